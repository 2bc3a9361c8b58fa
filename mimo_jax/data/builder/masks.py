"""Reads the pixels of a MaskRef from any kind of file.

Axis letters: F frames, H, W height and width of the item's image in pixels; i, j, k axes of a NIfTI file.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from mimo_jax.data.builder.items import MaskRef
from mimo_jax.data.images.dicom import reading
from mimo_jax.data.images.image import DicomGrid, MedicalImage, NiftiGrid, file_kind, import_medical
from mimo_jax.data.label_values import LabelValueError, check_labels, whole_labels
from mimo_jax.data.prompt_files import decode_segmentation
from mimo_jax.data.transforms import decode_labels, decode_mask
from mimo_jax.errors import UserError

_AFFINE_MM = 0.1  # tolerance for the corners of two equal grids


def read_mask(ref: MaskRef, image: MedicalImage) -> np.ndarray:
    """The mask `ref` of `image`, bool [H, W] as the image is displayed. A mask of a DICOM image has the pixels of the frame as it is
    stored, whatever its format. Raises UserError if it cannot be read or has another size."""
    height, width = image.pixels.shape[:2]
    dicom = image.grid if isinstance(image.grid, DicomGrid) else None
    if ref.rle is not None or ref.polygon is not None:
        size = dicom.stored_size if dicom else (height, width)
        mask = decode_segmentation(ref.rle if ref.rle is not None else [list(ring) for ring in ref.polygon], *size)
    else:
        mask = _of_file(ref, image)
    mask = dicom.display.turn(mask) if dicom else mask
    if mask.shape != (height, width):
        raise UserError(f"{ref.file}: is {mask.shape[1]}x{mask.shape[0]}, the image is {width}x{height}")
    return ~mask if ref.inverted else mask


def _of_file(ref: MaskRef, image: MedicalImage) -> np.ndarray:
    path = Path(ref.file)
    kind = file_kind(path)
    if kind == "DICOM":
        return _of_seg(path, ref.value, image.grid)
    if kind == "NIfTI":
        return _of_nifti(path, ref, image.grid)
    return decode_mask(path, threshold=ref.threshold) if ref.value is None else _labels(path, ref.labels) == ref.value


@lru_cache(maxsize=2)  # the classes of one image are often in one file
def _labels(path: Path, known: tuple[int, ...]) -> np.ndarray:
    labels = decode_labels(path)
    if known:
        check_labels(labels, known, str(path))
    return labels


def _of_nifti(path: Path, ref: MaskRef, grid: Any) -> np.ndarray:
    shape, affine, corner, crop = _nifti_labels(path, ref.labels, ref.threshold if ref.value is None else None)
    if not isinstance(grid, NiftiGrid):
        raise UserError(f"{path}: labels of a NIfTI volume need a NIfTI image")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    if shape != (*grid.shape, 1)[:3] or np.abs((affine - grid.affine) @ corners).max() > _AFFINE_MM:
        raise UserError(f"{path}: is not on the grid of its image; resample the labels onto it")
    rows, columns = (axis for axis in range(3) if axis != grid.axis)
    plane = np.zeros((shape[rows], shape[columns]), bool)
    index = grid.index - corner[grid.axis]
    if 0 <= index < crop.shape[grid.axis]:
        part = np.take(crop, index, axis=grid.axis)
        inside = np.s_[corner[rows] : corner[rows] + part.shape[0], corner[columns] : corner[columns] + part.shape[1]]
        plane[inside] = part != 0 if ref.value is None else part == ref.value
    return grid.display.turn(plane)


@lru_cache(maxsize=128)  # slices of one volume are consecutive, and each structure may have its own file
def _nifti_labels(
    path: Path, known: tuple[int, ...], threshold: float | None
) -> tuple[tuple[int, ...], np.ndarray, tuple[int, ...], np.ndarray]:
    """(shape [i, j, k], affine [4, 4], corner of the box that contains all labels, integer labels of that box). known: all labels that may
    occur; empty: any. threshold: the label is 1 where a value is at least this, and 0 elsewhere."""
    nibabel = import_medical("nibabel")
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)
        labels = whole_labels(values, str(path)) if threshold is None else (values >= threshold).astype(np.int32)
        if known:
            check_labels(labels, known, str(path))
        labels = labels.reshape((*labels.shape, 1)[:3])
        box = ndimage.find_objects((labels != 0).astype(np.int8))
        box = box[0] if box else (slice(0, 0),) * 3
        crop = labels[box]
        crop = crop.astype(np.min_scalar_type(int(crop.max(initial=0)))) if crop.min(initial=0) >= 0 else crop.copy()
        return labels.shape, image.affine, tuple(side.start for side in box), crop
    except LabelValueError:
        raise
    except Exception as error:  # nibabel, gzip and numpy raise various errors
        raise UserError(f"{path}: a damaged or truncated NIfTI file ({type(error).__name__})") from None


def _of_seg(path: Path, value: int | None, grid: Any) -> np.ndarray:
    """The union of the frames of a DICOM SEG that refer to the image's instance and belong to the segment `value` (None: any)."""
    if not isinstance(grid, DicomGrid):
        raise UserError(f"{path}: a DICOM SEG needs a DICOM image")
    dataset, frames = _seg(path)
    with reading(path):
        mask = np.zeros((int(dataset.Rows), int(dataset.Columns)), bool)
        segments = [int(segment.SegmentNumber) for segment in dataset.SegmentSequence]
        for number, functions in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            if _refers(functions, grid):
                pixels = frames[number]
                if dataset.SegmentationType == "LABELMAP":
                    check_labels(pixels, segments, str(path))
                    mask |= pixels != 0 if value is None else pixels == value
                elif value in (None, segment_number(dataset, functions)):
                    mask |= pixels * 2 >= int(dataset.get("MaximumFractionalValue") or 1)
        return mask


def segment_number(dataset: Any, functions: Any) -> int | None:
    """The segment of a frame of a DICOM SEG, by its functional groups or, if all frames have one segment, the shared ones; None in a
    label map."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    for group in (functions, shared[0]):
        if identification := group.get("SegmentIdentificationSequence"):
            return int(identification[0].ReferencedSegmentNumber)
    return None


@lru_cache(maxsize=1)
def _seg(path: Path) -> tuple[Any, np.ndarray]:
    """(pydicom's dataset, stored values [F, H, W])."""
    with reading(path):
        dataset = import_medical("pydicom").dcmread(path)
        if dataset.get("Modality") != "SEG":
            raise UserError(f"{path}: is a DICOM file of modality {dataset.get('Modality')}, not SEG")
        return dataset, np.atleast_3d(dataset.pixel_array).reshape(-1, int(dataset.Rows), int(dataset.Columns))


def _refers(functions: Any, grid: DicomGrid) -> bool:
    for derivation in functions.get("DerivationImageSequence") or ():
        for source in derivation.get("SourceImageSequence") or ():
            frames = source.get("ReferencedFrameNumber")  # none, one or several
            meant = frames is None or grid.frame + 1 in np.atleast_1d(frames)
            if meant and source.ReferencedSOPInstanceUID == grid.dataset.get("SOPInstanceUID"):
                return True
    return False
