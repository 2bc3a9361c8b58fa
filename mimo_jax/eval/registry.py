"""The registry of metrics: the report, the printed table and the conventions are derived from it.

    register_metric("mean_area", lambda results: ..., "mean mask area in pixels")

adds a metric; it may be called in any module that is imported before the evaluation runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mimo_jax.eval import metrics
from mimo_jax.eval.accumulator import Accumulator

# How the printed table shows a metric:
#   perspectives  a line with a column for each grounded perspective: {perspective: value}
#   baselines     such a line for each baseline: {baseline: {perspective: value}}
#   value         a line with one value
#   parts         a line for each part: {part: value}
#   score         the block of confidence scores
#   breakdown     a block with a line for each modality or entity
#   none          not printed; only in the report
FORMATS = ("perspectives", "baselines", "value", "parts", "score", "breakdown", "none")
RESERVED = ("intervals", "n", "unusable", "conventions")  # other fields of the report


class ResultRow(Protocol):
    """A row of the accumulator, which belongs to a sample and a patient or case."""

    sample: str
    group: str


@dataclass(frozen=True)
class Ratio:
    """A metric of the form sum(numerators) / sum(denominators) whose interval is bootstrapped over the groups of `rows`. Each sequence
    has one entry per row; denominators None means all 1, so that the value is a mean."""

    rows: Sequence[ResultRow]
    numerators: Sequence[float]
    denominators: Sequence[float] | None = None

    def summary(self) -> tuple[float | None, list[float] | None]:
        """(value, [low, high]); None if there was nothing to measure."""
        value = as_number(self.value())
        if value is None:
            return None, None
        return value, _bounds(*metrics.bootstrap_ci(self.numerators, self._denominators(), [row.group for row in self.rows]))

    def value(self) -> float:
        """The value in full; nan if there was nothing to measure."""
        return metrics.ratio(self.numerators, self._denominators())

    def by_sample(self) -> dict[str, list[float]]:
        """Sample → its [numerator, denominator]."""
        sums: dict[str, list[float]] = {}
        for row, above, below in zip(self.rows, self.numerators, self._denominators(), strict=True):
            of_sample = sums.setdefault(row.sample, [0.0, 0.0])
            of_sample[0] += float(above)
            of_sample[1] += float(below)
        return sums

    def _denominators(self) -> Sequence[float]:
        return [1] * len(self.numerators) if self.denominators is None else self.denominators


@dataclass(frozen=True)
class Resampled:
    """A metric that is no ratio of sums. value: maps how often each row occurs, int [draws, rows], to values [draws], nan where there is
    nothing to measure; it is called with ones, and with the draws of the bootstrap over groups."""

    rows: Sequence[ResultRow]
    value: Callable[[np.ndarray], np.ndarray]

    def summary(self) -> tuple[float | None, list[float] | None]:
        """(value, [low, high]); None if there was nothing to measure."""
        value = as_number(float(self.value(np.ones((1, len(self.rows)), int))[0])) if self.rows else None
        if value is None:
            return None, None
        counts, index = metrics.cluster_draws([row.group for row in self.rows])
        values = self.value(counts[:, index])
        return value, _bounds(*metrics.percentiles(values[~np.isnan(values)]))


Estimate = Ratio | Resampled


@dataclass(frozen=True)
class Metric:
    """One metric. compute: maps the results of an evaluation to a `Ratio` or `Resampled`, a dict of these by part, or plain JSON values,
    which have no interval. convention: how it is counted, for the reader of the report; empty if the name is enough."""

    name: str
    compute: Callable[[Accumulator], Any]
    convention: str
    format: str


METRICS: dict[str, Metric] = {}


def register_metric(name: str, compute: Callable[[Accumulator], Any], convention: str = "", format: str = "value") -> None:
    """Add a metric. Raises ValueError for a name that is already registered and for an unknown format."""
    if name in METRICS or name in RESERVED:
        raise ValueError(f"metric {name}: is registered already; choose another name")
    if format not in FORMATS:
        raise ValueError(f"metric {name}: format is {format!r}; use one of {', '.join(FORMATS)}")
    METRICS[name] = Metric(name, compute, convention, format)


def compute_metrics(results: Accumulator) -> tuple[dict, dict]:
    """Returns (values, intervals), both by metric name; plain values have no interval."""
    values: dict = {}
    intervals: dict = {}
    for metric in METRICS.values():
        value = metric.compute(results)
        if isinstance(value, Estimate):
            values[metric.name], intervals[metric.name] = value.summary()
        elif isinstance(value, dict) and value and all(isinstance(part, Estimate) for part in value.values()):
            summaries = {part: estimate.summary() for part, estimate in value.items()}
            values[metric.name] = {part: mean for part, (mean, _) in summaries.items()}
            intervals[metric.name] = {part: bounds for part, (_, bounds) in summaries.items()}
        else:
            values[metric.name] = value
    return values, intervals


def values_by_sample(results: Accumulator) -> list[dict]:
    """One row per scored sample: {sample, group, truth, values: {metric or metric/part: [numerator, denominator]}}, of all ratios."""
    rows = {row.sample: {"sample": row.sample, "group": row.group, "truth": row.truth, "values": {}} for row in results.scored}
    for metric in METRICS.values():
        value = metric.compute(results)
        for part, estimate in value.items() if isinstance(value, dict) else [("", value)]:
            for sample, sums in estimate.by_sample().items() if isinstance(estimate, Ratio) else ():
                rows[sample]["values"][f"{metric.name}/{part}" if part else metric.name] = sums
    return list(rows.values())


def conventions() -> dict[str, str]:
    """Name of a metric -> how it is counted."""
    texts = {metric.name: metric.convention for metric in METRICS.values() if metric.convention}
    return texts | {"intervals": "95 % percentile bootstrap over patients or cases, 1000 draws"}


def mean(values: Iterable[float]) -> float | None:
    """The mean as it is written to the report."""
    values = list(values)
    return as_number(metrics.ratio(values, [1] * len(values)))


def grouped(rows: Iterable, key: Callable) -> dict[str, list]:
    """The rows by their key, sorted by it."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def _bounds(low: float, high: float) -> list[float]:
    return [round(low, 4), round(high, 4)]


def as_number(value: float) -> float | None:
    """A value as it is written to the report: four decimals, None for nan."""
    return None if math.isnan(value) else round(float(value), 4)
