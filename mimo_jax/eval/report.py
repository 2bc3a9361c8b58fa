"""From scored answers to report.json: rows of what was found, their figures with intervals, and a table to read.

Axis letters: H, W height and width of the original image.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.overlay import draw_overlay
from mimo_jax.eval import metrics
from mimo_jax.infer.answers.answer import Answer
from mimo_jax.infer.answers.calibration import PLAIN, Calibration, Evidence

GROUNDED = tuple(p for p in PERSPECTIVES if p != "vqa")

_SCORE = ("bin_error", "spearman", "auroc", "below", "precision", "recall")  # columns of the table

CONVENTIONS = {
    "miou": "free-running greedy answers from image, question and prompts alone; mean over true entities; a prediction counts for "
    "the true entity of its name in its turn (II: for the single target), several of a name by best IoU, none = 0; original "
    "resolution, threshold 0; no-target entities do not enter",
    "dice": "as miou, perspectives I to IV together, 2 IoU / (1 + IoU) of each pair",
    "ciou": "sum of intersections / sum of unions, I to IV; what is painted in answer to a no-target sample enters the unions",
    "giou": "LISA's: mean IoU of I to IV, a no-target sample entering with 1 if nothing is painted, else 0",
    "entity_f1": "names found against names true, per turn, as multisets; micro",
    "naming_accuracy": "II: the first entity that the answer names is the target",
    "naming_accuracy_without_prompt": "the same questions with points, boxes and scribbles taken away",
    "commonest_class_share": "II: the share of targets that are of the commonest class",
    "no_target_fpr": "of samples that ask only for what is not there, the share in which anything is marked",
    "abstention": "precision: of the samples (I to IV) without any mark, the share that asks only for what is not there; recall: "
    "1 - no_target_fpr",
    "score": "of everything painted in I to IV, with its IoU as in miou (0 where no true entity of its turn is met): bin_error: "
    "|mean score - mean IoU| in 10 bins of equal count, averaged; spearman: rank correlation of score and IoU; auroc: of the score for "
    "IoU < 0.5; uncertain: precision and recall of `score < below` for IoU < 0.5. plain: iou × seg_prob; calibrated: with the "
    "checkpoint's calibration",
    "vqa_closed_accuracy": "short answer (yes or no, number, choice) equal to a reference after normalising",
    "vqa_closed_accuracy_image_blanked": "the same questions over a black image",
    "vqa_majority": "the share of the commonest short answer among the same questions; by_kind: the best constant answer to each kind",
    "baselines": "miou of trivial predictors that are told the entity's name, fitted on the training split",
    "intervals": "95 % percentile bootstrap over patients or cases, 1000 draws",
}


@dataclass
class Found:
    """One true entity and what was painted for it."""

    perspective: str
    modality: str
    entity: str
    group: str
    iou: float
    intersection: int
    union: int
    baselines: dict[str, float]  # IoU of each


@dataclass
class Tally:
    """Everything that a report is made of; one entry of `groups` names beside each value, for the bootstrap."""

    found: list[Found] = field(default_factory=list)
    samples: Counter = field(default_factory=Counter)  # perspective → samples
    painted: list[tuple[Evidence, float]] = field(default_factory=list)  # of every painted entity; its IoU
    names: list[tuple[str, str, int, int, int]] = field(default_factory=list)  # perspective, group, tp, fp, fn
    naming: list[tuple[str, bool]] = field(default_factory=list)  # group, right
    naming_blind: list[tuple[str, bool]] = field(default_factory=list)  # without prompts
    naming_true: list[str] = field(default_factory=list)  # the target's class
    silent: list[tuple[str, bool, bool, int]] = field(default_factory=list)  # group, nothing is there, nothing marked, painted pixels
    closed: list[tuple[str, str, bool]] = field(default_factory=list)  # group, kind, right
    closed_true: list[tuple[str, str]] = field(default_factory=list)  # kind, short answer
    closed_blank: list[tuple[str, bool]] = field(default_factory=list)
    unusable: list[dict] = field(default_factory=list)

    def report(self, calibration: Calibration = PLAIN) -> dict:
        """The figures as plain JSON values; None where there was nothing to measure."""
        values, intervals = {}, {}

        def measure(name: str, groups: Sequence[str], above: Sequence[float], below: Sequence[float] | None = None, part: str = ""):
            below = [1] * len(above) if below is None else below
            value, bounds = _number(metrics.ratio(above, below)), metrics.interval(above, below, groups)
            bounds = None if value is None else [round(b, 4) for b in bounds]
            if part:
                values.setdefault(name, {})[part] = value
                intervals.setdefault(name, {})[part] = bounds
            else:
                values[name], intervals[name] = value, bounds

        for p in GROUNDED:
            rows = [f for f in self.found if f.perspective == p]
            measure("miou", [f.group for f in rows], [f.iou for f in rows], part=p)
        everyone = [f.group for f in self.found]
        nothing = [(group, painted) for group, absent, _, painted in self.silent if absent]
        with_nothing = everyone + [group for group, _ in nothing]
        pairs = [(f.intersection, f.union) for f in self.found] + [(0, painted) for _, painted in nothing]
        measure("dice", everyone, [metrics.dice_from_iou(f.iou) for f in self.found])
        measure("ciou", with_nothing, [i for i, _ in pairs], [u for _, u in pairs])
        measure("giou", with_nothing, [metrics.iou_of_pair(*pair) for pair in pairs])
        for p in GROUNDED:
            rows = [(group, 2 * tp, 2 * tp + fp + fn) for q, group, tp, fp, fn in self.names if q == p]
            measure("entity_f1", [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], part=p)
        measure("naming_accuracy", *_columns(self.naming))
        measure("naming_accuracy_without_prompt", *_columns(self.naming_blind))
        values["commonest_class_share"] = _commonest(self.naming_true)
        measure("no_target_fpr", [s[0] for s in self.silent if s[1]], [not s[2] for s in self.silent if s[1]])
        measure("abstention", [s[0] for s in self.silent if s[2]], [s[1] for s in self.silent if s[2]], part="precision")
        measure("abstention", [s[0] for s in self.silent if s[1]], [s[2] for s in self.silent if s[1]], part="recall")
        measure("vqa_closed_accuracy", [c[0] for c in self.closed], [c[2] for c in self.closed])
        measure("vqa_closed_accuracy_image_blanked", *_columns(self.closed_blank))
        values["vqa_majority"] = _commonest([answer for _, answer in self.closed_true])
        by_kind = _grouped((kind, answer) for kind, answer in self.closed_true)
        right = sum(Counter(answers).most_common(1)[0][1] for answers in by_kind.values())
        values["vqa_majority_by_kind"] = _number(metrics.ratio(right, len(self.closed_true)))
        rights_of = _grouped((kind, right) for _, kind, right in self.closed)
        values["vqa_closed_accuracy_by_kind"] = {kind: {"accuracy": _number(_mean(r)), "n": len(r)} for kind, r in rights_of.items()}
        values["score"] = self.score(calibration)
        values["baselines"] = self._baselines()
        values["per_modality"] = self._parts(lambda f: f.modality)
        values["per_entity"] = self._parts(lambda f: f.entity)
        values["intervals"] = intervals
        values["n"] = {
            "samples": {p: self.samples[p] for p in PERSPECTIVES},
            "entities": {p: sum(f.perspective == p for f in self.found) for p in GROUNDED},
            "no_target": len(nothing),
            "vqa_closed": len(self.closed),
            "groups": len({f.group for f in self.found} | {c[0] for c in self.closed} | set(with_nothing)),
            "unusable": len(self.unusable),
        }
        values["unusable"] = self.unusable
        values["conventions"] = CONVENTIONS
        return values

    def score(self, calibration: Calibration) -> dict:
        """How well scores tell the IoU of what was painted, without and with a calibration; None for that where it is not fitted."""
        calibrated = self._score(calibration) if calibration else None
        return {"n": len(self.painted), "plain": self._score(PLAIN), "calibrated": calibrated, "fitted": calibration.fitted}

    def _score(self, calibration: Calibration) -> dict:
        scores = calibration.scores([evidence for evidence, _ in self.painted])
        ious = np.array([iou for _, iou in self.painted])
        bad, marked = ious < 0.5, scores < calibration.uncertain_below
        return {
            "bin_error": _number(metrics.bin_error(scores, ious)),
            "spearman": _number(metrics.spearman(scores, ious)),
            "auroc": _number(metrics.auroc(-scores, bad)),
            "below": calibration.uncertain_below,
            "uncertain": {"precision": _number(metrics.ratio(bad[marked], marked)), "recall": _number(metrics.ratio(marked[bad], bad))},
        }

    def _baselines(self) -> dict[str, dict[str, float | None]]:
        kinds = sorted({name for f in self.found for name in f.baselines})
        return {
            name: {p: _number(_mean([f.baselines[name] for f in self.found if f.perspective == p])) for p in GROUNDED} for name in kinds
        }

    def _parts(self, key) -> dict[str, dict]:
        """miou, dice, baselines and numbers of each modality or entity, over I to IV."""
        made = {}
        for name, rows in _grouped((key(f), f) for f in self.found).items():
            ious = [f.iou for f in rows]
            made[name] = {
                "miou": _number(_mean(ious)),
                "dice": _number(_mean([metrics.dice_from_iou(v) for v in ious])),
                **{f"{b}_miou": _number(_mean([f.baselines[b] for f in rows])) for b in sorted(rows[0].baselines)},
                "n": len(rows),
                "groups": len({f.group for f in rows}),
            }
        return made


def table(report: dict) -> str:
    """The headlines as text, with their intervals."""
    lines = [f"{'':34}" + "".join(f"{p:>16}" for p in GROUNDED)]
    for name in ("miou", "entity_f1"):
        cells = [_cell(report[name][p], report["intervals"][name][p]) for p in GROUNDED]
        lines.append(f"{name:34}" + "".join(f"{c:>16}" for c in cells))
    for name, values in report["baselines"].items():
        lines.append(f"{'baseline ' + name:34}" + "".join(f"{_cell(values[p]):>16}" for p in GROUNDED))
    lines.append(f"{'entities':34}" + "".join(f"{report['n']['entities'][p]:>16}" for p in GROUNDED))
    lines.append("")
    for name in (
        "dice", "ciou", "giou", "naming_accuracy", "naming_accuracy_without_prompt", "commonest_class_share", "no_target_fpr",
        "vqa_closed_accuracy", "vqa_closed_accuracy_image_blanked", "vqa_majority", "vqa_majority_by_kind",
    ):  # fmt: skip
        lines.append(f"{name:34}{_cell(report[name], report['intervals'].get(name)):>16}")
    for name, part in report["abstention"].items():
        lines.append(f"{'abstention ' + name:34}{_cell(part, report['intervals']['abstention'][name]):>16}")
    lines += ["", *score_table(report["score"])]
    for title, key in (("per modality", "per_modality"), ("per entity", "per_entity")):
        lines += ["", f"{title:34}{'miou':>16}{'mean mask':>16}{'n':>16}{'groups':>16}"]
        for name, part in report[key].items():
            lines.append(
                f"{name[:33]:34}{_cell(part['miou']):>16}{_cell(part.get('mean_mask_miou')):>16}{part['n']:>16}{part['groups']:>16}"
            )
    if report.get("not_evaluable"):
        lines += ["", "not evaluable (fewer than two patients or cases): " + ", ".join(report["not_evaluable"])]
    if report["unusable"]:
        first = report["unusable"][0]
        lines += ["", f"{len(report['unusable'])} samples could not be used, the first: {first['sample']}: {first['reason']}"]
    lines += ["", *(f"{name}: {text}" for name, text in report["conventions"].items())]
    return "\n".join(lines)


def score_table(score: dict) -> list[str]:
    """Lines of `Tally.score`."""
    lines = [f"{'score':18}{score['n']:>8} painted" + "".join(f"{name:>16}" for name in _SCORE)]
    for kind in ("plain", "calibrated"):
        if score[kind] is not None:
            flat = score[kind] | score[kind]["uncertain"]
            lines.append(f"{kind:34}" + "".join(f"{_cell(flat[name]):>16}" for name in _SCORE))
    return lines


def write_comparison(path: Path, answer: Answer, truth_text: str, truths: Sequence[tuple[str, np.ndarray]]) -> None:
    """PNG of two overlays side by side: the answer, and the truth (name, bool [H, W])."""
    named = [(e.phrase or f"structure {e.id + 1}", e.mask) for e in answer.entities]
    left = draw_overlay(answer.image, named, answer.prompts, f"{answer.question}\nmodel: {answer.describe()}")
    right = draw_overlay(answer.image, truths, answer.prompts, f"{answer.question}\ntruth: {truth_text}")
    sheet = Image.new("RGB", (left.width + right.width + 8, max(left.height, right.height)))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 8, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _cell(value: float | None, bounds: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} ±{(bounds[1] - bounds[0]) / 2:.3f}" if bounds else f"{value:.3f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _mean(values: Sequence[float]) -> float:
    return metrics.ratio(values, [1] * len(values))


def _columns(rows: Sequence[tuple[str, bool]]) -> tuple[list[str], list[bool]]:
    return [group for group, _ in rows], [right for _, right in rows]


def _grouped(pairs: Iterable[tuple]) -> dict:
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(sorted(groups.items()))


def _commonest(values: Sequence[str]) -> float | None:
    return _number(Counter(values).most_common(1)[0][1] / len(values)) if values else None
