"""Write the masks of an answer on the grid of the medical input file: NIfTI label maps and DICOM SEG.

Axis letters: F slices or frames, H, W height and width of each in pixels; E entities. A single image is a volume with one slice.
nibabel, pydicom and highdicom come with `pip install "mimo_jax[medical]"`; the checks below report it before anything runs.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mimo_jax import __version__
from mimo_jax.data.images.dicom import get_value, silence_libraries, stack_affine
from mimo_jax.data.images.image import DicomGrid, Grid, NiftiGrid, import_medical
from mimo_jax.errors import UserError

Named = Sequence[tuple[str, np.ndarray]]  # (phrase, bool [F, H, W] as displayed) of each entity
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Attributes that highdicom copies from the image, but that an anonymised file may lack.
_MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")
_SERIES_OFFSET = 1000  # added to the series number of the input
_LABEL_LENGTH = 64  # maximum number of characters in a DICOM LO


def check_nifti(path: Path, grids: Sequence[Grid]) -> None:
    """Raises UserError if no NIfTI can be written for slices with these grids (none: an image without geometry), or nibabel is missing."""
    if not grids:
        raise UserError(f"{path}: the image has no geometry; only NIfTI and DICOM input can be saved as NIfTI, use .npy or .json")
    if isinstance(grids[0], DicomGrid) and stack_affine(grids) is None:
        where = "its image lies" if len(grids) == 1 else "its slices lie, or they are not evenly spaced"
        raise UserError(f"{path}: this DICOM does not say where in the patient {where}; use .dcm, .npy or .json")
    import_medical("nibabel")


def check_seg(path: Path, grids: Sequence[Grid]) -> None:
    """Raises UserError if no DICOM SEG can refer to slices with these grids, or highdicom is missing."""
    if not grids or not isinstance(grids[0], DicomGrid):
        raise UserError(f"{path}: only DICOM input can be saved as DICOM SEG; use {'.nii.gz' if grids else '.json'}")
    sources = _sources(grids)
    missing = [name for name in _IDENTITY if not all(get_value(source, name) for source in sources)]
    if missing:
        raise UserError(f"{path}: a DICOM SEG refers to its image, and this one lacks {', '.join(missing)}; use {_alternatives(grids)}")
    if grids[0].frames * len(sources) > 1 and not all(get_value(source, "FrameOfReferenceUID") for source in sources):
        kind = "a multi-frame file" if grids[0].frames > 1 else "a series"
        raise UserError(f"{path}: a DICOM SEG cannot refer to {kind} without FrameOfReferenceUID; use {_alternatives(grids)}")
    import_medical("highdicom")


def write_nifti(file: BinaryIO, packed: bool, masks: Iterable[np.ndarray], grids: Sequence[Grid]) -> None:
    """Write a label map, gzipped if `packed`: mask n (from 1, each bool [F, H, W]) has the value n; later masks overwrite earlier ones.
    uint8, or uint16 if there are more than 255.

    NIfTI input: the label map has the shape, affine and orientation codes of the input, and is zero outside the given slices. DICOM
    input: it is (columns, rows, slices), as the frames are stored, with their affine in RAS mm.
    """
    import nibabel

    volume, count = np.zeros(file_shape(grids), np.uint16), 0
    planes = on_grid(volume, grids)
    volume = volume if isinstance(grids[0], NiftiGrid) else volume.T
    for count, mask in enumerate(masks, 1):
        for plane, slice_mask in zip(planes, mask, strict=True):
            plane[slice_mask] = count
    volume = volume if count > np.iinfo(np.uint8).max else volume.astype(np.uint8)
    if isinstance(grids[0], NiftiGrid):
        header = grids[0].header
        image = (nibabel.Nifti2Image if header["sizeof_hdr"] == 540 else nibabel.Nifti1Image)(volume, grids[0].affine)
        # Only the geometry is copied: the rest of a header may contain patient data.
        image.header.set_xyzt_units(*header.get_xyzt_units())
        try:
            image.set_qform(*header.get_qform(coded=True))
        except ValueError:  # the numbers are not a rotation; the affine is then that of the sform
            image.set_qform(None, 0)
        image.set_sform(*header.get_sform(coded=True))
    else:
        image = nibabel.Nifti1Image(volume, stack_affine(grids))
        image.header.set_xyzt_units("mm")
        image.set_qform(image.affine, "scanner")
        image.set_sform(image.affine, "scanner")
    if packed:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as stream:
            image.to_stream(stream)
    else:
        image.to_stream(file)


def file_shape(grids: Sequence[Grid]) -> tuple[int, ...]:
    """The shape of a label array on the file's own axes: that of a NIfTI file, [F, rows, columns] of DICOM frames as they are stored."""
    return grids[0].shape if isinstance(grids[0], NiftiGrid) else (len(grids), *grids[0].stored_size)


def on_grid(array: np.ndarray, grids: Sequence[Grid]) -> list[np.ndarray]:
    """Views [H, W] of each slice, as it is displayed, in an array of `file_shape`."""
    if isinstance(grids[0], NiftiGrid):
        return [grid.display_view(array) for grid in grids]
    return [grid.display.turn(plane) for grid, plane in zip(grids, array, strict=True)]


def write_seg(path: Path, file: BinaryIO, entities: Named, grids: Sequence[DicomGrid], prompted: bool) -> None:
    """Write a DICOM SEG in the study of the input that refers to all files of the slices: BINARY, one segment per non-empty entity,
    labelled with its phrase.

    path: for error messages. prompted: whether the question had points, boxes or scribbles; the segments are then SEMIAUTOMATIC,
    otherwise AUTOMATIC.
    """
    import highdicom
    from pydicom import Dataset
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    segments = [(_label(phrase) or f"structure {n}", mask) for n, (phrase, mask) in enumerate(entities, 1) if mask.any()]
    if not segments:
        raise UserError(f"{path}: the answer segments nothing, and a DICOM SEG without segments is not allowed; use .json")
    sources, frames = _sources(grids), grids[0].frames
    pixels = np.zeros((frames * len(sources), *grids[0].stored_size, len(segments)), np.uint8)  # [F, rows, columns, E]
    indices = [grid.frame if frames > 1 else k for k, grid in enumerate(grids)]  # a file of several frames is the only source
    for e, (_, mask) in enumerate(segments):
        for index, grid, slice_mask in zip(indices, grids, mask, strict=True):
            grid.display.turn(pixels[index, :, :, e])[:] = slice_mask
    algorithm = highdicom.AlgorithmIdentificationSequence("MIMO", codes.cid7162.ArtificialIntelligence, __version__)
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=n,
            segment_label=label,
            # Whether a phrase names an organ or a lesion is unknown; only the label says what it is.
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type="SEMIAUTOMATIC" if prompted else "AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for n, (label, _) in enumerate(segments, 1)
    ]
    with silence_libraries():
        try:
            images = []
            for source in sources:
                image = Dataset()
                image.update(source)
                for name in _MAY_BE_EMPTY:
                    if name not in image:
                        setattr(image, name, "")
                images.append(image)
            segmentation: Any = highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=pixels,
                segmentation_type="BINARY",
                segment_descriptions=described,
                series_instance_uid=generate_uid(),
                series_number=_SERIES_OFFSET + int(sources[0].get("SeriesNumber") or 0),
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="mimo_jax",
                manufacturer_model_name="MIMO",
                software_versions=__version__,
                device_serial_number="0",
                specific_character_set="ISO_IR 192",
            )
            segmentation.save_as(file)
        # highdicom expects a conforming file; its error messages for others may quote the header, so they are not shown.
        except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise UserError(f"{path}: this DICOM lacks attributes that a SEG must copy ({kind}); use {_alternatives(grids)}") from None


def _sources(grids: Sequence[DicomGrid]) -> list[Any]:
    """The distinct datasets of the slices."""
    return list({id(grid.dataset): grid.dataset for grid in grids}.values())


def _alternatives(grids: Sequence[DicomGrid]) -> str:
    return ".npy or .json" if stack_affine(grids) is None else ".nii.gz"


def _label(phrase: str) -> str:
    """A phrase as a valid DICOM LO: one line, no backslash, at most 64 characters."""
    printable = "".join(c if c.isprintable() else " " for c in phrase.replace("\\", "/"))
    return " ".join(printable.split())[:_LABEL_LENGTH].strip()
