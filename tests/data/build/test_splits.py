"""Splits by group, and what must not stand on both sides of one."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.data.build import splits
from mimo_jax.data.build.splits import NEAR, SHARES, Alike, check_shares, split_groups
from mimo_jax.data.schema import Mask, Record
from mimo_jax.data.sources import not_evaluable
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
    assert not_evaluable(records) == sorted(e for e, n in count.items() if n < 2)


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


def near_pairs(hashes):
    unique = sorted(set(hashes))
    return {(a, b) for i, a in enumerate(unique) for b in unique[i + 1 :] if (a ^ b).bit_count() <= NEAR}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.sampled_from([3, 4096]))
def test_near_hashes_are_all_found(seed, rows):
    """Against every pair; blocks so small that a run of equal quarters is cut."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, 6, np.uint64).tolist()
    for of in list(hashes):
        for flips in range(6):
            hashes.append(of ^ sum(1 << int(bit) for bit in rng.choice(64, flips, replace=False)))
    before, splits._ROWS = splits._ROWS, rows
    try:
        alike = Alike.of(np.array(hashes, np.uint64))
    finally:
        splits._ROWS = before
    unique = np.unique(np.array(hashes, np.uint64))
    assert unique[alike.kind].tolist() == hashes
    assert {tuple(pair) for pair in unique[alike.near].tolist()} == near_pairs(hashes)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_united_or_dropped_no_longer_leaks(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    base = rng.integers(0, 2**63, 6, np.uint64)
    hashes = base[rng.integers(0, 6, n)] ^ (np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64)) * rng.integers(0, 2, n).astype(
        np.uint64
    )
    groups, labels = rng.integers(0, 8, n), rng.integers(0, 3, n)
    alike = Alike.of(hashes)
    leaks = {(i, j) for i in range(n) for j in range(n) if labels[i] != labels[j] and int(hashes[i] ^ hashes[j]).bit_count() <= NEAR}
    found = set(alike.across(labels))
    assert bool(found) == bool(leaks) and {*found, *((j, i) for i, j in found)} <= leaks
    united = alike.together(groups)
    assert not set(alike.across(united))
    assert all(united[i] == united[j] for i in range(n) for j in range(n) if groups[i] == groups[j])
    kept = ~alike.leaking(labels, (0, 1, 2))
    assert not any(kept[i] and kept[j] for i, j in leaks)
    assert kept[labels == 2].all()  # nothing is ever left out of test
    assert all(kept[i] or any(i in pair for pair in leaks) for i in range(n))
