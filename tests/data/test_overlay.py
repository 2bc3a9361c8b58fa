"""The overlay shows each mask where it is, in its own colour, with names, prompts and caption."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from mimo_jax.data import overlay
from mimo_jax.data.overlay import colour, draw_overlay
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.transforms import decode_image, decode_mask

REAL = os.environ.get("MIMO_REAL_DATA", "")
GREY = 90


def image(height=600, width=640):
    return np.full((height, width, 3), GREY, np.uint8)


def box(height, width, y0, y1, x0, x1):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_fill_and_outline_cover_the_mask_and_nothing_else():
    masks = [box(600, 640, 100, 200, 100, 250), box(600, 640, 300, 500, 300, 400)]
    source = image()
    out = np.asarray(draw_overlay(source, list(zip(["liver", "spleen"], masks, strict=True))))
    assert out.shape[1] == 640 and out.shape[0] > 600  # the legend lies below
    assert (source == GREY).all()
    picture = out[:600]
    changed = (picture != GREY).any(2)
    np.testing.assert_array_equal(changed, masks[0] | masks[1])
    for i, (y, x) in enumerate([(100, 100), (300, 300)]):
        assert tuple(picture[y, x]) == colour(i)  # outline
        inner = picture[y + 40, x + 40].astype(int)
        np.testing.assert_allclose(inner, 0.65 * GREY + 0.35 * np.array(colour(i)), atol=1)  # fill


def test_small_images_are_enlarged_by_an_integer_factor():
    mask = box(20, 30, 5, 10, 5, 15)
    out = np.asarray(draw_overlay(image(20, 30), [("nodule", mask)]))
    factor = 18  # 30 -> 540, the first multiple of at least 512
    assert out.shape[1] == 30 * factor
    changed = (out[: 20 * factor] != GREY).any(2)
    np.testing.assert_array_equal(changed, np.kron(mask, np.ones((factor, factor), bool)))


def test_colours_are_distinct():
    table = np.array([colour(i) for i in range(40)], int)
    gaps = np.abs(table[:, None] - table[None]).sum(2) + 999 * np.eye(40, dtype=int)
    assert gaps[:8, :8].min() > 60 and gaps.min() > 0


def test_prompts_appear_where_they_are():
    source = image(64, 64)  # enlarged 8 times
    marks = Prompts(
        points=np.array([[10, 12, 1], [50, 12, 0]]),
        boxes=np.array([[20, 30, 40, 50]]),
        scribbles=[np.array([[5, 60], [30, 60]])],
    )
    out = np.asarray(draw_overlay(source, [], marks)).astype(int)
    assert out.shape == (512, 512, 3)  # no legend, no caption: only the picture

    def near(x, y, colour_, reach=2):
        cx, cy = int((x + 0.5) * 8 - 0.5), int((y + 0.5) * 8 - 0.5)
        patch = out[max(0, cy - reach) : cy + reach + 1, max(0, cx - reach) : cx + reach + 1]
        return (patch == colour_).all(2).any()

    assert near(10, 12, overlay._POINT_IN, 5) and not near(10, 12, overlay._POINT_OUT, 5)
    assert near(50, 12, overlay._POINT_OUT, 5)
    for x, y in [(19.5, 29.5), (39.5, 29.5), (19.5, 49.5), (39.5, 49.5), (29.5, 29.5), (5, 60), (17, 60), (30, 60)]:
        assert near(x, y, overlay._MARK), (x, y)
    ys, xs = np.nonzero((out == overlay._POINT_IN).all(2))
    np.testing.assert_allclose([xs.mean(), ys.mean()], [10.5 * 8 - 0.5, 12.5 * 8 - 0.5], atol=0.6)
    assert not near(30, 40, overlay._MARK) and not near(45, 40, overlay._MARK)


def test_legend_and_caption_grow_the_canvas_and_stay_inside():
    mask = box(600, 640, 100, 200, 100, 250)
    plain = draw_overlay(image(), [])
    assert plain.size == (640, 600)
    names = [(f"structure number {i}", mask) for i in range(30)]
    many = draw_overlay(image(), names)
    assert many.height > draw_overlay(image(), names[:1]).height + 100
    captioned = draw_overlay(image(), [], caption="The liver is enlarged and its border is irregular. " * 8)
    below = np.asarray(captioned)[600:]
    ink = np.argwhere((below != overlay._BACKGROUND).any(2))
    assert len(ink) and ink[:, 1].max() < 640 - 5 and ink[:, 0].max() < below.shape[0] - 3


def test_an_empty_mask_is_named_and_not_painted():
    out = np.asarray(draw_overlay(image(), [("spleen", np.zeros((600, 640), bool))]))
    assert (out[:600] == GREY).all() and (out[600:] == colour(0)).all(2).any()


@pytest.mark.parametrize("text", ["", "one", "a b c " * 40, "x" * 300, "two\nlines", "Größe der Läsion " * 9])
def test_wrapping_loses_nothing(text):
    font = ImageFont.load_default(size=14.0)
    lines = overlay._wrap(text, font, 200)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 200 for line in lines)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="'liver' is .5, 5., the image .600, 640."):
        draw_overlay(image(), [("liver", np.ones((5, 5), bool))])


@pytest.mark.skipif(not REAL, reason="set MIMO_REAL_DATA to the folder of real images")
def test_a_real_image():
    root = Path(REAL)
    name = "sammed2d_amos_0004_75"
    entities = [(p.stem.split("__")[1].replace("_", " "), decode_mask(p)) for p in sorted((root / "masks").glob(name + "__*.png"))]
    source = decode_image(root / "images" / f"{name}.png")
    out = np.asarray(draw_overlay(source, entities, caption="The liver is outlined."))
    united = np.any([m for _, m in entities], axis=0)
    changed = (out[:512] != source).any(2)
    assert len(entities) == 3 and not changed[~united].any() and changed[united].mean() > 0.95
