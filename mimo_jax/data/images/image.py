"""One image, or the slices of a volume, and the position of each in the medical file that it comes from.

Axis letters: F slices, H, W height and width of an image in pixels; i, j, k axes of a NIfTI file. World axes are in mm,
RAS: x grows to the patient's right, y to the front, z to the head (DICOM's LPS is converted).
"""

from __future__ import annotations

import gzip
import importlib
import os
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mimo_jax.data.images.orientation import Display
from mimo_jax.errors import UserError

Window = str | tuple[float, float] | None
# Presets of --window as (low, high) in Hounsfield units.
WINDOWS = {
    "lung": (-1350.0, 150.0), "bone": (-450.0, 1050.0), "soft": (-160.0, 240.0),
    "brain": (0.0, 80.0), "abdomen": (-140.0, 260.0), "mediastinum": (-125.0, 225.0),
}  # fmt: skip
MAX_SLICES, MAX_VOXELS = 4096, 2**29  # of a volume; a whole body of 512 x 512 x 2000 is accepted


@dataclass(frozen=True)
class NiftiGrid:
    """The position of an image in a NIfTI file. shape: that of the file. header: nibabel's. affine: [4, 4], voxel (i, j, k) to world in
    the file's unit. The image is the plane `index` of the file axis `axis`, turned by `display`."""

    shape: tuple[int, ...]
    header: Any = field(repr=False)
    affine: np.ndarray
    axis: int
    index: int
    display: Display

    def display_view(self, volume: np.ndarray) -> np.ndarray:
        """The image's plane [H, W] of an array of the file's shape, as a view: writing to it changes the array."""
        planes = np.moveaxis(volume.reshape((*self.shape, 1)[:3]), self.axis, 0)
        return self.display.turn(planes[self.index])


@dataclass(frozen=True)
class DicomGrid:
    """The position of an image in a DICOM file. dataset: pydicom's, without pixels. frame: index from 0, of `frames`. affine: [4, 4],
    (column, row, 0) of the frame as it is stored to world in mm, None if the file does not give the position in the patient. The image
    is the frame, turned by `display`."""

    dataset: Any = field(repr=False)
    frame: int
    frames: int
    affine: np.ndarray | None
    display: Display

    @property
    def stored_size(self) -> tuple[int, int]:
        """(rows, columns) of the frame as it is stored."""
        return int(self.dataset.Rows), int(self.dataset.Columns)


Grid = NiftiGrid | DicomGrid


@dataclass(frozen=True)
class MedicalImage:
    """pixels: uint8 RGB [H, W, 3]. spacing_mm: distance of neighbouring rows and of neighbouring columns, None if unknown.
    grid: position in the medical file, None for other image files. warnings: what was decided about the file and may be wrong, such as
    how its values are displayed, a line each."""

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None = None
    grid: Grid | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Volume(Sequence[MedicalImage]):
    """The slices of one scan, all of one size, as a sequence; `volume[k]` renders slice k again each time.

    size: (H, W). grids: position of each slice. load_slice: index -> image. spacing_mm: distance of neighbouring slices, rows and
    columns; voxel_mm3: volume of a voxel in mm³; both None if the files do not give them or the slices are not evenly spaced. files:
    those of the slices. num_skipped: number of files of the folder that have no image or cannot be read. warnings: as in `MedicalImage`.
    """

    size: tuple[int, int]
    grids: Sequence[Grid]
    load_slice: Callable[[int], MedicalImage] = field(repr=False)
    spacing_mm: tuple[float, float, float] | None
    voxel_mm3: float | None
    files: Sequence[Path] = field(repr=False)
    num_skipped: int = 0
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, k: int) -> MedicalImage:
        return self.load_slice(range(len(self))[k])


def warn_of(opened: MedicalImage | Volume) -> None:
    """Issue the warnings of an image or volume that was opened, for the caller of the function that opened it."""
    for line in opened.warnings:
        warnings.warn(line, stacklevel=3)


def parse_window(text: str) -> str | tuple[float, float]:
    """A name unchanged (`check_window` checks it), or "LOW,HIGH" as two numbers. Raises UserError for other text."""
    if text.isalpha():
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not LOW,HIGH such as -160,240, or a name such as lung") from None
    return low, high


def check_window(window: Window) -> None:
    """Raise UserError for a name that is not in WINDOWS, or unless LOW < HIGH."""
    if isinstance(window, str):
        if window.lower() not in WINDOWS:
            raise UserError(f"window {window}: is unknown; give LOW,HIGH or one of {', '.join(WINDOWS)}")
    elif window is not None and not (len(window) == 2 and np.isfinite(window).all() and window[0] < window[1]):
        raise UserError(f"window {','.join(f'{v:g}' for v in window)}: give two numbers LOW,HIGH with LOW < HIGH")


def window_limits(window: Window) -> tuple[float, float] | None:
    """(low, high) of a valid window; None for None."""
    return WINDOWS[window.lower()] if isinstance(window, str) else window


def check_size(path: Path, slices: int, height: int, width: int) -> None:
    """Raise UserError for a volume beyond MAX_SLICES or MAX_VOXELS."""
    if slices > MAX_SLICES or slices * height * width > MAX_VOXELS:
        raise UserError(f"{path}: {slices} slices of {width}x{height}; the limits are {MAX_SLICES} slices and {MAX_VOXELS} voxels")


def local_path(path: str | os.PathLike) -> Path:
    """The path of a file or folder. Raises UserError for a URL."""
    if re.match("(https?|ftp)://", os.fspath(path)):
        raise UserError(f"{path}: is a URL; download the file first, then name it")
    return Path(path)


def file_kind(path: Path) -> str:
    """ "DICOM", "NIfTI" or "picture" (any other), by the first bytes. Raises UserError if the file cannot be read."""
    try:
        with open_unpacked(path) as file:
            head = file.read(352)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'a damaged or truncated gzip file'}") from None
    if head[128:132] == b"DICM":
        return "DICOM"
    if b"ni1\0" == head[344:348] or b"ni2\0" == head[4:8]:
        raise UserError(f"{path}: is the header of a .hdr/.img pair; save both as one .nii.gz")
    if b"n+1\0" == head[344:348] or b"n+2\0" == head[4:8]:
        return "NIfTI"
    # Without preamble and magic, a DICOM file begins with an element of group 2 or 8; no image format does.
    return "DICOM" if head[:2] in (b"\x02\0", b"\x08\0") else "picture"


def open_unpacked(path: Path) -> BinaryIO:
    """A file opened for reading, decompressed if it is gzip."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")


def file_stamp(path: Path) -> tuple[int, int]:
    """What changes if a file is written again, for caches. Raises UserError if the file cannot be read."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


def nearest_axes(affine: np.ndarray) -> np.ndarray:
    """[3, 2]: nibabel's orientation of the file axes of an affine [4, 4]. Directions are rounded, so that slices of one scan between two
    planes, whose headers differ in the last digit, have the same one."""
    rounded = np.eye(4)
    rounded[:3, :3] = np.round(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0), 3)
    return import_medical("nibabel").io_orientation(rounded)


def import_medical(name: str) -> Any:
    """A module of the extra `medical`. Raises UserError with the remedy if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{name} is not installed, which medical files need: pip install "mimo_jax[medical]"') from None
