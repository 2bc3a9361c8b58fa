"""Hold the answers to one sample against its true texts and masks, and add the outcome to the results of an evaluation.

Axis letters: H, W height and width of the original image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from mimo_jax.data.schema import Record, Sample
from mimo_jax.eval import metrics, vqa_text
from mimo_jax.eval.accumulator import (
    AbstentionResult,
    Accumulator,
    ClosedEndedResult,
    EntityResult,
    GroundTruth,
    InstanceResult,
    NamingResult,
    OpenEndedResult,
    PredictedMaskResult,
    TurnResult,
)
from mimo_jax.eval.surface import nsd_and_hd95
from mimo_jax.infer.answers.answer import Answer


def digest(record: Record, sample: Sample) -> str:
    """Hexadecimal digest of what a sample asks and of what is right: image, texts, references, targets and masks."""
    targets = [[vars(target), [record.mask(mask_id).rle for mask_id in target.mask_ids]] for target in sample.targets]
    content = [[vars(turn) for turn in sample.turns], sample.references, sample.choices, targets]
    return hashlib.sha256(record.image + json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def score_vqa(record: Record, sample: Sample, answers: Sequence[Answer], image_blanked: bool, results: Accumulator) -> None:
    """Add the last answer of a sample of plain VQA. image_blanked: it was given to a black image."""
    text, keys = answers[-1].text, (sample.sample_id, record.group, record.dataset)
    if sample.answer_type == "closed":
        strict = vqa_text.closed_correct(text, sample.references, sample.choices)
        recall = max(vqa_text.token_scores(text, reference)[0] for reference in sample.references)
        reference, contained = vqa_text.closed_answer(sample.references[0]), vqa_text.contained(text, sample.references)
        row = ClosedEndedResult(*keys, sample.kind, reference, strict, recall, contained)
        (results.closed_ended_image_blanked if image_blanked else results.closed_ended).append(row)
    elif sample.references:
        results.open_ended.append(OpenEndedResult(*keys, vqa_text.open_scores(text, sample.references)))


def score_naming(record: Record, sample: Sample, truths: Sequence[GroundTruth], names: Sequence[str], rows: list[NamingResult]) -> None:
    """Add the name that an answer of perspective II gives first to `rows`."""
    if sample.perspective == "II" and truths:
        rows.append(NamingResult(sample.sample_id, record.group, truths[0].name, bool(names) and names[0] == truths[0].name))


def entity_names(answer: Answer, truths: Sequence[GroundTruth]) -> list[str]:
    """The canonical names of an answer's entities; the words by which the true answer calls an entity count as its name."""
    aliases = {truth.written: truth.name for truth in truths}
    return [aliases.get(entity.entity, entity.entity) for entity in answer.entities]


def score_masks(
    record: Record,
    sample: Sample,
    turn: int,
    truths: Sequence[GroundTruth],
    answer: Answer,
    baseline_masks: Mapping[str, Mapping[str, np.ndarray]],
    results: Accumulator,
) -> None:
    """Add one answer of perspectives I to IV to entities, turns, instances and segmented masks.

    turn: index of the answer in `sample.turns`. baseline_masks: baseline → entity → bool [H, W], for every true entity."""
    keys = (sample.sample_id, record.group)
    names, masks = entity_names(answer, truths), [entity.mask for entity in answer.entities]
    ious = [[metrics.iou(truth.mask, mask) for mask in masks] for truth in truths]
    pairs = metrics.match([t.name for t in truths], names, ious, by_name=sample.perspective != "II")
    matched = dict(pairs)
    results.predicted_masks += [
        PredictedMaskResult(*keys, entity.evidence, matched.get(k, 0.0)) for k, entity in enumerate(answer.entities)
    ]
    spacing = record.pixel_spacing_mm
    for truth, (k, value) in zip(truths, pairs, strict=True):
        trivial = {kind: metrics.iou(of[truth.name], truth.mask) for kind, of in baseline_masks.items()}
        row = EntityResult(
            *keys, sample.perspective, record.modality, truth.name, value, int(np.count_nonzero(truth.mask)), truth.mask.size,
            None if k is None else nsd_and_hd95(truth.mask, masks[k]),
            None if k is None or not spacing else nsd_and_hd95(truth.mask, masks[k], spacing),
            bool(spacing), trivial,
        )  # fmt: skip
        results.entities.append(row)
    nothing = np.zeros((record.height, record.width), bool)
    overlap = metrics.overlap(*(np.logical_or.reduce([nothing, *part]) for part in ([t.mask for t in truths], masks)))
    asked = any(target.turn == turn for target in sample.targets)
    scores = [entity.evidence.iou * entity.evidence.seg_prob for entity in answer.entities]
    results.turns.append(
        TurnResult(*keys, sample.perspective, record.modality, [t.name for t in truths], names, ious, scores, asked, overlap)
    )
    for name in dict.fromkeys(t.name for t in truths):
        instances = [instance for truth in truths if truth.name == name for instance in truth.instances]
        if len(instances) > 1:
            predicted = [mask for mask, given in zip(masks, names, strict=True) if given == name or sample.perspective == "II"]
            counts = metrics.match_instances([instance.decode() for instance in instances], predicted)
            results.instances.append(InstanceResult(*keys, name, *counts))


def score_abstention(record: Record, sample: Sample, answers: Sequence[Answer], any_present: bool, results: Accumulator) -> None:
    """Add whether a sample that asks for present or absent entities got any mask."""
    if sample.targets:
        segmented_px = sum(int(np.logical_or.reduce([e.mask for e in a.entities]).sum()) for a in answers if a.entities)
        abstained = not any(answer.entities for answer in answers)
        results.abstentions.append(AbstentionResult(sample.sample_id, record.group, not any_present, abstained, segmented_px))
