"""Image transforms: decodes files, resizes images for the vision and SAM encoders, and maps masks into the SAM frame and back.

Axis letters: H, W original height and width, M mask side (SAM's low-resolution logits).

Everything stays uint8 or bool on the host; normalisation and zeroing of padding happen on the device.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import csr_array
from scipy.special import ndtri

from mimo_jax.data.label_values import LabelValueError, whole_labels
from mimo_jax.data.mask_levels import MaskLevelsError, pixels_in_mask
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame, mask_to_box, sam_frame, vision_frame
from mimo_jax.model_config import ModelConfig

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # Pillow's other readers are never used
MAX_PIXELS = 89_478_485  # the size from which Pillow warns of a decompression bomb; an error here
_LOSSY = ("JPEG", "MPO", "WEBP")  # MPO: JPEG of a phone, followed by a second image
_COLOUR = ("LA", "RGB", "RGBA")
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
STRETCHED, TRANSPARENT = "values of more than 8 bits are stretched", "transparent pixels"
CHOICES = (STRETCHED, TRANSPARENT)
_NEAR_WHITE, _DARK = 240, 64  # grey levels of a white ground, and below which all visible pixels would be lost on black
_MAX_FULL_RESIZE = 64  # maximum ratio of content to frame side at which an image is resized before it is cropped


class ImageError(UserError):
    """A file that is not a usable image; the message names it."""


def decode_image(
    source: bytes | str | os.PathLike,
    *,
    window: tuple[float, float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
    name: str = "",
) -> np.ndarray:
    """Encoded bytes or a path -> uint8 RGB [H, W, 3], as an image viewer displays it.

    EXIF rotation is applied, palettes are resolved, grey becomes three equal channels, and the first of several frames is used.
    Transparent pixels become black; but white if the file stores white there, or if all that is visible is dark. Values of more than 8
    bits are windowed: `window` = (low, high), raw values that become 0 and 255; by default these `percentiles` of the image. name: the
    name of bytes in errors. Raises ImageError for a file that is missing, corrupt, truncated, of an unknown format, or larger than
    MAX_PIXELS.
    """
    return decode_picture(source, window=window, percentiles=percentiles, name=name)[0]


def decode_picture(
    source: bytes | str | os.PathLike,
    *,
    window: tuple[float, float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
    name: str = "",
) -> tuple[np.ndarray, list[str]]:
    """(as `decode_image`; a line for each choice that was made for the display and may be wrong, which begins with one of CHOICES)."""
    image, name = _open(source, name)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        low, high = value_limits(values, window, percentiles, name)
        grey = windowed(values, (low, high), percentiles, name)
        shown = f"{STRETCHED}: {low:g} is shown as black and {high:g} as white; give --window LOW,HIGH (window=) to choose"
        return np.repeat(grey[:, :, None], 3, axis=2), [shown] * (window is None)
    if window is not None:
        raise ImageError(f"{name}: window {window} given, but Pillow reads this {image.mode} file as 8 bits; omit the window")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        return _over_ground(np.array(image.convert("RGBA")))
    return np.array(image.convert("RGB")), []


def _over_ground(rgba: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """uint8 [H, W, 4] -> (uint8 RGB [H, W, 3] over black or white, the line about it), as `decode_picture`."""
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    hidden, visible = rgb[alpha == 0], rgb[alpha >= 128]
    stores_white = len(hidden) > 0 and (hidden >= _NEAR_WHITE).all(1).mean() > 0.95
    dark = len(visible) > 0 and np.percentile(visible.max(1), 99) < _DARK
    ground = (255, 255, 255, 255) if stores_white or dark else (0, 0, 0, 255)
    shown = Image.alpha_composite(Image.new("RGBA", alpha.shape[::-1], ground), Image.fromarray(rgba)).convert("RGB")
    colour = "white" if ground[0] else "black"
    choice = f"{TRANSPARENT}: shown as {colour}; save the picture without transparency to choose"
    return np.array(shown), [choice] * bool((alpha < 255).any())


def decode_mask(source: bytes | str | os.PathLike, *, threshold: float | None = None, name: str = "") -> np.ndarray:
    """Encoded bytes or a path -> bool [H, W].

    Pixels in the mask are, in palette files: index != 0, whatever the colour of 0; in others: those that `pixels_in_mask` takes of the
    grey levels, or of the largest channel; threshold: the least value in the mask. Raises ImageError, also for levels that may be
    ids or soft edges."""
    image, name = _open(source, name)
    lossy = image.format in _LOSSY
    if image.mode in ("P", "1"):
        return np.asarray(image) != 0
    if image.mode == "PA":
        return np.asarray(image.getchannel("P")) != 0
    if "A" in image.getbands():
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
        if image.getbbox() is None and alpha.getextrema()[0] == 0:  # black on a transparent ground
            image = alpha
    elif image.mode not in ("L", "RGB") and not image.mode.startswith(("I", "F")):
        image = image.convert("RGB")
    values = np.nan_to_num(np.asarray(image))
    if values.ndim == 3:
        values = values.max(2)
    try:
        return pixels_in_mask(values, lossy, threshold)
    except MaskLevelsError as error:
        raise ImageError(f"{name}: {error}") from None


def decode_labels(source: bytes | str | os.PathLike, *, name: str = "") -> np.ndarray:
    """Encoded bytes or a path -> int32 [H, W], the label of each pixel: palette index or grey level. Raises ImageError for
    a lossy file, for one whose channels differ, and for values that are no whole numbers."""
    image, name = _open(source, name)
    if image.format in _LOSSY:
        raise ImageError(f"{name}: lossy compression changes labels; give a PNG or TIFF")
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[..., : 1 if image.mode in ("LA", "PA") else 3]
        if (colours != colours[..., :1]).any():
            raise ImageError(f"{name}: is a colour image; give labels as grey levels or palette indices")
        values = colours[..., 0]
    try:
        return whole_labels(values, name)
    except LabelValueError as error:
        raise ImageError(str(error)) from None


def _open(source: bytes | str | os.PathLike, name: str) -> tuple[Image.Image, str]:
    """(the decoded PIL image, upright, with its `format` kept; the name for errors)."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, stream = name or "image", io.BytesIO(source)
    else:
        name, stream = name or os.fspath(source), source
    try:
        with Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{name}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS} in total")
            deep_colour = image.mode in _COLOUR and any(";16" in str(tile[3]) for tile in image.tile)
            image.load()  # a TIFF is rotated and loses the tag while it loads, so rotate only afterwards
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image of a supported format ({', '.join(FORMATS)})") from None
    except Exception as error:  # for a damaged file Pillow's decoders raise OSError, SyntaxError, struct.error, …
        raise ImageError(f"{name}: damaged or truncated image ({error})") from error
    if deep_colour and max(high for _, high in upright.convert("RGB").getextrema()) < 32:
        # Pillow keeps the high byte of 16-bit colour, which is right only if the values use all 16 bits.
        raise ImageError(f"{name}: 16-bit colour whose values use less than an eighth of the range; convert it to 8 bits")
    return upright, name


def value_limits(
    values: np.ndarray, window: tuple[float, float] | None, percentiles: tuple[float, float], name: str
) -> tuple[float, float]:
    """(low, high): the window or, without one, the percentiles of the finite values."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ImageError(f"{name}: has no finite value")
    if window is None:
        low, high = (float(v) for v in np.percentile(values[finite], percentiles))
        if low >= high:  # nearly constant: a few bright pixels must not vanish
            low, high = float(values[finite].min()), float(values[finite].max())
    else:
        low, high = window
        if not low < high:
            raise ImageError(f"{name}: window ({low:g}, {high:g}); give low < high")
    return low, max(high, float(np.nextafter(low, np.inf)))


def windowed(values: np.ndarray, window: tuple[float, float] | None, percentiles: tuple[float, float], name: str) -> np.ndarray:
    """float [H, W] -> uint8 [H, W], linear between the limits; values that are not finite become 0."""
    low, high = value_limits(values, window, percentiles, name)
    finite = np.isfinite(values)
    scaled = (np.where(finite, values, low) - low) * (255.0 / max(high - low, 1e-12))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def preprocess(image: np.ndarray, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """uint8 RGB [H, W, 3] -> the inputs of both encoders: `vision_image` uint8 [Hc, Hc, 3], unless the vision tower has no encoder of
    its own (`VisionConfig.from_sam`), `sam_image` uint8 [Hs, Hs, 3], and `vision_size`, `sam_size` int32 [2], the (height, width) of the
    content of each; the rest is 0."""
    views = {"sam_image": image_to_frame(_grey(image), frames(*image.shape[:2], cfg)[1])}
    if not cfg.vision.from_sam():
        views["vision_image"] = vision_image(image, cfg)
    return views | content_sizes(*image.shape[:2], cfg)


def vision_image(image: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """The `vision_image` of `preprocess`."""
    return image_to_frame(_grey(image), frames(*image.shape[:2], cfg)[0], cfg.vision.resample)


def _grey(image: np.ndarray) -> np.ndarray:
    """RGB [H, W, 3], or one channel [H, W] if all are equal: resizing one takes a third of the time and gives the same values."""
    red, green, blue = (image[:, :, channel] for channel in range(3))
    return red if np.array_equal(red, green) and np.array_equal(red, blue) else image


def frames(height: int, width: int, cfg: ModelConfig) -> tuple[Frame, Frame]:
    """The frames of an image for the vision tower and for SAM."""
    vision = vision_frame(height, width, cfg.vision.image_size, cfg.vision.image_fit)
    return vision, sam_frame(height, width, cfg.sam.image_size, cfg.sam.image_fit)


def content_sizes(height: int, width: int, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """`vision_size` and `sam_size` of `preprocess`."""
    vision, sam = frames(height, width, cfg)
    return {"vision_size": np.array(vision.size, np.int32), "sam_size": np.array(sam.size, np.int32)}


def image_to_frame(image: np.ndarray, frame: Frame, resample: str = "bilinear") -> np.ndarray:
    """uint8 RGB [H, W, 3], or grey [H, W], -> uint8 RGB [side, side, 3]: resized with Pillow's bilinear or bicubic filter (both
    antialias), cropped to the frame, padded with zeros at the right and bottom."""
    rows, cols = frame.size
    source = Image.fromarray(image)
    if max(frame.content_height, frame.content_width) <= _MAX_FULL_RESIZE * frame.side:
        full = source.resize((frame.content_width, frame.content_height), _FILTERS[resample])
        resized = np.asarray(full.crop((-frame.offset_x, -frame.offset_y, cols - frame.offset_x, rows - frame.offset_y)))
    else:
        # A long strip would exceed the memory: only the visible part is resized, which may differ by 1.
        left, top = -frame.offset_x / frame.scale_x, -frame.offset_y / frame.scale_y
        box = (left, top, min(left + cols / frame.scale_x, frame.width), min(top + rows / frame.scale_y, frame.height))
        resized = np.asarray(source.resize((cols, rows), _FILTERS[resample], box=box))
    if resized.shape == (frame.side, frame.side, 3):
        return resized
    out = np.zeros((frame.side, frame.side, 3), np.uint8)
    for channel in range(3):  # faster than one broadcasting assignment
        out[:rows, :cols, channel] = resized if resized.ndim == 2 else resized[:, :, channel]
    return out


def mask_to_frame(mask: np.ndarray, frame: Frame, mask_side: int) -> np.ndarray:
    """bool [H, W] -> uint8 [M, M]: the target in the (padded) frame at mask resolution.

    A cell is 1 if the mask covers at least half of the part of the cell that is inside the image, so that a structure at the image's edge,
    or an image narrower than a cell, is not lost to the padding. If a mask covers half of no cell, the cells with the largest coverage
    are taken: an entity that is present never becomes an empty target.
    """
    out = np.zeros((mask_side, mask_side), np.uint8)
    mask = np.asarray(mask, bool)
    box = mask_to_box(mask)
    if box is None:
        return out
    x0, y0, x1, y1 = box
    first_y, edges_y = _cell_edges(frame.side / mask_side / frame.scale_y, y0, y1, frame.height, mask_side)
    first_x, edges_x = _cell_edges(frame.side / mask_side / frame.scale_x, x0, x1, frame.width, mask_side)
    cover = _integrate(mask[y0:y1, x0:x1].view(np.uint8), edges_y - y0)
    cover = _integrate(np.ascontiguousarray(cover.T), edges_x - x0).T
    cover = cover / (np.diff(edges_y)[:, None] * np.diff(edges_x)[None, :])
    part = cover >= min(0.5, cover.max()) - 1e-6
    out[first_y : first_y + part.shape[0], first_x : first_x + part.shape[1]] = part
    return out


def _cell_edges(cell: float, start: int, stop: int, size: int, mask_side: int) -> tuple[int, np.ndarray]:
    """(index of the first cell that overlaps pixels start … stop-1, edges of these cells in pixels, clipped at the image's end)."""
    first = int(start / cell)
    last = min(mask_side, int(np.ceil(stop / cell - 1e-9)))
    return first, np.minimum(np.arange(first, last + 1) * cell, size)


def _integrate(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Integral of piecewise constant rows [n, w] between consecutive edges (in rows, any float): float64 [len(edges)-1, w]."""
    total = np.zeros((len(values) + 1, values.shape[1]), np.int32 if values.dtype == np.uint8 else np.float64)
    np.cumsum(values, axis=0, out=total[1:])
    at = np.clip(edges, 0, len(values))
    index = np.minimum(at.astype(int), len(values) - 1)
    return np.diff(total[index] + (at - index)[:, None] * values[index], axis=0)


def logits_to_image(logits: np.ndarray, frame: Frame, height: int, width: int) -> np.ndarray:
    """float [M, M] of the frame -> float32 [height, width]: as SAM and LISA do, bilinear to the frame's side, crop to the
    content, bilinear to the original size (align_corners False, no antialias). Both steps are one matrix per axis."""
    rows, _, _ = _upsampler(logits.shape[0], frame.side, frame.content_height, height)
    cols, _, _ = _upsampler(logits.shape[1], frame.side, frame.content_width, width)
    return _apply(rows, np.asarray(logits, np.float32), cols)


def mask_from_logits(logits: np.ndarray, frame: Frame, height: int, width: int) -> np.ndarray:
    """float [M, M] of the frame -> bool [height, width]: `logits_to_image` > 0."""
    logits = np.asarray(logits, np.float32)
    rows, *reach_y = _upsampler(logits.shape[0], frame.side, frame.content_height, height)
    cols, *reach_x = _upsampler(logits.shape[1], frame.side, frame.content_width, width)
    # An interpolated value can be positive only if one of its cells is, so only such values are computed.
    positive = logits > 0
    y, x = _outputs(*reach_y, positive.any(1)), _outputs(*reach_x, positive.any(0))
    out = np.zeros((height, width), bool)
    if y.start < y.stop and x.start < x.stop:
        out[y, x] = _apply(rows[y], logits, cols[x]) > 0
    return out


def _apply(rows: csr_array, values: np.ndarray, cols: csr_array) -> np.ndarray:
    """rows · values · colsᵀ. Sparse: each output mixes at most four cells, and BLAS would compete with other workers for cores."""
    return rows @ np.ascontiguousarray((cols @ np.ascontiguousarray(values.T)).T)


def _outputs(first: np.ndarray, last: np.ndarray, cells: np.ndarray) -> slice:
    """The outputs that mix any cell between the first and the last set one. first, last: as returned by `_upsampler`."""
    found = np.flatnonzero(cells)
    if not len(found):
        return slice(0, 0)
    return slice(int(np.searchsorted(last, found[0], "left")), int(np.searchsorted(first, found[-1], "right")))


@lru_cache(maxsize=256)
def _upsampler(mask_side: int, side: int, content: int, size: int) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """One axis of `logits_to_image`: (float32 matrix [size, M], and the first and last cell that each output mixes)."""
    low, high, part = _bilinear_taps(content, size)
    cell_low, cell_high, cell_part = _bilinear_taps(mask_side, side)
    cells = np.concatenate([cell_low[low], cell_high[low], cell_low[high], cell_high[high]])
    near, far = cell_part[low], cell_part[high]
    weights = np.concatenate([(1 - part) * (1 - near), (1 - part) * near, part * (1 - far), part * far])
    matrix = csr_array((weights.astype(np.float32), (np.tile(np.arange(size), 4), cells)), shape=(size, mask_side))
    return matrix, cell_low[low], cell_high[high]


def _bilinear_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower tap, upper tap, weight of the upper) of each of `target` samples, as torch's F.interpolate(mode="bilinear")."""
    at = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(at.astype(int), source - 1)
    return low, np.minimum(low + 1, source - 1), at - low


def augment(image: np.ndarray, masks: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """One random variant of uint8 RGB [H, W, 3] and its bool masks [H, W]: rotation up to 10 degrees, scale 0.9 to 1.1,
    shift up to 6 % of each side, applied to the image and all masks; then gain, gamma and noise of the intensities.

    It is not flipped (see `flips`): left and right are anatomy. If more than half of a mask would leave the image, it is not moved.
    """
    affine = _random_affine(*image.shape[:2], rng)
    intensities = rng.uniform((0.85, 0.8, 0.0), (1.15, 1.25, 4.0))
    moved = [_warp_mask(mask, affine) for mask in masks]
    if all(2 * np.count_nonzero(after) >= np.count_nonzero(before) for before, after in zip(masks, moved, strict=True)):
        image = _warp(image, affine, (0, 0, image.shape[1], image.shape[0]))
    else:
        moved = [np.array(mask, bool) for mask in masks]
    return _intensity(image, *intensities, rng), moved


def _random_affine(height: int, width: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Output -> input map (a, b, c, d, e, f) about the centre, in pixels counted from the top-left *corner*, as Pillow's."""
    angle, scale = rng.uniform(-np.pi / 18, np.pi / 18), rng.uniform(0.9, 1.1)
    shift_x, shift_y = rng.uniform(-0.06, 0.06, 2) * (width, height)
    a, b = np.cos(angle) / scale, np.sin(angle) / scale
    cx, cy = width / 2, height / 2
    return a, b, cx - a * (cx + shift_x) - b * (cy + shift_y), -b, a, cy + b * (cx + shift_x) - a * (cy + shift_y)


def _warp(values: np.ndarray, affine: tuple[float, ...], box: tuple[int, int, int, int]) -> np.ndarray:
    """The part [x0, y0, x1, y1) of the moved uint8 image; black outside the original image."""
    x0, y0, x1, y1 = box
    a, b, c, d, e, f = affine
    shifted = (a, b, c + a * x0 + b * y0, d, e, f + d * x0 + e * y0)
    image = Image.fromarray(values).transform((x1 - x0, y1 - y0), Image.Transform.AFFINE, shifted, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _warp_mask(mask: np.ndarray, affine: tuple[float, ...]) -> np.ndarray:
    """bool [H, W] -> bool [H, W]; only the box that can contain the moved mask is computed."""
    height, width = mask.shape
    out = np.zeros((height, width), bool)
    box = mask_to_box(mask)
    if box is None:
        return out
    a, b, c, d, e, f = affine
    corners = np.array([(x - c, y - f) for x in box[::2] for y in box[1::2]])
    corners = corners @ np.linalg.inv([[a, b], [d, e]]).T
    x0, y0 = np.clip(np.floor(corners.min(0)).astype(int) - 1, 0, (width, height)).tolist()
    x1, y1 = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, (width, height)).tolist()
    if x0 < x1 and y0 < y1:
        out[y0:y1, x0:x1] = _warp(mask.astype(np.uint8) * 255, affine, (x0, y0, x1, y1)) >= 128
    return out


def _intensity(image: np.ndarray, gain: float, gamma: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """gain·x^gamma, then Gaussian noise of that many grey levels, the same in all channels: a grey image stays grey."""
    levels = np.clip(255 * gain * (np.arange(256) / 255) ** gamma, 0, 255)
    out = np.asarray(Image.fromarray(image).point(np.rint(levels).astype(int).tolist() * 3)).astype(np.int16)
    # 256 quantiles approximate the normal distribution at a tenth of the cost of sampling it.
    quantiles = np.rint(noise * ndtri((np.arange(256) + 0.5) / 256)).astype(np.int16)
    out += quantiles[rng.integers(0, 256, image.shape[:2], np.uint8)][:, :, None]
    return np.clip(out, 0, 255).astype(np.uint8)
