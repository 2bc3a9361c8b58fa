"""The registry of metrics: the report, the printed table and the conventions are derived from it.

    register_metric("mean_area", lambda results: ..., "mean mask area in pixels")

adds a metric; it may be called in any module that is imported before the evaluation runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Ratio:
    """A metric of the form sum(numerators) / sum(denominators) whose interval is bootstrapped over clusters. Each sequence has one entry
    per item; denominators None means all 1, so that the value is a mean."""

    clusters: Sequence[str]
    numerators: Sequence[float]
    denominators: Sequence[float] | None = None

    def summary(self) -> tuple[float | None, list[float] | None]:
        """(value, [low, high]); None if there was nothing to measure."""
        below = [1] * len(self.numerators) if self.denominators is None else self.denominators
        value = as_number(metrics.ratio(self.numerators, below))
        if value is None:
            return None, None
        return value, [round(bound, 4) for bound in metrics.bootstrap_ci(self.numerators, below, self.clusters)]


@dataclass(frozen=True)
class Metric:
    """One metric. compute: maps the results of an evaluation to a `Ratio`, a dict of Ratios by part, or plain JSON values, which have no
    interval. convention: how it is counted, for the reader of the report; empty if the name is enough."""

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
    """Returns (values, intervals), both by metric name; only `Ratio`s have intervals."""
    values: dict = {}
    intervals: dict = {}
    for metric in METRICS.values():
        value = metric.compute(results)
        if isinstance(value, Ratio):
            values[metric.name], intervals[metric.name] = value.summary()
        elif isinstance(value, dict) and value and all(isinstance(part, Ratio) for part in value.values()):
            summaries = {part: ratio.summary() for part, ratio in value.items()}
            values[metric.name] = {part: mean for part, (mean, _) in summaries.items()}
            intervals[metric.name] = {part: bounds for part, (_, bounds) in summaries.items()}
        else:
            values[metric.name] = value
    return values, intervals


def conventions() -> dict[str, str]:
    """Name of a metric -> how it is counted."""
    texts = {metric.name: metric.convention for metric in METRICS.values() if metric.convention}
    return texts | {"intervals": "95 % percentile bootstrap over patients or cases, 1000 draws"}


def as_number(value: float) -> float | None:
    """A value as it is written to the report: four decimals, None for nan."""
    return None if math.isnan(value) else round(float(value), 4)
