"""Compare two evaluations of the same samples: `mimo eval compare A.json B.json`.

`mimo eval` writes beside REPORT.json the file REPORT.samples.jsonl with one line per sample: {sample, group, truth, values}, where values
maps the name of each metric that is a ratio of sums to the [numerator, denominator] of this sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_jax import files
from mimo_jax.errors import UserError
from mimo_jax.eval import metrics


class CompareError(UserError):
    """Reports that cannot be compared; the message names the file, the sample and the remedy."""


@dataclass(frozen=True)
class Difference:
    """One metric of both evaluations. a, b: its values; difference: b - a; interval: of the difference, 95 % percentile bootstrap over
    groups; samples, groups: that have a part in it. None: one of the two had nothing to measure."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    interval: tuple[float, float] | None
    samples: int
    groups: int


def samples_path(report: Path) -> Path:
    """The file of the results by sample beside a report."""
    return report.with_name(f"{report.stem}.samples.jsonl")


def write_samples(rows: Sequence[dict], report: Path) -> None:
    """Write the results by sample beside a report, atomically."""
    with files.atomic_write(samples_path(report)) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def compare_reports(a: Path, b: Path) -> list[Difference]:
    """The metrics that both reports have, in the order of the first one. Raises CompareError for a file that cannot be read, and for
    evaluations of other samples, images, texts or masks."""
    of_a, of_b = _read(a), _read(b)
    _check_same(a, of_a, b, of_b)
    names: dict[str, None] = dict.fromkeys(name for row in of_a.values() for name in row["values"])
    in_b = {name for row in of_b.values() for name in row["values"]}
    return [difference(name, list(of_a.values()), [of_b[sample] for sample in of_a]) for name in names if name in in_b]


def difference(name: str, a: Sequence[dict], b: Sequence[dict]) -> Difference:
    """The difference of one metric between two lists of rows of the same samples in the same order."""
    sums = np.array([[row["values"].get(name, (0.0, 0.0)) for row in rows] for rows in (a, b)])  # [2, samples, 2]
    used = (sums[..., 1] != 0).any(axis=0)
    groups = [row["group"] for row, has in zip(a, used, strict=True) if has]
    value_a, value_b = (metrics.ratio(of[:, 0], of[:, 1]) for of in sums)
    if np.isnan([value_a, value_b]).any():
        known = [None if np.isnan(value) else value for value in (value_a, value_b)]
        return Difference(name, *known, None, None, len(groups), len(set(groups)))
    counts, index = metrics.cluster_draws(groups)
    by_group = np.stack([[np.bincount(index, weights=of[used, part]) for part in (0, 1)] for of in sums])  # [2, 2, groups]
    (above_a, below_a), (above_b, below_b) = by_group @ counts.T  # [draws] each
    drawn = (below_a > 0) & (below_b > 0)
    interval = metrics.percentiles(above_b[drawn] / below_b[drawn] - above_a[drawn] / below_a[drawn])
    return Difference(name, value_a, value_b, value_b - value_a, interval, len(groups), len(set(groups)))


def table(a: Path, b: Path, differences: Sequence[Difference]) -> str:
    """The comparison as text."""
    lines = [f"A: {a}", f"B: {b}", "", f"{'':44}{'A':>9}{'B':>9}{'B - A':>9}{'95 % interval':>20}{'samples':>9}{'groups':>8}"]
    for row in differences:
        cells = ["-" if value is None else f"{value:.3f}" for value in (row.a, row.b)]
        change = "-" if row.difference is None else f"{row.difference:+.3f}"
        bounds = "-" if row.interval is None else f"{row.interval[0]:+.3f} … {row.interval[1]:+.3f}"
        lines.append(f"{row.metric:44}{cells[0]:>9}{cells[1]:>9}{change:>9}{bounds:>20}{row.samples:>9}{row.groups:>8}")
    what = "95 % percentile bootstrap of the paired difference over patients or cases, 1000 draws; samples and groups: with a part in it"
    return "\n".join([*lines, "", f"interval: {what}"])


def _read(report: Path) -> dict[str, dict]:
    """Sample -> its row."""
    path = samples_path(report)
    if not report.is_file():
        raise CompareError(f"{report}: no such file; give a report of `mimo eval --out`")
    if not path.is_file():
        raise CompareError(f"{path}: is missing; `mimo eval` writes it beside the report: keep both, or evaluate again")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["sample"]: {name: row[name] for name in ("group", "truth", "values")} for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        raise CompareError(f"{path}: is damaged; evaluate again") from None


def _check_same(a: Path, of_a: dict[str, dict], b: Path, of_b: dict[str, dict]) -> None:
    for one, rows, other, others in ((a, of_a, b, of_b), (b, of_b, a, of_a)):
        if only := sorted(rows.keys() - others.keys()):
            what = f"{len(only)} of its {len(rows)} samples are not in {other}, such as {only[0]}"
            raise CompareError(f"{one}: {what}; evaluate both on the same --data, --split and --limit")
    for sample, row in of_a.items():
        if (row["truth"], row["group"]) != (of_b[sample]["truth"], of_b[sample]["group"]):
            what = f"sample {sample} has another image, text, mask or patient than in {a}"
            raise CompareError(f"{b}: {what}; evaluate both on the same --data")
