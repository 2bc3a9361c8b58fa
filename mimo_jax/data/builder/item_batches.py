"""The first pass of a build: items in parts of a fixed number, each to a file of records and a file of what is known of them.

A part that is whole and of the same items is not made again: that is how a build goes on after a stop. `BuildIndex` holds, of every
record, the few bytes that the census, the splits and the search for duplicates need.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import msgpack
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from mimo_jax import files
from mimo_jax.data.builder.items import Item
from mimo_jax.data.builder.record import Made, Reject, make_record
from mimo_jax.data.records import DataError
from mimo_jax.data.schema import Mask, Record

PART = 256  # items of a part: what a kill may cost each worker
_WRITER = "group_size:1,uncompressed"  # images are compressed already


@dataclass(frozen=True)
class ItemBatch:
    """fingerprint: of its items and of how they are made. rows: of each record (item, …), as `BuildIndex.add` takes them."""

    number: int
    fingerprint: str
    rows: list[list]
    rejects: list[tuple[str, str]]  # (item, reason)
    notes: list[tuple[str, str]]  # (item, note)


def in_parts(items: Iterable[Item]) -> Iterator[tuple[int, list[Item]]]:
    items = iter(items)
    return enumerate(iter(lambda: list(itertools.islice(items, PART)), []))


def make_part(folder: Path, version: str, job: tuple[int, list[Item]]) -> ItemBatch:
    """The part of these items, made unless it is there. `folder` is written by no other process than the workers of one build."""
    number, items = job
    fingerprint = hashlib.sha256(f"{version} {items!r}".encode()).hexdigest()
    known = _read(folder, number)
    if known is not None and known.fingerprint == fingerprint:
        return known
    path = records_file(folder, number)
    known_file(folder, number).unlink(missing_ok=True)
    part = ItemBatch(number, fingerprint, [], [], [])
    with files.disk_errors(path, DataError):
        writer = array_record_module.ArrayRecordWriter(f"{path}.new", _WRITER)
    for item in items:
        made = make_record(item)
        if isinstance(made, Reject):
            part.rejects.append((made.item, made.reason))
            continue
        data = pack(made)
        with files.disk_errors(path, DataError):
            writer.write(data)
        part.rows.append(row_of(item.id, made.record, made.looks, len(data), made.complete, made.absent))
        part.notes.extend((item.id, note) for note in made.notes)
    with files.disk_errors(path, DataError):
        writer.close()
    os.replace(f"{path}.new", path)
    with files.atomic_write(known_file(folder, number)) as beside:
        beside.write_bytes(msgpack.packb(vars(part)))
    return part


def records_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.array_record"


def known_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.known"


def _read(folder: Path, number: int) -> ItemBatch | None:
    try:
        content = msgpack.unpackb(known_file(folder, number).read_bytes())
        return ItemBatch(**content) if records_file(folder, number).is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def pack(made: Made) -> bytes:
    return msgpack.packb([made.record.to_bytes(), made.complete, list(made.absent)])


def unpack(data: bytes) -> tuple[Record, bool, list[str]]:
    """(record, complete, absent)."""
    record, complete, absent = msgpack.unpackb(data)
    return Record.from_bytes(record), complete, absent


def row_of(name: str, record: Record, looks: bytes, size: int = 0, complete: bool = True, absent: Iterable[str] = ()) -> list:
    """What `BuildIndex` takes of a record of so many bytes. looks: as of `record.perceptual_hash`."""
    kind = [record.dataset, record.modality, sorted({mask.entity for mask in record.masks}), complete, sorted(absent)]
    pixels = int(record.id[:16], 16) if re.match("[0-9a-f]{16}", record.id) else _number(record.id)
    index = int(record.phash64, 16) if record.phash64 else pixels  # without a hash, what has the same pixels is alike
    return [name, pixels, index.to_bytes(8, "little") + looks, size, record.group, record.split, kind]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass
class BuildIndex:
    """Of n records, in the order of the items: columns of n numbers, and the tables that `group` and `kind` count in."""

    pixels: array = field(default_factory=lambda: array("Q"))  # hash of the pixels
    alike: array = field(default_factory=lambda: array("Q"))  # of each five: what `splits.NearDuplicates` compares
    sizes: array = field(default_factory=lambda: array("Q"))  # bytes
    group: array = field(default_factory=lambda: array("L"))
    kind: array = field(default_factory=lambda: array("L"))
    groups: dict[str, int] = field(default_factory=dict)
    # (dataset, modality, entities, complete, absent) -> its number; many images share one
    kinds: dict[tuple, int] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)  # group -> splits that the source gives its records
    first: list[int] = field(default_factory=lambda: [0])  # records first[p] … first[p + 1] - 1 are part p's
    fingerprints: list[str] = field(default_factory=list)
    rejected: int = 0
    notes: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.pixels)

    def add(self, part: ItemBatch) -> None:
        for _, pixels, alike, size, group, split, (dataset, modality, entities, complete, absent) in part.rows:
            self.pixels.append(pixels)
            self.alike.frombytes(alike)
            self.sizes.append(size)
            self.group.append(self.groups.setdefault(group, len(self.groups)))
            kind = (dataset, modality, tuple(entities), complete, tuple(absent))
            self.kind.append(self.kinds.setdefault(kind, len(self.kinds)))
            if split:
                self.given.setdefault(group, set()).add(split)
        self.first.append(len(self.pixels))
        self.fingerprints.append(part.fingerprint)
        self.rejected += len(part.rejects)
        self.notes.update(note for _, note in part.notes)

    def place(self, number: int) -> tuple[int, int]:
        """(part, row in it) of a record."""
        part = int(np.searchsorted(self.first, number, side="right")) - 1
        return part, number - self.first[part]

    def ids(self) -> list[str]:
        """Of each record its id: the hash of its pixels, with -2, -3, … for later ones of the same pixels."""
        count: Counter[int] = Counter()
        ids = []
        for pixels in self.pixels:
            count[pixels] += 1
            ids.append(f"{pixels:016x}" + f"-{count[pixels]}" * (count[pixels] > 1))
        return ids

    def outlines(self, ids: Iterable[str], group_of: Callable[[int], str] | None = None) -> Iterator[Record]:
        """Of each record what is known without its pixels: masks have names alone."""
        groups, kinds = list(self.groups), list(self.kinds)
        masks = [[Mask(entity, entity, {}, 0, []) for entity in kind[2]] for kind in kinds]
        for number, (record_id, group, kind) in enumerate(zip(ids, self.group, self.kind, strict=True)):
            dataset, modality = kinds[kind][:2]
            yield Record(
                id=record_id, image=b"", format="png", height=0, width=0, modality=modality, dataset=dataset, split="",
                group=group_of(number) if group_of else groups[group], masks=masks[kind],
            )  # fmt: skip


class ItemNames(Sequence[str]):
    """Of a record's number the id of its item, read back from the parts."""

    def __init__(self, folder: Path, known: BuildIndex):
        self._known = known
        self._rows = lru_cache(maxsize=64)(lambda part: [row[0] for row in _read(folder, part).rows])

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, number: int) -> str:
        part, row = self._known.place(number)
        return self._rows(part)[row]


def read_records(folder: Path, places: Iterable[tuple[int, int, str]], counts: Sequence[int]) -> Iterator[tuple[Record, bool, list[str]]]:
    """(record, complete, absent) at each (part, row in it, …), in their order; counts: records of each part. One part is open at a
    time."""
    opened, source = -1, None
    for part, row, _ in places:
        if part != opened:
            opened, path = part, records_file(folder, part)
            source = array_record_data_source.ArrayRecordDataSource([f"{path}[0:{counts[part]}]"])
        yield unpack(source[row])
