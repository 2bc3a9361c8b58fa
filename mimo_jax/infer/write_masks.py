"""Masks of an answer back on the grid of the medical file that was asked about: NIfTI label maps and DICOM SEG.

Axis letters: H, W height and width of the picture in pixels; E entities, F frames of the DICOM input.
nibabel, pydicom and highdicom come with `pip install "mimo_jax[medical]"`; the checks below say so before anything runs.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax import __version__
from mimo_jax.data.medical import DicomGrid, NiftiGrid, library
from mimo_jax.errors import UserError

Grid = NiftiGrid | DicomGrid | None
Named = Sequence[tuple[str, np.ndarray]]  # (phrase, bool [H, W]) of each entity
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# What highdicom repeats from the image, and a file without names may lack.
_MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")
_LABELS = 255  # uint8
_SERIES = 1000  # added to the number of the series asked about
_LABEL_LENGTH = 64  # characters of a DICOM LO


def check_nifti(path: Path, grid: Grid) -> None:
    """UserError where no NIfTI can be laid onto the input, or nibabel is missing."""
    if grid is None:
        raise UserError(f"{path}: the image has no place in space; only NIfTI and DICOM input can be saved as NIfTI, use .npy or .json")
    if isinstance(grid, DicomGrid) and grid.affine is None:
        raise UserError(f"{path}: this DICOM does not say where in the patient its picture lies; use .dcm, .npy or .json")
    library("nibabel")


def check_seg(path: Path, grid: Grid) -> None:
    """UserError where no DICOM SEG can refer to the input, or highdicom is missing."""
    if not isinstance(grid, DicomGrid):
        raise UserError(f"{path}: only DICOM input can be saved as DICOM SEG; use {'.json' if grid is None else '.nii.gz'}")
    missing = [name for name in _IDENTITY if not grid.dataset.get(name)]
    if missing:
        raise UserError(f"{path}: a DICOM SEG points at its image, and this one lacks {', '.join(missing)}; use {_instead(grid)}")
    if grid.frames > 1 and not grid.dataset.get("FrameOfReferenceUID"):
        raise UserError(f"{path}: a DICOM SEG cannot point into a multi-frame file without FrameOfReferenceUID; use {_instead(grid)}")
    library("highdicom")


def check_painted(path: Path, entities: Named) -> None:
    """UserError where a DICOM SEG would hold no segment, which it may not."""
    if not any(mask.any() for _, mask in entities):
        raise UserError(f"{path}: the answer paints nothing, and a DICOM SEG without segments is not allowed; use .json")


def write_nifti(path: Path, entities: Named, grid: NiftiGrid | DicomGrid) -> None:
    """A uint8 label map, .nii or .nii.gz: entity n (from 1) has the value n, later ones lie on top.

    NIfTI input: shape, affine and orientation codes of the input, zero outside the slice asked about. DICOM input: one slice
    [W, H, 1] (columns, rows) whose affine is that of the frame, in RAS mm.
    """
    import nibabel

    if len(entities) > _LABELS:
        raise UserError(f"{path}: {len(entities)} entities; a label map of 8 bits holds {_LABELS}, use .npy or .json")
    labels = np.zeros(entities[0][1].shape if entities else (), np.uint8)
    for n, (_, mask) in enumerate(entities, 1):
        labels[mask] = n
    if isinstance(grid, NiftiGrid):
        volume = np.zeros(grid.shape, np.uint8)
        grid.shown(volume)[:] = labels
        image = (nibabel.Nifti2Image if grid.header["sizeof_hdr"] == 540 else nibabel.Nifti1Image)(volume, grid.affine)
        # Only what says where the voxels lie is taken over: the rest of a header may speak of the patient.
        image.header.set_xyzt_units(*grid.header.get_xyzt_units())
        try:
            image.set_qform(*grid.header.get_qform(coded=True))
        except ValueError:  # numbers that are no rotation; the affine is then the sform's
            image.set_qform(None, 0)
        image.set_sform(*grid.header.get_sform(coded=True))
    else:
        volume = np.zeros((grid.dataset.Columns, grid.dataset.Rows, 1), np.uint8)
        volume[:, :, 0] = labels.T
        image = nibabel.Nifti1Image(volume, grid.affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(grid.affine, "scanner")
        image.set_sform(grid.affine, "scanner")
    data = image.to_bytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data)


def write_seg(path: Path, entities: Named, grid: DicomGrid, prompted: bool) -> None:
    """A DICOM SEG of the series' study: BINARY, one segment for each entity that is not empty, labelled with its phrase.

    `prompted`: the question came with points, boxes or scribbles, so the segments are SEMIAUTOMATIC, else AUTOMATIC.
    """
    import highdicom
    from pydicom import Dataset
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    check_painted(path, entities)
    painted = [(_label(phrase) or f"structure {n}", mask) for n, (phrase, mask) in enumerate(entities, 1) if mask.any()]
    pixels = np.zeros((grid.frames, *painted[0][1].shape, len(painted)), np.uint8)  # [F, H, W, E]
    pixels[grid.frame] = np.stack([mask for _, mask in painted], axis=-1)
    algorithm = highdicom.AlgorithmIdentificationSequence("MIMO", codes.cid7162.ArtificialIntelligence, __version__)
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=n,
            segment_label=label,
            # Whether a phrase names an organ or a lesion is not known: the label alone says what it is.
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type="SEMIAUTOMATIC" if prompted else "AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for n, (label, _) in enumerate(painted, 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the values of a header
        try:
            source = Dataset()
            source.update(grid.dataset)
            for name in _MAY_BE_EMPTY:
                if name not in source:
                    setattr(source, name, "")
            segmentation: Any = highdicom.seg.Segmentation(
                source_images=[source],
                pixel_array=pixels,
                segmentation_type="BINARY",
                segment_descriptions=described,
                series_instance_uid=generate_uid(),
                series_number=_SERIES + int(grid.dataset.get("SeriesNumber") or 0),
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="mimo_jax",
                manufacturer_model_name="MIMO",
                software_versions=__version__,
                device_serial_number="0",
                specific_character_set="ISO_IR 192",
            )
            segmentation.save_as(path)
        # highdicom takes its source for a conforming file; what it says of one that is not may quote the header.
        except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise UserError(f"{path}: this DICOM lacks what a SEG must repeat ({kind}); use {_instead(grid)}") from None


def _instead(grid: DicomGrid) -> str:
    return ".npy or .json" if grid.affine is None else ".nii.gz"


def _label(phrase: str) -> str:
    """As DICOM's LO allows it: one line, no backslash, no more than 64 characters."""
    printable = "".join(c if c.isprintable() else " " for c in phrase.replace("\\", "/"))
    return " ".join(printable.split())[:_LABEL_LENGTH].strip()
