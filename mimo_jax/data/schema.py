"""The record: one image, its masks, and all questions about it.

Coordinates are pixels of the original image, origin top left, x right, y down. Boxes are half-open [x0, y0, x1, y1). Spans are character
offsets [start, end) into the turn's clean text; `<p>` and `<SEG>` are inserted when a conversation is rendered. Prompts are not stored: a
user turn lists the prompted masks, and points, boxes or scribbles are drawn from them at load time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgpack
import numpy as np
from pycocotools import mask as coco

from mimo_jax.errors import UserError

ASPECT_CHANGED = "aspect_changed"  # the flag of an image whose sides were scaled differently


class RecordError(UserError):
    """A record that violates the schema; the message names the record and the field."""


@dataclass
class Mask:
    mask_id: str
    entity: str  # canonical name, as it is written in answers
    rle: dict  # COCO: {"size": [height, width], "counts": str}
    area_px: int
    box_xyxy: list[int]
    instance: int = 0
    entity_id: str = ""
    class_raw: str = ""
    annotation: str = ""
    parent_mask_id: str = ""

    def decode(self) -> np.ndarray:
        """bool [height, width]. Raises RecordError for a damaged RLE."""
        try:
            return coco.decode(self.rle).astype(bool)
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(f"mask {self.mask_id}: its RLE cannot be read ({error})") from None


@dataclass
class Turn:
    role: str  # "user" or "assistant"
    text: str
    prompted: list[str] = field(default_factory=list)  # user: mask_ids of the prompted masks


@dataclass
class Target:
    """A span of an assistant turn with its masks; `absent` means that the entity is asked for but not in the image.

    In vqa, whose answers segment nothing, a target is what the answer is about: it has masks and no span, or is absent."""

    turn: int  # index into Sample.turns
    entity: str
    span: list[int] | None = None  # None if absent, and in vqa
    mask_ids: list[str] = field(default_factory=list)
    absent: bool = False


@dataclass
class Sample:
    sample_id: str
    perspective: str  # vqa, I, II, III, IV
    turns: list[Turn]
    targets: list[Target] = field(default_factory=list)
    answer_type: str = ""  # vqa: "closed" or "open"
    references: list[str] = field(default_factory=list)  # vqa: accepted answers
    choices: list[str] = field(default_factory=list)
    kind: str = ""  # kind of question, e.g. "yes_no", "count", "modality", "compare", "absent"
    kb: dict = field(default_factory=dict)
    gen: dict = field(default_factory=dict)


@dataclass
class Record:
    id: str
    image: bytes  # encoded file
    format: str  # "png" or "jpeg"
    height: int
    width: int
    modality: str
    dataset: str
    split: str
    group: str  # patient or case
    masks: list[Mask] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    channels: int = 3
    src_bit_depth: int = 8
    slice_axis: str = ""
    slice_index: int = -1
    orientation: str = ""
    pixel_spacing_mm: list[float] | None = None  # [row, column]
    window: list[float] | None = None
    phash64: str = ""
    licence: str = ""
    source: str = ""
    flags: list[str] = field(default_factory=list)  # what its source says against it: ASPECT_CHANGED, "orientation:unverified", …

    def to_bytes(self) -> bytes:
        return msgpack.packb(vars(self), default=vars)

    @staticmethod
    def from_bytes(data: bytes) -> Record:
        values = msgpack.unpackb(data)
        values["masks"] = [Mask(**m) for m in values["masks"]]
        values["samples"] = [
            Sample(**{**s, "turns": [Turn(**t) for t in s["turns"]], "targets": [Target(**t) for t in s["targets"]]})
            for s in values["samples"]
        ]
        return Record(**values)

    def mask(self, mask_id: str) -> Mask:
        for mask in self.masks:
            if mask.mask_id == mask_id:
                return mask
        raise RecordError(f"record {self.id}: no mask {mask_id!r}")

    def check(self) -> None:
        """Raise RecordError for a mask of another size, a span outside its text, or a reference to a missing mask or turn."""
        for mask in self.masks:
            if list(mask.rle["size"]) != [self.height, self.width]:
                raise RecordError(
                    f"record {self.id}: mask {mask.mask_id} is {mask.rle['size'][1]}x{mask.rle['size'][0]}, "
                    f"the image is {self.width}x{self.height}"
                )
        for sample in self.samples:
            for turn in sample.turns:
                for mask_id in turn.prompted:
                    self.mask(mask_id)
            for target in sample.targets:
                for mask_id in target.mask_ids:
                    self.mask(mask_id)
                if not 0 <= target.turn < len(sample.turns):
                    raise RecordError(f"record {self.id}, sample {sample.sample_id}: target of turn {target.turn}, which does not exist")
                text = sample.turns[target.turn].text
                if target.span is not None and not 0 <= target.span[0] < target.span[1] <= len(text):
                    raise RecordError(f"record {self.id}, sample {sample.sample_id}: span {target.span} is outside the text")
                if target.absent == bool(target.mask_ids):
                    raise RecordError(f"record {self.id}, sample {sample.sample_id}: a target must either have masks or be absent")


def encode_mask(mask: np.ndarray, mask_id: str, entity: str, **extra) -> Mask:
    """The Mask of a bool array [height, width]. Raises RecordError if it is empty: an empty mask is never a target."""
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    area = int(coco.area(rle))
    if not area:
        raise RecordError(f"mask {mask_id} ({entity}) is empty")
    x, y, width, height = (int(side) for side in coco.toBbox(rle))
    return Mask(
        mask_id=mask_id,
        entity=entity,
        rle={"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")},
        area_px=area,
        box_xyxy=[x, y, x + width, y + height],
        **extra,
    )
