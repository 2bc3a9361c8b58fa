"""Reads prompts in the formats of other tools: JSON of points, boxes, scribbles and COCO masks, mask images, bool arrays.

Axis letters: H, W height and width of the image in pixels.

Coordinates are pixels of the image; integers are pixel centres. A mask becomes a scribble through it. Nothing is decoded before its size
and the number of prompts have been checked.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco

from mimo_jax.data.prompts import PromptError, Prompts, prompts_from_mask
from mimo_jax.data.transforms import ImageError, decode_mask
from mimo_jax.geometry import GeometryError, validate_boxes, validate_points, validate_scribbles

Source = str | os.PathLike | bytes | Mapping | np.ndarray | Prompts

MAX_PROMPTS = 64  # per source; no model accepts as many
MAX_VERTICES = 10_000  # per scribble or polygon
MAX_BYTES = 2**24  # of a JSON file
_PROMPT_KEYS = ("points", "boxes", "scribbles", "masks")
_RLE = ("size", "counts")
_COCO = ("segmentation", "bbox")
# Other fields of a COCO annotation.
_COCO_OTHER = ("id", "image_id", "category_id", "category_name", "area", "iscrowd", "score", "keypoints", "num_keypoints", "attributes")
_FORMS = {
    "points": "[[x, y, label], …]", "boxes": "[[x0, y0, x1, y1], …]", "scribbles": "[[[x, y], …], …]", "masks": "[{size, counts}, …]",
    "bbox": "[x, y, width, height]",
}  # fmt: skip


def read_prompts(source: Source, height: int, width: int, name: str = "", mask_threshold: float | None = None) -> Prompts:
    """The prompts in `source` for an image of `height` x `width` pixels.

    source: a path or the bytes of a file, JSON or a mask image (PNG, TIFF, …, read by `decode_mask`); the content of such JSON as a dict;
    a bool array [H, W]; or Prompts, which are checked. JSON is one of: an object with any of
    {"points": [[x, y, label] or [x, y]], "boxes": [[x0, y0, x1, y1]], "scribbles": [[[x, y], …]], "masks": [RLE]};
    a COCO RLE {"size": [H, W], "counts": str or list}; a COCO annotation, whose "segmentation" (polygons or RLE) is used, or else its
    "bbox" [x, y, width, height]. name: the name of the source in errors.
    mask_threshold: the least value in the mask of a mask image; by default, as `pixels_in_mask` decides.
    Raises PromptError, one line, for anything else, and for prompts outside the image or masks of another size.
    """
    name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "prompts")
    try:
        if isinstance(source, str | os.PathLike | bytes):
            source = _read_file(source, name, mask_threshold)
        if isinstance(source, np.ndarray):
            return _masks_to_prompts([_check_mask(source, height, width)])
        if isinstance(source, Prompts):
            return _validated(source, height, width)
        if not isinstance(source, Mapping):
            raise PromptError(
                f"is {_type_name(source)}; give an object with some of {', '.join(_PROMPT_KEYS)}, or a COCO RLE or annotation"
            )
        return _parse_json(source, height, width)
    except (PromptError, GeometryError, ImageError) as error:
        message = str(error)
        raise PromptError(message if message.startswith(f"{name}: ") else f"{name}: {message}") from None


def join_prompts(parts: Iterable[Prompts]) -> Prompts:
    """All prompts of several sources, in order."""
    parts = list(parts)
    points = [np.asarray(p.points, np.float64).reshape(-1, 3) for p in parts]
    boxes = [np.asarray(p.boxes, np.float64).reshape(-1, 4) for p in parts]
    scribbles = [s for p in parts for s in p.scribbles]
    return Prompts(np.concatenate([np.zeros((0, 3)), *points]), np.concatenate([np.zeros((0, 4)), *boxes]), scribbles)


def _read_file(source: str | os.PathLike | bytes, name: str, mask_threshold: float | None) -> Any:
    """The content of a JSON file, or the mask, bool [H, W], of an image. No image format begins like JSON."""
    if isinstance(source, bytes):
        head, size = source[:64], len(source)
    else:
        try:
            with open(source, "rb") as file:
                head, size = file.read(64), os.fstat(file.fileno()).st_size
        except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
            raise PromptError(f"{getattr(error, 'strerror', None) or 'cannot be opened'}; give a JSON file or a mask image") from None
    if not size:
        raise PromptError("is empty")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"{", b"["):
        return decode_mask(source, threshold=mask_threshold, name=name)
    if size > MAX_BYTES:
        raise PromptError(f"is a JSON file of {size} bytes; the limit is {MAX_BYTES}: save large masks as PNG")
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read()
    try:
        return json.loads(source.decode("utf-8-sig"))
    except RecursionError:
        raise PromptError("is nested too deeply") from None
    except ValueError as error:
        raise PromptError(f"is not JSON ({error})") from None


def _parse_json(content: Mapping, height: int, width: int) -> Prompts:
    keys = [key for key in content if content[key] is not None]
    if "counts" in keys:
        _check_keys(keys, _RLE)
        return _masks_to_prompts([_decode_rle(content, height, width)])
    if any(key in keys for key in _COCO):
        _check_keys(keys, (*_COCO, *_COCO_OTHER))
        if "segmentation" in keys:
            return _masks_to_prompts([decode_segmentation(content["segmentation"], height, width)])
        x, y, w, h = _numbers(content["bbox"], "bbox", _FORMS["bbox"], (4,))
        return Prompts(boxes=validate_boxes(np.array([[x, y, x + w, y + h]]), height, width))
    _check_keys(keys, _PROMPT_KEYS)
    lists = {key: _as_list(content[key], key, _FORMS[key]) for key in keys}
    if (count := sum(map(len, lists.values()))) > MAX_PROMPTS:
        raise PromptError(f"has {count} prompts; the limit is {MAX_PROMPTS}, and that of the model is lower")
    points = [(_numbers(p, "points", _FORMS["points"], (2, 3)) + [1.0])[:3] for p in lists.get("points", [])]
    boxes = [_numbers(b, "boxes", _FORMS["boxes"], (4,)) for b in lists.get("boxes", [])]
    scribbles = [np.array(_parse_scribble(s)) for s in lists.get("scribbles", [])]
    prompts = _validated(Prompts(np.array(points).reshape(-1, 3), np.array(boxes).reshape(-1, 4), scribbles), height, width)
    return join_prompts([prompts, _masks_to_prompts([_decode_rle(m, height, width) for m in lists.get("masks", [])])])


def _check_keys(keys: Iterable[Any], known: Iterable[str]) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key[:40] if isinstance(key, str) else "", known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise PromptError(f"{_abbreviated(key)} is unknown; {remedy}")


def _masks_to_prompts(masks: Iterable[np.ndarray]) -> Prompts:
    return join_prompts([prompts_from_mask(mask) for mask in masks])


def _validated(prompts: Prompts, height: int, width: int) -> Prompts:
    return Prompts(
        validate_points(prompts.points, height, width),
        validate_boxes(prompts.boxes, height, width),
        validate_scribbles(prompts.scribbles, height, width),
    )


def _check_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    if mask.dtype != bool or mask.ndim != 2:
        raise PromptError(f"is an array {mask.dtype}{list(mask.shape)}; give bool [height, width], such as array > 0")
    _same_size(*mask.shape, height, width)
    return mask


def _same_size(rows: int, columns: int, height: int, width: int) -> None:
    if (rows, columns) != (height, width):
        raise PromptError(f"a mask has {columns}x{rows} pixels, the image {width}x{height}; give a mask of the image's size")


def _decode_rle(rle: Any, height: int, width: int) -> np.ndarray:
    """A COCO RLE as bool [H, W]. It is decoded here because pycocotools reads beyond the end of a damaged RLE."""
    if not isinstance(rle, Mapping) or not all(key in rle for key in _RLE):
        raise PromptError(f"a mask is {_type_name(rle)}; give a COCO RLE with size [height, width] and counts")
    _check_keys(rle, _RLE)
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(_is_count(side) for side in size):
        raise PromptError(f"size: is {_abbreviated(size)}; give [height, width] in pixels")
    _same_size(*size, height, width)
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if isinstance(counts, str):
        counts = _decompress_counts(counts)
    if not isinstance(counts, list | tuple) or not all(_is_count(run) for run in counts):
        raise PromptError("counts: give COCO's string, or a list of nonnegative integers")
    if sum(counts) != height * width:
        raise PromptError(f"counts: cover {_abbreviated(sum(counts))} pixels; the image has {width}x{height}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _decompress_counts(text: str) -> list[int]:
    """The runs of COCO's compressed string: signed numbers of 5 bits per character, lowest first, with 32 as continuation bit; from the
    fourth run on, the difference to the run before the previous one."""
    if not re.fullmatch("(?:[P-o]{0,6}[0-O])*", text):
        raise PromptError("counts: is not a compressed COCO string")
    runs: list[int] = []
    for group in re.findall("[P-o]*[0-O]", text):
        codes = [ord(character) - 48 for character in group]
        value = sum((code & 31) << 5 * place for place, code in enumerate(codes))
        value -= (codes[-1] & 16) << 5 * len(codes) - 4
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def decode_segmentation(value: Any, height: int, width: int) -> np.ndarray:
    """The union of polygons [[x, y, x, y, …], …], or an RLE, as bool [H, W]."""
    if isinstance(value, Mapping):
        return _decode_rle(value, height, width)
    form = "polygons [[x, y, x, y, x, y, …], …] or a COCO RLE"
    polygons = _as_list(value, "segmentation", form)
    if not 1 <= len(polygons) <= MAX_PROMPTS:
        raise PromptError(f"segmentation: has {len(polygons)} polygons; give 1 to {MAX_PROMPTS}")
    rings = []
    for polygon in polygons:
        numbers = np.array(_numbers(polygon, "segmentation", form, range(6, 2 * MAX_VERTICES + 1, 2)))
        # COCO's polygons count from the corner of the first pixel. Its rasteriser allocates memory for points outside the image.
        if not ((numbers >= -1) & (numbers <= np.tile([width + 1, height + 1], len(numbers) // 2))).all():
            raise PromptError(f"segmentation: a polygon exceeds the image of {width}x{height} pixels")
        rings.append(np.clip(numbers, 0, np.tile([width, height], len(numbers) // 2)).tolist())
    return coco.decode(coco.merge(coco.frPyObjects(rings, height, width))).astype(bool)


def _parse_scribble(value: Any) -> list[list[float]]:
    vertices = _as_list(value, "scribbles", _FORMS["scribbles"])
    if not 1 <= len(vertices) <= MAX_VERTICES:
        raise PromptError(f"scribbles: one has {len(vertices)} points; give 1 to {MAX_VERTICES}")
    return [_numbers(vertex, "scribbles", _FORMS["scribbles"], (2,)) for vertex in vertices]


def _as_list(value: Any, what: str, form: str) -> list | tuple:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise PromptError(f"{what}: is {_type_name(value)}; give {form}")
    return value


def _numbers(value: Any, what: str, form: str, counts: Iterable[int]) -> list[float]:
    values = _as_list(value, what, form)
    if len(values) not in counts:
        raise PromptError(f"{what}: has {len(values)} numbers; give {form}")
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float | np.integer | np.floating) or not -1e9 <= number <= 1e9:
            raise PromptError(f"{what}: {_abbreviated(number)} is not a finite number; give {form}")
    return [float(number) for number in values]


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= value < 2**40


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _abbreviated(value: Any) -> str:
    """A value as one short line, for errors."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:  # Python refuses to print very long integers
        return f"a number of about {math.floor(value.bit_length() * 0.30103) + 1} digits"
    text = " ".join(ascii(value).split()) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
