"""Splits without leaks: by group, and with no two near-duplicate images in different splits.

n records are columns of n numbers. Images are near-duplicates if their perceptual hashes differ in few bits. The coarse hash of 64 bits
finds candidates; the fine hash of 256 bits separates copies (at most 28 bits flipped, for real images saved again at another size) from
images that are merely similar (58 or more). Candidates are found by an index of the quarters of the coarse hash: hashes that differ in at
most 3 bits have one of the four quarters in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mimo_jax.data.schema import Record
from mimo_jax.errors import UserError

MAX_COARSE_BITS, MAX_FINE_BITS = 3, 32  # by how many bits the coarse and the fine hash of a copy may differ
_BAND = 64 // (MAX_COARSE_BITS + 1)
_BLOCK_ROWS = 1024  # hashes that are compared with each other at a time
SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}


def check_shares(shares: Mapping[str, float]) -> None:
    if not any(shares.values()) or any(not 0 <= share < np.inf for share in shares.values()):
        raise UserError(f"ratios {','.join(f'{share:g}' for share in shares.values())}: give numbers of 0 or more, such as 0.9,0.05,0.05")


def split_groups(
    records: Iterable[Record], seed: int = 0, shares: Mapping[str, float] = SHARES, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Group -> split. Every entity that occurs in two or more groups, the rarest first, gets one group in test and one in train where
    that is possible. A group that has only other entities goes to train. The rest are divided by `shares` within each modality. A group
    with a split in `given` keeps it. A split whose share is 0 stays empty; any other split that would stay empty gets a group that train
    can spare."""
    modality: dict[str, str] = {}
    images: dict[str, int] = defaultdict(int)
    entities: dict[str, set[str]] = defaultdict(set)
    for record in records:
        modality.setdefault(record.group, record.modality)
        images[record.group] += 1
        entities[record.group] |= {mask.entity for mask in record.masks}
    groups = sorted(modality)
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    groups_with: dict[str, list[str]] = defaultdict(list)
    for group in order:
        for entity in sorted(entities[group]):
            groups_with[entity].append(group)
    evaluable = {entity for entity, containing in groups_with.items() if len(containing) > 1}

    splits: dict[str, str] = {}
    lacking = {split: set(evaluable) for split in ("test", "train") if shares.get(split)}

    def assign(group: str, split: str) -> None:
        splits[group] = split
        lacking.get(split, set()).difference_update(entities[group])

    for group, split in (given or {}).items():
        if group in modality:
            assign(group, split)
    for entity in sorted(evaluable, key=lambda e: (len(groups_with[e]), e)):
        for split, without in lacking.items():
            free = [group for group in groups_with[entity] if group not in splits] if entity in without else []
            if free:
                # Train gets the large groups. Among equal groups, the one with the most missing entities leaves most freedom for the rest.
                covers = {group: len(entities[group] & without) for group in free}
                smallest = min(images[group] for group in free)
                assign(max([g for g in free if images[g] == smallest] if split == "test" else free, key=covers.__getitem__), split)
    for group in order if "train" in lacking else ():
        if group not in splits and entities[group] and not entities[group] & evaluable:
            assign(group, "train")
    members: dict[str, list[str]] = defaultdict(list)
    for group in order:
        members[modality[group]].append(group)
    for kind in sorted(members):
        count = {split: sum(splits.get(group) == split for group in members[kind]) for split in shares}
        for group in members[kind]:
            if group not in splits:
                splits[group] = max(shares, key=lambda split: (shares[split] > 0, shares[split] * len(members[kind]) - count[split]))
                count[splits[group]] += 1
    for split in (split for split in shares if shares[split] and split not in splits.values()):
        spare = [
            group
            for group in order
            if splits[group] == "train" and group not in (given or {})
            and all(any(splits[other] == "train" for other in groups_with[entity] if other != group) for entity in entities[group])
        ]  # fmt: skip
        if spare:
            splits[min(spare, key=images.__getitem__)] = split
    return splits


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates among n records. kind: index of each record's hash among the different hashes; near: pairs of kinds that are
    near-duplicates."""

    kind: np.ndarray  # int64 [n]
    near: np.ndarray  # int64 [p, 2], pairs of kinds, the smaller first

    @staticmethod
    def from_hashes(hashes: np.ndarray) -> NearDuplicates:
        """hashes: uint64 [n, 5], the 64 bits of the coarse hash, then the 256 bits of the fine one."""
        unique, kind = np.unique(hashes, axis=0, return_inverse=True)
        pairs = [np.zeros((0, 2), np.int64)]
        for band in range(MAX_COARSE_BITS + 1):
            quarter = ((unique[:, 0] >> np.uint64(band * _BAND)) & np.uint64((1 << _BAND) - 1)).astype(np.int64)
            order = np.argsort(quarter, kind="stable")
            edges = np.flatnonzero(np.diff(quarter[order], prepend=-1, append=-1))
            pairs += [_near(unique, order[start:end]) for start, end in zip(edges[:-1], edges[1:], strict=True) if end - start > 1]
        return NearDuplicates(kind.reshape(-1), np.unique(np.concatenate(pairs), axis=0))

    def merge_groups(self, groups: np.ndarray) -> np.ndarray:
        """int64 [n]: `groups`, int64 [n], merged where they have near-duplicates of each other; each is named by its smallest member."""
        names, index = np.unique(groups, return_inverse=True)
        nodes = len(names) + int(self.kind.max(initial=-1)) + 1
        edges = np.concatenate([np.column_stack([index, self.kind + len(names)]), self.near + len(names)])
        _, component = connected_components(coo_array((np.ones(len(edges), bool), edges.T), (nodes, nodes)), directed=False)
        first = np.full(nodes, len(names))
        np.minimum.at(first, component[: len(names)], np.arange(len(names)))
        return names[first[component[index]]]

    def pairs_across(self, labels: np.ndarray) -> list[tuple[int, int]]:
        """Sorted pairs of records that are near-duplicates and have different `labels`, int64 [n]; one pair for each pair of kinds and
        labels."""
        of_kind: dict[int, dict[int, int]] = defaultdict(dict)  # kind -> label -> its first record
        for record, (kind, label) in enumerate(zip(self.kind.tolist(), labels.tolist(), strict=True)):
            of_kind[kind].setdefault(label, record)
        pairs = []
        for found in of_kind.values():
            firsts = list(found.values())
            pairs += zip(firsts, firsts[1:], strict=False)
        for a, b in self.near.tolist():
            pairs += ((i, j) for la, i in of_kind[a].items() for lb, j in of_kind[b].items() if la != lb)
        return sorted((min(pair), max(pair)) for pair in pairs)

    def leaking(self, labels: np.ndarray, order: Sequence[int]) -> np.ndarray:
        """bool [n]: records that are a near-duplicate of one whose label comes later in `order`; without them nothing leaks."""
        rank = np.argsort(np.asarray(order))[labels]
        latest = np.full(int(self.kind.max(initial=-1)) + 1, -1)
        np.maximum.at(latest, self.kind, rank)
        reach = latest.copy()
        np.maximum.at(reach, self.near[:, 0], latest[self.near[:, 1]])
        np.maximum.at(reach, self.near[:, 1], latest[self.near[:, 0]])
        return rank < reach[self.kind]


def _near(unique: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Pairs int64 [p, 2] of the indices `chosen` of hashes in unique, [u, 5], that differ in few bits."""
    chosen, found = np.sort(chosen), []
    for start in range(0, len(chosen), _BLOCK_ROWS):
        rows = chosen[start : start + _BLOCK_ROWS]
        for begin in range(start, len(chosen), _BLOCK_ROWS):
            columns = chosen[begin : begin + _BLOCK_ROWS]
            i, j = np.nonzero(np.bitwise_count(unique[rows, 0][:, None] ^ unique[columns, 0][None]) <= MAX_COARSE_BITS)
            i, j = rows[i[rows[i] < columns[j]]], columns[j[rows[i] < columns[j]]]
            copies = np.bitwise_count(unique[i, 1:] ^ unique[j, 1:]).sum(1) <= MAX_FINE_BITS
            found.append(np.column_stack([i[copies], j[copies]]))
    return np.concatenate(found)
