"""The standard metrics of a report: names, abstention and confidence scores, and the table of all metrics with their conventions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mimo_jax.eval import mask_metrics, metrics, vqa_metrics
from mimo_jax.eval.accumulator import Accumulator
from mimo_jax.eval.mask_metrics import GROUNDED
from mimo_jax.eval.registry import Ratio, Resampled, as_number, register_metric
from mimo_jax.eval.vqa_metrics import majority_share
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, ConfidenceFeatures

# --- names and abstention --------------------------------------------------------------------------------------------


def entity_f1(results: Accumulator) -> dict[str, Ratio]:
    counts = {p: [(t, *metrics.name_counts(t.names, t.predicted)) for t in results.turns if t.perspective == p] for p in GROUNDED}
    return {
        p: Ratio([turn for turn, *_ in of_p], [2 * tp for _, tp, *_ in of_p], [2 * tp + fp + fn for _, tp, fp, fn in of_p])
        for p, of_p in counts.items()
    }


def naming_accuracy(results: Accumulator) -> Ratio:
    return Ratio(results.naming, [row.correct for row in results.naming])


def naming_accuracy_without_prompt(results: Accumulator) -> Ratio:
    return Ratio(results.naming_no_prompt, [row.correct for row in results.naming_no_prompt])


def majority_class_share(results: Accumulator) -> float | None:
    return majority_share([n.target for n in results.naming])


def no_target_fpr(results: Accumulator) -> Ratio:
    rows = [a for a in results.abstentions if a.no_target]
    return Ratio(rows, [not a.abstained for a in rows])


def abstention(results: Accumulator) -> dict[str, Ratio]:
    abstained = [a for a in results.abstentions if a.abstained]
    no_target = [a for a in results.abstentions if a.no_target]
    return {
        "precision": Ratio(abstained, [a.no_target for a in abstained]),
        "recall": Ratio(no_target, [a.abstained for a in no_target]),
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
            "brier": as_number(metrics.brier(scores, ious >= 0.5)),
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


def score_error(results: Accumulator) -> dict[str, Ratio | Resampled]:
    rows = results.predicted_masks
    scores, ious = results.calibration.scores([row.features for row in rows]), np.array([row.iou for row in rows])

    def bin_error(counts: np.ndarray) -> np.ndarray:
        drawn = (np.repeat(np.arange(len(rows)), count) for count in counts)
        return np.array([metrics.expected_calibration_error(scores[items], ious[items]) for items in drawn])

    return {"ECE": Resampled(rows, bin_error), "Brier": Ratio(rows, ((scores - (ious >= 0.5)) ** 2).tolist())}


# --- registration ----------------------------------------------------------------------------------------------------

for _compute, _format, _convention in (
    (mask_metrics.miou, "perspectives", "the paper's convention: free-running greedy answers from image, question and prompts alone; mean "
     "over true entities; a prediction is matched to the true entity with its name in its turn (II: the best of all predictions to the "
     "single target), several of one name one to one by best IoU, none = 0; extra masks do not count; original resolution, threshold 0; "
     "absent entities are not counted"),
    (mask_metrics.miou_strict, "perspectives", "one to one by equal names, in II too; a pair has an IoU above 0; mean over pairs, missed "
     "entities and extra masks, the latter two with IoU 0, masks for absent entities included"),
    (mask_metrics.ap50, "perspectives", "COCO's AP at IoU 0.5 (101 recalls, 100 masks per name and turn), score = predicted IoU × "
     "P(<SEG>), mean over names that have a true entity; II, whose question names nothing: one class; equal scores in the order of the "
     "samples"),
    (mask_metrics.success_50, "perspectives", "the fraction of true entities with IoU >= 0.5, pairs as in miou"),
    (mask_metrics.f1_50, "perspectives", "2 TP / (true entities + predicted masks), TP: the most one-to-one pairs of equal names with "
     "IoU >= 0.5; over all turns"),
    (mask_metrics.dice, "value", "as miou, perspectives I to IV together, 2 IoU / (1 + IoU) of each pair"),
    (mask_metrics.dice_strict, "value", "as miou_strict, I to IV together, 2 IoU / (1 + IoU) of each pair"),
    (mask_metrics.ciou, "value", "LISA's cumulative IoU, I to IV: of each answer, the union of all predicted masks against the union of "
     "all true masks; sum of intersections / sum of unions"),
    (mask_metrics.giou, "value", "LISA's gIoU, I to IV: mean over answers of the IoU of the same unions; without a target 1 if nothing is "
     "predicted, else 0 (LISA's code adds 1e-5 to the unions)"),
    (mask_metrics.dice_by_size, "parts", "dice by size of the true mask, as a fraction of the image's pixels"),
    (mask_metrics.surface, "parts", "pairs as in miou: NSD, the share of boundary pixels of both masks within 2 px (2 mm where the pixel "
     "spacing is known) of the other boundary, without a mask 0; HD95, the greater of the two directed 95th percentiles, over the "
     "entities that have a mask, whose share is 'with a mask'"),
    (mask_metrics.instances, "parts", "panoptic quality of entities with several instances in an answer: the 8-connected components of the "
     "masks predicted for the entity against its instances; pairs have IoU > 0.5; SQ = mean IoU of pairs, RQ = TP / (TP + FP/2 + FN/2), "
     "PQ = SQ × RQ, over all answers together, not per image"),
    (mask_metrics.ap50_by_modality, "parts", "as ap50, perspectives I and III (without prompt) and II and IV (with prompt)"),
    (entity_f1, "perspectives", "predicted names against true names, per turn, as multisets; micro-averaged"),
    (naming_accuracy, "value", "II: the first entity that the answer names is the target"),
    (naming_accuracy_without_prompt, "value", "the same questions without points, boxes and scribbles"),
    (majority_class_share, "value", "II: the fraction of targets that belong to the most frequent class"),
    (no_target_fpr, "value", "the fraction of no-target samples (which ask only for absent entities) for which any mask is predicted"),
    (abstention, "parts", "precision: the fraction of no-target samples among the samples (I to IV) without any predicted mask; recall: "
     "1 - no_target_fpr"),
    (score, "score", "over all masks predicted in I to IV, each with its IoU as in miou (0 if it matches no true entity of its turn): "
     "expected_calibration_error (ECE): |mean score - mean IoU| in 10 bins of equal count, averaged; brier: mean (score - [IoU >= 0.5])²; "
     "spearman: rank correlation of score and IoU; auroc: of the score for IoU < 0.5; uncertain: precision and recall of `score < below` "
     "for IoU < 0.5. plain: iou × seg_prob; calibrated: with the checkpoint's calibration"),
    (score_error, "parts", "ECE and Brier of the scores that users see, calibrated if the checkpoint is, with intervals"),
    (vqa_metrics.vqa_closed_accuracy, "value", "strict: the short answer (yes or no, number, choice, or all of the text but words such as "
     "'image') equals a reference after normalisation; clauses that deny are left out, and a bare denial is no"),
    (vqa_metrics.vqa_closed_recall, "value", "LLaVA-Med's recall on closed-ended questions: the share of the reference's words that the "
     "answer has, the best over the references"),
    (vqa_metrics.vqa_closed_contained, "value", "the words of a reference occur in the answer in their order, whatever else it says"),
    (vqa_metrics.vqa_closed_accuracy_image_blanked, "value", "vqa_closed_accuracy of the same questions with a black image"),
    (vqa_metrics.vqa_majority, "value", "the fraction of the most frequent short answer among the same questions; by_kind: with the best "
     "constant answer to each kind of question"),
    (vqa_metrics.vqa_majority_by_kind, "value", ""),
    (vqa_metrics.vqa_closed_accuracy_by_kind, "none", ""),
    (vqa_metrics.vqa_closed_accuracy_by_dataset, "parts", ""),
    (vqa_metrics.vqa_open, "parts", "open-ended questions, mean over questions: recall and f1 of words as LLaVA-Med counts them, the best "
     "over the references; bleu_n: BLEU of the sentence, n-grams up to n, no smoothing (nltk); rouge_l: F-measure (rouge-score)"),
    (vqa_metrics.vqa_open_recall_by_dataset, "parts", ""),
    (mask_metrics.baselines, "baselines", "miou of trivial predictors that know the entity's name, fitted on the training split"),
    (mask_metrics.per_modality, "breakdown", ""),
    (mask_metrics.per_entity, "breakdown", ""),
):  # fmt: skip
    register_metric(_compute.__name__, _compute, _convention, _format)
