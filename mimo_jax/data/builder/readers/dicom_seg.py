"""Reads DICOM images and the DICOM SEG objects that refer to them, in a folder and its subfolders.

Items are the frames that a SEG refers to. No header value that identifies a person or a study leaves this file: ids and groups are
hashes of UIDs. (The hash of a short patient number could be reversed by trying all numbers.)
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.masks import segment_number
from mimo_jax.data.builder.readers.reader import DatasetReader
from mimo_jax.data.images.dicom import get_value, reading
from mimo_jax.data.images.image import file_kind, import_medical
from mimo_jax.errors import UserError

_MODALITY = {
    **{"CT": "CT", "MR": "MR", "US": "ultrasound", "IVUS": "ultrasound", "OP": "fundus", "DMS": "dermoscopy", "ES": "endoscopy"},
    **dict.fromkeys(("CR", "DX", "MG", "RF", "XA", "RG", "IO", "PX"), "X-ray"), "SM": "pathology", "GM": "pathology",
}  # fmt: skip
_OF_IMAGE = ("SOPInstanceUID", "PatientID", "StudyInstanceUID", "Modality", "NumberOfFrames", "Rows")
_NUMBERED = re.compile(r"(segment|label)?[ _]*\d*", re.IGNORECASE)


@dataclass(frozen=True)
class _ReferencedImage:
    path: Path
    uid: str
    patient: str
    study: str
    modality: str
    frames: int


class DicomSeg(DatasetReader):
    name = "dicom-seg"
    expected_layout = "DICOM images and DICOM SEG objects"
    options = {"window": None}

    def open(self) -> None:
        import_medical("pydicom")
        self.images: dict[str, _ReferencedImage] = {}
        self.segs: list[Path] = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            try:
                if file_kind(path) == "DICOM":
                    self._sort(path)
            except UserError:
                self.skip(str(path), "a damaged or truncated file")
        if not self.segs or not self.images:
            raise self.layout_error()

    def items(self) -> Iterator[Item]:
        masks: dict[tuple[str, int], list[MaskRef]] = defaultdict(list)
        for path in self.segs:
            try:
                found, missing = self._segments(path)
            except UserError:
                self.skip(str(path), "a damaged or incomplete SEG")
                continue
            for place, mask in found.items():
                masks[place] += mask.values()
            if missing:
                self.skip(str(path), f"has {missing} frames whose image is missing or not named")
        studies: dict[str, str] = {}  # patient -> first study
        for image in self.images.values():
            studies[image.patient] = min(image.study, studies.get(image.patient, image.study))
        for uid, image in self.images.items():
            for frame in range(image.frames):
                if (uid, frame) in masks and image.modality:
                    yield Item(
                        id=f"{_hash(uid)}_{frame}", image=str(image.path), modality=image.modality, dataset=self.dataset,
                        group=f"{self.dataset}/{_hash(studies[image.patient])}", masks=tuple(masks[uid, frame]),
                        frame=frame if image.frames > 1 else None, window=self.values["window"], complete=False, licence=self.licence,
                    )  # fmt: skip
            if not image.modality and any((uid, frame) in masks for frame in range(image.frames)):
                self.skip(str(image.path), "its modality is not one of records")

    def _sort(self, path: Path) -> None:
        with reading(path):
            ds = import_medical("pydicom").dcmread(path, stop_before_pixels=True, specific_tags=list(_OF_IMAGE), force=True)
            if get_value(ds, "Modality") == "SEG":
                self.segs.append(path)
            elif get_value(ds, "Rows") and get_value(ds, "SOPInstanceUID"):
                study = str(get_value(ds, "StudyInstanceUID") or ds.SOPInstanceUID)
                patient = str(get_value(ds, "PatientID") or study)
                modality = _MODALITY.get(str(get_value(ds, "Modality")), self.modality)
                uid, frames = str(ds.SOPInstanceUID), int(get_value(ds, "NumberOfFrames") or 1)
                if uid in self.images:
                    self.skip(str(path), "same image as another file")
                self.images.setdefault(uid, _ReferencedImage(path, uid, patient, study, modality, frames))

    def _segments(self, path: Path) -> tuple[dict[tuple[str, int], dict[int, MaskRef]], int]:
        """((image, frame) -> segment number -> mask, of one SEG; how many of its frames refer to no available image)."""
        found: dict[tuple[str, int], dict[int, MaskRef]] = defaultdict(dict)
        missing = 0
        with reading(path):
            ds = import_medical("pydicom").dcmread(path, stop_before_pixels=True)
            numbered = {int(segment.SegmentNumber): segment for segment in ds.SegmentSequence}
            names = {number: _name(segment) for number, segment in numbered.items() if number}  # 0 is the background of a label map
            for functions in ds.PerFrameFunctionalGroupsSequence:
                number = segment_number(ds, functions)
                numbers = list(names) if number is None else [number]
                places = [place for place in _sources(functions) if place[0] in self.images]
                missing += not places
                for place in places:
                    found[place] |= {number: MaskRef(names[number], str(path), value=number) for number in numbers}
        return found, missing


def _sources(functions: Any) -> Iterator[tuple[str, int]]:
    """(SOPInstanceUID, frame from 0) of the images that a frame of a SEG refers to."""
    for derivation in functions.get("DerivationImageSequence") or ():
        for source in derivation.get("SourceImageSequence") or ():
            numbers = source.get("ReferencedFrameNumber") or 1
            for number in [numbers] if isinstance(numbers, int) else numbers:
                yield str(source.ReferencedSOPInstanceUID), int(number) - 1


def _name(segment: Any) -> str:
    """The segment's label or, if that is only a number, the meaning of its code."""
    label = str(segment.get("SegmentLabel") or "").strip()
    coded = segment.get("SegmentedPropertyTypeCodeSequence")
    if not coded or not _NUMBERED.fullmatch(label):
        return label
    modifier = coded[0].get("SegmentedPropertyTypeModifierCodeSequence")
    return " ".join(str(code[0].CodeMeaning) for code in (modifier, coded) if code)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
