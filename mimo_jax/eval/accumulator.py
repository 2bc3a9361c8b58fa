"""What an evaluation gathers: one row for everything that was asked, named or painted, from which every metric is computed.

Each row carries its `group`, the patient or case, for the bootstrap. Axis letters: H, W height and width of the original image.
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
    """One true entity and what was painted for it. intersection, union: pixels. baselines: IoU of each trivial predictor."""

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
    """Names of one turn's answer against the true ones."""

    perspective: str
    group: str
    tp: int
    fp: int
    fn: int


@dataclass
class NamingResult:
    """One turn of perspective II: the class of its target, and whether the answer names it first."""

    group: str
    target: str
    correct: bool


@dataclass
class AbstentionResult:
    """One grounded sample. no_target: nothing that it asks for is there; abstained: nothing was marked; painted_px: union of the
    masks, summed over its turns."""

    group: str
    no_target: bool
    abstained: bool
    painted_px: int


@dataclass
class ClosedEndedResult:
    """One closed-ended question. reference: its short answer."""

    group: str
    kind: str
    reference: str
    correct: bool


@dataclass
class Accumulator:
    """Everything that a report is made of. painted: evidence and IoU of every painted entity; samples: number by perspective."""

    calibration: Calibration = UNCALIBRATED
    samples: Counter = field(default_factory=Counter)
    entities: list[EntityResult] = field(default_factory=list)
    painted: list[tuple[ConfidenceFeatures, float]] = field(default_factory=list)
    names: list[NameCounts] = field(default_factory=list)
    naming: list[NamingResult] = field(default_factory=list)
    naming_no_prompt: list[NamingResult] = field(default_factory=list)
    abstentions: list[AbstentionResult] = field(default_factory=list)
    closed_ended: list[ClosedEndedResult] = field(default_factory=list)
    closed_ended_image_blanked: list[ClosedEndedResult] = field(default_factory=list)
    unusable: list[dict] = field(default_factory=list)  # {"sample": id, "reason": why}


@dataclass
class GroundTruth:
    """What one span of a true answer stands for. name: the entity; written: the words of the span, also accepted."""

    name: str
    written: str
    mask: np.ndarray  # bool [H, W]


def ground_truths(record: Record, sample: Sample, turn: int) -> list[GroundTruth]:
    """What assistant turn `turn` (index into sample.turns) marks: one for each span, the masks of its targets united."""
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
