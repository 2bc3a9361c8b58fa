"""Ids keep every pixel, soft edges are divided at half, and what may be either is refused."""

import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion

from mimo_jax.data.mask_levels import MaskLevelsError, pixels_in_mask
from mimo_jax.data.transforms import ImageError, decode_mask

FILTERS = [Image.Resampling[name] for name in ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")]


def encoded(values: np.ndarray, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, format, **options)
    return stream.getvalue()


def id_map(ids: list[int], seed: int, background: float) -> np.ndarray:
    """uint8 [H, W]: a patch of 3 to 9 pixels a side for each id, on a grid; a share of the patches is background."""
    rng = np.random.default_rng(seed)
    side = int(rng.integers(3, 10))
    columns = int(np.ceil(np.sqrt(len(ids))))
    grid = np.resize(np.array(ids, np.uint8), (columns, columns))
    grid[rng.random(grid.shape) < background] = 0
    return np.pad(np.kron(grid, np.ones((side, side), np.uint8)), int(rng.integers(0, 20)))


def shape(seed: int, side: int) -> np.ndarray:
    """bool [side, side]: an ellipse or a polygon, at times with a hole."""
    rng = np.random.default_rng(seed)
    image = Image.new("1", (side, side))
    draw = ImageDraw.Draw(image)
    x0, y0 = rng.uniform(0.05, 0.4, 2) * side
    x1, y1 = rng.uniform(0.6, 0.95, 2) * side
    if seed % 2:
        draw.ellipse((x0, y0, x1, y1), fill=1)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(0.2, 0.45, 9) * side
        draw.polygon([(side / 2 + r * np.cos(a), side / 2 + r * np.sin(a)) for r, a in zip(radius, angles, strict=True)], fill=1)
    if seed % 3 == 0:
        draw.ellipse((0.45 * side, 0.45 * side, 0.55 * side, 0.55 * side), fill=0)
    return np.array(image)


def assert_equal_but_for_the_edge(found: np.ndarray, true: np.ndarray, pixels: int) -> None:
    edge = binary_dilation(true, iterations=pixels) & ~binary_erosion(true, iterations=pixels, border_value=1)
    assert not ((found != true) & ~edge).any()


def test_two_hundred_instances_keep_every_pixel():
    values = id_map(list(range(1, 201)), 0, 0.0)
    np.testing.assert_array_equal(decode_mask(encoded(values)), values != 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 255), min_size=1, max_size=255, unique=True), st.integers(0, 2**32 - 1), st.floats(0, 0.9))
@example([*range(1, 21), 255], 1, 0.3)  # classes, and 255 for what is not labelled
@example([*range(1, 10)], 2, 0.5)
@example([1, 2, 3, 4, 5, 6, 7, 252, 253, 254, 255], 3, 0.5)
def test_ids_keep_every_pixel(ids, seed, background):
    values = id_map(ids, seed, background)
    np.testing.assert_array_equal(decode_mask(encoded(values)), values != 0)
    rgb = np.repeat(values[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_mask(encoded(rgb)), values != 0)
    deep = values.astype(np.uint16) * 40
    np.testing.assert_array_equal(decode_mask(encoded(deep)), values != 0)


@settings(deadline=None, max_examples=100)
@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), fill=st.just(0)), st.booleans())
def test_no_object_vanishes_in_silence(values, lossy):
    """Whatever the levels: a pixel that is not 0 is in the mask or within 8 pixels of it, or the picture is refused. Only a level of at
    most 8 that is more frequent than 0 counts as black, because JPEG decodes black so."""
    try:
        mask = pixels_in_mask(values, lossy)
    except MaskLevelsError:
        return
    near = binary_dilation(mask, np.ones((17, 17), bool)) if mask.any() else mask
    black = np.bincount(values.ravel(), minlength=9)[:9].argmax()
    assert not ((values > black) & ~near).any() and not (mask & (values == 0)).any()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(FILTERS), st.sampled_from([0.3, 0.5, 0.75, 1.6, 3.0]))
def test_antialiased_masks_come_back(seed, filter, scale):
    true = shape(seed, 160)
    side = round(160 * scale)
    soft = np.asarray(Image.fromarray(true.astype(np.uint8) * 255).resize((side, side), filter))
    found = decode_mask(encoded(soft))
    assert found[soft == 255].all() and not found[soft == 0].any()
    if len(np.unique(soft)) > 8:  # fewer levels may be ids
        np.testing.assert_array_equal(found, soft >= 128)
        np.testing.assert_array_equal(decode_mask(encoded(soft.astype(np.uint16) * 257)), found)
        np.testing.assert_array_equal(decode_mask(encoded(soft.astype(np.float32) / 255, "TIFF")), found)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(60, 98), st.sampled_from(["L", "RGB"]))
def test_compressed_masks_come_back(seed, quality, mode):
    true = shape(seed, 160)
    stream = io.BytesIO()
    Image.fromarray(true.astype(np.uint8) * 255).convert(mode).save(stream, "JPEG", quality=quality)
    found = decode_mask(stream.getvalue())
    assert_equal_but_for_the_edge(found, true, 1)
    again = np.asarray(Image.open(stream))  # decoded, and saved without loss
    if len(np.unique(again)) > 8:
        np.testing.assert_array_equal(decode_mask(encoded(again)), found)


def test_what_may_be_either_is_refused_until_a_threshold_is_given(tmp_path):
    ids = id_map(list(range(1, 21)), 0, 0.3)
    path = tmp_path / "classes.jpg"
    Image.fromarray(ids).save(path, quality=95)
    with pytest.raises(
        ImageError, match=r"classes\.jpg: has \d+ grey levels, which may be ids that compression changed .*--mask-threshold"
    ):
        decode_mask(path)
    y, x = np.mgrid[:64, :64]
    probability = 1 / (1 + np.exp((np.hypot(y - 32, x - 32) - 16) / 6))
    grey = encoded(np.rint(probability * 255).astype(np.uint8))
    with pytest.raises(ImageError, match="p.png: has .*1 for ids or 128 for soft edges"):
        decode_mask(grey, name="p.png")
    np.testing.assert_array_equal(decode_mask(grey, threshold=128), np.rint(probability * 255) >= 128)
    assert decode_mask(grey, threshold=1).sum() > decode_mask(grey, threshold=128).sum()
    floats = encoded(probability.astype(np.float32), "TIFF")
    with pytest.raises(ImageError, match="probabilities or soft edges.* such as 0.5"):
        decode_mask(floats)
    np.testing.assert_array_equal(decode_mask(floats, threshold=0.5), probability >= 0.5)


def test_masks_drawn_in_black_on_a_transparent_ground():
    true = shape(1, 80)
    black = np.dstack([np.zeros((80, 80, 3), np.uint8), true.astype(np.uint8) * 255])
    np.testing.assert_array_equal(decode_mask(encoded(black)), true)
    np.testing.assert_array_equal(decode_mask(encoded(black | np.uint8(255) * np.array([1, 1, 1, 0], np.uint8))), true)
