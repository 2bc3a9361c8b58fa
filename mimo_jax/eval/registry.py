"""The table of metrics: report, printed table and conventions are all derived from its rows.

    register_metric("mean_area", lambda results: ..., "mean painted area in pixels")

adds one, from any module that is imported before the evaluation runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_jax.eval import metrics
from mimo_jax.eval.accumulator import Accumulator

# How the printed table shows a metric.
#   perspectives  a line with a column for each grounded perspective: {perspective: figure}
#   baselines     such a line for each baseline: {baseline: {perspective: figure}}
#   value         a line with one figure
#   parts         a line for each part: {part: figure}
#   score         the block of confidence scores
#   breakdown     a block with a line for each modality or entity
#   none          nothing; it stands in the report alone
FORMATS = ("perspectives", "baselines", "value", "parts", "score", "breakdown", "none")
RESERVED = ("intervals", "n", "unusable", "conventions")  # other fields of the report


@dataclass(frozen=True)
class Ratio:
    """A figure that is sum(numerators) / sum(denominators); its interval is bootstrapped over clusters. One entry per item in each;
    denominators None: all 1, the mean."""

    clusters: Sequence[str]
    numerators: Sequence[float]
    denominators: Sequence[float] | None = None

    def summary(self) -> tuple[float | None, list[float] | None]:
        """(value, [low, high]); None where there was nothing to measure."""
        below = [1] * len(self.numerators) if self.denominators is None else self.denominators
        value = as_number(metrics.ratio(self.numerators, below))
        if value is None:
            return None, None
        return value, [round(bound, 4) for bound in metrics.bootstrap_ci(self.numerators, below, self.clusters)]


@dataclass(frozen=True)
class Metric:
    """A row. compute: the results of an evaluation to a `Ratio`, a dict of them by part, or plain JSON values, which get no interval.
    convention: how it is counted, for the reader of the report; empty: its name says it."""

    name: str
    compute: Callable[[Accumulator], Any]
    convention: str
    format: str


METRICS: dict[str, Metric] = {}


def register_metric(name: str, compute: Callable[[Accumulator], Any], convention: str = "", format: str = "value") -> None:
    """Add a row. Raises ValueError for a name that is taken and for an unknown format."""
    if name in METRICS or name in RESERVED:
        raise ValueError(f"metric {name}: is registered already; choose another name")
    if format not in FORMATS:
        raise ValueError(f"metric {name}: format is {format!r}; use one of {', '.join(FORMATS)}")
    METRICS[name] = Metric(name, compute, convention, format)


def compute_metrics(results: Accumulator) -> tuple[dict, dict]:
    """(values, intervals), both by name of the metric; intervals of `Ratio`s alone."""
    values: dict = {}
    intervals: dict = {}
    for metric in METRICS.values():
        figure = metric.compute(results)
        if isinstance(figure, Ratio):
            values[metric.name], intervals[metric.name] = figure.summary()
        elif isinstance(figure, dict) and figure and all(isinstance(part, Ratio) for part in figure.values()):
            summaries = {part: ratio.summary() for part, ratio in figure.items()}
            values[metric.name] = {part: value for part, (value, _) in summaries.items()}
            intervals[metric.name] = {part: bounds for part, (_, bounds) in summaries.items()}
        else:
            values[metric.name] = figure
    return values, intervals


def conventions() -> dict[str, str]:
    """Name of a metric -> how it is counted."""
    said = {metric.name: metric.convention for metric in METRICS.values() if metric.convention}
    return said | {"intervals": "95 % percentile bootstrap over patients or cases, 1000 draws"}


def as_number(value: float) -> float | None:
    """A figure as the report holds it: four decimals, None for nan."""
    return None if math.isnan(value) else round(float(value), 4)
