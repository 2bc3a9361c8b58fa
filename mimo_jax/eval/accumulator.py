"""The raw results of an evaluation: one row per question, name or mask, from which every metric is computed.

Each row has its `sample`, by which two evaluations are paired, and its `group`, the patient or case, for the bootstrap.
Axis letters: H, W height and width of the original image; T true entities and P predicted ones of one turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields

import numpy as np

from mimo_jax.data.schema import Mask, Record, Sample
from mimo_jax.infer.answers.asked import canonical_name
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, ConfidenceFeatures


@dataclass
class EntityResult:
    """One true entity and the mask matched with it by the paper's convention. iou: 0 without one; true_px, image_px: pixels of the true
    mask and of the image; surface_px, surface_mm: (NSD, HD95) in these units, None without a mask, `surface_mm` also without a pixel
    spacing, which `has_mm` says; baselines: IoU of each trivial predictor."""

    sample: str
    group: str
    perspective: str
    modality: str
    entity: str
    iou: float
    true_px: int
    image_px: int
    surface_px: tuple[float, float] | None = None
    surface_mm: tuple[float, float] | None = None
    has_mm: bool = False
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass
class TurnResult:
    """The names and masks of one answer of perspectives I to IV, held against its T true entities.

    names, predicted: T and P canonical names. ious [T][P]: IoU of every pair; scores [P]: predicted IoU × P(`<SEG>`). asked: whether the
    turn has targets, present or absent. overlap: (intersection, union) in pixels of the union of all true and of all predicted masks."""

    sample: str
    group: str
    perspective: str
    modality: str
    names: list[str]
    predicted: list[str]
    ious: list[list[float]]
    scores: list[float]
    asked: bool
    overlap: tuple[int, int]


@dataclass
class InstanceResult:
    """The instances of one entity in one answer, the entity having several in the truth. iou: summed over the matched pairs (tp)."""

    sample: str
    group: str
    entity: str
    iou: float
    tp: int
    fp: int
    fn: int


@dataclass
class PredictedMaskResult:
    """One predicted mask: its confidence features and its IoU with the true entity that it is matched with, 0 without one."""

    sample: str
    group: str
    features: ConfidenceFeatures
    iou: float


@dataclass
class NamingResult:
    """One turn of perspective II: the class of its target, and whether it is the first entity that the answer names."""

    sample: str
    group: str
    target: str
    correct: bool


@dataclass
class AbstentionResult:
    """One grounded sample. no_target: nothing that it asks for is present; abstained: no mask was predicted; segmented_px: pixels in the
    union of the predicted masks, summed over its turns."""

    sample: str
    group: str
    no_target: bool
    abstained: bool
    segmented_px: int


@dataclass
class ClosedEndedResult:
    """One closed-ended question. reference: its short answer. strict, recall, contained: the answer by the three conventions."""

    sample: str
    group: str
    dataset: str
    kind: str
    reference: str
    strict: bool
    recall: float
    contained: bool


@dataclass
class OpenEndedResult:
    """One open-ended question. scores: value of each of `vqa_text.OPEN_METRICS`."""

    sample: str
    group: str
    dataset: str
    scores: dict[str, float]


@dataclass
class SampleResult:
    """One sample that was scored. truth: digest of its image, texts and true masks, by which reports of other data are told apart."""

    sample: str
    group: str
    truth: str


@dataclass
class Accumulator:
    """All results that a report is computed from. samples: number of samples per perspective."""

    calibration: Calibration = UNCALIBRATED
    samples: Counter = field(default_factory=Counter)
    entities: list[EntityResult] = field(default_factory=list)
    turns: list[TurnResult] = field(default_factory=list)
    instances: list[InstanceResult] = field(default_factory=list)
    predicted_masks: list[PredictedMaskResult] = field(default_factory=list)
    naming: list[NamingResult] = field(default_factory=list)
    naming_no_prompt: list[NamingResult] = field(default_factory=list)
    abstentions: list[AbstentionResult] = field(default_factory=list)
    closed_ended: list[ClosedEndedResult] = field(default_factory=list)
    closed_ended_image_blanked: list[ClosedEndedResult] = field(default_factory=list)
    open_ended: list[OpenEndedResult] = field(default_factory=list)
    scored: list[SampleResult] = field(default_factory=list)
    unusable: list[dict] = field(default_factory=list)  # {"sample": id, "reason": text}

    @property
    def segmented(self) -> list[tuple[ConfidenceFeatures, float]]:
        """Confidence features and IoU of every predicted mask."""
        return [(row.features, row.iou) for row in self.predicted_masks]

    def extend(self, other: Accumulator) -> None:
        """Add the results of other samples behind these."""
        for name in (f.name for f in fields(self) if f.name != "calibration"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.update(theirs) if isinstance(mine, Counter) else mine.extend(theirs)


@dataclass
class GroundTruth:
    """The entity of one span of a true answer. name: its name; written: the words of the span, accepted as another name."""

    name: str
    written: str
    mask: np.ndarray  # bool [H, W], the union of `instances`
    instances: list[Mask]


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
        instances = [record.mask(mask_id) for t in targets for mask_id in t.mask_ids]
        mask = np.logical_or.reduce([instance.decode() for instance in instances])
        truths.append(GroundTruth(names[0] if len(names) == 1 else written, written, mask, instances))
    return truths
