"""Builds one record from one item: reads and repairs pixels, encodes masks as COCO RLE, and warns of what looks wrong.

Axis letters: H, W height and width in pixels. `make_record` is a pure function of the item and its files.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn

from mimo_jax.config import MODALITIES, PERSPECTIVES
from mimo_jax.data.builder.entities import canonical
from mimo_jax.data.builder.items import Item
from mimo_jax.data.builder.masks import read_mask
from mimo_jax.data.images.image import DicomGrid, MedicalImage, NiftiGrid, Volume, Window, file_kind, window_limits
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.series import ALONE
from mimo_jax.data.images.volume import open_volume
from mimo_jax.data.schema import ASPECT_CHANGED, Mask, Record, Sample, Target, Turn, encode_mask
from mimo_jax.data.transforms import CHOICES, FORMATS, decode_picture
from mimo_jax.errors import UserError

MAX_MASK_SHARE = 0.9  # a mask that covers more of its image is probably the background
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # chunks in which a PNG may store its rotation
_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}  # bits per value of Pillow's modes; other modes have 8
_BLACK, _BLACK_LINE = 12, 0.02  # a row or column is a black border if at most this share of it is brighter than this grey level
_FLAT = 2.0  # standard deviation in grey levels; the perceptual hash of a flatter image says nothing

# Texts of warnings; dataset_info.json counts them.
EMPTY_MASK, DUPLICATE_MASK = "empty mask, left out", "duplicate mask, left out"
LARGE_MASK = "mask of more than 90 % of the image"
SAME_PIXELS = "masks of several names with the same pixels"
BURNED_IN = "may contain burned-in text"  # and ALONE and CHOICES
EMPTY_MASK_SAMPLE = "sample about an empty mask, left out"


@dataclass(frozen=True)
class BuiltRecord:
    """record: its split is "" unless the source gave one; its samples are those of the source. fine_hash: 256 bits, in which copies
    of the image differ in few. complete, absent: as in `Item`, with canonical names. warnings: what looks wrong or was left out."""

    record: Record
    fine_hash: bytes
    complete: bool
    absent: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    item: str
    reason: str


def make_record(item: Item) -> BuiltRecord | Reject:
    """The record of one item, or a Reject: for an image or mask that cannot be read, a mask of another size, or an invalid field.
    Never raises because of a file's contents."""
    try:
        return _build_record(item)
    except (UserError, OSError) as error:
        return Reject(item.id, " ".join(str(error).split()))


def _build_record(item: Item) -> BuiltRecord:
    if item.modality not in MODALITIES:
        raise UserError(f"modality {item.modality!r}: use one of {', '.join(MODALITIES)}")
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = _read(item)
    messages += [text for text in (BURNED_IN, ALONE, *CHOICES) if any(text in str(warning.message) for warning in caught)]
    pixels = source.image.pixels
    to_square = None
    if item.square:
        to_square = _squaring(pixels, item.square)
        pixels = to_square(pixels)
    masks = _masks(item, source.image, messages, to_square)
    if item.square:
        source = _repaired(MedicalImage(pixels), source.bits)
    phash, fine_hash = perceptual_hash(pixels)
    unique = {mask.mask_id: mask for mask in masks if mask is not None}
    spacing = None if item.square else source.image.spacing_mm or item.pixel_spacing_mm
    flags = dict.fromkeys((*item.flags, *[ASPECT_CHANGED] * bool(item.square)))
    limits = window_limits(item.window)
    record = Record(
        id=pixel_hash(pixels), image=source.data, format=source.format, height=pixels.shape[0], width=pixels.shape[1],
        channels=source.channels, src_bit_depth=source.bits, modality=item.modality, dataset=item.dataset, split=item.split,
        group=item.group, masks=list(unique.values()), slice_axis=item.slice_axis, slice_index=item.slice_index,
        pixel_spacing_mm=None if spacing is None else [float(mm) for mm in spacing],
        window=None if limits is None else [float(value) for value in limits],
        # The patient's left is on the right of these planes; the orientation of any other image is unknown.
        orientation="radiological" if _plane(source.image) in ("axial", "coronal") else "",
        phash64=phash, licence=item.licence, source=item.source or item.id, flags=list(flags),
    )  # fmt: skip
    record.samples = [sample for i, given in enumerate(item.samples) if (sample := _sample(given, i, masks, messages)) is not None]
    for number, sample in enumerate(record.samples):
        sample.sample_id = f"{record.id}/{number}"
    record.check()
    absent = {canonical(name, item.dataset, item.modality).name for name in item.absent} - {mask.entity for mask in record.masks}
    return BuiltRecord(record, fine_hash, item.complete, tuple(sorted(absent)), tuple(messages))


# --- the image


@dataclass(frozen=True)
class _SourceImage:
    """data: the encoded image as it is stored, in `format`. bits: per value of the source."""

    image: MedicalImage
    data: bytes
    format: str
    channels: int
    bits: int


def _read(item: Item) -> _SourceImage:
    path = Path(item.image)
    kind = file_kind(path)
    if kind != "picture" or item.slice or item.frame is not None:
        image = _slice(path, item.slice, item.window) if item.slice else open_image(path, frame=item.frame, window=item.window)
        return _repaired(image, _bits(image))
    data = path.read_bytes()
    limits = window_limits(item.window)
    if isinstance(item.window, str):
        raise UserError(f"{path}: window {item.window} is in Hounsfield units, which only DICOM and NIfTI files have; give LOW,HIGH")
    pixels, choices = decode_picture(data, window=limits, name=item.image)
    for choice in choices:
        warnings.warn(choice, stacklevel=2)
    image = MedicalImage(pixels)
    format, mode = kept_format(data)
    if format:
        return _SourceImage(image, data, format, 1 if mode == "L" else 3, 8)
    return _repaired(image, _BITS.get(mode, 8))


def kept_format(data: bytes) -> tuple[str, str]:
    """("png" or "jpeg" if the encoded image can be stored as it is, "" if it needs repair; Pillow's mode). An image needs repair if it
    has EXIF rotation, more than 8 bits, a palette, alpha, CMYK, several frames, or another format."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode = image.mode
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        plain = image.format in ("PNG", "JPEG") and mode in ("L", "RGB") and not deep
        plain = plain and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1
        if plain and (image.format == "JPEG" or any(mark in data for mark in _TURNED)):  # otherwise Pillow would decode a PNG to find out
            plain = image.getexif().get(_ORIENTATION, 1) == 1
        return (image.format.lower() if plain else "", "I;16" if deep else mode)


def _repaired(image: MedicalImage, bits: int) -> _SourceImage:
    """The image as PNG, with one channel if it is grey."""
    pixels = image.pixels
    grey = (pixels == pixels[..., :1]).all()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(stream, "PNG")
    return _SourceImage(image, stream.getvalue(), "png", 1 if grey else 3, bits)


def _squaring(pixels: np.ndarray, side: int) -> Callable[[np.ndarray], np.ndarray]:
    """What makes the image uint8 [H, W, 3], and its masks bool [H, W], a square of this side without the image's black borders."""
    bright = pixels.max(2) > _BLACK
    rows, columns = (np.flatnonzero(bright.mean(axis) > _BLACK_LINE) for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows.size and columns.size else None

    def squared(values: np.ndarray) -> np.ndarray:
        grey = values.astype(np.uint8) * 255 if values.dtype == bool else values
        resized = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BILINEAR, box=box))
        return resized >= 128 if values.dtype == bool else resized

    return squared


def _bits(image: MedicalImage) -> int:
    if isinstance(image.grid, DicomGrid):
        return int(image.grid.dataset.BitsStored)
    if isinstance(image.grid, NiftiGrid):
        return 8 * image.grid.header.get_data_dtype().itemsize
    return 8


def _plane(image: MedicalImage) -> str:
    """The nearest plane of the patient, "" if it is unknown."""
    return "" if image.grid is None else image.grid.display.plane


def _slice(path: Path, slice: str, window: Window) -> MedicalImage:
    """One slice; a compressed volume is decompressed once for consecutive slices."""
    axis, _, index = slice.partition(":")
    if not index.isdecimal():
        return open_image(path, slice=slice, window=window)  # raises an error that explains what is wrong
    volume = _volume(path, axis, window)
    if int(index) >= len(volume):
        raise UserError(f"{path}: slice {slice} does not exist; it has {len(volume)}, counted from 0")
    return volume[int(index)]


@lru_cache(maxsize=1)
def _volume(path: Path, axis: str, window: Window) -> Volume:
    return open_volume(path, axis=axis, window=window)


def pixel_hash(pixels: np.ndarray) -> str:
    """16 hexadecimal digits of uint8 RGB [H, W, 3]: equal for equal pixels, however the image is encoded."""
    digest = hashlib.sha256(np.array(pixels.shape[:2], "<u4").tobytes())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()[:16]


def perceptual_hash(pixels: np.ndarray) -> tuple[str, bytes]:
    """(64 bits of uint8 RGB [H, W, 3] as hexadecimal digits; 256 bits as bytes). The bits say which of the 8x8, and of the 16x16, lowest
    frequencies of the cosine transform of the grey image at 64x64 are above their median. Saving a file again, or at another size,
    flips few of them. Returns "" and zeros for an image so flat that it would match all flat images."""
    small = Image.fromarray(pixels).convert("L").resize((64, 64), Image.Resampling.BILINEAR)
    grey = np.asarray(small, np.float64)
    if grey.std() < _FLAT:
        return "", bytes(32)
    low = np.round(dctn(grey, norm="ortho")[:16, :16], 3)
    coarse, fine = (np.packbits(part > np.median(part.ravel()[1:])).tobytes() for part in (low[:8, :8], low))
    return coarse.hex(), fine


# --- masks and samples


def _masks(item: Item, image: MedicalImage, messages: list[str], to_square: Callable[[np.ndarray], np.ndarray] | None) -> list[Mask | None]:
    """The mask of each MaskRef: that of an earlier one if both are equal, None if it is empty. Appends warnings to `messages`. to_square:
    as `_squaring` returns it, or None."""
    found: list[Mask | None] = []
    count: dict[str, int] = defaultdict(int)
    named: dict[str, dict[str, Mask]] = defaultdict(dict)  # RLE -> entity -> mask
    wholes: dict[str, set[str]] = {}  # entity -> entities that it may be a part of, or lie in
    for ref in item.masks:
        entity = canonical(ref.class_raw, item.dataset, item.modality)
        pixels = read_mask(ref, image)
        pixels = to_square(pixels) if to_square else pixels
        wholes[entity.name] = {entity.parent, entity.site} - {""}
        if not pixels.any():
            messages.append(EMPTY_MASK)
            found.append(None)
            continue
        stem = entity.name.replace(" ", "_")
        mask = encode_mask(
            pixels, f"{stem}_{count[entity.name]}", entity.name, instance=ref.instance, entity_id=entity.cui,
            class_raw=ref.class_raw, annotation=ref.annotation,
        )  # fmt: skip
        first = named[mask.rle["counts"]].setdefault(entity.name, mask)
        found.append(first)
        if first is not mask:
            messages.append(DUPLICATE_MASK)
            continue
        count[entity.name] += 1
        messages += [LARGE_MASK] * (mask.area_px > MAX_MASK_SHARE * pixels.size)
    messages += [SAME_PIXELS] * any(len(masks) > 1 for masks in named.values())
    unique = [mask for masks in named.values() for mask in masks.values()]
    for mask in unique:
        mask.parent_mask_id = _parent(mask, [other for other in unique if other.entity in wholes[mask.entity]])
    return found


def _parent(mask: Mask, wholes: list[Mask]) -> str:
    """The mask_id of the whole that contains most of a mask, and more than half of it; "" if there is none."""
    if not wholes:
        return ""
    pixels = mask.decode()
    inside = {whole.mask_id: int((whole.decode() & pixels).sum()) for whole in wholes}
    best = max(inside, key=inside.__getitem__)
    return best if 2 * inside[best] > mask.area_px else ""


def _sample(given: Mapping, number: int, masks: list[Mask | None], messages: list[str]) -> Sample | None:
    """A conversation of the source, with its indices into `masks` replaced by mask_ids; None if it is about a mask that was left out."""
    try:
        values = {key: value for key, value in given.items() if key not in ("turns", "targets")}
        used = [index for turn in given["turns"] for index in turn.get("prompted", ())]
        used += [index for target in given.get("targets", ()) for index in target.get("mask", ())]
        if any(masks[index] is None for index in used):
            messages.append(EMPTY_MASK_SAMPLE)
            return None
        ids = [mask.mask_id if mask else "" for mask in masks]
        turns = [Turn(turn["role"], turn["text"], [ids[index] for index in turn.get("prompted", ())]) for turn in given["turns"]]
        targets = []
        for target in given.get("targets", ()):
            fields = {key: value for key, value in target.items() if key != "mask"}
            targets.append(Target(**fields, mask_ids=[ids[index] for index in target.get("mask", ())]))
        sample = Sample("", turns=turns, targets=targets, **values)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"sample {number}: is not a conversation ({type(error).__name__}: {error})") from None
    if sample.perspective not in PERSPECTIVES:
        raise UserError(f"sample {number}: perspective {sample.perspective!r}; use one of {', '.join(PERSPECTIVES)}")
    return sample
