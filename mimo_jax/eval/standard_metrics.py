"""The standard metrics of a report: one function and one entry in the registry each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mimo_jax.config import PERSPECTIVES
from mimo_jax.eval import metrics
from mimo_jax.eval.accumulator import Accumulator, ClosedEndedResult, EntityResult, NamingResult
from mimo_jax.eval.registry import Ratio, as_number, register_metric
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, ConfidenceFeatures

GROUNDED = tuple(p for p in PERSPECTIVES if p != "vqa")


# --- masks -----------------------------------------------------------------------------------------------------------


def miou(results: Accumulator) -> dict[str, Ratio]:
    rows = {p: [e for e in results.entities if e.perspective == p] for p in GROUNDED}
    return {p: Ratio([e.group for e in of_p], [e.iou for e in of_p]) for p, of_p in rows.items()}


def dice(results: Accumulator) -> Ratio:
    return Ratio([e.group for e in results.entities], [metrics.dice_from_iou(e.iou) for e in results.entities])


def ciou(results: Accumulator) -> Ratio:
    groups, pairs = _pairs(results)
    return Ratio(groups, [intersection for intersection, _ in pairs], [union for _, union in pairs])


def giou(results: Accumulator) -> Ratio:
    groups, pairs = _pairs(results)
    return Ratio(groups, [metrics.iou_of_pair(*pair) for pair in pairs])


def _pairs(results: Accumulator) -> tuple[list[str], list[tuple[int, int]]]:
    """Groups and (intersection, union) of every true entity and of every no-target sample."""
    no_target = [a for a in results.abstentions if a.no_target]
    pairs = [(e.intersection, e.union) for e in results.entities] + [(0, a.segmented_px) for a in no_target]
    return [row.group for row in (*results.entities, *no_target)], pairs


def baselines(results: Accumulator) -> dict[str, dict[str, float | None]]:
    kinds = sorted({name for e in results.entities for name in e.baselines})
    return {k: {p: _mean(e.baselines[k] for e in results.entities if e.perspective == p) for p in GROUNDED} for k in kinds}


def per_modality(results: Accumulator) -> dict[str, dict]:
    return _breakdown(results, lambda e: e.modality)


def per_entity(results: Accumulator) -> dict[str, dict]:
    return _breakdown(results, lambda e: e.entity)


def _breakdown(results: Accumulator, key: Callable[[EntityResult], str]) -> dict[str, dict]:
    """The miou, dice, baselines and counts of each modality or entity, over perspectives I to IV."""
    return {
        name: {
            "miou": _mean(e.iou for e in rows),
            "dice": _mean(metrics.dice_from_iou(e.iou) for e in rows),
            **{f"{b}_miou": _mean(e.baselines[b] for e in rows) for b in sorted(rows[0].baselines)},
            "n": len(rows),
            "groups": len({e.group for e in rows}),
        }
        for name, rows in _grouped(results.entities, key).items()
    }


# --- names and abstention --------------------------------------------------------------------------------------------


def entity_f1(results: Accumulator) -> dict[str, Ratio]:
    rows = {p: [n for n in results.names if n.perspective == p] for p in GROUNDED}
    return {p: Ratio([n.group for n in of_p], [2 * n.tp for n in of_p], [2 * n.tp + n.fp + n.fn for n in of_p]) for p, of_p in rows.items()}


def naming_accuracy(results: Accumulator) -> Ratio:
    return _accuracy(results.naming)


def naming_accuracy_without_prompt(results: Accumulator) -> Ratio:
    return _accuracy(results.naming_no_prompt)


def majority_class_share(results: Accumulator) -> float | None:
    return _majority_share([n.target for n in results.naming])


def no_target_fpr(results: Accumulator) -> Ratio:
    rows = [a for a in results.abstentions if a.no_target]
    return Ratio([a.group for a in rows], [not a.abstained for a in rows])


def abstention(results: Accumulator) -> dict[str, Ratio]:
    abstained = [a for a in results.abstentions if a.abstained]
    no_target = [a for a in results.abstentions if a.no_target]
    return {
        "precision": Ratio([a.group for a in abstained], [a.no_target for a in abstained]),
        "recall": Ratio([a.group for a in no_target], [a.abstained for a in no_target]),
    }


# --- confidence scores -----------------------------------------------------------------------------------------------


def score(results: Accumulator) -> dict:
    return score_quality(results.segmented, results.calibration)


def score_quality(segmented: Sequence[tuple[ConfidenceFeatures, float]], calibration: Calibration) -> dict:
    """How well scores predict the IoU of a mask, without and with a calibration; "calibrated" is None if there is no fitted one."""

    def quality(calibration: Calibration) -> dict:
        scores = calibration.scores([features for features, _ in segmented])
        ious = np.array([iou for _, iou in segmented])
        bad, uncertain = ious < 0.5, scores < calibration.uncertain_below
        return {
            "expected_calibration_error": as_number(metrics.expected_calibration_error(scores, ious)),
            "spearman": as_number(metrics.spearman(scores, ious)),
            "auroc": as_number(metrics.auroc(-scores, bad)),
            "below": calibration.uncertain_below,
            "uncertain": {
                "precision": as_number(metrics.ratio(bad[uncertain], uncertain)),
                "recall": as_number(metrics.ratio(uncertain[bad], bad)),
            },
        }

    calibrated = quality(calibration) if calibration else None
    return {"n": len(segmented), "plain": quality(UNCALIBRATED), "calibrated": calibrated, "fitted": calibration.fitted}


# --- closed-ended questions ------------------------------------------------------------------------------------------


def vqa_closed_accuracy(results: Accumulator) -> Ratio:
    return _accuracy(results.closed_ended)


def vqa_closed_accuracy_image_blanked(results: Accumulator) -> Ratio:
    return _accuracy(results.closed_ended_image_blanked)


def vqa_majority(results: Accumulator) -> float | None:
    return _majority_share([c.reference for c in results.closed_ended])


def vqa_majority_by_kind(results: Accumulator) -> float | None:
    by_kind = _grouped(results.closed_ended, lambda c: c.kind)
    right = sum(Counter(c.reference for c in rows).most_common(1)[0][1] for rows in by_kind.values())
    return as_number(metrics.ratio(right, len(results.closed_ended)))


def vqa_closed_accuracy_by_kind(results: Accumulator) -> dict[str, dict]:
    by_kind = _grouped(results.closed_ended, lambda c: c.kind)
    return {kind: {"accuracy": _mean(c.correct for c in rows), "n": len(rows)} for kind, rows in by_kind.items()}


# --- helpers ---------------------------------------------------------------------------------------------------------


def _accuracy(rows: Sequence[NamingResult] | Sequence[ClosedEndedResult]) -> Ratio:
    return Ratio([row.group for row in rows], [row.correct for row in rows])


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return as_number(metrics.ratio(values, [1] * len(values)))


def _grouped(rows: Iterable, key: Callable) -> dict[str, list]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def _majority_share(values: Sequence[str]) -> float | None:
    return as_number(Counter(values).most_common(1)[0][1] / len(values)) if values else None


# --- registration ----------------------------------------------------------------------------------------------------

for _compute, _format, _convention in (
    (miou, "perspectives", "free-running greedy answers from image, question and prompts alone; mean over true entities; a prediction "
     "is matched to the true entity with its name in its turn (II: to the single target), several of one name by best IoU, none = 0; "
     "original resolution, threshold 0; absent entities are not counted"),
    (dice, "value", "as miou, perspectives I to IV together, 2 IoU / (1 + IoU) of each pair"),
    (ciou, "value", "sum of intersections / sum of unions, I to IV; masks predicted for a no-target sample are added to the unions"),
    (giou, "value", "as in LISA: mean IoU over I to IV; a no-target sample counts as 1 if no mask is predicted, else as 0"),
    (entity_f1, "perspectives", "predicted names against true names, per turn, as multisets; micro-averaged"),
    (naming_accuracy, "value", "II: the first entity that the answer names is the target"),
    (naming_accuracy_without_prompt, "value", "the same questions without points, boxes and scribbles"),
    (majority_class_share, "value", "II: the fraction of targets that belong to the most frequent class"),
    (no_target_fpr, "value", "the fraction of no-target samples (which ask only for absent entities) for which any mask is predicted"),
    (abstention, "parts", "precision: the fraction of no-target samples among the samples (I to IV) without any predicted mask; recall: "
     "1 - no_target_fpr"),
    (score, "score", "over all masks predicted in I to IV, each with its IoU as in miou (0 if it matches no true entity of its turn): "
     "expected_calibration_error (ECE): |mean score - mean IoU| in 10 bins of equal count, averaged; spearman: rank correlation of score "
     "and IoU; auroc: of the score for IoU < 0.5; uncertain: precision and recall of `score < below` for IoU < 0.5. plain: iou × "
     "seg_prob; calibrated: with the checkpoint's calibration"),
    (vqa_closed_accuracy, "value", "the short answer (yes or no, number, choice) equals a reference after normalisation"),
    (vqa_closed_accuracy_image_blanked, "value", "the same questions with a black image"),
    (vqa_majority, "value", "the fraction of the most frequent short answer among the same questions; by_kind: with the best constant "
     "answer to each kind of question"),
    (vqa_majority_by_kind, "value", ""),
    (vqa_closed_accuracy_by_kind, "none", ""),
    (baselines, "baselines", "miou of trivial predictors that know the entity's name, fitted on the training split"),
    (per_modality, "breakdown", ""),
    (per_entity, "breakdown", ""),
):  # fmt: skip
    register_metric(_compute.__name__, _compute, _convention, _format)
