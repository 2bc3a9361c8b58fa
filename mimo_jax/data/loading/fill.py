"""How often an image with too few samples of one perspective is filled up with its samples of others.

Axis letters: L leaves, each one perspective of one source, from which groups of K samples of an image are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize


def filled_share(counts: np.ndarray, own: int, group_size: int) -> np.ndarray:
    """float [p]: the expected share of each perspective in a group of K = `group_size` samples that is drawn for perspective `own`, and
    filled up with random samples of other perspectives. counts: int [n, p], the samples of each record; at least one record has `own`."""
    counts = counts[counts[:, own] > 0].astype(float)
    others = counts.copy()
    others[:, own] = 0
    total = others.sum(1)
    filled = np.clip(group_size - counts[:, own], 0, total)
    shares = others * (filled / np.maximum(total, 1) / group_size)[:, None]
    shares[:, own] = 1 - filled / group_size
    return np.average(shares, axis=0, weights=np.ceil(counts[:, own] / group_size))


def mix_weights(target: Sequence[float], filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weights of the leaves [L], share of its short groups that each leaf fills up [L]).

    target: the share of samples that each leaf shall have, sum 1. filled: float [L, L], row i the shares of a group of leaf i if short
    ones are filled up; if they are not, their samples repeat. As many samples as possible are filled in that leave the shares at
    `target`: a perspective with few samples per image and a large weight must repeat them. At least half of a leaf's samples are drawn
    for itself, so that images that have no other perspective are not left out."""
    leaves = len(target)
    if np.array_equal(filled, np.eye(leaves)):
        return np.asarray(target, float), np.zeros(leaves)
    gained = 1 - np.diag(filled)  # samples of a group that do not repeat
    balance = np.concatenate([filled.T, np.eye(leaves)], axis=1)  # of weights [2 L]: with filling, without
    own = -np.concatenate([np.eye(leaves)] * 2, axis=1)
    found = optimize.linprog(
        np.concatenate([-gained, np.zeros(leaves)]), own, -np.asarray(target) / 2, A_eq=balance, b_eq=target, method="highs"
    )
    with_filling, without = np.maximum(found.x[:leaves], 0), np.maximum(found.x[leaves:], 0)
    weights = with_filling + without
    return weights, np.divide(with_filling, weights, out=np.zeros(leaves), where=weights > 0)
