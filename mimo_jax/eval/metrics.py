"""The measures that a report is computed from, in plain numpy, each with its convention.

Axis letters: H, W height and width of the original image in pixels; T true entities and P predicted ones of one
turn; C clusters of a bootstrap.

Nearly every metric is a ratio of two sums (a mean is sum / count, micro-F1 is 2 tp / (2 tp + fp + fn), cIoU is
sum of intersections / sum of unions), so one `ratio` and one bootstrap, `bootstrap_ci`, serve them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata, spearmanr

# --- masks -----------------------------------------------------------------------------------------------------------


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """(intersection, union) in pixels of two bool masks [H, W]; ValueError if their shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"masks of different size: {a.shape} and {b.shape}")
    return int(np.count_nonzero(a & b)), int(np.count_nonzero(a | b))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks [H, W]; 1 if both are empty."""
    return iou_of_pair(*overlap(a, b))


def dice_from_iou(value: float) -> float:
    """Dice = 2 |a & b| / (|a| + |b|) of a pair whose IoU is `value`: 2 IoU / (1 + IoU)."""
    return 2 * value / (1 + value)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two bool masks [H, W]; 1 if both are empty."""
    return dice_from_iou(iou(a, b))


def match(
    true_names: Sequence[str], pred_names: Sequence[str], ious: Sequence[Sequence[float]], by_name: bool = True
) -> list[tuple[int | None, float]]:
    """Which prediction of a turn answers each true entity: T pairs (index of the prediction or None, IoU). ious: [T][P].

    Only equal canonical names can match; several of a name are assigned one to one so that their summed IoU is
    greatest. `by_name=False` (perspective II, whose single target is not named in the question) lets any prediction
    match. An entity without a prediction has IoU 0; predictions that are left over do not count here.
    """
    pairs: list[tuple[int | None, float]] = [(None, 0.0)] * len(true_names)
    for name in dict.fromkeys(true_names) if by_name else [None]:
        rows = [i for i, n in enumerate(true_names) if name is None or n == name]
        cols = [j for j, n in enumerate(pred_names) if name is None or n == name]
        if not cols or not rows:
            continue
        values = np.array([[ious[i][j] for j in cols] for i in rows])
        for r, c in zip(*linear_sum_assignment(values, maximize=True), strict=True):
            pairs[rows[r]] = (cols[c], float(values[r, c]))
    return pairs


def strict_match(true_names: Sequence[str], pred_names: Sequence[str], ious: Sequence[Sequence[float]]) -> tuple[list[float], int]:
    """(IoUs of the one-to-one pairs, number of masks that are in no pair: missed entities and extra predictions).

    A pair has equal names, in perspective II as well, and an IoU above 0."""
    pairs = [value for _, value in match(true_names, pred_names, ious) if value > 0]
    return pairs, len(true_names) + len(pred_names) - 2 * len(pairs)


def count_pairs(true_names: Sequence[str], pred_names: Sequence[str], ious: Sequence[Sequence[float]], threshold: float = 0.5) -> int:
    """The greatest number of one-to-one pairs with equal names and an IoU of at least `threshold`."""
    allowed = np.array([[t == p and ious[i][j] >= threshold for j, p in enumerate(pred_names)] for i, t in enumerate(true_names)])
    return int(allowed[linear_sum_assignment(allowed, maximize=True)].sum()) if allowed.size else 0


def match_instances(instances: Iterable[np.ndarray], predicted: Sequence[np.ndarray]) -> tuple[float, int, int, int]:
    """(summed IoU of the pairs, tp, fp, fn) of the true instances of an entity, bool [H, W] each, and of the 8-connected components of
    the masks predicted for it. A pair has an IoU above 0.5, so that it is unique unless instances overlap (panoptic quality,
    arXiv 1801.00868); then the summed IoU is greatest."""
    labelled = [ndimage.label(mask, np.ones((3, 3))) for mask in predicted]
    areas = np.concatenate([np.zeros(0, int), *(np.bincount(labels.ravel(), minlength=n + 1)[1:] for labels, n in labelled)])
    rows = []
    for instance in instances:
        shared = np.concatenate([np.zeros(0, int), *(np.bincount(labels[instance], minlength=n + 1)[1:] for labels, n in labelled)])
        rows.append(shared / (np.count_nonzero(instance) + areas - shared))
    ious = np.array(rows).reshape(len(rows), len(areas))
    ious[ious <= 0.5] = 0
    pairs = ious[linear_sum_assignment(ious, maximize=True)]
    tp = int(np.count_nonzero(pairs))
    return float(pairs.sum()), tp, len(areas) - tp, len(rows) - tp


# --- names -----------------------------------------------------------------------------------------------------------


def name_counts(true: Sequence[str], pred: Sequence[str]) -> tuple[int, int, int]:
    """(tp, fp, fn) of the names of one turn, as multisets: if two of three lesions are found, tp is 2 and fn 1."""
    t, p = Counter(true), Counter(pred)
    tp = sum((t & p).values())
    return tp, sum(p.values()) - tp, sum(t.values()) - tp


def f1(tp: float, fp: float, fn: float) -> float:
    """2 tp / (2 tp + fp + fn); nan if all counts are 0."""
    return ratio(2 * tp, 2 * tp + fp + fn)


# --- scores ----------------------------------------------------------------------------------------------------------


def expected_calibration_error(scores: Sequence[float], values: Sequence[float], bins: int = 10) -> float:
    """Mean over `bins` bins of equal count, by score, of |mean score - mean value|; nan for fewer items than bins. Items with equal
    scores are replaced by the mean of their values, so that their order does not matter."""
    if len(scores) < bins:
        return float("nan")
    scores, values = np.asarray(scores, float), np.asarray(values, float)
    _, same = np.unique(scores, return_inverse=True)
    values = (np.bincount(same, weights=values) / np.bincount(same))[same]
    parts = np.array_split(np.argsort(scores), bins)
    return float(np.mean([abs(scores[part].mean() - values[part].mean()) for part in parts]))


def brier(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Mean squared difference of score and outcome (1 if positive, else 0); nan without items."""
    return ratio((np.asarray(scores, float) - np.asarray(positive, float)) ** 2, np.ones(len(scores)))


def spearman(scores: Sequence[float], values: Sequence[float]) -> float:
    """Spearman's rank correlation, ties with their mean rank; nan if either sequence is constant."""
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(values) == 0:
        return float("nan")
    return float(spearmanr(scores, values).statistic)


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Probability that a positive scores higher than a negative, ties counting one half; nan if all are positive or all negative."""
    positive = np.asarray(positive, bool)
    above, below = int(positive.sum()), int((~positive).sum())
    if not above or not below:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - above * (above + 1) / 2) / (above * below))


# --- ratios and their intervals --------------------------------------------------------------------------------------


def ratio(numerator: float | Sequence[float], denominator: float | Sequence[float]) -> float:
    """Sum over sum; nan if the denominator is 0 (nothing to measure)."""
    below = float(np.sum(denominator))
    return float(np.sum(numerator)) / below if below else float("nan")


def bootstrap_ci(
    numerator: Sequence[float],
    denominator: Sequence[float],
    clusters: Sequence[str],
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `ratio`, drawing whole clusters (patients, cases) with replacement.

    One entry per item in each sequence. Items of one image are not independent, so the cluster is the patient or case.
    (nan, nan) if there is nothing to measure.
    """
    if not len(clusters) or not np.sum(denominator):
        return float("nan"), float("nan")
    counts, index = cluster_draws(clusters, draws, seed)
    above, below = (np.bincount(index, weights=np.asarray(part, float)) for part in (numerator, denominator))
    sums = counts @ below
    return percentiles((counts @ above)[sums > 0] / sums[sums > 0], level)


def cluster_draws(clusters: Sequence[str], draws: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(how often each cluster is drawn [draws, C], the cluster of each item [items]) for a bootstrap over whole clusters."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws), index


def percentiles(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle `level` of the bootstrapped values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def iou_of_pair(intersection: int, union: int) -> float:
    """IoU of an (intersection, union) pair as LISA's gIoU counts it: an empty union (no target, no mask) is 1."""
    return intersection / union if union else 1.0
