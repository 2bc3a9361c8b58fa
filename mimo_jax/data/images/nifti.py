"""Reads images from NIfTI files: one slice, or all along an axis, as a radiologist sees them.

Axis letters: F slices, H, W height and width of the image in pixels; i, j, k axes of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.data.images.grey_values import Limits, ValueCounts, grey_levels
from mimo_jax.data.images.image import (
    MedicalImage,
    NiftiGrid,
    Volume,
    Window,
    check_size,
    file_stamp,
    import_medical,
    nearest_axes,
    open_unpacked,
    window_limits,
)
from mimo_jax.data.images.orientation import PLANES, display_of
from mimo_jax.data.transforms import MAX_PIXELS
from mimo_jax.errors import UserError

_AXES = "ijk"
_PART = 2**20  # voxels read at once where only their grey values count
_MM = {"meter": 1000.0, "micron": 0.001}  # length units of NIfTI files; all others are treated as mm


def open_slice(path: Path, slice: str | None, window: Window) -> MedicalImage:
    """One slice of a NIfTI file; see `open_image`."""
    with _reading(path) as image:
        axis, index = _parse_slice(path, slice, *_axes(image))
        grid = _grid(path, image, axis, index)
        where = [np.s_[:]] * 3 + [0] * len(image.shape[3:])
        where[axis] = index
        plane = np.asarray(image.dataobj[tuple(where[: len(image.shape)])], np.float64)  # nibabel applies slope and intercept
        plane = plane.reshape(np.delete((*image.shape, 1)[:3], axis))
        limits = window_limits(window) or _limits_of_file(path, file_stamp(path))
        return _to_image(grid, plane, _steps(image), limits)


def open_slices(path: Path, axis: str | None, window: Window) -> Volume:
    """All slices along an axis of a NIfTI file; see `open_volume`. The stored values stay in memory, unscaled."""
    with _reading(path) as image:
        shape, worlds = _axes(image)
        across = _axis(axis or "axial", worlds)
        if across is None:
            raise UserError(f"axis {axis}: give i, j, k, {', '.join(reversed(PLANES))}")
        grid = _grid(path, image, across, 0)
        height, width = grid.display.swap(tuple(np.delete(shape, across).tolist()))
        check_size(path, shape[across], height, width)
        stored = np.moveaxis(image.dataobj.get_unscaled().reshape(shape), across, 0)
        scaling, steps = (image.dataobj.slope, image.dataobj.inter), _steps(image)
        scaled = import_medical("nibabel.volumeutils").apply_read_scaling
        limits = window_limits(window) or _limits(path, stored, scaling)

    def load_slice(k: int) -> MedicalImage:
        values = np.asarray(scaled(stored[k], *scaling), np.float64)
        return _to_image(replace(grid, index=k), values, steps, limits)

    between, rows, columns = steps[across], *_spacing(grid, steps)
    voxel = float(abs(np.linalg.det(grid.affine[:3, :3])) * np.prod(steps / np.linalg.norm(grid.affine[:3, :3], axis=0)))
    grids = [replace(grid, index=k) for k in range(shape[across])]
    return Volume((height, width), grids, load_slice, (float(between), rows, columns), voxel, [path])


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """nibabel's image; any failure while it is read becomes a UserError of one line."""
    nibabel = import_medical("nibabel")
    with open_unpacked(path) as stream:
        try:
            head = stream.read(8)
            stream.seek(0)
            image = (nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image).from_stream(stream)
            _check_nifti(path, image)
            yield image
        except UserError:
            raise
        except Exception as error:  # nibabel, gzip and numpy raise various errors
            raise UserError(f"{path}: a damaged or truncated NIfTI file ({type(error).__name__})") from None


@lru_cache(maxsize=64)
def _limits_of_file(path: Path, stamp: object) -> Limits:
    """The limits of all voxels of a file, read in parts. stamp: `file_stamp` of the file, so that a changed one is read again."""
    fileslice = import_medical("nibabel.fileslice").fileslice
    with _reading(path) as image:
        data = image.dataobj
        step = max(1, _PART // max(1, int(np.prod(data.shape[:-1]))))
        parts = (np.s_[..., start : start + step] for start in range(0, data.shape[-1], step))
        stored = (fileslice(data.file_like, part, data.shape, data.dtype, data.offset, order="F") for part in parts)
        return _limits(path, stored, (data.slope, data.inter))


def _limits(path: Path, parts: Iterable[np.ndarray], scaling: tuple[float, float]) -> Limits:
    """The limits of stored values."""
    scaled, counts = import_medical("nibabel.volumeutils").apply_read_scaling, ValueCounts()
    for part in parts:
        counts.add(part, lambda values: scaled(values, *scaling))
    limits = counts.limits()
    if limits is None:
        raise UserError(f"{path}: has no finite value")
    return limits


def _to_image(grid: NiftiGrid, plane: np.ndarray, steps: np.ndarray, limits: Limits) -> MedicalImage:
    """The image of a plane of the file, float64 and scaled."""
    grey = grid.display.turn(grey_levels(plane, limits))
    return MedicalImage(np.repeat(grey[:, :, None], 3, axis=2), _spacing(grid, steps), grid)


def _steps(image: Any) -> np.ndarray:
    """Distance of neighbouring voxels along i, j, k in mm, float64 [3]."""
    return np.linalg.norm(image.affine[:3, :3], axis=0) * _MM.get(image.header.get_xyzt_units()[0], 1.0)


def _spacing(grid: NiftiGrid, steps: np.ndarray) -> tuple[float, float]:
    """Distance of neighbouring rows and of neighbouring columns of an image in mm."""
    first, second = np.delete(steps, grid.axis).tolist()
    return grid.display.swap((first, second))


def _check_nifti(path: Path, image: Any) -> None:
    kind, affine = image.get_data_dtype().kind, image.affine
    if kind not in "iufb":
        raise UserError(f"{path}: has {'complex numbers' if kind == 'c' else 'colours'}; save it with one real number per voxel")
    if len(image.shape) < 2 or 0 in image.shape or any(n > 1 for n in image.shape[3:]):
        raise UserError(f"{path}: is {len(image.shape)}-D {list(image.shape)}; save one volume of it as a 3-D file")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) <= 1e-6 * np.prod(np.linalg.norm(affine[:3, :3], axis=0)):
        raise UserError(f"{path}: its affine maps all voxels into one plane, so the orientation is unknown; fix its header")


def _axes(image: Any) -> tuple[tuple[int, ...], list[int]]:
    """(shape as 3-D; the nearest world axis of each file axis)."""
    return (*image.shape, 1)[:3], [int(world) for world in nearest_axes(image.affine)[:, 0]]


def _grid(path: Path, image: Any, axis: int, index: int) -> NiftiGrid:
    shape = (*image.shape, 1)[:3]
    first, second = (a for a in range(3) if a != axis)
    display = display_of(nearest_axes(image.affine), first, second)
    height, width = display.swap((shape[first], shape[second]))
    if height * width > MAX_PIXELS:
        raise UserError(f"{path}: a slice of {width}x{height} pixels; the limit is {MAX_PIXELS} in all")
    return NiftiGrid(image.shape, image.header, image.affine, axis, index, display)


def _axis(name: str, worlds: list[int]) -> int | None:
    """The file axis of i, j, k or a plane's name; None for other names."""
    name = name.lower()
    return worlds.index(PLANES[name]) if name in PLANES else _AXES.index(name) if name in tuple(_AXES) else None


def _parse_slice(path: Path, slice: str | None, shape: tuple[int, ...], worlds: list[int]) -> tuple[int, int]:
    """(file axis, index) of "AXIS:INDEX"; without it, those of the only slice."""
    near = {worlds.index(world): name for name, world in PLANES.items()}
    counts = ", ".join(f"{_AXES[a]} (near {near[a]}) has {shape[a]}" for a in range(3))
    if slice is None:
        if 1 not in shape:
            raise UserError(f"{path}: is a volume; choose a slice, such as slice k:{shape[2] // 2}: {counts}")
        return max(a for a in range(3) if shape[a] == 1), 0
    match = re.fullmatch(r"([a-z]+):(\d+)", slice.lower())
    axis = _axis(match[1], worlds) if match else None
    if not match or axis is None:
        raise UserError(f"slice {slice}: write AXIS:INDEX, AXIS one of i, j, k, {', '.join(reversed(PLANES))}, such as axial:30")
    if int(match[2]) >= shape[axis]:
        raise UserError(f"{path}: slice {slice} does not exist, counted from 0: {counts}")
    return axis, int(match[2])
