"""NSD and HD95 against all distances between all boundary pixels."""

import numpy as np
import pytest

from mimo_jax.eval import mask_metrics
from mimo_jax.eval.accumulator import Accumulator, EntityResult
from mimo_jax.eval.surface import nsd_and_hd95


def edge(mask):
    """Pixels of a mask with a 4-neighbour outside it."""
    height, width = mask.shape

    def outside(y, x):
        return not (0 <= y < height and 0 <= x < width and mask[y, x])

    return [(y, x) for y, x in np.argwhere(mask).tolist() if any(outside(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))]


def by_hand(a, b, spacing):
    one, two = (np.array(edge(mask), float) * spacing for mask in (a, b))
    distances = np.sqrt(((one[:, None] - two[None]) ** 2).sum(-1))
    from_a, from_b = distances.min(1), distances.min(0)
    nsd = np.mean(np.concatenate([from_a, from_b]) <= 2)
    return nsd, max(np.percentile(from_a, 95), np.percentile(from_b, 95))


def test_nsd_and_hd95_are_those_of_all_distances():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = rng.integers(4, 14, 2)
        a, b = rng.random((2, height, width)) < rng.uniform(0.2, 0.95)
        spacing = rng.uniform(0.3, 3, 2) if rng.random() < 0.5 else (1.0, 1.0)
        if a.any() and b.any():
            assert nsd_and_hd95(a, b, spacing) == pytest.approx(by_hand(a, b, spacing), abs=1e-9)


def test_discs_of_known_distance():
    y, x = np.mgrid[:60, :60]
    small, large = ((y - 30) ** 2 + (x - 30) ** 2 <= r * r for r in (10, 15))
    assert nsd_and_hd95(small, small) == (1, 0)
    nsd, hd95 = nsd_and_hd95(small, large)
    assert nsd == 0 and hd95 == pytest.approx(5, abs=0.5)
    assert nsd_and_hd95(small, large, (0.3, 0.3)) == pytest.approx((1, 0.3 * hd95), abs=1e-9)
    assert nsd_and_hd95(small, np.zeros_like(small)) is None


def test_a_missing_mask_counts_for_nsd_and_not_for_hd95():
    rows = [
        EntityResult("s", "g", "I", "CT", "e", 0.8, 9, 99, (0.9, 3.0), (0.5, 6.0), True),
        EntityResult("t", "g", "I", "CT", "e", 0.0, 9, 99, None, None, True),
        EntityResult("u", "g", "I", "CT", "e", 0.8, 9, 99, (0.3, 5.0)),
    ]
    found = mask_metrics.surface(Accumulator(entities=rows))
    values = {name: ratio.value() for name, ratio in found.items()}
    assert values == pytest.approx({"NSD 2 px": 0.4, "HD95 px": 4, "NSD 2 mm": 0.25, "HD95 mm": 6, "with a mask": 2 / 3})
