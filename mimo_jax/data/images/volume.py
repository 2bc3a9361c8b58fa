"""Opens whole scans: all slices of a NIfTI file, a folder of DICOM files, or a multi-frame DICOM file."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from mimo_jax.data.images.image import MedicalImage, Volume, Window, check_window, file_kind, local_path, warn_of
from mimo_jax.data.images.nifti import open_slices
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.orientation import PLANES
from mimo_jax.data.images.series import open_frames, open_series
from mimo_jax.errors import UserError


def open_volume(path: str | os.PathLike, *, axis: str | None = None, series: int | None = None, window: Window = None) -> Volume:
    """All slices of a scan, loaded one at a time; formats are recognised by content.

    Each slice is the image that `open_image` gives of it alone.

    NIfTI: every slice along `axis` (axial, coronal, sagittal, i, j, k; default axial). A compressed file is decompressed once and its
    stored values stay in memory.

    Folder: the DICOM files of one series, sorted by position along the normal of the slices (or by InstanceNumber if they have no
    position). Other files are skipped, damaged ones with a warning. `series` chooses one of several series (or sizes, or directions),
    counted from 1; without it, an error lists them. Warns of gaps and of slices with the same position.

    DICOM file: all frames in their order. Every DICOM image is decoded once here, so that damage is found before any further work.

    Raises UserError for files that cannot be read, for a missing or wrong choice, and beyond MAX_SLICES or MAX_VOXELS.
    """
    check_window(window)
    path = local_path(path)
    kind = "folder" if path.is_dir() else file_kind(path)
    if series is not None and kind != "folder":
        raise UserError(f"{path}: is not a folder; omit series {series}")
    if axis is not None and kind != "NIfTI":
        raise UserError(f"{path}: is not a NIfTI volume; omit axis {axis}, DICOM slices stay in the plane of their acquisition")
    if kind == "NIfTI":
        return open_slices(path, axis, window)
    if kind == "picture":
        raise UserError(f"{path}: is one image, not a volume; give a NIfTI file, a multi-frame DICOM file, or a folder of DICOM files")
    volume = open_series(path, series, window) if kind == "folder" else open_frames(path, window)
    warn_of(volume)
    return volume


def open_scan(
    path: str | os.PathLike, *, frame: int | str | None = None, slice: str | None = None, series: int | None = None, window: Window = None
) -> MedicalImage | Volume:
    """The Volume or image that a command line selects: a Volume for a folder, frame "all" or slice "AXIS:all", else one image.

    In a folder, slice "INDEX" or "PLANE:INDEX" selects one slice, counted from 0 in the order of `open_volume`; PLANE must be the plane
    nearest to the slices. Raises UserError as `open_image` and `open_volume` do.
    """
    path = local_path(path)
    if path.is_dir():
        if frame is not None:
            raise UserError(f"{path}: is a folder; omit frame {frame}, or select a slice instead")
        volume = open_volume(path, series=series, window=window)
        index = None if slice is None else _index(path, volume, slice)
        return volume if index is None else replace(volume[index], warnings=volume.warnings)
    axis = re.fullmatch(r"(\w+):all", slice, re.IGNORECASE) if slice else None
    if axis and frame is None:
        return open_volume(path, axis=axis[1].lower(), series=series, window=window)
    if frame == "all" and slice is None:
        if file_kind(path) != "DICOM":
            raise UserError(f"{path}: is not a DICOM file; omit frame all")
        return open_volume(path, series=series, window=window)
    if series is not None:
        raise UserError(f"{path}: is not a folder; omit series {series}")
    if isinstance(frame, str):
        raise UserError(f"{path}: choose a frame or a slice, not both")
    return open_image(path, frame=frame, slice=slice, window=window)


def _index(path: Path, volume: Volume, slice: str) -> int | None:
    """The index of the selected slice of a DICOM series; None for all."""
    match = re.fullmatch(r"(?:([a-z]+):)?(\d+|all)", slice.lower())
    if not match or match[1] not in (None, *PLANES):
        raise UserError(f"slice {slice}: for a folder, write INDEX or PLANE:INDEX, such as 30 or axial:30")
    plane = volume.grids[0].display.plane
    if match[1] and match[1] != plane:
        what = f"are {plane}" if plane else "have no known plane"
        raise UserError(f"{path}: its slices {what}, and DICOM slices stay in the plane of their acquisition; write slice {match[2]}")
    if match[2] == "all":
        return None
    if int(match[2]) >= len(volume):
        raise UserError(f"{path}: slice {slice} does not exist; it has {len(volume)}, counted from 0")
    return int(match[2])
