"""Make the report of an evaluation: values with intervals as JSON, and a printed table. Both follow the registry of metrics.

Axis letters: H, W height and width of the original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.overlay import draw_overlay
from mimo_jax.eval.accumulator import Accumulator
from mimo_jax.eval.registry import METRICS, compute_metrics, conventions
from mimo_jax.eval.standard_metrics import GROUNDED
from mimo_jax.infer.answers.answer import Answer

_SCORE = {  # column heading in the block of confidence scores -> key of its value
    "ECE": "expected_calibration_error",
    **{name: name for name in ("brier", "spearman", "auroc", "below", "precision", "recall")},
}


def make_report(results: Accumulator) -> dict:
    """The metrics as plain JSON values; None if there was nothing to measure."""
    values, intervals = compute_metrics(results)
    counts = {
        "samples": {p: results.samples[p] for p in PERSPECTIVES},
        "entities": {p: sum(e.perspective == p for e in results.entities) for p in GROUNDED},
        "no_target": sum(a.no_target for a in results.abstentions),
        "vqa_closed": len(results.closed_ended),
        "vqa_open": len(results.open_ended),
        "groups": len({row.group for row in results.scored}),
        "unusable": len(results.unusable),
    }
    return {**values, "intervals": intervals, "n": counts, "unusable": results.unusable, "conventions": conventions()}


def table(report: dict) -> str:
    """The report as text, in blocks: values per perspective, single values, confidence scores, and breakdowns."""

    def lines(format: str) -> list[str]:
        return [line for metric in METRICS.values() if metric.format == format for line in _LINES[format](metric.name, report)]

    out = [f"{'':34}" + "".join(f"{p:>16}" for p in GROUNDED), *lines("perspectives"), *lines("baselines")]
    out.append(f"{'entities':34}" + "".join(f"{report['n']['entities'][p]:>16}" for p in GROUNDED))
    out += ["", *lines("value"), *lines("parts"), *lines("score"), *lines("breakdown")]
    if report.get("not_evaluable"):
        out += ["", "not evaluable (fewer than two patients or cases): " + ", ".join(report["not_evaluable"])]
    if report["unusable"]:
        first = report["unusable"][0]
        out += ["", f"{len(report['unusable'])} samples could not be used; the first: {first['sample']}: {first['reason']}"]
    out += ["", *(f"{name}: {text}" for name, text in report["conventions"].items())]
    return "\n".join(out)


def score_table(score: dict) -> list[str]:
    """The lines for the result of `standard_metrics.score_quality`."""
    lines = [f"{'score':18}{score['n']:>10} masks" + "".join(f"{name:>16}" for name in _SCORE)]
    for kind in ("plain", "calibrated"):
        if score[kind] is not None:
            flat = score[kind] | score[kind]["uncertain"]
            lines.append(f"{kind:34}" + "".join(f"{_cell(flat[name]):>16}" for name in _SCORE.values()))
    if score["calibrated"] is not None and score.get("in_sample"):
        lines.append("in-sample: the calibration was fitted on patients or cases of these data; other data show its quality")
    return lines


def write_comparison(path: Path, answer: Answer, truth_text: str, truths: Sequence[tuple[str, np.ndarray]]) -> None:
    """Write a PNG of two overlays side by side: the answer, and the ground truth (name, bool [H, W])."""
    named = [(e.phrase or f"structure {e.id + 1}", e.mask) for e in answer.entities]
    left = draw_overlay(answer.image, named, answer.prompts, f"{answer.question}\nmodel: {answer.describe()}")
    right = draw_overlay(answer.image, truths, answer.prompts, f"{answer.question}\ntruth: {truth_text}")
    sheet = Image.new("RGB", (left.width + right.width + 8, max(left.height, right.height)))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 8, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _perspective_lines(name: str, report: dict) -> list[str]:
    bounds = report["intervals"].get(name, {})
    return [f"{name:34}" + "".join(f"{_cell(report[name][p], bounds.get(p)):>16}" for p in GROUNDED)]


def _baseline_lines(name: str, report: dict) -> list[str]:
    return [f"{'baseline ' + kind:34}" + "".join(f"{_cell(of[p]):>16}" for p in GROUNDED) for kind, of in report[name].items()]


def _value_lines(name: str, report: dict) -> list[str]:
    return [f"{name:34}{_cell(report[name], report['intervals'].get(name)):>16}"]


def _part_lines(name: str, report: dict) -> list[str]:
    bounds = report["intervals"].get(name, {})
    rows = [(f"{name} {part}", _cell(value, bounds.get(part))) for part, value in report[name].items()]
    return [f"{label} {cell.rjust(49 - len(label))}" for label, cell in rows]  # also if a modality or dataset has a long name


def _score_lines(name: str, report: dict) -> list[str]:
    return ["", *score_table(report[name])]


def _breakdown_lines(name: str, report: dict) -> list[str]:
    lines = ["", f"{name.replace('_', ' '):34}{'miou':>16}{'mean mask':>16}{'n':>16}{'groups':>16}"]
    for part, of in report[name].items():
        lines.append(f"{part[:33]:34}{_cell(of['miou']):>16}{_cell(of.get('mean_mask_miou')):>16}{of['n']:>16}{of['groups']:>16}")
    return lines


_LINES = {
    "perspectives": _perspective_lines,
    "baselines": _baseline_lines,
    "value": _value_lines,
    "parts": _part_lines,
    "score": _score_lines,
    "breakdown": _breakdown_lines,
}


def _cell(value: float | None, bounds: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} ±{(bounds[1] - bounds[0]) / 2:.3f}" if bounds else f"{value:.3f}"
