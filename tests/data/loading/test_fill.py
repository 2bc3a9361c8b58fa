"""Groups of an image's samples: filled up instead of repeated as far as the shares of perspectives stay what they are."""

from collections import Counter

import numpy as np
import pytest

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.loading.fill import filled_share, mix_weights
from mimo_jax.data.loading.loader import GlobalOrder
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import write_records
from tests.data import handmade
from tests.data.loading.test_loader import config_for


def drawn_shares(counts: np.ndarray, own: int, group_size: int, draws: int = 20_000) -> np.ndarray:
    """`filled_share` by drawing."""
    rng, found = np.random.default_rng(0), np.zeros(counts.shape[1])
    groups = np.repeat(np.arange(len(counts)), np.ceil(counts[:, own] / group_size).astype(int))
    for record in rng.choice(groups, draws):
        of = np.repeat(np.arange(counts.shape[1]), counts[record])
        picked = [own] * min(group_size, counts[record, own])
        picked += rng.permutation(of[of != own])[: group_size - len(picked)].tolist()
        picked += [own] * (group_size - len(picked))
        found += np.bincount(picked, minlength=counts.shape[1])
    return found / found.sum()


def test_expected_shares_are_those_of_draws():
    rng = np.random.default_rng(1)
    for _ in range(5):
        counts = rng.integers(0, 7, (9, 4))
        counts[0] = 1
        for own in range(4):
            np.testing.assert_allclose(filled_share(counts, own, 4), drawn_shares(counts, own, 4), atol=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_the_mixture_keeps_every_share(seed):
    rng = np.random.default_rng(seed)
    counts, leaves = rng.integers(0, 6, (30, 5)), 5
    counts[0] = 1
    target = rng.dirichlet(np.ones(leaves))
    filled = np.array([filled_share(counts, own, 4) for own in range(leaves)])
    weights, fills = mix_weights(target, filled)
    got = sum(w * (f * row + (1 - f) * np.eye(leaves)[i]) for i, (w, f, row) in enumerate(zip(weights, fills, filled, strict=True)))
    np.testing.assert_allclose(got, target, atol=1e-9)
    assert (weights >= target / 2 - 1e-9).all() and (fills <= 1).all() and fills.max() > 0


def test_groups_that_are_never_short_leave_the_weights_as_they_are():
    target = np.array([0.2, 0.3, 0.5])
    weights, fills = mix_weights(target, np.array([filled_share(np.full((4, 3), 4), own, 4) for own in range(3)]))
    assert weights.tolist() == target.tolist() and not fills.any()


def test_draws_do_not_repeat_and_shares_stay(tmp_path):
    """Records have 4 × I, 2 × II, and one each of III, IV and vqa, which used to come twice in each of their draws of two."""
    write_records(tmp_path / "a", [handmade.record(number) for number in range(12)], {})
    config = config_for(tmp_path / "a", samples_per_image=2, buckets="192")
    config.data.weights = {"vqa": 1.0, "I": 3.0, "II": 2.0, "III": 1.0, "IV": 1.0}
    order = GlobalOrder(config, handmade.tokenizer(tmp_path), open_sources(config, "train"))
    images, index = [order.sequence[number] for number in range(6000)], order.sources[0].index
    assert all(len(set(image.samples)) == 2 for image in images)
    count = Counter(PERSPECTIVES[index.perspective[index.first[image.record] + n]] for image in images for n in image.samples)
    assert all(count[p] / 12_000 == pytest.approx(weight / 8, rel=0.05) for p, weight in config.data.weights.items())


def test_a_perspective_with_few_samples_and_a_large_weight_repeats_them(tmp_path):
    write_records(tmp_path / "a", [handmade.record(number) for number in range(12)], {})
    config = config_for(tmp_path / "a", samples_per_image=2, buckets="192")
    config.data.weights = {"I": 1.0, "III": 9.0}
    order = GlobalOrder(config, handmade.tokenizer(tmp_path), open_sources(config, "train"))
    images, index = [order.sequence[number] for number in range(3000)], order.sources[0].index
    count = Counter(PERSPECTIVES[index.perspective[index.first[image.record] + n]] for image in images for n in image.samples)
    assert count["III"] / 6000 == pytest.approx(0.9, rel=0.02) and any(len(set(image.samples)) == 1 for image in images)
