"""Prompts drawn from masks and encoded into tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mimo_jax.data.prompts import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    NONE,
    POINT_IN,
    POINT_OUT,
    SCRIBBLE,
    PromptError,
    Prompts,
    draw_outside,
    draw_prompts,
    encode_prompts,
    joined,
    prompts_from_mask,
    sam_points,
)
from mimo_jax.geometry import GeometryError, sam_frame, validate_boxes, validate_points, validate_scribbles, vision_frame
from mimo_jax.model_config import PromptConfig


def rng(seed=0):
    return np.random.default_rng(seed)


def disc(height=200, width=300, x=120, y=90, radius=60):
    ys, xs = np.mgrid[:height, :width]
    return (xs - x) ** 2 + (ys - y) ** 2 < radius**2


def equal(a, b):
    return (
        np.array_equal(a.points, b.points)
        and np.array_equal(a.boxes, b.boxes)
        and len(a.scribbles) == len(b.scribbles)
        and all(np.array_equal(x, y) for x, y in zip(a.scribbles, b.scribbles, strict=True))
    )


@st.composite
def masks(draw):
    """Blobs, specks and lines on images of any shape; never empty."""
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    seed = draw(st.integers(0, 10**6))
    noise = rng(seed).random((height, width))
    mask = ndimage.uniform_filter(noise, draw(st.sampled_from([1, 3, 15]))) > draw(st.sampled_from([0.4, 0.5, 0.55]))
    mask[rng(seed).integers(height), rng(seed).integers(width)] = True
    return mask


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(0, 10**6), st.sampled_from(["point", "box", "scribble"]))
def test_every_drawn_prompt_is_valid(mask, seed, kind):
    height, width = mask.shape
    before = mask.copy()
    prompts = draw_prompts(mask, rng(seed), (kind,))
    np.testing.assert_array_equal(mask, before)
    validate_points(prompts.points, height, width)
    validate_boxes(prompts.boxes, height, width)
    validate_scribbles(prompts.scribbles, height, width)
    assert (bool(len(prompts.points)), bool(len(prompts.boxes)), bool(prompts.scribbles)) == tuple(
        kind == k for k in ("point", "box", "scribble")
    )
    inside = mask[prompts.points[:, 1].astype(int), prompts.points[:, 0].astype(int)]
    np.testing.assert_array_equal(inside, prompts.points[:, 2] == 1)
    assert kind != "point" or 1 <= inside.sum() <= 3
    for scribble in prompts.scribbles:
        assert mask[scribble[:, 1].astype(int), scribble[:, 0].astype(int)].all()
    xy, kinds = encode_prompts(prompts, vision_frame(height, width, 224, "pad"), PromptConfig())
    assert np.isfinite(xy).all() and kinds[0] != NONE


def test_the_same_key_draws_the_same_and_kinds_are_equally_likely():
    mask = disc()
    assert equal(draw_prompts(mask, rng(5)), draw_prompts(mask, rng(5)))
    drawn = [draw_prompts(mask, rng(seed)) for seed in range(300)]
    shares = [sum(bool(len(p.points)) for p in drawn), sum(bool(len(p.boxes)) for p in drawn), sum(bool(p.scribbles) for p in drawn)]
    assert sum(shares) == 300 and all(70 <= n <= 130 for n in shares)


def test_the_drawing_depends_on_the_structure_not_on_where_it_lies():
    """Another image around the same structure: the same marks, moved along."""
    big = np.zeros((500, 600), bool)
    big[100:300, 200:500] = disc()
    for seed in range(20):
        a, b = draw_prompts(disc(), rng(seed), ("scribble",)), draw_prompts(big, rng(seed), ("scribble",))
        np.testing.assert_allclose(a.scribbles[0] + (200, 100), b.scribbles[0])


def test_points_prefer_the_interior_and_negatives_stay_near():
    mask = disc()
    drawn = np.concatenate([draw_prompts(mask, rng(seed), ("point",)).points for seed in range(300)])
    depth = ndimage.distance_transform_edt(mask)
    inside = drawn[drawn[:, 2] == 1].astype(int)
    assert depth[inside[:, 1], inside[:, 0]].mean() > 1.3 * depth[mask].mean()
    negatives = drawn[drawn[:, 2] == 0]
    assert 50 <= len(negatives) <= 130
    assert np.hypot(negatives[:, 0] - 120, negatives[:, 1] - 90).max() < 60 * 1.5 * 2**0.5 + 3


def test_boxes_are_jittered_about_the_tight_box():
    mask = disc()
    tight = np.array([61, 31, 180, 150])
    boxes = np.concatenate([draw_prompts(mask, rng(seed), ("box",)).boxes for seed in range(100)])
    assert np.abs(boxes - tight).max() <= 0.1 * 119 and np.abs(boxes - tight).max(0).min() > 5
    assert (np.abs(boxes.mean(0) - tight) < 3).all()


def test_scribbles_follow_a_thin_structure():
    thin = np.zeros((120, 400), bool)
    thin[57:63, 20:380] = True
    lines = [draw_prompts(thin, rng(seed), ("scribble",)).scribbles[0] for seed in range(30)]
    assert np.percentile([np.ptp(line[:, 0]) for line in lines], 10) > 100  # a stroke across would be 6


def test_scribbles_are_long_smooth_and_keep_to_the_middle():
    bar = np.zeros((120, 400), bool)
    bar[50:70, 20:380] = True
    lengths, off_axis = [], []
    for seed in range(30):
        line = draw_prompts(bar, rng(seed), ("scribble",)).scribbles[0]
        steps = np.diff(line, axis=0)
        lengths.append(np.hypot(*steps.T).sum())
        off_axis.append(np.abs(line[:, 1] - 59.5).mean())
        turns = np.diff(np.unwrap(np.arctan2(steps[:, 1], steps[:, 0])))
        assert np.abs(turns).mean() < 0.6  # radians at each vertex; a walk without a heading would take 1.5
    assert np.median(lengths) > 150  # along the bar, not across its 20 pixels
    assert np.mean(off_axis) < 5  # a stroke anywhere inside would be 5 off


def test_thin_tiny_and_full_masks():
    vessel = np.zeros((1000, 1000), bool)
    vessel[np.arange(1000), (500 + 300 * np.sin(np.arange(1000) / 150)).astype(int)] = True
    for seed in range(10):
        line = draw_prompts(vessel, rng(seed), ("scribble",)).scribbles[0]
        assert vessel[line[:, 1].astype(int), line[:, 0].astype(int)].all()
    speck = np.zeros((50, 50), bool)
    speck[0, 49] = True
    assert draw_prompts(speck, rng(), ("scribble",)).scribbles[0].tolist() == [[49, 0]]
    assert draw_prompts(speck, rng(), ("point",)).points[0].tolist() == [49, 0, 1]
    full = np.ones((30, 40), bool)
    for seed in range(30):
        assert (draw_prompts(full, rng(seed), ("point",)).points[:, 2] == 1).all()  # no outside to point at


def test_empty_masks_and_unknown_kinds():
    with pytest.raises(PromptError, match="empty mask"):
        draw_prompts(np.zeros((5, 5), bool), rng())
    with pytest.raises(PromptError, match="lasso"):
        draw_prompts(disc(), rng(), ("lasso",))
    with pytest.raises(PromptError, match="empty mask"):
        prompts_from_mask(np.zeros((5, 5), bool))


def test_prompts_from_a_users_mask_are_always_the_same():
    first = prompts_from_mask(disc())
    assert equal(first, prompts_from_mask(disc())) and first.scribbles and not len(first.points)


def test_encoding_token_by_token():
    prompts = Prompts(
        points=np.array([[10, 20, 1], [30, 5, 0]]),
        boxes=np.array([[0, 0, 100, 50]]),
        scribbles=[np.array([[0, 0], [30, 0], [30, 40]])],
    )
    frame = vision_frame(50, 100, 224, "pad")  # scale 2.24
    xy, kind = encode_prompts(prompts, frame, PromptConfig(max_tokens=16, scribble_points=8))
    assert xy.shape == (16, 2) and xy.dtype == np.float32 and kind.dtype == np.int32
    assert kind.tolist() == [POINT_IN, POINT_OUT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT] + [SCRIBBLE] * 8 + [NONE] * 4 == [
        1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0,
    ]  # fmt: skip
    np.testing.assert_allclose(xy[0], [10.5 * 2.24 - 0.5, 20.5 * 2.24 - 0.5], rtol=1e-6)
    np.testing.assert_allclose(xy[2:4], [[-0.5, -0.5], [223.5, 111.5]], atol=1e-4)  # the edges of the content
    line = frame.from_frame(xy[4:12])
    np.testing.assert_allclose(line, [[0, 0], [10, 0], [20, 0], [30, 0], [30, 10], [30, 20], [30, 30], [30, 40]], atol=1e-3)
    assert not xy[12:].any()
    xy, kind = encode_prompts(Prompts(), frame, PromptConfig())
    assert not xy.any() and not kind.any() and not Prompts() and prompts


def test_a_scribble_of_one_point_stays_there():
    xy, kind = encode_prompts(Prompts(scribbles=[np.array([[3.0, 4.0]])]), vision_frame(10, 10, 10, "pad"), PromptConfig())
    np.testing.assert_allclose(xy[:8], [[3, 4]] * 8)
    assert (kind[:8] == SCRIBBLE).all()


def test_too_many_or_misplaced_prompts():
    frame = vision_frame(50, 100, 224, "pad")
    with pytest.raises(PromptError, match="17 prompt tokens.*accepts 16"):
        encode_prompts(Prompts(points=np.ones((17, 3))), frame, PromptConfig())
    with pytest.raises(GeometryError, match="outside the image of 100x50"):
        encode_prompts(Prompts(points=np.array([[10, 60, 1]])), frame, PromptConfig())


def test_sam_points_lie_where_the_prompts_do_and_end_as_sam_was_trained():
    vision, sam = vision_frame(40, 60, 32, "pad"), sam_frame(40, 60, 64)
    config = PromptConfig(max_tokens=8, scribble_points=3)

    def points(**marks):
        return sam_points(*encode_prompts(Prompts(**marks), vision, config), vision, sam)

    one = {"points": np.array([[10, 20, 1], [50.5, 3, 0]])}
    xy, labels = points(**one)
    np.testing.assert_allclose(xy[:2], sam.to_frame(one["points"][:, :2]), atol=1e-4)
    assert labels.tolist() == [1, 0, -2, -2, -2, -2, -2, -2, -1] and xy.shape == (9, 2)
    box = {"boxes": np.array([[4, 6, 30, 20]])}
    xy, labels = points(**one, **box)
    np.testing.assert_allclose(xy[2:4], sam.to_frame(np.array([[3.5, 5.5], [29.5, 19.5]])), atol=1e-4)
    assert labels.tolist() == [1, 0, 2, 3, -2, -2, -2, -2, -2]
    assert points(scribbles=[np.array([[1, 1], [9, 9]])])[1].tolist() == [1, 1, 1, -2, -2, -2, -2, -2, -1]
    assert set(points()[1].tolist()) == {-2}


def test_points_outside_are_near_or_anywhere_and_never_on_what_is_meant():
    left, right = disc(x=60, y=60, radius=40), disc(x=220, y=120, radius=50)
    points = np.concatenate([draw_outside(left, rng(seed), left | right).points for seed in range(300)])
    assert len(points) == 300 and (points[:, 2] == 0).all()
    x, y = points[:, 0].astype(int), points[:, 1].astype(int)
    assert not (left | right)[y, x].any()
    near = (x < 60 + 40 * 1.5 + 3) & (y < 60 + 40 * 1.5 + 3)
    assert 150 < near.sum() < 250 and len(set(x[~near] // 100)) == 3  # half, and those that lie there by chance
    full = np.ones((5, 5), bool)
    assert not draw_outside(full, rng(), full)
    beside = [draw_prompts(left, rng(seed), ("point",), meant=np.ones_like(left)).points for seed in range(50)]
    assert all((drawn[:, 2] == 1).all() for drawn in beside)


def test_points_outside_alone_are_refused():
    outside = np.array([[10, 5, 0], [11, 6, 0]])
    frame = vision_frame(40, 60, 32, "pad")
    with pytest.raises(PromptError, match="only say what is not meant .*; add a point, box or scribble on what is meant"):
        encode_prompts(Prompts(points=outside), frame, PromptConfig())
    for more in (Prompts(boxes=np.array([[1, 1, 9, 9]])), Prompts(scribbles=[np.array([[1, 1], [9, 9]])])):
        encode_prompts(joined([Prompts(points=outside), more]), frame, PromptConfig())
