"""The raw results of an evaluation: one row per question, name or mask, from which every metric is computed.

Each row has a `group`, the patient or case, for the bootstrap. Axis letters: H, W height and width of the original image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from mimo_jax.data.schema import Record, Sample
from mimo_jax.infer.answers.answer import canonical_name
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, ConfidenceFeatures


@dataclass
class EntityResult:
    """One true entity and the mask predicted for it. intersection, union: in pixels. baselines: IoU of each trivial predictor."""

    perspective: str
    modality: str
    entity: str
    group: str
    iou: float
    intersection: int
    union: int
    baselines: dict[str, float]


@dataclass
class NameCounts:
    """The names in the answer of one turn, counted against the true names."""

    perspective: str
    group: str
    tp: int
    fp: int
    fn: int


@dataclass
class NamingResult:
    """One turn of perspective II: the class of its target, and whether it is the first entity that the answer names."""

    group: str
    target: str
    correct: bool


@dataclass
class AbstentionResult:
    """One grounded sample. no_target: nothing that it asks for is present; abstained: no mask was predicted; segmented_px: pixels in the
    union of the predicted masks, summed over its turns."""

    group: str
    no_target: bool
    abstained: bool
    segmented_px: int


@dataclass
class ClosedEndedResult:
    """One closed-ended question. reference: its short answer."""

    group: str
    kind: str
    reference: str
    correct: bool


@dataclass
class Accumulator:
    """All results that a report is computed from. segmented: confidence features and IoU of every predicted mask; samples: number of
    samples per perspective."""

    calibration: Calibration = UNCALIBRATED
    samples: Counter = field(default_factory=Counter)
    entities: list[EntityResult] = field(default_factory=list)
    segmented: list[tuple[ConfidenceFeatures, float]] = field(default_factory=list)
    names: list[NameCounts] = field(default_factory=list)
    naming: list[NamingResult] = field(default_factory=list)
    naming_no_prompt: list[NamingResult] = field(default_factory=list)
    abstentions: list[AbstentionResult] = field(default_factory=list)
    closed_ended: list[ClosedEndedResult] = field(default_factory=list)
    closed_ended_image_blanked: list[ClosedEndedResult] = field(default_factory=list)
    unusable: list[dict] = field(default_factory=list)  # {"sample": id, "reason": text}


@dataclass
class GroundTruth:
    """The entity of one span of a true answer. name: its name; written: the words of the span, accepted as another name."""

    name: str
    written: str
    mask: np.ndarray  # bool [H, W]


def ground_truths(record: Record, sample: Sample, turn: int) -> list[GroundTruth]:
    """The grounded spans of assistant turn `turn` (index into sample.turns), each with the union of the masks of its targets."""
    spans: dict[tuple[int, ...] | None, list] = defaultdict(list)
    for number, target in enumerate(sample.targets):
        if target.turn == turn and not target.absent:
            spans[tuple(target.span) if target.span else (-1, number)].append(target)
    truths = []
    for span, targets in spans.items():
        names = list(dict.fromkeys(canonical_name(t.entity) for t in targets))
        written = canonical_name(sample.turns[turn].text[span[0] : span[1]]) if span[0] >= 0 else names[0]
        mask = np.logical_or.reduce([record.mask(mask_id).decode() for t in targets for mask_id in t.mask_ids])
        truths.append(GroundTruth(names[0] if len(names) == 1 else written, written, mask))
    return truths
