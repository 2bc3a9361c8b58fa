"""Coordinates: exact both ways, in line with the pixels that `transforms` really makes, and with SAM's own code."""

import importlib
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.data.transforms import image_to_frame
from mimo_jax.geometry import (
    GeometryError,
    box_to_corners,
    mask_to_box,
    sam_frame,
    validate_boxes,
    validate_points,
    validate_scribbles,
    vision_frame,
)

ODD_SIZES = [(1, 1), (1, 4000), (4000, 1), (17, 333), (333, 17), (512, 512), (181, 258), (1070, 1348)]
sizes = st.one_of(st.sampled_from(ODD_SIZES), st.tuples(st.integers(1, 5000), st.integers(1, 5000)))


def frames(height, width):
    return [
        *(sam_frame(height, width, 1024, fit) for fit in ("pad", "stretch")),
        *(vision_frame(height, width, 224, fit) for fit in ("pad", "stretch", "crop")),
    ]


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_round_trip(size, u, v, sam_compat):
    height, width = size
    xy = np.array([[u * width - 0.5, v * height - 0.5]])
    for frame in frames(height, width):
        back = frame.from_frame(frame.to_frame(xy, sam_compat), sam_compat)
        np.testing.assert_allclose(back, xy, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_the_image_fills_its_content_exactly(size):
    height, width = size
    for frame in frames(height, width):
        corners = frame.to_frame(np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]]))
        offset = np.array([frame.offset_x, frame.offset_y])
        np.testing.assert_allclose(corners[0], offset - 0.5, atol=1e-9)
        np.testing.assert_allclose(corners[1], offset + [frame.content_width, frame.content_height] - np.array(0.5), atol=1e-6)
        assert 1 <= min(frame.size) and max(frame.size) <= frame.side
        if frame.fit == "pad":
            assert max(frame.size) == frame.side == max(frame.content_height, frame.content_width)
        else:
            assert frame.size == (frame.side, frame.side)


def test_thin_images_keep_a_row():
    assert sam_frame(1, 4000, 1024).size == (1, 1024)
    assert sam_frame(4000, 1, 1024).size == (1024, 1)
    assert vision_frame(1, 4000, 224, "crop").content_width == 224 * 4000


def blob(height, width, x, y, sigma):
    ys, xs = np.mgrid[:height, :width]
    grey = 255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * sigma**2))
    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, 2)


def centroid(grey):
    grey = grey.astype(float)
    ys, xs = np.mgrid[: grey.shape[0], : grey.shape[1]]
    return np.array([(xs * grey).sum(), (ys * grey).sum()]) / grey.sum()


@pytest.mark.parametrize("height,width", [(97, 131), (411, 700), (700, 411), (55, 60)])
def test_a_prompt_on_a_dot_lands_on_the_resized_dot(height, width):
    x, y = 0.47 * width + 0.3, 0.55 * height - 0.2
    image = blob(height, width, x, y, 0.04 * min(height, width))
    for frame in [sam_frame(height, width, 256), *(vision_frame(height, width, 224, fit) for fit in ("pad", "stretch", "crop"))]:
        seen = centroid(image_to_frame(image, frame)[:, :, 0])
        np.testing.assert_allclose(frame.to_frame(np.array([x, y])), seen, atol=0.05, err_msg=str(frame))
        # SAM's own rule is off by half of (1 - scale): the two must not be confused.
        off = frame.to_frame(np.array([x, y])) - frame.to_frame(np.array([x, y]), sam_compat=True)
        np.testing.assert_allclose(off, (np.array([frame.scale_x, frame.scale_y]) - 1) / 2, atol=1e-9)


@pytest.fixture
def resize_longest_side(monkeypatch):
    """SAM's own class; its module imports torchvision at the top, for functions that this test does not call."""
    pytest.importorskip("torch")
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.resize = module.to_pil_image = None
        monkeypatch.setitem(sys.modules, name, module)
    package = importlib.util.find_spec("segment_anything")
    if package is None:
        pytest.skip("segment-anything is not installed")
    spec = importlib.util.spec_from_file_location("sam_transforms", f"{package.submodule_search_locations[0]}/utils/transforms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ResizeLongestSide


@pytest.mark.parametrize("height,width", [(17, 333), (333, 17), (512, 512), (181, 258), (1070, 1348), (1348, 1070), (999, 960)])
def test_sam_compat_is_sams_rule(resize_longest_side, height, width):
    sam = resize_longest_side(1024)
    frame = sam_frame(height, width, 1024)
    assert frame.size == sam.get_preprocess_shape(height, width, 1024)
    xy = np.random.default_rng(0).uniform(0, [width, height], (20, 2))
    np.testing.assert_allclose(frame.to_frame(xy, sam_compat=True), sam.apply_coords(xy, (height, width)), atol=1e-9)


def test_a_box_goes_to_the_edges_of_its_pixels():
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:20, 30:50] = 255
    frame = sam_frame(40, 80, 320)  # enlarged four times: edges fall between pixels
    corners = frame.to_frame(box_to_corners(np.array([[30, 10, 50, 20]])))
    np.testing.assert_allclose(corners, [[[119.5, 39.5], [199.5, 79.5]]])
    rows, cols = np.nonzero(image_to_frame(image, frame)[:, :, 0] >= 128)
    assert (cols.min() - 0.5, rows.min() - 0.5, cols.max() + 0.5, rows.max() + 0.5) == tuple(corners.ravel())


@pytest.mark.parametrize(
    "check,value,says",
    [
        (validate_points, [[1.0, np.nan, 1]], "finite"),
        (validate_points, [[np.inf, 1, 1]], "finite"),
        (validate_points, [[20, 5, 1]], "outside the image of 20x10"),
        (validate_points, [[5, -0.6, 1]], "outside"),
        (validate_points, [[5, 5, 2]], "label 2"),
        (validate_points, [[5, 5]], "shape"),
        (validate_points, [5, 5, 1], "shape"),
        (validate_points, [["a", 5, 1]], "numbers"),
        (validate_boxes, [[5, 5, 5, 9]], "no area"),
        (validate_boxes, [[8, 5, 5, 9]], "no area"),
        (validate_boxes, [[0, 0, 20.1, 5]], "exceeds the image"),
        (validate_boxes, [[-1, 0, 5, 5]], "exceeds the image"),
        (validate_boxes, [[0, 0, 5, np.nan]], "finite"),
        (validate_boxes, [[0, 0, 5]], "shape"),
        (validate_scribbles, [[[1, 1], [1, 11]]], "outside"),
        (validate_scribbles, [[[1, 1], [np.nan, 2]]], "scribble 0: row 1"),
        (validate_scribbles, [[[1, 1]], []], "scribble 1 has no points"),
        (validate_scribbles, [[[1, 1, 1]]], "shape"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(check, value, says):
    with pytest.raises(GeometryError, match=says) as caught:
        check(value, 10, 20)
    assert "\n" not in str(caught.value)


def test_the_limits_are_inside():
    assert validate_points([[-0.5, -0.5, 0], [19.5, 9.5, 1]], 10, 20).shape == (2, 3)
    assert validate_boxes([[0, 0, 20, 10]], 10, 20).shape == (1, 4)
    assert validate_points([], 10, 20).shape == (0, 3) and validate_boxes(np.zeros((0, 4)), 10, 20).shape == (0, 4)
    assert validate_scribbles([], 10, 20) == []


def test_sizes_and_fits_that_cannot_be():
    with pytest.raises(GeometryError, match="at least 1"):
        sam_frame(0, 10, 1024)
    with pytest.raises(GeometryError, match="pad, stretch, crop"):
        vision_frame(10, 10, 224, "squash")
    with pytest.raises(GeometryError, match="last axis"):
        sam_frame(10, 10, 1024).to_frame(np.zeros((2, 3)))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_the_box_of_a_mask_is_the_smallest(height, width, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))).reshape(height, width)
    box = mask_to_box(mask)
    if box is None:
        assert not mask.any()
        return
    x0, y0, x1, y1 = box
    assert mask[y0:y1, x0:x1].sum() == mask.sum()
    assert all(edge.any() for edge in (mask[y0, :], mask[y1 - 1, :], mask[:, x0], mask[:, x1 - 1]))
