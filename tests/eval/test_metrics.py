import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from mimo_jax.eval import metrics

masks = hnp.arrays(bool, (5, 7))
named = st.tuples(st.sampled_from("ab"), masks)
names = st.lists(st.sampled_from(["liver", "spleen", "cyst"]), max_size=4)


@given(masks, masks)
def test_iou_and_dice_are_symmetric_bounded_and_ordered(a, b):
    value = metrics.iou(a, b)
    assert value == metrics.iou(b, a)
    assert 0 <= value <= metrics.dice(a, b) <= 1
    assert metrics.dice(a, b) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0)
    assert metrics.iou(a, a) == metrics.dice(a, a) == 1
    assert (value == 1) == bool((a == b).all())


def test_masks_of_different_size_are_refused():
    with pytest.raises(ValueError, match="different size"):
        metrics.iou(np.ones((2, 3), bool), np.ones((3, 2), bool))


@settings(max_examples=60)
@given(st.lists(named, max_size=3), st.lists(named, max_size=4), st.booleans())
def test_match_is_the_best_assignment_of_all(true, pred, by_name):
    ious = [[metrics.iou(t, p) for _, p in pred] for _, t in true]
    pairs = metrics.match([n for n, _ in true], [n for n, _ in pred], ious, by_name=by_name)
    used = [j for j, _ in pairs if j is not None]
    assert len(set(used)) == len(used)
    for i, (j, value) in enumerate(pairs):
        assert value == (metrics.iou(true[i][1], pred[j][1]) if j is not None else 0)
        assert not by_name or j is None or true[i][0] == pred[j][0]
    best = 0.0
    for perm in itertools.permutations([*range(len(pred)), *[None] * len(true)], len(true)):
        allowed = all(j is None or not by_name or true[i][0] == pred[j][0] for i, j in enumerate(perm))
        if allowed:
            best = max(best, sum(metrics.iou(true[i][1], pred[j][1]) for i, j in enumerate(perm) if j is not None))
    assert sum(v for _, v in pairs) == pytest.approx(best)


def test_match_of_an_unnamed_entity_scores_zero():
    assert metrics.match(["liver"], ["spleen"], [[1.0]]) == [(None, 0.0)]
    assert metrics.match(["liver"], ["spleen"], [[1.0]], by_name=False) == [(0, 1.0)]


@given(names, names)
def test_name_counts_and_f1(true, pred):
    tp, fp, fn = metrics.name_counts(true, pred)
    assert tp + fn == len(true) and tp + fp == len(pred)
    assert metrics.name_counts(pred, true) == (tp, fn, fp)
    value = metrics.f1(tp, fp, fn)
    if not true and not pred:
        assert math.isnan(value)
    else:
        assert 0 <= value <= 1
        assert (value == 1) == (sorted(true) == sorted(pred))


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    precision, recall = 6 / 8, 6 / 9
    assert metrics.f1(6, 2, 3) == pytest.approx(2 * precision * recall / (precision + recall))


@given(masks, masks)
def test_an_empty_pair_counts_as_right_and_paint_where_nothing_is_as_wrong(a, b):
    assert metrics.iou_of_pair(*metrics.overlap(a, b)) == metrics.iou(a, b)
    nothing = np.zeros_like(a)
    assert metrics.iou_of_pair(*metrics.overlap(nothing, b)) == (0 if b.any() else 1)


items = st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abcd")), min_size=1, max_size=30)


@settings(max_examples=50)
@given(items)
def test_interval_lies_within_the_values(data):
    values, clusters = [v for v, _ in data], [c for _, c in data]
    low, high = metrics.bootstrap_ci(values, [1] * len(values), clusters, draws=100)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    if len(set(clusters)) == 1:
        assert low == pytest.approx(metrics.ratio(values, [1] * len(values))) == high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.normal(0.5, 0.1, size=60)
        low, high = metrics.bootstrap_ci(values, np.ones(60), np.arange(60), draws=300, seed=trial)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_widens_when_items_hang_together():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=20), 10)
    ones = np.ones(200)
    alone = metrics.bootstrap_ci(values, ones, np.arange(200))
    together = metrics.bootstrap_ci(values, ones, np.repeat(np.arange(20), 10))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


def test_nothing_to_measure_is_nan():
    assert math.isnan(metrics.ratio([], [])) and all(map(math.isnan, metrics.bootstrap_ci([], [], [])))


few = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.4, 0.9]), st.sampled_from([0.0, 0.3, 0.8])), min_size=2, max_size=12)


@given(few)
def test_spearman_is_scipys(pairs):
    scores, values = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input: nan there and here
        wanted = stats.spearmanr(scores, values).statistic
    assert metrics.spearman(scores, values) == pytest.approx(wanted, nan_ok=True)


@given(few)
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    scores, positive = [s for s, _ in pairs], [v > 0 for _, v in pairs]
    ordered = [
        (a > b) + (a == b) / 2 for a, p in zip(scores, positive, strict=True) for b, q in zip(scores, positive, strict=True) if p > q
    ]
    assert metrics.auroc(scores, positive) == pytest.approx(np.mean(ordered) if ordered else math.nan, nan_ok=True)


def test_expected_calibration_error_is_the_gap_of_each_bin_whatever_the_order_of_equals():
    scores, values = np.repeat([0.2, 0.8], 10), np.array([0.0, 1.0] * 10)
    assert metrics.expected_calibration_error(scores, values, bins=2) == pytest.approx(0.3)
    assert metrics.expected_calibration_error(scores, values) == pytest.approx(0.3)
    assert metrics.expected_calibration_error(scores, np.sort(values)) == pytest.approx(0.2)
    rng = np.random.default_rng(0)
    order = rng.permutation(20)
    assert metrics.expected_calibration_error(scores[order], values[order]) == pytest.approx(0.3)
    assert math.isnan(metrics.expected_calibration_error(scores[:9], values[:9]))


def test_scores_are_measured_as_by_hand_on_random_cases():
    """ECE over 10 bins of equal count, Brier, AUROC as the share of ordered pairs, Spearman as the correlation of mean ranks."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        scores, values = rng.random(23), rng.random(23)
        bins = np.array_split(sorted(zip(scores, values, strict=True)), 10)
        wanted = np.mean([abs(np.mean([s for s, _ in part]) - np.mean([v for _, v in part])) for part in bins])
        assert metrics.expected_calibration_error(scores, values) == pytest.approx(wanted, abs=1e-9)
        positive = values > 0.5
        assert metrics.brier(scores, positive) == pytest.approx(sum((s - (v > 0.5)) ** 2 for s, v in zip(scores, values, strict=True)) / 23)
        pairs = [a > b for a in scores[positive] for b in scores[~positive]]
        assert metrics.auroc(scores, positive) == pytest.approx(np.mean(pairs) if pairs else math.nan, abs=1e-9, nan_ok=True)
        ranks = [np.argsort(np.argsort(part)) for part in (scores, values)]
        assert metrics.spearman(scores, values) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


def test_interval_is_the_percentiles_of_whole_clusters_drawn_again():
    rng = np.random.default_rng(3)
    for trial in range(20):
        above, below = rng.random(12), rng.random(12) + 0.1
        clusters = [f"p{i // 3}" for i in range(12)]
        counts, _ = metrics.cluster_draws(clusters, draws=50, seed=trial)
        values = []
        for count in counts:
            items = [i for cluster, n in enumerate(count) for _ in range(n) for i in range(3 * cluster, 3 * cluster + 3)]
            values.append(sum(above[items]) / sum(below[items]))
        low, high = metrics.bootstrap_ci(above, below, clusters, draws=50, seed=trial)
        assert (low, high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-9)
