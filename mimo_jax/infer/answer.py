"""What the model said and painted: text, its parts, and one entity per painted structure.

Axis letters: H, W height and width of the original image in pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from mimo_jax.data.prompts import Prompts
from mimo_jax.errors import UserError
from mimo_jax.infer.overlay import draw_overlay
from mimo_jax.infer.write_masks import Grid, check_nifti, check_painted, check_seg, write_nifti, write_seg

UNCERTAIN_BELOW = 0.5  # score under which an entity is marked `uncertain`
NOTHING_PAINTED = "(no structure is marked in this answer)"
_ARTICLES = {"a", "an", "the"}
_OUTER = " \t\r\n.,;:!?\"'()[]"


def canonical_name(phrase: str) -> str:
    """An entity's name as it is compared: lower case, no leading article, no outer punctuation, single spaces."""
    words = " ".join(phrase.casefold().split()).strip(_OUTER).split()
    while len(words) > 1 and words[0] in _ARTICLES:
        words = " ".join(words[1:]).strip(_OUTER).split()
    return " ".join(words)


@dataclass
class Entity:
    """A structure that the answer names and paints.

    id: place among the answer's entities, from 0. phrase: the words as written ("" where a mask came without any);
    entity: its canonical name. mask: bool [H, W]. box_xyxy: half-open [x0, y0, x1, y1] around the mask, None where it is
    empty. area_mm2: None where the distance of pixels is not known. iou: the model's own estimate of the mask's IoU, 0 to 1.
    score: iou × probability of the `<SEG>` token. uncertain: score below 0.5, or an empty mask.
    """

    id: int
    phrase: str
    entity: str
    mask: np.ndarray
    box_xyxy: list[int] | None
    area_px: int
    area_mm2: float | None
    iou: float
    score: float
    uncertain: bool

    @staticmethod
    def of(id: int, phrase: str, mask: np.ndarray, iou: float, seg_prob: float, spacing_mm: tuple[float, float] | None = None) -> Entity:
        """Entity with name, box, areas and score worked out; `iou` is clipped to 0 … 1. spacing_mm: of rows, of columns."""
        rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1] if len(rows) else None
        iou = float(np.clip(iou, 0.0, 1.0))
        score = iou * float(seg_prob)
        uncertain = box is None or score < UNCERTAIN_BELOW
        area = int(mask.sum())
        area_mm2 = None if spacing_mm is None else area * spacing_mm[0] * spacing_mm[1]
        return Entity(id, phrase, canonical_name(phrase), mask, box, area, area_mm2, iou, score, uncertain)

    def to_json(self) -> dict:
        """As a plain dict; the mask as COCO RLE {"size": [H, W], "counts": str}; no area_mm2 where it is not known."""
        rle = coco.encode(np.asfortranarray(self.mask.astype(np.uint8)))
        return {
            "id": self.id,
            "phrase": self.phrase,
            "entity": self.entity,
            "rle": {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")},
            "box_xyxy": self.box_xyxy,
            "area_px": self.area_px,
            **({} if self.area_mm2 is None else {"area_mm2": round(self.area_mm2, 2)}),
            "iou": round(self.iou, 4),
            "score": round(self.score, 4),
            "uncertain": self.uncertain,
        }


@dataclass
class Answer:
    """text: the answer without tags. parts: the same text in pieces, in order, {"text"} or {"text", "entity_id"}.
    truncated: the token limit came before the end of the answer. image uint8 [H, W, 3], question and prompts are those
    that were asked with; the overlay shows them. grid: where the image lies in the medical file that it comes from."""

    text: str
    parts: list[dict]
    entities: list[Entity]
    truncated: bool
    question: str
    image: np.ndarray = field(repr=False)
    prompts: Prompts = field(repr=False)
    grid: Grid = field(default=None, repr=False)

    def describe(self) -> str:
        """The text, with a plain word where nothing is painted or the answer was cut off."""
        notes = [NOTHING_PAINTED] * (not self.entities) + ["(cut off at the token limit)"] * self.truncated
        return "\n".join([self.text, *notes])

    def to_json(self) -> dict:
        return {
            "text": self.text,
            "parts": self.parts,
            "entities": [e.to_json() for e in self.entities],
            "truncated": self.truncated,
        }

    def save(self, *paths: str | Path) -> None:
        """Write the answer to each path by its ending: .png the overlay, .json `to_json`, .npy the masks bool [entities, H, W],
        .nii and .nii.gz a label map on the grid of the NIfTI or DICOM input, .dcm a DICOM SEG of the DICOM input.

        UserError, before anything is written, for what `check_outputs` refuses, and for a .dcm where all masks are empty."""
        check_outputs(*paths, grid=self.grid)
        for path in map(Path, paths):
            if _ending(path) == ".dcm":
                check_painted(path, self._named())
        for path in map(Path, paths):
            _WRITERS[_ending(path)](self, path)

    def _named(self) -> list[tuple[str, np.ndarray]]:
        return [(e.phrase, e.mask) for e in self.entities]


def check_outputs(*paths: str | Path, grid: Grid = None) -> None:
    """UserError for a path that `Answer.save` could not write: another ending, a folder that is not there, or a medical
    format for which the input, of this grid, has no geometry."""
    for path in map(Path, paths):
        ending = _ending(path)
        if ending not in _WRITERS:
            raise UserError(f"{path}: cannot tell what to write; end the name in {', '.join(_WRITERS)}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        if ending in (".nii", ".nii.gz"):
            check_nifti(path, grid)
        if ending == ".dcm":
            check_seg(path, grid)


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _write_overlay(answer: Answer, path: Path) -> None:
    named = [(e.phrase or f"structure {e.id + 1}", e.mask) for e in answer.entities]
    draw_overlay(answer.image, named, answer.prompts, f"{answer.question}\n{answer.describe()}").save(path)


def _write_json(answer: Answer, path: Path) -> None:
    path.write_text(json.dumps(answer.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_masks(answer: Answer, path: Path) -> None:
    np.save(path, np.stack([e.mask for e in answer.entities]) if answer.entities else np.zeros((0, *answer.image.shape[:2]), bool))


def _write_nifti(answer: Answer, path: Path) -> None:
    write_nifti(path, answer._named(), answer.grid)


def _write_seg(answer: Answer, path: Path) -> None:
    write_seg(path, answer._named(), answer.grid, bool(answer.prompts))


_WRITERS = {
    **{".png": _write_overlay, ".json": _write_json, ".npy": _write_masks},
    **{".nii": _write_nifti, ".nii.gz": _write_nifti, ".dcm": _write_seg},
}
