"""Whole scans: all slices of a NIfTI file, of a folder of DICOM files, of a DICOM file of several frames."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from mimo_jax.data.images.image import PLANES, MedicalImage, Volume, Window, check_window, file_kind
from mimo_jax.data.images.nifti import open_slices
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.series import open_frames, open_series
from mimo_jax.errors import UserError


def open_volume(path: str | os.PathLike, *, axis: str | None = None, series: int | None = None, window: Window = None) -> Volume:
    """All slices of a scan, shown one at a time; formats are known by content.

    NIfTI: every slice along `axis` (axial, coronal, sagittal, i, j, k; default axial), each the picture that `open_picture`
    makes of it; but without a window, all are shown with one, from the 0.5 to the 99.5 percentile of the whole volume, so that
    neighbours look alike. A packed file is unpacked once and its stored values stay in memory.

    A folder: the DICOM files of one series, sorted by their position along the normal of the slices (of InstanceNumber where
    they have none), each with its own window as in `open_picture`. Other files are passed over, damaged ones with a warning. Of
    several series (or sizes, or directions) `series` chooses one, counted from 1; without it, an error lists them. Warns of
    slices that share a place and of gaps. A DICOM file: all its frames, in their order. Every DICOM picture is decoded once
    here, so that what is damaged is known before the work.

    Raises UserError for what cannot be read or is not said, and for more than MAX_SLICES slices or MAX_VOXELS voxels.
    """
    check_window(window)
    path = Path(path)
    kind = "folder" if path.is_dir() else file_kind(path)
    if series is not None and kind != "folder":
        raise UserError(f"{path}: is no folder; leave series {series} away")
    if axis is not None and kind != "NIfTI":
        raise UserError(f"{path}: is no NIfTI volume; leave axis {axis} away, DICOM slices are seen as they were taken")
    if kind == "NIfTI":
        return open_slices(path, axis, window)
    if kind == "picture":
        raise UserError(f"{path}: is one picture, no volume; give a NIfTI file, a DICOM file of several frames, or a folder of DICOM files")
    return open_series(path, series, window) if kind == "folder" else open_frames(path, window)


def open_scan(
    path: str | os.PathLike, *, frame: int | str | None = None, slice: str | None = None, series: int | None = None, window: Window = None
) -> MedicalImage | Volume:
    """What a command line chooses of a path: a Volume for a folder, frame "all" or slice "AXIS:all", else one Picture.

    Of a folder, slice "INDEX" or "PLANE:INDEX" chooses one, counted from 0 in the order of `open_volume`; PLANE can only be the
    one nearest to the slices. Raises UserError as `open_picture` and `open_volume` do.
    """
    path = Path(path)
    if path.is_dir():
        if frame is not None:
            raise UserError(f"{path}: is a folder; leave frame {frame} away, and choose a slice if you mean one")
        volume = open_volume(path, series=series, window=window)
        index = None if slice is None else _index(path, volume, slice)
        return volume if index is None else volume[index]
    axis = re.fullmatch(r"(\w+):all", slice, re.IGNORECASE) if slice else None
    if axis and frame is None:
        return open_volume(path, axis=axis[1].lower(), series=series, window=window)
    if frame == "all" and slice is None:
        if file_kind(path) != "DICOM":
            raise UserError(f"{path}: is no DICOM file; leave frame all away")
        return open_volume(path, series=series, window=window)
    if series is not None:
        raise UserError(f"{path}: is no folder; leave series {series} away")
    if isinstance(frame, str):
        raise UserError(f"{path}: choose a frame or a slice, not both")
    return open_image(path, frame=frame, slice=slice, window=window)


def _index(path: Path, volume: Volume, slice: str) -> int | None:
    """Which slice of a DICOM series is meant; None for all."""
    match = re.fullmatch(r"(?:([a-z]+):)?(\d+|all)", slice.lower())
    if not match or match[1] not in (None, *PLANES):
        raise UserError(f"slice {slice}: of a folder, write INDEX or PLANE:INDEX, such as 30 or axial:30")
    affine = volume.grids[0].affine
    plane = None if affine is None else list(PLANES)[int(np.abs(np.cross(affine[:3, 0], affine[:3, 1])).argmax())]
    if match[1] not in (None, plane):
        what = f"are {plane}" if plane else "do not say how they lie"
        raise UserError(f"{path}: its slices {what}, and DICOM slices are seen as they were taken; write slice {match[2]}")
    if match[2] == "all":
        return None
    if int(match[2]) >= len(volume):
        raise UserError(f"{path}: slice {slice} is not there; it holds {len(volume)}, counted from 0")
    return int(match[2])
