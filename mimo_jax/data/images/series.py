"""Reads the slices of one series from a folder of DICOM files, in the order of their position in the patient.

Files that are not images to ask about (other formats, a DICOMDIR, reports, segmentations) or that cannot be read are skipped.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.data.images.dicom import STEP_TOLERANCE, DamagedError, DicomFile, directions_and_position, get_value, reading, stack_affine
from mimo_jax.data.images.grey_values import Limits, ValueCounts
from mimo_jax.data.images.image import (
    DicomGrid,
    MedicalImage,
    Volume,
    Window,
    check_size,
    file_kind,
    file_stamp,
    import_medical,
)
from mimo_jax.errors import UserError

_TAGS = (
    "SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "Rows", "Columns", "NumberOfFrames", "ImageOrientationPatient",
    "ImagePositionPatient",
)  # fmt: skip
_DERIVED_MODALITIES = ("SEG", "RTDOSE")  # modalities whose pixels are derived from an image
_SLICES = ("CT", "MR", "PT")  # modalities of which one file is a part of a scan
_BURNED_IN = "may contain burned-in text, such as a patient's name"
ALONE = "the grey values follow this slice alone: no window is in the file"
_MAX_KNOWN = 64
_known_limits: dict[tuple, Limits] = {}  # of the scans of single images, by their files and stamps
_SKIP_REASONS = {"other": "not DICOM", "no image": "without an image to ask about", "damaged": "damaged or unreadable"}


class SeriesError(UserError):
    """The folder has several series; the message lists one per line after the first line."""

    listing = True


@dataclass
class _Series:
    """Files whose images have the same series, size and direction; a multi-frame file is a series by itself."""

    uid: str
    number: float
    modality: str
    size: tuple[int, int]
    directions: np.ndarray | None
    frames: int
    files: list[Path] = field(default_factory=list)

    def accepts(self, other: _Series) -> bool:
        matches = (self.uid, self.size, self.frames) == (other.uid, other.size, other.frames) and self.frames == 1
        if self.directions is None or other.directions is None:
            return matches and self.directions is other.directions
        return matches and np.abs(self.directions - other.directions).max() < 1e-3

    def describe(self) -> str:
        images = self.frames * len(self.files)
        return f"{images} image{'s' * (images != 1)}, {self.modality or 'modality unknown'}, {self.size[1]}x{self.size[0]}"


def open_series(folder: Path, number: int | None, window: Window) -> Volume:
    """A series of a folder as a Volume; see `open_volume`."""
    found, skipped = _scan(folder)
    if not found:
        reasons = ", ".join(f"{count} {_SKIP_REASONS[kind]}" for kind, count in skipped.items())
        pictures = f", or ask about a folder of pictures with mimo batch --in {folder}" * (skipped["other"] > 0)
        raise UserError(
            f"{folder}: has no DICOM image that can be read ({reasons or 'no file at all'}); give the folder of one series{pictures}"
        )
    if number is None and len(found) > 1:
        head = f"{folder}: has {len(found)} series, sizes or directions; choose one with series=N (--series N)"
        raise SeriesError("\n  ".join([head, *(f"{n}: {series.describe()}" for n, series in enumerate(found, 1))]))
    if number is not None and not 1 <= number <= len(found):
        raise UserError(f"{folder}: series {number} does not exist; it has {len(found)}, counted from 1")
    chosen = found[(number or 1) - 1]
    if chosen.frames > 1:
        volume = open_frames(chosen.files[0], window)
    else:
        check_size(folder, len(chosen.files), *chosen.size)
        slices, limits, lines = _read(folder, chosen.files, window, skipped)
        volume = _volume([path for path, _ in slices], [grid for _, grid in slices], window, limits, lines)
    damaged = [f"skipped damaged or unreadable files: {skipped['damaged']}; slices may be missing"] * bool(skipped["damaged"])
    return replace(volume, num_skipped=skipped.total(), warnings=(*volume.warnings, *damaged))


def open_frame(path: Path, frame: int | None, window: Window) -> MedicalImage:
    """One frame of a DICOM file; see `open_image`."""
    file = DicomFile(path)
    if frame is None and file.frames > 1:
        raise UserError(f"{path}: has {file.frames} frames; choose one, frame 0 to {file.frames - 1}")
    frame = frame or 0
    if not 0 <= frame < file.frames:
        raise UserError(f"{path}: frame {frame} does not exist; it has {file.frames}, counted from 0")
    files: list[Path] = []  # those whose grey values count, if they do

    def scan_limits() -> Limits:
        files[:] = [path] if file.frames > 1 else _series_beside(path)
        return _limits_of_files(file, files)

    image = file.image(frame, window, scan_limits)
    is_slice = file.position(frame) or get_value(file.header, "Modality") in _SLICES
    lines = [f"the image {_BURNED_IN}"] * file.may_have_burned_in_text()
    if len(files) == 1 and file.frames == 1 and is_slice:
        lines.insert(0, f"{ALONE}; give --window, or put the other files of its series into its folder")
    return replace(image, warnings=tuple(lines))


def open_frames(path: Path, window: Window) -> Volume:
    """All frames of a DICOM file as a Volume, in order."""
    file = DicomFile(path)
    check_size(path, file.frames, *file.size)
    lines = _burned_in(file.may_have_burned_in_text())
    counts = ValueCounts()
    needed = [_check_frame(file, frame, window, counts) for frame in range(file.frames)]
    grids = [file.grid(frame) for frame in range(file.frames)]
    if len({grid.display.swap(file.size) for grid in grids}) > 1:
        raise UserError(f"{path}: its frames have several directions, and sizes once they are turned; choose one, such as frame 0")
    return _volume([path] * file.frames, grids, window, _limits(path, counts) if any(needed) else None, lines, file)


def _scan(folder: Path) -> tuple[list[_Series], Counter]:
    """(the series of a folder, sorted by number; how many files were skipped, by reason)."""
    found: dict[tuple, list[_Series]] = defaultdict(list)  # by what is compared most quickly
    skipped = Counter[str]()
    import_medical("pydicom")  # if it is missing, files are not to blame
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        try:
            if file_kind(path) != "DICOM":
                skipped["other"] += 1
                continue
            header = _header(path)
        except UserError:
            skipped["damaged"] += 1
            continue
        if header is None:
            skipped["no image"] += 1
            continue
        alike = found[header.uid, header.size]
        match = next((series for series in alike if series.accepts(header)), header)
        if match is header:
            alike.append(header)
        match.files.append(path)
    return sorted(itertools.chain(*found.values()), key=lambda series: series.number), skipped


def _header(path: Path) -> _Series | None:
    """The series of one file, without any files yet; None if the file has no image to ask about."""
    pydicom = import_medical("pydicom")
    with reading(path):
        ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS), force=True)
        if not ds.get("Rows") or not ds.get("Columns"):
            kind = pydicom.uid.UID(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "").name
            if not kind or "Image Storage" in kind:
                raise DamagedError(f"{path}: truncated before its image")
            return None
        if ds.get("Modality") in _DERIVED_MODALITIES:
            return None
        position = directions_and_position(ds)
        number = float("inf") if ds.get("SeriesNumber") is None else float(ds.SeriesNumber)
        size, frames = (int(ds.Rows), int(ds.Columns)), int(ds.get("NumberOfFrames") or 1)
        uid, modality = str(ds.get("SeriesInstanceUID") or ""), str(ds.get("Modality") or "")
        return _Series(uid, number, modality, size, position and position[0], frames)


def _read(
    folder: Path, files: Sequence[Path], window: Window, skipped: Counter
) -> tuple[list[tuple[Path, DicomGrid]], Limits | None, list[str]]:
    """(the readable files with their grids, sorted; the limits of all, if a slice needs them; warnings). All are decoded here, so that
    damage is found before any further work."""
    slices, text, needed, counts = [], False, False, ValueCounts()
    for path in files:
        try:
            file = DicomFile(path)
            needed |= _check_frame(file, 0, window, counts)
            slices.append((path, file.grid(0)))
            text |= file.may_have_burned_in_text()
        except DamagedError:
            skipped["damaged"] += 1
    if not slices:
        raise UserError(f"{folder}: all {len(files)} images are damaged or truncated; copy them again from their origin")
    slices, lines = _sorted(slices)
    return slices, _limits(folder, counts) if needed else None, _burned_in(text) + lines


def _check_frame(file: DicomFile, frame: int, window: Window, counts: ValueCounts) -> bool:
    """Decode a frame, so that damage or a wrong choice is found, and count its values; whether it needs the limits of its scan."""
    asked = []

    def unknown() -> Limits:
        asked.append(frame)
        return 0.0, 1.0

    file.image(frame, window, unknown)
    if window is None and file.is_grey:
        file.count_values(frame, counts)
    return bool(asked)


def _limits_of_files(file: DicomFile, files: list[Path]) -> Limits:
    """The limits of all frames of `files`, of which `file` is one; others that cannot be read do not count."""
    key = tuple((path, file_stamp(path)) for path in files)
    limits = _known_limits.get(key)
    if limits is None:
        counts = ValueCounts()
        for path in files:
            try:
                each = file if path == file.path else DicomFile(path)
                for frame in range(each.frames if each.is_grey else 0):
                    each.count_values(frame, counts)
            except UserError:
                if path == file.path:
                    raise
        limits = _limits(file.path, counts)
        if len(_known_limits) >= _MAX_KNOWN:
            _known_limits.clear()
        _known_limits[key] = limits
    return limits


def _series_beside(path: Path) -> list[Path]:
    """The files of the series of a file in its folder."""
    stamps = tuple(sorted((entry.name, *file_stamp(Path(entry.path))) for entry in os.scandir(path.parent) if entry.is_file()))
    return next((series.files for series in _series_of_folder(path.parent, stamps) if path in series.files), [path])


@lru_cache(maxsize=4)
def _series_of_folder(folder: Path, stamps: tuple) -> list[_Series]:
    """The series of a folder. stamps: name and `file_stamp` of its files, so that a changed folder is read again."""
    return _scan(folder)[0]


def _limits(path: Path, counts: ValueCounts) -> Limits:
    limits = counts.limits()
    if limits is None:
        raise UserError(f"{path}: has no finite value")
    return limits


def _sorted(slices: list[tuple[Path, DicomGrid]]) -> tuple[list[tuple[Path, DicomGrid]], list[str]]:
    """(the slices by position along their normal, else by InstanceNumber, else by file name; warnings)."""
    lines = []
    positions = [directions_and_position(grid.dataset) for _, grid in slices]
    if all(positions):
        directions = positions[0][0]
        keys: list[Any] = [position @ np.cross(directions[:3], directions[3:]) for _, position in positions]
    else:
        keys, how = [get_value(grid.dataset, "InstanceNumber") for _, grid in slices], "InstanceNumber"
        if not all(isinstance(key, int) for key in keys):
            keys, how = [path.name for path, _ in slices], "file name"
        if len(slices) > 1:
            lines = [f"the files do not give the positions of their slices; they are sorted by {how}"]
    return [slices[n] for n in sorted(range(len(slices)), key=keys.__getitem__)], lines


def _volume(
    files: list[Path], grids: list[DicomGrid], window: Window, limits: Limits | None, lines: list[str], file: DicomFile | None = None
) -> Volume:
    """limits: those of the scan, if a slice needs them. lines: warnings so far. file: the open file of all slices; without it, each of
    `files` is read when its slice is loaded."""
    affine = stack_affine(grids)
    if affine is None:
        lines = lines + _gaps(grids)
    known = affine is not None and len(grids) > 1
    between, rows, columns = (float(np.linalg.norm(affine[:3, n])) for n in (2, 1, 0)) if known else (0, 0, 0)
    display = grids[0].display

    def load_slice(k: int) -> MedicalImage:
        return (file or DicomFile(files[k])).image(grids[k].frame, window, lambda: limits)

    return Volume(
        size=display.swap(grids[0].stored_size),
        grids=grids,
        load_slice=load_slice,
        spacing_mm=(between, *display.swap((rows, columns))) if known else None,
        voxel_mm3=float(abs(np.linalg.det(affine[:3, :3]))) if known else None,
        files=list(dict.fromkeys(files)),
        warnings=tuple(lines),
    )


def _gaps(grids: Sequence[DicomGrid]) -> list[str]:
    """The line that says why slices with known positions are not evenly spaced."""
    if any(grid.affine is None for grid in grids):
        return []
    affines = np.array([grid.affine for grid in grids])
    normal = np.cross(affines[0, :3, 0], affines[0, :3, 1])
    steps = np.abs(np.diff(affines[:, :3, 3] @ (normal / np.linalg.norm(normal))))
    apart = steps[steps >= 1e-3]
    usual = np.median(apart) if len(apart) else 0
    same, odd = len(steps) - len(apart), int((np.abs(apart - usual) > STEP_TOLERANCE * usual).sum())
    reasons = [f"slices with the same position as another one: {same} (several phases or echoes?)"] * (same > 0)
    reasons += [f"distances other than the usual {usual:g} mm: {odd} of {len(steps)} (slices missing?)"] * (odd > 0)
    what = "; ".join(reasons) or "the slices are not stacked along one direction"
    return [f"{what}; mm³ are unknown, and .nii cannot be written"]


def _burned_in(possible: bool) -> list[str]:
    return [f"the slices {_BURNED_IN}"] * possible
