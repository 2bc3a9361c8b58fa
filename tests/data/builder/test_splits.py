"""Splits by group, and what must not stand on both sides of one."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.data.builder import splits
from mimo_jax.data.builder.splits import MAX_COARSE_BITS, MAX_FINE_BITS, SHARES, NearDuplicates, check_shares, split_groups
from mimo_jax.data.loading.sources import _entity_groups, not_evaluable
from mimo_jax.data.schema import Mask, Record
from mimo_jax.errors import UserError


def outline(group: str, entities, modality="CT") -> Record:
    masks = [Mask(entity, entity, {}, 0, []) for entity in entities]
    return Record(id="", image=b"", format="png", height=1, width=1, modality=modality, dataset="", split="", group=group, masks=masks)


@settings(max_examples=200)
@given(groups=st.lists(st.sets(st.sampled_from("abcdef"), max_size=1), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_split_covers_every_entity_of_two_groups(groups, seed):
    records = [outline(f"g{i}", entities) for i, entities in enumerate(groups)]
    found = split_groups(records, seed)
    assert set(found) == {r.group for r in records} and set(found.values()) <= set(SHARES)
    assert found == split_groups(records[::-1], seed)
    seen, count = defaultdict(set), defaultdict(int)
    for record in records:
        for mask in record.masks:
            seen[mask.entity].add(found[record.group])
            count[mask.entity] += 1
    for entity, n in count.items():
        assert seen[entity] >= {"train", "test"} if n > 1 else seen[entity] == {"train"}
    assert not_evaluable(_entity_groups(records)) == sorted(e for e, n in count.items() if n < 2)


def test_split_shares_within_each_modality():
    records = [outline(f"{m}{i}", ["x"], m) for m, n in (("CT", 100), ("MR", 50)) for i in range(n)]
    found = split_groups(records)
    for modality, n in (("CT", 100), ("MR", 50)):
        got = [split for group, split in found.items() if group.startswith(modality)]
        assert all(abs(got.count(split) - share * n) <= 1 for split, share in SHARES.items())


def test_given_splits_stay_and_no_split_is_empty():
    records = [outline(f"g{i}", ["x"]) for i in range(8)]
    found = split_groups(records, 0, SHARES, {"g3": "val", "g4": "test", "gone": "test"})
    assert found["g3"] == "val" and found["g4"] == "test" and "gone" not in found
    for seed in range(5):
        assert set(split_groups(records, seed).values()) == set(SHARES)
        assert set(split_groups(records, seed, {"train": 0.8, "val": 0.2, "test": 0.0}).values()) == {"train", "val"}
    assert set(split_groups(records[:2]).values()) == {"train", "test"}


def test_shares_are_checked():
    check_shares({"train": 1.0, "val": 0.0})
    for shares in ({"train": 0.0}, {"train": -1.0, "val": 2.0}, {"train": float("nan")}):
        with pytest.raises(UserError, match="give numbers of 0 or more"):
            check_shares(shares)


def differ(a, b):
    """Bits of the 64 and of the 256 in which two rows uint64 [5] differ."""
    counts = np.bitwise_count(a ^ b)
    return int(counts[0]), int(counts[1:].sum())


def alike(a, b):
    return differ(a, b)[0] <= MAX_COARSE_BITS and differ(a, b)[1] <= MAX_FINE_BITS


def turned(rng, hashes, coarse, fine):
    """Copies of rows [n, 5] with so many bits of the 64, and of the 256, flipped."""
    copies = hashes.copy()
    for row in copies:
        for bits, first, last in ((coarse, 0, 64), (fine, 64, 320)):
            for bit in rng.choice(np.arange(first, last), bits, replace=False).tolist():
                row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return copies


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.sampled_from([3, 4096]))
def test_near_hashes_are_all_found(seed, rows):
    """Against every pair; blocks so small that a run of equal quarters is cut."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, (4, 5), np.uint64)
    hashes = np.concatenate([base, *(turned(rng, base, coarse, fine) for coarse in (0, 2, 3, 4) for fine in (0, 16, 32, 33))])
    before, splits._BLOCK_ROWS = splits._BLOCK_ROWS, rows
    try:
        found = NearDuplicates.from_hashes(hashes)
    finally:
        splits._BLOCK_ROWS = before
    unique = np.unique(hashes, axis=0)
    np.testing.assert_array_equal(unique[found.kind], hashes)
    wanted = {(i, j) for i in range(len(unique)) for j in range(i + 1, len(unique)) if alike(unique[i], unique[j])}
    assert {tuple(pair) for pair in found.near.tolist()} == wanted and wanted


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_united_or_dropped_no_longer_leaks(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    base = rng.integers(0, 2**63, (6, 5), np.uint64)[rng.integers(0, 6, n)]
    hashes = np.where(rng.random((n, 1)) < 0.5, base, turned(rng, base, 1, 8))
    groups, labels = rng.integers(0, 8, n), rng.integers(0, 3, n)
    found = NearDuplicates.from_hashes(hashes)
    leaks = {(i, j) for i in range(n) for j in range(n) if labels[i] != labels[j] and alike(hashes[i], hashes[j])}
    across = set(found.pairs_across(labels))
    assert bool(across) == bool(leaks) and {*across, *((j, i) for i, j in across)} <= leaks
    united = found.merge_groups(groups)
    assert not set(found.pairs_across(united))
    assert all(united[i] == united[j] for i in range(n) for j in range(n) if groups[i] == groups[j])
    kept = ~found.leaking(labels, (0, 1, 2))
    assert not any(kept[i] and kept[j] for i, j in leaks)
    assert kept[labels == 2].all()  # nothing is ever left out of test
    assert all(kept[i] or any(i in pair for pair in leaks) for i in range(n))
