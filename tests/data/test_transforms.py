"""Files to pixels with every trap of real data; views and masks against Pillow, torch and brute force."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from mimo_jax.data import transforms
from mimo_jax.data.transforms import (
    ImageError,
    augment,
    decode_image,
    decode_mask,
    decode_picture,
    image_to_frame,
    logits_to_image,
    mask_from_logits,
    mask_to_frame,
    preprocess,
)
from mimo_jax.geometry import sam_frame, vision_frame
from mimo_jax.model_config import ModelConfig

REAL = os.environ.get("MIMO_REAL_DATA", "")
needs_real = pytest.mark.skipif(not REAL, reason="set MIMO_REAL_DATA to the folder of real images")


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(height=23, width=31, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png16_colour(values):
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# Orientation tag -> how the stored pixels are made from the upright ones.
TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_is_applied_once(tag, kind):
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = Image.fromarray(np.ascontiguousarray(TURNS[tag](upright)))
    np.testing.assert_array_equal(decode_image(encoded(stored, kind, exif=exif)), upright)


def test_exif_is_applied_to_deep_greyscale_and_masks():
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    exif = Image.Exif()
    exif[0x0112] = 6
    out = decode_image(encoded(Image.fromarray(np.ascontiguousarray(np.rot90(values))), exif=exif), window=(0, 11000))
    np.testing.assert_array_equal(out[:, :, 0], np.rint(values / 11000 * 255))
    mask = values > 4000
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(mask)).astype(np.uint8) * 255)
    np.testing.assert_array_equal(decode_mask(encoded(stored, exif=exif)), mask)


def test_sixteen_bits_are_windowed_not_clipped():
    values = np.linspace(900, 1200, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = encoded(Image.fromarray(values))
    by_percentile = decode_image(data)
    assert by_percentile.shape == (64, 64, 3) and by_percentile.dtype == np.uint8
    assert by_percentile.min() == 0 and by_percentile.max() == 255 and 120 < by_percentile.mean() < 135
    by_window = decode_image(data, window=(1000, 1100))
    np.testing.assert_allclose(by_window[:, :, 1], np.clip((values - 1000.0) * 2.55, 0, 255), atol=0.5001)
    assert (decode_image(data, percentiles=(0, 50))[:, :, 0] == 255).mean() > 0.49
    with pytest.raises(ImageError, match="low < high"):
        decode_image(data, window=(5, 5))


def test_rare_bright_pixels_survive_the_percentiles():
    values = np.zeros((100, 100), np.uint16)
    values[50, 50], values[50, 51] = 4000, 2000
    assert decode_image(encoded(Image.fromarray(values)))[50, 50:52, 0].tolist() == [255, 128]


def test_float_tiff_with_what_is_not_finite():
    values = np.linspace(-1, 1, 100, dtype=np.float32).reshape(10, 10)
    values[0, 0], values[9, 9] = np.nan, np.inf
    out = decode_image(encoded(Image.fromarray(values), "TIFF"), window=(-1, 1))[:, :, 0]
    assert out[0, 0] == 0 and out[9, 9] == 0 and out[9, 8] > 240
    with pytest.raises(ImageError, match="no finite"):
        decode_image(encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))


def test_a_window_on_eight_bits_is_refused():
    with pytest.raises(ImageError, match="omit the window"):
        decode_image(encoded(Image.fromarray(picture())), window=(0, 100))


def test_sixteen_bit_colour_is_kept_or_refused_never_black():
    values = np.random.default_rng(0).integers(0, 65536, (8, 9, 3))
    np.testing.assert_array_equal(decode_image(png16_colour(values)), values >> 8)
    with pytest.raises(ImageError, match="slide.png: 16-bit colour"):
        decode_image(png16_colour(values >> 4), name="slide.png")


def test_what_is_chosen_for_the_display_is_said():
    values = np.linspace(900, 1200, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep = encoded(Image.fromarray(values))
    pixels, (said,) = decode_picture(deep)
    low, high = np.percentile(values.astype(np.float32), (0.5, 99.5))
    assert said.startswith(f"values of more than 8 bits are stretched: {low:g} is shown as black and {high:g} as white; give --window")
    np.testing.assert_array_equal(pixels, decode_picture(deep, window=(low, high))[0])
    assert decode_picture(deep, window=(900, 1200))[1] == [] == decode_picture(encoded(Image.fromarray(picture())))[1]


def test_transparent_pixels_are_white_where_black_would_hide_or_invent_something():
    rgb, inside = picture() // 2 + 90, np.zeros((23, 31), bool)
    inside[5:15, 5:20] = True

    def over(colours, hidden):
        rgba = np.dstack([np.where(inside[..., None], colours, hidden), inside * 255]).astype(np.uint8)
        pixels, said = decode_picture(encoded(Image.fromarray(rgba)))
        np.testing.assert_array_equal(pixels[inside], rgba[inside][:, :3])
        assert said[0].startswith("transparent pixels: shown as ")
        assert (pixels[~inside] == pixels[~inside][0]).all()
        return int(pixels[~inside][0, 0])

    assert over(rgb, 0) == 0 and over(rgb, 120) == 0
    assert over(rgb, 255) == 255  # a white ground that was made transparent
    assert over(rgb * 0, 0) == 255 and over(rgb // 5, 0) == 255  # dark drawings would vanish on black
    opaque = np.dstack([rgb, np.full((23, 31), 255)]).astype(np.uint8)
    np.testing.assert_array_equal(decode_picture(encoded(Image.fromarray(opaque)))[0], rgb)
    assert decode_picture(encoded(Image.fromarray(opaque)))[1] == []


def test_modes():
    rgb = picture()
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(rgb))), rgb)
    grey = rgb[:, :, 0]
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))
    alpha = np.where(np.arange(31) < 10, 0, 255).astype(np.uint8) * np.ones((23, 1), np.uint8)
    over_black = np.where(alpha[:, :, None] > 0, rgb, 0)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(np.dstack([rgb, alpha])))), over_black)
    out = decode_image(encoded(Image.fromarray(np.dstack([grey, alpha]))))
    np.testing.assert_array_equal(out, np.repeat(np.where(alpha > 0, grey, 0)[:, :, None], 3, 2))
    palette = Image.fromarray((grey % 3).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    np.testing.assert_array_equal(decode_image(encoded(palette)), table[grey % 3])
    np.testing.assert_array_equal(decode_image(encoded(palette, transparency=1)), np.where(grey[:, :, None] % 3 == 1, 0, table[grey % 3]))
    one_bit = decode_image(encoded(Image.fromarray(grey > 100)))
    np.testing.assert_array_equal(one_bit[:, :, 2], np.where(grey > 100, 255, 0))


@pytest.mark.parametrize("width,height", [(10000, 9500), (40000, 40000)])  # Pillow warns of the first, refuses the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_decoding(width, height):
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, body))
    with pytest.raises(ImageError, match="bomb.png: .*pixels"):
        decode_image(data, name="bomb.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_named(tmp_path, kind, share):
    data = encoded(Image.fromarray(picture(64, 64)), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * share)])
    for decode in (decode_image, decode_mask):
        with pytest.raises(ImageError, match="cut") as caught:
            decode(path)
        assert "\n" not in str(caught.value)


def test_files_that_are_not_images_are_named(tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    data = bytearray(encoded(Image.fromarray(picture(64, 64))))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "corrupt.png").write_bytes(data)
    for name in ("notes.png", "empty.png", "corrupt.png", "missing.png"):
        with pytest.raises(ImageError, match=name):
            decode_image(tmp_path / name)
    with pytest.raises(ImageError, match="record 7"):
        decode_image(b"rubbish", name="record 7")


def test_masks_of_every_kind():
    mask = np.zeros((40, 50), bool)
    mask[10:30, 15:40] = True
    for value in (1, 7, 255):
        np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(mask.astype(np.uint8) * value))), mask)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(mask))), mask)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(mask.astype(np.uint16) * 300))), mask)
    rgb = np.zeros((40, 50, 3), np.uint8)
    rgb[mask] = (0, 0, 128)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(rgb))), mask)
    rgba = np.dstack([np.full((40, 50, 3), 255, np.uint8), mask.astype(np.uint8) * 255])
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(rgba))), mask)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(mask.astype(np.uint8) * 255), "JPEG", quality=60)), mask)
    soft = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((200, 160), Image.Resampling.BILINEAR))
    hard = np.repeat(np.repeat(mask, 4, 0), 4, 1)
    assert (decode_mask(encoded(Image.fromarray(soft))) != hard).sum() == 4  # the corners
    assert not decode_mask(encoded(Image.fromarray(np.zeros((9, 9), np.uint8)))).any()


def test_palette_masks_are_read_by_index():
    index = np.zeros((20, 20), np.uint8)
    index[5:10, 5:10], index[12:15, 5:10] = 1, 2
    image = Image.fromarray(index).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0, 200, 0, 0])  # the background is white, a class black
    np.testing.assert_array_equal(decode_mask(encoded(image)), index > 0)


@pytest.mark.parametrize("height,width", [(23, 31), (31, 23), (1, 400), (700, 411), (1024, 1024)])
@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_views(height, width, fit, resample):
    cfg = ModelConfig()
    cfg.vision.image_fit, cfg.vision.resample = fit, resample
    image = picture(height, width)
    out = preprocess(image, cfg)
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
        "vision_image": ((224, 224, 3), np.uint8), "vision_size": ((2,), np.int32),
        "sam_image": ((1024, 1024, 3), np.uint8), "sam_size": ((2,), np.int32),
    }  # fmt: skip
    frame = sam_frame(height, width, 1024)
    rows, cols = out["sam_size"]
    assert (rows, cols) == (frame.content_height, frame.content_width)
    resized = np.asarray(Image.fromarray(image).resize((int(cols), int(rows)), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(out["sam_image"][:rows, :cols], resized)
    assert not out["sam_image"][rows:].any() and not out["sam_image"][:, cols:].any()
    frame = vision_frame(height, width, 224, fit)
    assert tuple(out["vision_size"]) == frame.size
    how = Image.Resampling[resample.upper()]
    whole = np.asarray(Image.fromarray(image).resize((frame.content_width, frame.content_height), how))
    seen = whole[-frame.offset_y :, -frame.offset_x :][: frame.size[0], : frame.size[1]].astype(int)
    off = np.abs(out["vision_image"][: frame.size[0], : frame.size[1]] - seen).max()
    assert off <= (fit == "crop" and width == 400)  # the visible part of a strip is cut out first, and Pillow rounds that apart


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_views_of_grey_are_those_of_its_channels(resample):
    """One channel is resized for all three, and every value is the same."""
    cfg = ModelConfig()
    cfg.vision.resample = resample
    for height, width in ((700, 411), (333, 501), (9, 500), (1024, 1024)):
        image = np.repeat(picture(height, width)[:, :, :1], 3, axis=2)
        out = preprocess(image, cfg)
        np.testing.assert_array_equal(out["sam_image"], image_to_frame(image, sam_frame(height, width, 1024)))
        np.testing.assert_array_equal(out["vision_image"], image_to_frame(image, vision_frame(height, width, 224, "pad"), resample))
        image[height // 2, width // 2, 2] ^= 255  # one pixel in colour
        seen = preprocess(image, cfg)["sam_image"]
        assert (seen[..., 0] != seen[..., 2]).any() and np.array_equal(seen[..., :2], out["sam_image"][..., :2])


@pytest.mark.parametrize("height,width", [
    (480, 640), (640, 480), (333, 501), (517, 257), (100, 71), (53, 90), (224, 224), (224, 300), (225, 223), (1348, 1070), (9, 500),
])  # fmt: skip
def test_the_crop_is_that_of_clips_stock_processor(height, width):
    cfg = ModelConfig()
    cfg.vision.image_fit, cfg.vision.resample = "crop", "bicubic"
    image = picture(height, width)
    theirs = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(image, cfg)["vision_image"], theirs.transpose(1, 2, 0))


def brute_mask_to_frame(mask, frame, side):
    """Every cell against every pixel, by the overlap of rectangles in the frame."""
    cell = frame.side / side
    out = np.zeros((side, side))

    def overlaps(count, scale, size):
        lo, hi = np.arange(count) * cell, (np.arange(count) + 1) * cell
        pixel = np.arange(size) * scale
        shared = np.minimum(hi[:, None], pixel + scale) - np.maximum(lo[:, None], pixel)
        return np.clip(shared, 0, None)

    y, x = overlaps(side, frame.scale_y, mask.shape[0]), overlaps(side, frame.scale_x, mask.shape[1])
    area = y.sum(1)[:, None] * x.sum(1)[None]
    np.divide(y @ mask @ x.T, area, out=out, where=area > 1e-9)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([(32, 8), (48, 12), (64, 16)]), st.integers(0, 10**6))
def test_mask_to_frame_is_the_area_average(height, width, sides, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = True
    frame = sam_frame(height, width, sides[0])
    out = mask_to_frame(mask, frame, sides[1])
    cover = brute_mask_to_frame(mask, frame, sides[1])
    assert out.dtype == np.uint8 and out.shape == (sides[1], sides[1]) and out.any()
    threshold = min(0.5, cover.max())
    clear = np.abs(cover - threshold) > 1e-5
    np.testing.assert_array_equal(out[clear], cover[clear] >= threshold)


def test_small_and_thin_structures_are_not_lost():
    mask = np.zeros((2000, 2000), bool)
    assert not mask_to_frame(mask, sam_frame(2000, 2000, 1024), 256).any()
    mask[777, 1234] = True
    out = mask_to_frame(mask, sam_frame(2000, 2000, 1024), 256)
    assert np.argwhere(out).tolist() == [[int(777.5 * 256 / 2000), int(1234.5 * 256 / 2000)]]
    thin = np.ones((1, 4000), bool)
    assert mask_to_frame(thin, sam_frame(1, 4000, 1024), 256)[0].all()


@pytest.mark.parametrize("height,width", [(512, 512), (181, 258), (333, 17), (1070, 1348), (1, 400), (400, 1), (1, 1)])
def test_mask_from_logits_is_torchs(height, width):
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(1, 1, 9, 9)).astype(np.float32))
    logits = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    frame = sam_frame(height, width, 256)
    up = torch.nn.functional.interpolate(logits, (256, 256), mode="bilinear", align_corners=False)
    up = up[..., : frame.content_height, : frame.content_width]
    expected = torch.nn.functional.interpolate(up, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
    logits = logits[0, 0].numpy()
    np.testing.assert_allclose(logits_to_image(logits, frame, height, width), expected, atol=1e-4)
    out = mask_from_logits(logits, frame, height, width)
    assert out.shape == (height, width) and out.dtype == bool
    clear = np.abs(expected) > 1e-4
    np.testing.assert_array_equal(out[clear], expected[clear] > 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 10**6))
def test_the_shortcut_of_mask_from_logits_changes_nothing(height, width, seed):
    """Few positive cells, anywhere, the padding included."""
    rng = np.random.default_rng(seed)
    logits = np.full((32, 32), -1.0, np.float32)
    logits[rng.integers(0, 32, 2), rng.integers(0, 32, 2)] = rng.uniform(0.5, 30)
    frame = sam_frame(height, width, 128)
    whole = logits_to_image(logits, frame, height, width)
    clear = np.abs(whole) > 1e-5
    np.testing.assert_array_equal(mask_from_logits(logits, frame, height, width)[clear], whole[clear] > 0)


@pytest.mark.parametrize("height,width", [(512, 512), (181, 258), (1070, 1348), (55, 60)])
def test_a_mask_comes_back_where_it_was(height, width):
    ys, xs = np.mgrid[:height, :width]
    mask = ((xs - 0.4 * width) / (0.2 * width)) ** 2 + ((ys - 0.6 * height) / (0.25 * height)) ** 2 < 1
    frame = sam_frame(height, width, 1024)
    back = mask_from_logits(mask_to_frame(mask, frame, 256).astype(np.float32) - 0.5, frame, height, width)
    assert (back & mask).sum() / (back | mask).sum() > 0.97
    shift = np.argwhere(back).mean(0) - np.argwhere(mask).mean(0)
    cell = 4 / frame.scale_x  # in pixels; half a pixel of the frame would be an eighth of it
    assert np.abs(shift).max() < max(0.05, 0.06 * cell)


def test_a_full_mask_comes_back_full():
    for height, width in [(717, 1024), (1, 400), (181, 258)]:
        frame = sam_frame(height, width, 1024)
        back = mask_from_logits(mask_to_frame(np.ones((height, width), bool), frame, 256) - 0.5, frame, height, width)
        assert back.all()


def scene(height=96, width=128):
    ys, xs = np.mgrid[:height, :width]
    left = (xs - 40) ** 2 + (ys - 50) ** 2 < 20**2
    right = (np.abs(xs - 90) < 12) & (np.abs(ys - 40) < 20)
    grey = np.where(left, 200, np.where(right, 120, 20)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2), [left, right]


@pytest.mark.parametrize("seed", range(12))
def test_augment_moves_image_and_masks_together_and_never_flips(seed):
    image, masks = scene()
    out, moved = augment(image, masks, np.random.default_rng(seed))
    assert out.shape == image.shape and out.dtype == np.uint8
    assert (out[:, :, 0] == out[:, :, 1]).all() and (out[:, :, 0] == out[:, :, 2]).all()  # grey stays grey
    grey = out[:, :, 0].astype(float)
    inside, outside = np.median(grey[moved[0]]), np.median(grey[~(moved[0] | moved[1])])
    seen = grey > (inside + np.median(grey[moved[1]])) / 2
    assert inside > outside + 50
    assert (seen & moved[0]).sum() / (seen | moved[0]).sum() > 0.93
    for before, after in zip(masks, moved, strict=True):
        assert after.dtype == bool and 0.75 < after.sum() / before.sum() < 1.3
    (y0, x0), (y1, x1) = (np.argwhere(m).mean(0) for m in moved)
    # From the left to the right structure the direction turns by at most 10 degrees: no flip, no quarter turn.
    turn = np.degrees(np.arctan2(y1 - y0, x1 - x0)) - np.degrees(np.arctan2(-10, 50))
    assert abs(turn) < 11.5


def test_augment_varies_repeats_and_leaves_its_input():
    image, masks = scene()
    kept = image.copy()
    a, ma = augment(image, masks, np.random.default_rng(3))
    b, mb = augment(image, masks, np.random.default_rng(3))
    c, mc = augment(image, masks, np.random.default_rng(4))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ma, mb)
    assert (a != c).any() and (ma[0] != mc[0]).any()
    np.testing.assert_array_equal(image, kept)


def test_augment_loses_no_mask():
    image, _ = scene()
    corner = np.zeros(image.shape[:2], bool)
    corner[:3, :3] = True
    empty = np.zeros(image.shape[:2], bool)
    for seed in range(40):
        _, (moved, nothing) = augment(image, [corner, empty], np.random.default_rng(seed))
        assert 2 * moved.sum() >= corner.sum() and not nothing.any()


def test_a_mask_is_moved_the_same_in_its_box_and_in_full():
    """Only the box of a moved mask is computed; the whole picture would give the same."""
    _, masks = scene()
    rng = np.random.default_rng(0)
    for _ in range(20):
        affine = transforms._random_affine(96, 128, rng)
        whole = transforms._warp(masks[0].astype(np.uint8) * 255, affine, (0, 0, 128, 96)) >= 128
        # Pillow steps in fixed point from the box's corner: a pixel exactly at half may differ.
        assert (transforms._warp_mask(masks[0], affine) != whole).sum() <= 2


@needs_real
def test_real_files_with_traps():
    raw = Path(REAL) / "raw"
    rgba = np.asarray(Image.open(raw / "dsb_rgba.png"))
    np.testing.assert_array_equal(decode_image(raw / "dsb_rgba.png")[rgba[:, :, 3] == 255], rgba[rgba[:, :, 3] == 255][:, :3])
    lossy = decode_mask(raw / "kvasir_mask_lossy.jpg")
    assert lossy.shape == (529, 622) and 0.005 < lossy.mean() < 0.9
    naive = np.asarray(Image.open(raw / "kvasir_mask_lossy.jpg")).max(2) != 0
    assert naive.sum() > lossy.sum()  # the noise round the edges, which a plain != 0 would take
    with pytest.raises(ImageError, match="nii.gz"):
        decode_image(raw / "t2.nii.gz")


@needs_real
def test_real_masks_come_back():
    images = sorted((Path(REAL) / "images").glob("*amos*.png")) + sorted((Path(REAL) / "images").glob("*mcu*1_0.png"))[:2]
    checked = 0
    for path in images:
        image = decode_image(path)
        frame = sam_frame(*image.shape[:2], 1024)
        assert image_to_frame(image, frame).shape == (1024, 1024, 3)
        for mask_path in sorted((Path(REAL) / "masks").glob(path.stem + "__*.png")):
            mask = decode_mask(mask_path)
            back = mask_from_logits(mask_to_frame(mask, frame, 256) - 0.5, frame, *mask.shape)
            assert (back & mask).sum() / (back | mask).sum() > 0.9, mask_path.name
            checked += 1
    assert checked >= 6
