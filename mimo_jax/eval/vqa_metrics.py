"""Metrics of plain questions and answers, one function each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mimo_jax.eval import metrics
from mimo_jax.eval.accumulator import Accumulator
from mimo_jax.eval.registry import Ratio, as_number, grouped, mean
from mimo_jax.eval.vqa_text import OPEN_METRICS


def vqa_closed_accuracy(results: Accumulator) -> Ratio:
    return Ratio(results.closed_ended, [row.strict for row in results.closed_ended])


def vqa_closed_recall(results: Accumulator) -> Ratio:
    return Ratio(results.closed_ended, [row.recall for row in results.closed_ended])


def vqa_closed_contained(results: Accumulator) -> Ratio:
    return Ratio(results.closed_ended, [row.contained for row in results.closed_ended])


def vqa_closed_accuracy_image_blanked(results: Accumulator) -> Ratio:
    return Ratio(results.closed_ended_image_blanked, [row.strict for row in results.closed_ended_image_blanked])


def vqa_majority(results: Accumulator) -> float | None:
    return majority_share([c.reference for c in results.closed_ended])


def vqa_majority_by_kind(results: Accumulator) -> float | None:
    by_kind = grouped(results.closed_ended, lambda c: c.kind)
    right = sum(Counter(c.reference for c in rows).most_common(1)[0][1] for rows in by_kind.values())
    return as_number(metrics.ratio(right, len(results.closed_ended)))


def vqa_closed_accuracy_by_kind(results: Accumulator) -> dict[str, dict]:
    by_kind = grouped(results.closed_ended, lambda c: c.kind)
    return {kind: {"accuracy": mean(c.strict for c in rows), "n": len(rows)} for kind, rows in by_kind.items()}


def vqa_closed_accuracy_by_dataset(results: Accumulator) -> dict[str, Ratio]:
    by_dataset = grouped(results.closed_ended, lambda c: c.dataset)
    return {dataset: Ratio(rows, [row.strict for row in rows]) for dataset, rows in by_dataset.items()}


def vqa_open(results: Accumulator) -> dict[str, Ratio]:
    return {name: Ratio(results.open_ended, [row.scores[name] for row in results.open_ended]) for name in OPEN_METRICS}


def vqa_open_recall_by_dataset(results: Accumulator) -> dict[str, Ratio]:
    by_dataset = grouped(results.open_ended, lambda row: row.dataset)
    return {dataset: Ratio(rows, [row.scores["recall"] for row in rows]) for dataset, rows in by_dataset.items()}


def majority_share(values: Sequence[str]) -> float | None:
    """The fraction of the most frequent value."""
    return as_number(Counter(values).most_common(1)[0][1] / len(values)) if values else None
