"""Summarize a sweep: for every variant the mean over seeds, their standard deviation and the difference to the baseline, as a table, as
JSON and as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mimo_jax import files
from mimo_jax.config import PERSPECTIVES

COLUMNS = (*PERSPECTIVES[1:], PERSPECTIVES[0])  # I to IV: mIoU; vqa: accuracy of closed-ended questions
_MIN_SPAN = 0.1  # minimum range of an axis, so that negligible differences do not look large
_LINE_COLOR, _BAND_COLOR, _SEED_COLOR = "#22303c", "#d7e3ee", "#7fa6c9"


def summarize(groups: Mapping[str, Mapping[str, Sequence[str]]], reports: Mapping[str, dict]) -> dict:
    """groups: group → variant → names of its runs, one per seed, the baseline first; reports: name of a finished run → its report.

    Returns group → variant → {"missing": names of runs without a report, column → {"values" by seed, "mean", "sd" over the seeds (None
    for a single seed), "difference" to the baseline (mean over the seeds that both have; None for the baseline)}}."""
    summary: dict[str, dict] = {}
    for group, variants in groups.items():
        baseline = next(iter(variants.values()))
        summary[group] = {}
        for variant, runs in variants.items():
            row: dict = {"missing": [name for name in runs if name not in reports]}
            for column in COLUMNS:
                values, baseline_values = ([_value(reports.get(name), column) for name in names] for names in (runs, baseline))
                known = [v for v in values if v is not None]
                differences = [a - b for a, b in zip(values, baseline_values, strict=True) if a is not None and b is not None]
                row[column] = {
                    "values": values,
                    "mean": statistics.fmean(known) if known else None,
                    "sd": statistics.stdev(known) if len(known) > 1 else None,
                    "difference": statistics.fmean(differences) if differences and runs != baseline else None,
                }
            summary[group][variant] = row
    return summary


def _value(report: dict | None, column: str) -> float | None:
    if report is None:
        return None
    return report["vqa_closed_accuracy"] if column == "vqa" else report["miou"][column]


def write_summary(folder: Path, about: str, groups: Mapping[str, Mapping[str, Sequence[str]]], reports: Mapping[str, dict]) -> str:
    """Write summary.json, summary.md and summary.png to `folder`; returns the table. about: one line that says what was measured."""
    summary = summarize(groups, reports)
    text = table(about, summary)
    files.write_json(folder / "summary.json", {"about": about, "groups": summary})
    (folder / "summary.md").write_text(text, encoding="utf-8")
    if reports:
        with files.atomic_write(folder / "summary.png") as part:
            draw(summary).savefig(part, format="png", dpi=120)
    return text


def table(about: str, summary: dict) -> str:
    """Markdown: one table for each group, a row for each variant."""
    lines = [
        about,
        "",
        "I to IV: mIoU; vqa: accuracy of closed-ended questions. Mean ± standard deviation of the seeds (difference to the first row).",
    ]
    for group, variants in summary.items():
        lines += ["", f"| {group} | seeds | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
        for variant, row in variants.items():
            seeds = len(row["I"]["values"]) - len(row["missing"])
            lines.append(f"| {variant} | {seeds} | {' | '.join(_cell(row[column]) for column in COLUMNS)} |")
        if missing := [name for row in variants.values() for name in row["missing"]]:
            lines += ["", f"not finished: {', '.join(missing)}"]
    return "\n".join(lines) + "\n"


def _cell(figures: dict) -> str:
    if figures["mean"] is None:
        return "-"
    spread = "" if figures["sd"] is None else f" ± {figures['sd']:.3f}"
    return f"{figures['mean']:.3f}{spread}" + ("" if figures["difference"] is None else f" ({figures['difference']:+.3f})")


def draw(summary: dict) -> Figure:
    """Draw a row of panels for each group, a panel for each column, and a line for each variant: every seed, and their mean and standard
    deviation, in front of the mean and standard deviation of the baseline."""
    heights = [len(variants) + 1.2 for variants in summary.values()]
    figure = Figure(figsize=(3 + 2.4 * len(COLUMNS), 0.6 + 0.34 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(summary), len(COLUMNS), squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for axes, (group, variants) in zip(panels, summary.items(), strict=True):
        rows = list(variants.values())
        positions = range(len(rows))
        for axis, column in zip(axes, COLUMNS, strict=True):
            base = rows[0][column]
            if base["mean"] is not None:
                axis.axvspan(base["mean"] - (base["sd"] or 0), base["mean"] + (base["sd"] or 0), color=_BAND_COLOR, lw=0)
                axis.axvline(base["mean"], color=_LINE_COLOR, lw=0.8, ls=":")
            for y, figures in zip(positions, (row[column] for row in rows), strict=True):
                values = [value for value in figures["values"] if value is not None]
                axis.plot(values, [y] * len(values), "o", ms=4, color=_SEED_COLOR, mec="none")
                if values:
                    axis.errorbar(figures["mean"], y, xerr=figures["sd"] or 0, fmt="|", ms=11, color=_LINE_COLOR, capsize=2, lw=1)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.grid(axis="x", lw=0.3)
        axes[0].set_yticks(positions, variants)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        axes[0].set_ylabel(group, fontweight="bold")
    for axis, column in zip(panels[0], COLUMNS, strict=True):
        axis.set_title("vqa, accuracy" if column == "vqa" else f"{column}, mIoU", fontsize=10)
        low, high = axis.get_xlim()
        if high - low < _MIN_SPAN:
            axis.set_xlim((low + high - _MIN_SPAN) / 2, (low + high + _MIN_SPAN) / 2)
    return figure
