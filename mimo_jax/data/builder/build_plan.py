"""Decisions between the two passes: label statistics, splits, near-duplicates, and which records each shard contains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.builder.entities import canonical
from mimo_jax.data.builder.item_batches import BuildIndex, ItemNames
from mimo_jax.data.builder.label_stats import LabelCounts, LabelStats
from mimo_jax.data.builder.llm_client import ChatClient
from mimo_jax.data.builder.question_generation import QuestionGeneration
from mimo_jax.data.builder.splits import SHARES, NearDuplicates, check_shares, split_groups
from mimo_jax.data.records import SHARD_BYTES, DataError

BUILDER_VERSION = "1.2"  # increased whenever the same items would give different records or another index
WARNINGS, NEAR_DUPLICATES = "warnings.jsonl", "near_duplicates.jsonl"
DUPLICATES = ("error", "group", "drop")
QA = ("templates", "llm")
_MAX_SHOWN = 10  # lines of a list in an error; the rest is written to a file
SPLITS = ("train", "val", "test")
SAME_IMAGE = "same pixels as an earlier image"
NEAR_DUPLICATE = "near-duplicate of another image"
NEAR_DUPLICATE_DROPPED = "near-duplicate of an image of another split, left out"


class LeakError(DataError):
    """Near-duplicate images in different splits; the message lists one pair per line."""

    listing = True


@dataclass(frozen=True)
class Options:
    """The options that determine the contents in addition to the items.

    duplicates: how to treat near-duplicate images in different splits: "error" raises LeakError, "group" puts their groups into one
    split, "drop" leaves out those of train (or else val). perspectives: which questions are kept. qa: "templates", or "llm", which
    has III and IV written by the endpoint that the environment names (see llm_client); its replies are cached in the folder llm_cache,
    and each process sends at most llm_requests requests. max_rejects: share of the items that may have no record."""

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    perspectives: Sequence[str] = PERSPECTIVES
    qa: str = "templates"
    llm_cache: str = ""
    llm_requests: int = 10_000
    duplicates: str = "error"
    max_rejects: float = 0.01
    shard_bytes: int = SHARD_BYTES

    def check(self) -> None:
        check_shares(self.shares)
        unknown = [name for name in self.perspectives if name not in PERSPECTIVES]
        if unknown or not self.perspectives:
            raise DataError(f"perspectives {','.join(unknown) or 'missing'}: use some of {', '.join(PERSPECTIVES)}")
        if self.duplicates not in DUPLICATES:
            raise DataError(f"duplicates {self.duplicates}: use one of {', '.join(DUPLICATES)}")
        if self.qa not in QA:
            raise DataError(f"qa {self.qa}: use one of {', '.join(QA)}")
        self.model()
        if not 0 <= self.max_rejects <= 1:
            raise DataError(f"max-rejects {self.max_rejects:g}: give a share from 0 to 1")

    def model(self) -> str:
        """The model that writes questions, "" if templates do. Raises EndpointError if the environment names no endpoint."""
        return ChatClient.from_environment(self.llm_cache).model if self.qa == "llm" else ""


@dataclass(frozen=True)
class ShardJob:
    """name: of the file. fingerprint: a hash of everything that its contents depend on. places: its records as (batch, row in it, id)."""

    name: str
    fingerprint: str
    split: str
    places: list[tuple[int, int, str]]


@dataclass(frozen=True)
class BuildPlan:
    """num_records: the total of all jobs. jobs: a generator, since the ids of all records need much memory. info: what
    dataset_info.json says of the plan."""

    questions: QuestionGeneration
    num_records: int
    jobs: Iterator[ShardJob]
    info: dict


def make_plan(work: Path, index: BuildIndex, options: Options) -> BuildPlan:
    """Decide splits and shards; appends to the warnings in `work`. Raises as `decide_splits` does."""
    ids, names = index.ids(), ItemNames(work / "batches", index)
    decided = decide_splits(index, ids, options, names, work / NEAR_DUPLICATES)
    index.warnings.update(warning for _, warning, _ in decided.warnings)
    with open(work / WARNINGS, "a", encoding="utf-8") as file:
        others = ({} if other is None else {"other": names[other]} for _, _, other in decided.warnings)
        write_lines(file, ({"id": names[n], "warning": text} | other for (n, text, _), other in zip(decided.warnings, others, strict=True)))
    kept = ~decided.dropped
    label_stats, label_counts = _count_labels(index, kept)
    model, counts = options.model(), np.diff(index.offsets).tolist()
    questions = QuestionGeneration(
        label_stats, options.seed, tuple(options.perspectives), counts, model, options.llm_cache, options.llm_requests
    )
    basis = (BUILDER_VERSION, options.seed, options.perspectives, model, label_counts)
    numbers = {split: np.flatnonzero((decided.split_index == label) & kept).tolist() for label, split in enumerate(SPLITS)}
    unknown = sorted({entity for kind in index.kinds for entity in kind[2] if not canonical(entity, *kind[:2]).known})
    of_source = index.given_splits.keys() >= set(index.groups)  # no group was left to divide
    info = {"warnings": dict(sorted(index.warnings.items())), "unknown_entities": unknown, "split_by_source": of_source}
    return BuildPlan(questions, int(kept.sum()), _jobs(index, ids, numbers, basis, options.shard_bytes), info)


def _jobs(index: BuildIndex, ids: Sequence[str], numbers: Mapping[str, list[int]], basis: tuple, shard_bytes: int) -> Iterator[ShardJob]:
    """numbers: the records of each split. basis: what the contents of all shards depend on."""
    for split in sorted(numbers):
        for number, shard in enumerate(_fill_shards(numbers[split], index.sizes, shard_bytes)):
            places = [(*index.locate(n), ids[n]) for n in shard]
            batches = [index.fingerprints[batch] for batch in sorted({place[0] for place in places})]
            fingerprint = hashlib.sha256(repr((basis, split, places, batches)).encode()).hexdigest()
            yield ShardJob(f"{split}-{number:05d}.part", fingerprint, split, places)


def _count_labels(index: BuildIndex, kept: np.ndarray) -> tuple[LabelStats, list[tuple[tuple, int]]]:
    """(the statistics of the labels of the records `kept`, bool [n]; the counts that they are computed from)."""
    images = np.bincount(np.array(index.kind, np.int64)[kept], minlength=len(index.kinds))
    counted = [(kind, n) for kind, n in zip(index.kinds, images.tolist(), strict=True)]
    label_counts = LabelCounts()
    for (dataset, modality, entities, complete, absent), n in counted:
        label_counts.add(dataset, modality, entities, absent, complete, times=n)
    return LabelStats.from_counts(label_counts, by_region=True), counted


def _fill_shards(numbers: Iterable[int], sizes: Sequence[int], shard_bytes: int) -> Iterator[list[int]]:
    """The records of each shard; a new shard begins once one has `shard_bytes`."""
    shard, filled = [], 0
    for number in numbers:
        if filled >= shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(number)
        filled += sizes[number]
    if shard:
        yield shard


@dataclass(frozen=True)
class Splits:
    """split_index: int64 [n], the index of each record's split in SPLITS. dropped: bool [n], records left out because they would leak.
    warnings: (record, text, the other record or None)."""

    split_index: np.ndarray
    dropped: np.ndarray
    warnings: list[tuple[int, str, int | None]]


def decide_splits(index: BuildIndex, ids: Sequence[str], options: Options, names: Sequence[str], listing: Path) -> Splits:
    """Assign every record to a split. names: of the records, for errors. listing: file for the pairs that leak, if there are many.
    Raises DataError for a group in two splits, LeakError as described in `Options`."""
    for group, splits in index.given_splits.items():
        if len(splits) > 1 or not splits <= set(SPLITS):
            raise DataError(f"group {group}: its source puts it into {' and '.join(sorted(splits))}; use one of {', '.join(SPLITS)}")
    given = {group: split for group, (split,) in index.given_splits.items()}
    group_names, groups = list(index.groups), np.array(index.group, np.int64)
    near_duplicates = NearDuplicates.from_hashes(np.array(index.hashes, np.uint64).reshape(-1, 5))
    merged = near_duplicates.merge_groups(groups) if options.duplicates == "group" else groups
    fixed: dict[str, str] = {}
    for group, root in zip(groups.tolist(), merged.tolist(), strict=True):
        if group_names[group] in given:
            fixed.setdefault(group_names[root], given[group_names[group]])
    of_root = split_groups(index.outlines(ids, lambda n: group_names[merged[n]]), options.seed, options.shares, fixed)
    chosen = [given.get(group_names[group]) or of_root[group_names[root]] for group, root in zip(groups, merged, strict=True)]
    split_index = np.array([SPLITS.index(split) for split in chosen], np.int64)
    if options.duplicates == "drop":
        dropped = near_duplicates.leaking(split_index, range(len(SPLITS)))
    else:
        dropped = np.zeros(len(split_index), bool)
        _raise_leaks(near_duplicates.pairs_across(split_index), split_index, names, listing)
    warnings: list[tuple[int, str, int | None]] = [(n, SAME_IMAGE, None) for n, record_id in enumerate(ids) if record_id[-2:-1] == "-"]
    warnings += [(i, NEAR_DUPLICATE, j) for i, j in near_duplicates.pairs_across(groups) if split_index[i] == split_index[j]]
    warnings += [(n, NEAR_DUPLICATE_DROPPED, None) for n in np.flatnonzero(dropped).tolist()]
    return Splits(split_index, dropped, warnings)


def _raise_leaks(pairs: list[tuple[int, int]], split_index: np.ndarray, names: Sequence[str], listing: Path) -> None:
    if not pairs:
        return
    found = [[(names[n], SPLITS[split_index[n]]) for n in pair] for pair in pairs]
    shown = [f"  {a} ({in_a}) and {b} ({in_b})" for (a, in_a), (b, in_b) in found[:_MAX_SHOWN]]
    if len(found) > _MAX_SHOWN:
        with open(listing, "w", encoding="utf-8") as file:
            write_lines(file, ({"ids": [a, b], "splits": [in_a, in_b]} for (a, in_a), (b, in_b) in found))
        shown.append(f"  … all in {listing}")
    remedy = "use --duplicates group (one split for their groups) or drop (leave out those of train, or else val)"
    raise LeakError("\n".join([f"{len(pairs)} pairs of near-duplicate images are in different splits; {remedy}", *shown]))


def write_lines(file, lines: Iterable[dict]) -> None:
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
