"""The seam of the builder: what a reader tells of a source, picture by picture, before any pixel is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class MaskRef:
    """A mask of an item, not read: of `file`, `rle` and `polygon` one is given."""

    class_raw: str  # as the source names it
    file: str = ""  # path of an image file, NIfTI or DICOM SEG
    value: int | None = None  # the label meant in an indexed file; None: all that `decode_mask` counts
    rle: dict | None = None  # COCO RLE {"size": [height, width], "counts"}
    polygon: tuple[tuple[float, ...], ...] | None = None  # rings of x0, y0, x1, y1, … in pixels
    instance: int = 0
    inverted: bool = False  # what is set is the background
    annotation: str = ""  # how it was made, where the source says so: "manual", "silver"


@dataclass(frozen=True)
class Item:
    """One picture of a source with all that is known of it: picklable, cheap, a pure description."""

    id: str  # unique in the source, stable
    image: str  # path
    modality: str  # one of config.MODALITIES
    dataset: str  # as the source names the data set
    group: str  # patient or case, unique across data sets: "dataset/case"
    masks: tuple[MaskRef, ...] = ()
    split: str = ""  # "train", "val" or "test" where the source says so, else the builder decides
    slice: str = ""  # "axial:30" of a volume, as data.medical.open_picture takes it
    frame: int | None = None  # of a DICOM of several
    window: str | tuple[float, float] | None = None
    slice_axis: str = ""
    slice_index: int = -1
    pixel_spacing_mm: tuple[float, float] | None = None  # [row, column] where the image file does not say it
    # Ready-made conversations: dicts of schema.Sample, without sample_id, that name masks by their place in `masks`: targets say
    # "mask": [0, 2] in place of mask_ids, user turns "prompted": [1]; spans are into clean text.
    samples: tuple[dict, ...] = ()
    complete: bool = True  # False: more may be there than is labelled, so only what `absent` names may be asked as absent
    absent: tuple[str, ...] = ()  # entities known not to be there; where complete, those that masks of the data set name are too
    licence: str = ""
    source: str = ""


class Reader(Protocol):
    name: str  # the --source value
    skipped: list[tuple[str, str]]  # (what, reason) of known-bad items and of lines that are no items; filled while iterating

    def items(self) -> Iterator[Item]:
        """In a stable order, without decoding pixels, memory bounded by the index of the source."""
