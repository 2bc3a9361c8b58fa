"""Splits without leaks: by group, and so that no two pictures that look alike stand in different ones.

n records are columns of n numbers. Pictures look alike whose hashes differ in few bits: of 64, by which candidates are found, and of
256, which tells copies (up to 28 turned, of real images saved again at another size) from what is merely of a kind (58 and more).
Candidates are found through an index of the quarters of the 64: hashes that differ in at most 3 bits share one of four.
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

NEAR, COPY = 3, 32  # bits of 64, and of 256, in which those of a copy differ at most
_BAND = 64 // (NEAR + 1)
_ROWS = 1024  # of a block of hashes that are compared with each other
SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}


def check_shares(shares: Mapping[str, float]) -> None:
    if not any(shares.values()) or any(not 0 <= share < np.inf for share in shares.values()):
        raise UserError(f"ratios {','.join(f'{share:g}' for share in shares.values())}: give numbers of 0 or more, such as 0.9,0.05,0.05")


def split_groups(
    records: Iterable[Record], seed: int = 0, shares: Mapping[str, float] = SHARES, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Group -> split. Every entity of two or more groups, the rarest first, gets one group in test and one in train where
    that is possible; a group of other entities alone goes to train; the rest keep `shares` within each modality. A group that
    is `given` a split keeps it. A split whose share is 0 gets none; another that would stay empty gets a group that train can spare."""
    modality: dict[str, str] = {}
    images: dict[str, int] = defaultdict(int)
    entities: dict[str, set[str]] = defaultdict(set)
    for record in records:
        modality.setdefault(record.group, record.modality)
        images[record.group] += 1
        entities[record.group] |= {mask.entity for mask in record.masks}
    groups = sorted(modality)
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    holders: dict[str, list[str]] = defaultdict(list)
    for group in order:
        for entity in sorted(entities[group]):
            holders[entity].append(group)
    evaluable = {entity for entity, of in holders.items() if len(of) > 1}

    splits: dict[str, str] = {}
    lacking = {split: set(evaluable) for split in ("test", "train") if shares.get(split)}

    def put(group: str, split: str) -> None:
        splits[group] = split
        lacking.get(split, set()).difference_update(entities[group])

    for group, split in (given or {}).items():
        if group in modality:
            put(group, split)
    for entity in sorted(evaluable, key=lambda e: (len(holders[e]), e)):
        for split, without in lacking.items():
            free = [group for group in holders[entity] if group not in splits] if entity in without else []
            if free:
                # Training gets the large groups. Of equal ones, that which serves most entities leaves the others most room.
                serves = {group: len(entities[group] & without) for group in free}
                least = min(images[group] for group in free)
                put(max([g for g in free if images[g] == least] if split == "test" else free, key=serves.__getitem__), split)
    for group in order if "train" in lacking else ():
        if group not in splits and entities[group] and not entities[group] & evaluable:
            put(group, "train")
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
            and all(any(splits[other] == "train" for other in holders[entity] if other != group) for entity in entities[group])
        ]  # fmt: skip
        if spare:
            splits[min(spare, key=images.__getitem__)] = split
    return splits


@dataclass(frozen=True)
class NearDuplicates:
    """Of n records: which of the different looks each has, and the pairs of these that are alike."""

    kind: np.ndarray  # int64 [n]
    near: np.ndarray  # int64 [p, 2], of kinds, the first the smaller

    @staticmethod
    def of(hashes: np.ndarray) -> NearDuplicates:
        """hashes: uint64 [n, 5], the 64 bits, then the 256."""
        unique, kind = np.unique(hashes, axis=0, return_inverse=True)
        pairs = [np.zeros((0, 2), np.int64)]
        for band in range(NEAR + 1):
            part = ((unique[:, 0] >> np.uint64(band * _BAND)) & np.uint64((1 << _BAND) - 1)).astype(np.int64)
            order = np.argsort(part, kind="stable")
            edges = np.flatnonzero(np.diff(part[order], prepend=-1, append=-1))
            pairs += [_near(unique, order[start:end]) for start, end in zip(edges[:-1], edges[1:], strict=True) if end - start > 1]
        return NearDuplicates(kind.reshape(-1), np.unique(np.concatenate(pairs), axis=0))

    def together(self, groups: np.ndarray) -> np.ndarray:
        """int64 [n]: groups, int64 [n], united where they share a picture that looks alike; named by their smallest."""
        names, place = np.unique(groups, return_inverse=True)
        nodes = len(names) + int(self.kind.max(initial=-1)) + 1
        edges = np.concatenate([np.column_stack([place, self.kind + len(names)]), self.near + len(names)])
        _, component = connected_components(coo_array((np.ones(len(edges), bool), edges.T), (nodes, nodes)), directed=False)
        first = np.full(nodes, len(names))
        np.minimum.at(first, component[: len(names)], np.arange(len(names)))
        return names[first[component[place]]]

    def across(self, labels: np.ndarray) -> list[tuple[int, int]]:
        """Pairs of records, in order, that look alike and have different `labels`, int64 [n]; of each two looks, and of each two labels,
        one pair."""
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
        """bool [n]: the records that look like one whose label comes later in `order`; without them nothing leaks."""
        rank = np.argsort(np.asarray(order))[labels]
        latest = np.full(int(self.kind.max(initial=-1)) + 1, -1)
        np.maximum.at(latest, self.kind, rank)
        reach = latest.copy()
        np.maximum.at(reach, self.near[:, 0], latest[self.near[:, 1]])
        np.maximum.at(reach, self.near[:, 1], latest[self.near[:, 0]])
        return rank < reach[self.kind]


def _near(unique: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Pairs int64 [p, 2] of the hashes numbered `of`, of unique [u, 5], that differ in few bits."""
    of, found = np.sort(of), []
    for start in range(0, len(of), _ROWS):
        rows = of[start : start + _ROWS]
        for begin in range(start, len(of), _ROWS):
            columns = of[begin : begin + _ROWS]
            i, j = np.nonzero(np.bitwise_count(unique[rows, 0][:, None] ^ unique[columns, 0][None]) <= NEAR)
            i, j = rows[i[rows[i] < columns[j]]], columns[j[rows[i] < columns[j]]]
            copies = np.bitwise_count(unique[i, 1:] ^ unique[j, 1:]).sum(1) <= COPY
            found.append(np.column_stack([i[copies], j[copies]]))
    return np.concatenate(found)
