"""What is decided between the two passes: the census, the splits, what looks alike, and which records stand in which shard."""

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

BUILDER_VERSION = "1.0"  # raised whenever the same items would give other records
NOTES, ALIKE = "notes.jsonl", "alike.jsonl"
DUPLICATES = ("refuse", "together", "drop")
QA = ("templates", "llm")
_SHOWN = 10  # lines of a list in an error; the rest stands in a file
SPLITS = ("train", "val", "test")
AGAIN, LIKE, DROPPED = "the same picture again", "looks like another", "looks like one of another split, left out"


class LeakError(DataError):
    """Pictures that look alike on both sides of a split, one pair a line."""

    listing = True


@dataclass(frozen=True)
class Options:
    """What decides the contents, beside the items.

    duplicates: what becomes of pictures of different splits that look alike: "refuse" raises LeakError, "together" puts their
    groups into one split, "drop" leaves those of train (or else val) away. perspectives: which questions are kept. qa: "templates",
    or "llm", which has III and IV written by the endpoint that the environment names (see llm_client), its replies kept in the folder
    llm_cache, with at most llm_requests of each process. max_rejects: share of the items that may have no record."""

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    perspectives: Sequence[str] = PERSPECTIVES
    qa: str = "templates"
    llm_cache: str = ""
    llm_requests: int = 10_000
    duplicates: str = "refuse"
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
        """That of the endpoint that writes questions; "" where templates do. Raises EndpointError where the environment names none."""
        return ChatClient.from_environment(self.llm_cache).model if self.qa == "llm" else ""


@dataclass(frozen=True)
class ShardJob:
    """name: of the file. fingerprint: of all that its contents depend on. places: of its records, as (part, row in it, id)."""

    name: str
    fingerprint: str
    split: str
    places: list[tuple[int, int, str]]


@dataclass(frozen=True)
class Plan:
    """records: in all jobs, which come one by one. told: what dataset_info.json says of it."""

    asking: QuestionGeneration
    records: int
    jobs: Iterator[ShardJob]
    told: dict


def make_plan(work: Path, known: BuildIndex, options: Options) -> Plan:
    """Adds to the notes in `work`. Raises as `decide_splits` does."""
    ids, names = known.ids(), ItemNames(work / "parts", known)
    decided = decide_splits(known, ids, options, names, work / ALIKE)
    at, dropped = decided.at, decided.dropped
    known.notes.update(note for _, note, _ in decided.notes)
    with open(work / NOTES, "a", encoding="utf-8") as file:
        others = ({} if other is None else {"other": names[other]} for _, _, other in decided.notes)
        write_lines(file, ({"id": names[n], "note": note} | beside for (n, note, _), beside in zip(decided.notes, others, strict=True)))
    census, counted = _census(known, ~dropped)
    model, counts = options.model(), np.diff(known.first).tolist()
    asking = QuestionGeneration(census, options.seed, tuple(options.perspectives), counts, model, options.llm_cache, options.llm_requests)
    basis = (BUILDER_VERSION, options.seed, options.perspectives, model, counted)
    numbers = {split: np.flatnonzero((at == label) & ~dropped).tolist() for label, split in enumerate(SPLITS)}
    unknown = sorted({entity for kind in known.kinds for entity in kind[2] if not canonical(entity, *kind[:2]).known})
    told = {"notes": dict(sorted(known.notes.items())), "unknown_entities": unknown}
    return Plan(asking, int((~dropped).sum()), _jobs(known, ids, numbers, basis, options.shard_bytes), told)


def _jobs(known: BuildIndex, ids: Sequence[str], numbers: Mapping[str, list[int]], basis: tuple, shard_bytes: int) -> Iterator[ShardJob]:
    """numbers: of each split its records. basis: what all contents depend on."""
    for split in sorted(numbers):
        for number, shard in enumerate(_filled(numbers[split], known.sizes, shard_bytes)):
            places = [(*known.place(n), ids[n]) for n in shard]
            parts = [known.fingerprints[part] for part in sorted({place[0] for place in places})]
            fingerprint = hashlib.sha256(repr((basis, split, places, parts)).encode()).hexdigest()
            yield ShardJob(f"{split}-{number:05d}.part", fingerprint, split, places)


def _census(known: BuildIndex, kept: np.ndarray) -> tuple[LabelStats, list[tuple[tuple, int]]]:
    """(the census; what it is made of)."""
    images = np.bincount(np.array(known.kind, np.int64)[kept], minlength=len(known.kinds))
    counted = [(kind, n) for kind, n in zip(known.kinds, images.tolist(), strict=True)]
    tally = LabelCounts()
    for (dataset, modality, entities, complete, absent), n in counted:
        tally.add(dataset, modality, entities, absent, complete, times=n)
    return LabelStats.of_tally(tally), counted


def _filled(numbers: Iterable[int], sizes: Sequence[int], shard_bytes: int) -> Iterator[list[int]]:
    """Records of each shard: a new one begins once one holds `shard_bytes`."""
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
    """Of n records: at, int64 [n], the place of its split in SPLITS; dropped, bool [n]: left out, for it leaks. notes: (record, note,
    the other record or None)."""

    at: np.ndarray
    dropped: np.ndarray
    notes: list[tuple[int, str, int | None]]


def decide_splits(known: BuildIndex, ids: Sequence[str], options: Options, names: Sequence[str], listing: Path) -> Splits:
    """names: of each record, as an error shows it. listing: the file for the pairs that leak, where there are many. Raises DataError
    for a group in two splits, LeakError as `Options` says."""
    for group, said in known.given.items():
        if len(said) > 1 or not said <= set(SPLITS):
            raise DataError(f"group {group}: its source puts it into {' and '.join(sorted(said))}; use one of {', '.join(SPLITS)}")
    given = {group: said for group, (said,) in known.given.items()}
    group_names, groups = list(known.groups), np.array(known.group, np.int64)
    alike = NearDuplicates.of(np.array(known.alike, np.uint64).reshape(-1, 5))
    united = alike.together(groups) if options.duplicates == "together" else groups
    fixed: dict[str, str] = {}
    for group, root in zip(groups.tolist(), united.tolist(), strict=True):
        if group_names[group] in given:
            fixed.setdefault(group_names[root], given[group_names[group]])
    of_root = split_groups(known.outlines(ids, lambda n: group_names[united[n]]), options.seed, options.shares, fixed)
    chosen = [given.get(group_names[group]) or of_root[group_names[root]] for group, root in zip(groups, united, strict=True)]
    at = np.array([SPLITS.index(split) for split in chosen], np.int64)
    if options.duplicates == "drop":
        dropped = alike.leaking(at, range(len(SPLITS)))
    else:
        dropped = np.zeros(len(at), bool)
        _refuse(alike.across(at), at, names, listing)
    notes: list[tuple[int, str, int | None]] = [(n, AGAIN, None) for n, record_id in enumerate(ids) if record_id[-2:-1] == "-"]
    notes += [(i, LIKE, j) for i, j in alike.across(groups) if at[i] == at[j]]
    notes += [(n, DROPPED, None) for n in np.flatnonzero(dropped).tolist()]
    return Splits(at, dropped, notes)


def _refuse(pairs: list[tuple[int, int]], at: np.ndarray, names: Sequence[str], listing: Path) -> None:
    if not pairs:
        return
    found = [[(names[n], SPLITS[at[n]]) for n in pair] for pair in pairs]
    shown = [f"  {a} ({in_a}) and {b} ({in_b})" for (a, in_a), (b, in_b) in found[:_SHOWN]]
    if len(found) > _SHOWN:
        with open(listing, "w", encoding="utf-8") as file:
            write_lines(file, ({"ids": [a, b], "splits": [in_a, in_b]} for (a, in_a), (b, in_b) in found))
        shown.append(f"  … all in {listing}")
    remedy = "use --duplicates together (one split for their groups) or drop (leave those of train, or else val, away)"
    raise LeakError("\n".join([f"{len(pairs)} pairs of pictures look alike and are in different splits; {remedy}", *shown]))


def write_lines(file, lines: Iterable[dict]) -> None:
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
