"""The answer of the model: its text, the parts of the text, and one entity per segmented structure.

Axis letters: H, W height and width of the original image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from mimo_jax.data.images.image import Grid
from mimo_jax.data.overlay import draw_overlay
from mimo_jax.data.prompts import Prompts
from mimo_jax.geometry import mask_to_box
from mimo_jax.infer.answers.asked import asked_names, canonical_name, unanswered
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, ConfidenceFeatures
from mimo_jax.infer.answers.familiarity import Likeness
from mimo_jax.infer.answers.outputs import check_outputs, write_all, write_json
from mimo_jax.infer.answers.write_masks import write_nifti, write_seg

NO_MASKS = "(no structure is marked in this answer)"


@dataclass
class Entity:
    """A structure that the answer names and segments.

    id: index among the answer's entities, from 0. phrase: the words of the answer ("" if a mask has none); entity: its
    canonical name. mask: bool [H, W]. box_xyxy: half-open [x0, y0, x1, y1] around the mask, None if it is empty. area_mm2: None
    if the pixel spacing is unknown. iou: the model's own estimate of the mask's IoU, 0 to 1. score: the expected IoU, if the
    answer is `calibrated`; else iou × probability of the `<SEG>` token. uncertain: the score is below the calibration's
    threshold (0.5 without one), or the mask is empty. evidence: the features that the score is computed from.
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
    evidence: ConfidenceFeatures = field(repr=False)

    @staticmethod
    def of(
        id: int,
        phrase: str,
        mask: np.ndarray,
        evidence: ConfidenceFeatures,
        calibration: Calibration = UNCALIBRATED,
        spacing_mm: tuple[float, float] | None = None,
    ) -> Entity:
        """Make an entity; computes its name, box, areas and score. spacing_mm: (between rows, between columns)."""
        tight = mask_to_box(mask)
        box = None if tight is None else list(tight)
        score = float(calibration.scores([evidence])[0])
        uncertain = box is None or score < calibration.uncertain_below
        area = int(mask.sum())
        area_mm2 = None if spacing_mm is None else area * spacing_mm[0] * spacing_mm[1]
        return Entity(id, phrase, canonical_name(phrase), mask, box, area, area_mm2, evidence.iou, score, uncertain, evidence)

    def describe(self) -> str:
        """Name, size, box and score in one line."""
        area = f"{self.area_px} px" if self.area_mm2 is None else f"{self.area_px} px, {self.area_mm2:.1f} mm²"
        return f"{self.phrase or 'unnamed'}: {area}, box {self.box_xyxy}, score {self.score:.2f}{', uncertain' if self.uncertain else ''}"

    def to_json(self) -> dict:
        """The fields as a plain dict, with the mask as COCO RLE {"size": [H, W], "counts": str}; without area_mm2 if it is unknown."""
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


def left_out_notes(question: str, names: list[str], max_segs: int | None) -> list[str]:
    """The line about structures that were asked for and that the answer leaves out; none if there are no `names`."""
    if not names:
        return []
    too_many = max_segs is not None and len(asked_names(question)) > max_segs
    why = f"; this model marks {max_segs} structures in one answer at most (max_segs): ask for the others in another question"
    return [f"(not answered: {', '.join(names)}{why * too_many})"]


@dataclass
class Answer:
    """The answer to one question.

    text: the answer without tags. parts: the same text in pieces, in order, {"text"} or {"text", "entity_id"}. truncated: the token
    limit was reached before the end of the answer. image uint8 [H, W, 3], question, prompts: the request, which the overlay shows.
    grid: the position of the image in the medical file that it comes from. calibrated: whether scores are expected IoUs. max_segs: the
    number of structures that an answer of the model's training may mark; None if it is unknown. likeness: of the request to the training
    data, None if nothing was fitted. read_as: the question in words that the model knows, "" if it was read as it is written.
    image_warnings: what was decided about the image and may be wrong, a line each."""

    text: str
    parts: list[dict]
    entities: list[Entity]
    truncated: bool
    question: str
    image: np.ndarray = field(repr=False)
    prompts: Prompts = field(repr=False)
    grid: Grid | None = field(default=None, repr=False)
    calibrated: bool = False
    max_segs: int | None = None
    likeness: Likeness | None = None
    read_as: str = ""
    image_warnings: tuple[str, ...] = ()

    @property
    def understood(self) -> bool | None:
        """Whether the image and the question are like the training data; None if the checkpoint has nothing to compare them with."""
        return None if self.likeness is None else self.likeness.understood

    @property
    def unanswered(self) -> list[str]:
        """Names of the structures that the question asks to be segmented and that the answer neither mentions nor marks."""
        return unanswered(self.question, self.text, [e.phrase for e in self.entities])

    def describe(self) -> str:
        """The text, with the notes of `notes`."""
        return "\n".join([self.text, *self.notes()])

    def notes(self) -> list[str]:
        """What is to be known about the answer, a line each: that nothing is segmented, and `warnings` but those of the image, which are
        printed when it is opened."""
        return [NO_MASKS] * (not self.entities) + self._own_warnings()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be wrong, a line each: what was decided about the image and its file, such as how its values are displayed; that the
        image or the question is unlike the training data; how the question was read; what is left out and why; that it was cut off."""
        return (*self.image_warnings, *self._own_warnings())

    def _own_warnings(self) -> list[str]:
        read_as = [f"(read as: {self.read_as})"] if self.read_as else []
        unlike = self.likeness.notes() if self.likeness else []
        cut_off = ["(cut off at the token limit)"] * self.truncated
        return unlike + read_as + left_out_notes(self.question, self.unanswered, self.max_segs) + cut_off

    def to_json(self) -> dict:
        return {
            "text": self.text,
            "parts": self.parts,
            "entities": [e.to_json() for e in self.entities],
            "unanswered": self.unanswered,
            "understood": self.understood,
            **({} if self.likeness is None else {"likeness": self.likeness.to_json()}),
            **({"read_as": self.read_as} if self.read_as else {}),
            "truncated": self.truncated,
            "calibrated": self.calibrated,
            "warnings": list(self.warnings),
        }

    def save(self, *paths: str | Path) -> None:
        """Write the answer to each path by its ending: .png the overlay, .json `to_json`, .npy the masks bool [entities, H, W],
        .nii and .nii.gz a label map on the grid of the NIfTI or DICOM input, .dcm a DICOM SEG of the DICOM input.

        Either all files are written or none. Raises UserError as `check_outputs` does, and for a .dcm if all masks are empty."""
        check_outputs(*paths, grid=self.grid)
        grids, named = [self.grid], [(e.phrase, e.mask[None]) for e in self.entities]
        masks = [mask for _, mask in named]
        write_all(
            paths,
            {
                ".png": lambda _, file: self._overlay().save(file, "PNG"),
                ".json": lambda _, file: write_json(file, self.to_json()),
                ".npy": lambda _, file: np.save(file, np.concatenate([np.zeros((0, *self.image.shape[:2]), bool), *masks])),
                ".nii": lambda _, file: write_nifti(file, False, masks, grids),
                ".nii.gz": lambda _, file: write_nifti(file, True, masks, grids),
                ".dcm": lambda path, file: write_seg(path, file, named, grids, bool(self.prompts)),
            },
        )

    def _overlay(self) -> Image.Image:
        named = [(e.phrase or f"structure {e.id + 1}", e.mask) for e in self.entities]
        return draw_overlay(self.image, named, self.prompts, f"{self.question}\n{self.describe()}")
