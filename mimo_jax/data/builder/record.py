"""One item to one record: pixels read and, where they need it, repaired; masks to COCO RLE; what looks wrong is told.

Axis letters: H, W height and width in pixels. All of it is one pure function of the item and its files.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Mapping
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
from mimo_jax.data.images.image import DicomGrid, MedicalImage, NiftiGrid, Volume, Window, kind_of, limits_of
from mimo_jax.data.images.open_image import open_picture
from mimo_jax.data.images.volume import open_volume
from mimo_jax.data.schema import Mask, Record, Sample, Target, Turn, encode_mask
from mimo_jax.data.transforms import FORMATS, decode_image
from mimo_jax.errors import UserError

SUSPICIOUS = 0.9  # a mask that covers more of its image is rather the background
_ORIENTATION = 0x0112  # the tag of EXIF
_TURNED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where a PNG may say how it is turned
_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}  # of Pillow's modes; the others have 8
_FLAT = 2.0  # grey levels of standard deviation below which an image looks like any other

# What a note says of an item; notes are counted in dataset_info.json.
EMPTY, TWICE = "empty mask, left out", "mask that is there twice, left out"
WIDE = "mask of more than 90 % of the image"
SAME = "masks of several names with the same pixels"
BURNED_IN = "may contain burned-in text"
UNASKED = "sample about an empty mask, left out"


@dataclass(frozen=True)
class Made:
    """record: without a decided split, unless the source gave one; samples are those that the source brought.
    looks: 256 bits that its copies share but for a few. notes: what looks wrong, and what was left out."""

    record: Record
    looks: bytes
    complete: bool
    absent: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    item: str
    reason: str


def make_record(item: Item) -> Made | Reject:
    """The record of one item, or why there is none: an image or mask that cannot be read, a mask of another size, a field that
    means nothing. Never raises for what a file holds."""
    try:
        return _made(item)
    except (UserError, OSError) as error:
        return Reject(item.id, " ".join(str(error).split()))


def _made(item: Item) -> Made:
    if item.modality not in MODALITIES:
        raise UserError(f"modality {item.modality!r}: use one of {', '.join(MODALITIES)}")
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        image = _read(item)
    notes += [BURNED_IN] * any("burned-in" in str(warning.message) for warning in warned)
    pixels = image.picture.pixels
    masks = _masks(item, image.picture, notes)
    phash, looks = perceptual_hash(pixels)
    different = {mask.mask_id: mask for mask in masks if mask is not None}
    spacing = image.picture.spacing_mm or item.pixel_spacing_mm
    limits = limits_of(item.window)
    record = Record(
        id=pixel_hash(pixels), image=image.data, format=image.format, height=pixels.shape[0], width=pixels.shape[1],
        channels=image.channels, src_bit_depth=image.bits, modality=item.modality, dataset=item.dataset, split=item.split,
        group=item.group, masks=list(different.values()), slice_axis=item.slice_axis, slice_index=item.slice_index,
        pixel_spacing_mm=None if spacing is None else [float(mm) for mm in spacing],
        window=None if limits is None else [float(value) for value in limits],
        # A slice of a volume is shown as a radiologist sees it; which way any other picture is turned, nobody says.
        orientation="radiological" if item.slice and item.slice_axis in ("axial", "coronal") else "",
        phash64=phash, licence=item.licence, source=item.source or item.id,
    )  # fmt: skip
    record.samples = [sample for number, given in enumerate(item.samples) if (sample := _sample(given, number, masks, notes)) is not None]
    for number, sample in enumerate(record.samples):
        sample.sample_id = f"{record.id}/{number}"
    record.check()
    absent = {canonical(name, item.dataset, item.modality).name for name in item.absent} - {mask.entity for mask in record.masks}
    return Made(record, looks, item.complete, tuple(sorted(absent)), tuple(notes))


# --- the image


@dataclass(frozen=True)
class _Image:
    """data: what is stored, in `format`. bits: of a value in the source."""

    picture: MedicalImage
    data: bytes
    format: str
    channels: int
    bits: int


def _read(item: Item) -> _Image:
    path = Path(item.image)
    kind = kind_of(path)
    if kind != "picture" or item.slice or item.frame is not None:
        picture = _slice(path, item.slice, item.window) if item.slice else open_picture(path, frame=item.frame, window=item.window)
        return _repaired(picture, _bits(picture))
    data = path.read_bytes()
    limits = limits_of(item.window)
    picture = MedicalImage(decode_image(data, window=limits, name=item.image))
    format, mode = kept_format(data)
    if format:
        return _Image(picture, data, format, 1 if mode == "L" else 3, 8)
    return _repaired(picture, _BITS.get(mode, 8))


def kept_format(data: bytes) -> tuple[str, str]:
    """("png" or "jpeg" where the encoded image is stored as it is, "" where it needs repair; Pillow's mode). Repair: EXIF
    rotation, more than 8 bits, palette, alpha, CMYK, several frames, any other format."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode = image.mode
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        plain = image.format in ("PNG", "JPEG") and mode in ("L", "RGB") and not deep
        plain = plain and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1
        if plain and (image.format == "JPEG" or any(mark in data for mark in _TURNED)):  # else Pillow would decode a PNG to look
            plain = image.getexif().get(_ORIENTATION, 1) == 1
        return (image.format.lower() if plain else "", "I;16" if deep else mode)


def _repaired(picture: MedicalImage, bits: int) -> _Image:
    """The picture as PNG, of one channel where it is grey."""
    pixels = picture.pixels
    grey = (pixels == pixels[..., :1]).all()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(stream, "PNG")
    return _Image(picture, stream.getvalue(), "png", 1 if grey else 3, bits)


def _bits(picture: MedicalImage) -> int:
    if isinstance(picture.grid, DicomGrid):
        return int(picture.grid.dataset.BitsStored)
    if isinstance(picture.grid, NiftiGrid):
        return 8 * picture.grid.header.get_data_dtype().itemsize
    return 8


def _slice(path: Path, slice: str, window: Window) -> MedicalImage:
    """One slice, shown as its neighbours are; a packed volume is unpacked once for all that follow each other."""
    axis, _, index = slice.partition(":")
    if not index.isdecimal():
        return open_picture(path, slice=slice, window=window)  # which says what is wrong with it
    volume = _volume(path, axis, window)
    if int(index) >= len(volume):
        raise UserError(f"{path}: slice {slice} is not there; it holds {len(volume)}, counted from 0")
    return volume[int(index)]


@lru_cache(maxsize=1)
def _volume(path: Path, axis: str, window: Window) -> Volume:
    return open_volume(path, axis=axis, window=window)


def pixel_hash(pixels: np.ndarray) -> str:
    """16 hexadecimal digits of uint8 RGB [H, W, 3]: the same for the same picture, however it is encoded."""
    digest = hashlib.sha256(np.array(pixels.shape[:2], "<u4").tobytes())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()[:16]


def perceptual_hash(pixels: np.ndarray) -> tuple[str, bytes]:
    """(64 bits of uint8 RGB [H, W, 3], as hexadecimal digits; 256 bits): of the grey image at 64x64, which of the 8x8, and of the
    16x16, lowest frequencies of its cosine transform lie above their median. Saving a file again, or at another size, turns few of
    them. "" and zeros for an image so flat that it looks like all that are flat."""
    small = Image.fromarray(pixels).convert("L").resize((64, 64), Image.Resampling.BILINEAR)
    grey = np.asarray(small, np.float64)
    if grey.std() < _FLAT:
        return "", bytes(32)
    low = np.round(dctn(grey, norm="ortho")[:16, :16], 3)
    coarse, fine = (np.packbits(part > np.median(part.ravel()[1:])).tobytes() for part in (low[:8, :8], low))
    return coarse.hex(), fine


# --- masks and samples


def _masks(item: Item, picture: MedicalImage, notes: list[str]) -> list[Mask | None]:
    """Of each MaskRef its mask: that of an earlier one where both are the same, None where it is empty."""
    found: list[Mask | None] = []
    count: dict[str, int] = defaultdict(int)
    named: dict[str, dict[str, Mask]] = defaultdict(dict)  # RLE -> entity -> mask
    wholes: dict[str, set[str]] = {}  # entity -> those that it may be a part of, or lie in
    for ref in item.masks:
        entity = canonical(ref.class_raw, item.dataset, item.modality)
        pixels = read_mask(ref, picture)
        wholes[entity.name] = {entity.parent, entity.site} - {""}
        if not pixels.any():
            notes.append(EMPTY)
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
            notes.append(TWICE)
            continue
        count[entity.name] += 1
        notes += [WIDE] * (mask.area_px > SUSPICIOUS * pixels.size)
    notes += [SAME] * any(len(of) > 1 for of in named.values())
    different = [mask for of in named.values() for mask in of.values()]
    for mask in different:
        mask.parent_mask_id = _holder(mask, [other for other in different if other.entity in wholes[mask.entity]])
    return found


def _holder(mask: Mask, wholes: list[Mask]) -> str:
    """The mask_id of that whole which holds most of a mask, and more than half; else ""."""
    if not wholes:
        return ""
    pixels = mask.decode()
    inside = {whole.mask_id: int((whole.decode() & pixels).sum()) for whole in wholes}
    best = max(inside, key=inside.__getitem__)
    return best if 2 * inside[best] > mask.area_px else ""


def _sample(given: Mapping, number: int, masks: list[Mask | None], notes: list[str]) -> Sample | None:
    """A conversation of the source, its places in `masks` turned into mask_ids; None where it is about a mask that is left out."""
    try:
        values = {key: value for key, value in given.items() if key not in ("turns", "targets")}
        used = [place for turn in given["turns"] for place in turn.get("prompted", ())]
        used += [place for target in given.get("targets", ()) for place in target.get("mask", ())]
        if any(masks[place] is None for place in used):
            notes.append(UNASKED)
            return None
        ids = [mask.mask_id if mask else "" for mask in masks]
        turns = [Turn(turn["role"], turn["text"], [ids[place] for place in turn.get("prompted", ())]) for turn in given["turns"]]
        targets = []
        for target in given.get("targets", ()):
            fields = {key: value for key, value in target.items() if key != "mask"}
            targets.append(Target(**fields, mask_ids=[ids[place] for place in target.get("mask", ())]))
        sample = Sample("", turns=turns, targets=targets, **values)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"sample {number}: is no conversation ({type(error).__name__}: {error})") from None
    if sample.perspective not in PERSPECTIVES:
        raise UserError(f"sample {number}: perspective {sample.perspective!r}; use one of {', '.join(PERSPECTIVES)}")
    return sample
