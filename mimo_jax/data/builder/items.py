"""The interface between readers and the builder: a description of each image of a source, made before any pixel is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class MaskRef:
    """A reference to a mask of an item; one of `file`, `rle` and `polygon` is given."""

    class_raw: str  # the class name in the source
    file: str = ""  # path of an image file, NIfTI or DICOM SEG
    value: int | None = None  # label in an indexed file; None: all pixels that `decode_mask` counts
    labels: tuple[int, ...] = ()  # all labels that the source names, if it names them; a file with others is refused
    threshold: float | None = None  # without `value`: the least value in the mask; None: as `pixels_in_mask` decides
    rle: dict | None = None  # COCO RLE {"size": [height, width], "counts"}
    polygon: tuple[tuple[float, ...], ...] | None = None  # rings of x0, y0, x1, y1, … in pixels
    instance: int = 0
    inverted: bool = False  # nonzero pixels are the background
    annotation: str = ""  # how it was made, if the source says so: "manual", "silver"


@dataclass(frozen=True)
class Item:
    """The description of one image of a source; picklable and cheap."""

    id: str  # unique in the source, stable
    image: str  # path
    modality: str  # one of config.MODALITIES
    dataset: str  # name of the data set in the source
    group: str  # patient or case, unique across data sets: "dataset/case"
    masks: tuple[MaskRef, ...] = ()
    split: str = ""  # "train", "val" or "test" if the source says so; otherwise the builder decides
    slice: str = ""  # "axial:30" of a volume, as for `open_image`
    frame: int | None = None  # index in a multi-frame DICOM file
    window: str | tuple[float, float] | None = None
    slice_axis: str = ""
    slice_index: int = -1
    pixel_spacing_mm: tuple[float, float] | None = None  # [row, column] if the image file does not contain it
    # Existing conversations: dicts of schema.Sample without sample_id. They refer to masks by index into `masks`: targets have
    # "mask": [0, 2] instead of mask_ids, user turns "prompted": [1]; spans are offsets into clean text.
    samples: tuple[dict, ...] = ()
    complete: bool = True  # False: the image may show unlabelled structures, so only those in `absent` may be asked for as absent
    absent: tuple[str, ...] = ()  # entities known to be absent; if complete, all others that the data set labels are absent too
    licence: str = ""
    source: str = ""
    flags: tuple[str, ...] = ()  # as in `schema.Record`
    square: int = 0  # side to which image and masks are resized, without their black borders; 0: they stay as they are


class Reader(Protocol):
    name: str  # the --source value
    skipped: list[tuple[str, str]]  # (what, reason) of known-bad items and invalid lines; filled while iterating

    def items(self) -> Iterator[Item]:
        """The items in a stable order, without decoding pixels; memory is bounded by the index of the source."""
