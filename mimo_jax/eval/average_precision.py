"""Average precision at IoU 0.5 as COCO computes it, from the IoUs of every turn, for many bootstrap draws at a time.

Axis letters: N turns, D predicted masks of one category, B draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mimo_jax.eval.accumulator import TurnResult

THRESHOLD = 0.5
MAX_DETECTIONS = 100  # of one category in one turn, those with the highest scores
_RECALLS = np.linspace(0.0, 1.0, 101)
_CHUNK = 1 << 24  # maximum number of values of one array


@dataclass
class _Category:
    """The predicted masks of one category in all turns. turn: their turns; hit: whether each is a true positive; true: turn → number of
    true entities."""

    turn: list[int] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    hit: list[bool] = field(default_factory=list)
    true: dict[int, int] = field(default_factory=dict)


class AveragePrecision:
    """AP50 of the turns [N], the mean over the categories that have a true entity.

    A category is a name; in perspective II, whose question names nothing, all names are one. In each turn, the predictions of a category
    take the free true entity with the highest IoU, of at least 0.5, in the order of their scores."""

    def __init__(self, turns: Sequence[TurnResult]):
        self.num_turns = len(turns)
        categories: dict[str, _Category] = defaultdict(_Category)
        for number, turn in enumerate(turns):
            by_name = turn.perspective != "II"
            for name in dict.fromkeys([*turn.names, *turn.predicted]) if by_name else [""]:
                true = [i for i, n in enumerate(turn.names) if not by_name or n == name]
                found = [j for j, n in enumerate(turn.predicted) if not by_name or n == name]
                category = categories[name]
                category.true[number] = len(true)
                ranked = sorted(found, key=lambda j: -turn.scores[j])[:MAX_DETECTIONS]
                category.turn += [number] * len(ranked)
                category.score += [turn.scores[j] for j in ranked]
                category.hit += hits([[turn.ious[i][j] for i in true] for j in ranked])
        self.categories = [category for category in categories.values() if any(category.true.values())]

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """AP50 [B] if each turn occurs as often as `counts` [B, N] says; nan without true entities."""
        rows = max(1, _CHUNK // max(1, *(len(category.turn) for category in self.categories), self.num_turns))
        parts = [self._of_chunk(counts[first : first + rows]) for first in range(0, len(counts), rows)]
        return np.concatenate(parts)

    def _of_chunk(self, counts: np.ndarray) -> np.ndarray:
        total, num_measured = np.zeros(len(counts)), np.zeros(len(counts))
        for category in self.categories:
            num_true = counts[:, list(category.true)] @ np.array(list(category.true.values()))
            measured = num_true > 0
            order = np.argsort(-np.array(category.score), kind="stable")
            weights = counts[measured][:, np.array(category.turn, int)[order]]
            total[measured] += _interpolated(weights, np.array(category.hit, bool)[order], num_true[measured])
            num_measured += measured
        return np.divide(total, num_measured, out=np.full(len(counts), np.nan), where=num_measured > 0)


def hits(ious: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each prediction of a turn, in the order of the scores, is a true positive. ious: [predictions][true entities]."""
    taken: set[int] = set()
    found = []
    for row in ious:
        best, place = THRESHOLD, None
        for i, value in enumerate(row):
            if i not in taken and value >= best:
                best, place = value, i
        taken |= {place} - {None}
        found.append(place is not None)
    return found


def _interpolated(weights: np.ndarray, hit: np.ndarray, num_true: np.ndarray) -> np.ndarray:
    """Mean over 101 recalls of the highest precision at that recall or above, [B]. weights [B, D]: how often each mask occurs, in the
    order of the scores; hit [D]; num_true [B]."""
    if not weights.shape[1]:
        return np.zeros(len(weights))
    tp, seen = np.cumsum(weights * hit, axis=1), np.cumsum(weights, axis=1)
    precision = tp / (seen + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(_RECALLS, tp / num_true[:, None], side="right")  # number of recalls up to here
    return (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1) / len(_RECALLS)
