"""The first pass of a build: batches of a fixed number of items, each written to a file of records and a summary file.

A complete batch of the same items is not built again; this is how a build resumes after a stop. `BuildIndex` keeps the few bytes per
record that label statistics, splits and the search for near-duplicates need.
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
from mimo_jax.data.builder.record import BuiltRecord, Reject, make_record
from mimo_jax.data.records import DataError
from mimo_jax.data.schema import Mask, Record

BATCH_SIZE = 256  # items of a batch: what each worker may lose when it is killed
_WRITER_OPTIONS = "group_size:1,uncompressed"  # images are already compressed


@dataclass(frozen=True)
class ItemBatch:
    """fingerprint: a hash of its items and the builder's version. rows: one per record, as `index_row` returns them."""

    number: int
    fingerprint: str
    rows: list[list]
    rejects: list[tuple[str, str]]  # (item, reason)
    warnings: list[tuple[str, str]]  # (item, warning)


def batch_items(items: Iterable[Item]) -> Iterator[tuple[int, list[Item]]]:
    """(number, items) of each batch."""
    items = iter(items)
    return enumerate(iter(lambda: list(itertools.islice(items, BATCH_SIZE)), []))


def make_batch(folder: Path, version: str, job: tuple[int, list[Item]]) -> ItemBatch:
    """The batch of these items, read back if it exists, else built. Only the workers of one build may write to `folder`."""
    number, items = job
    fingerprint = hashlib.sha256(f"{version} {items!r}".encode()).hexdigest()
    existing = _read(folder, number)
    if existing is not None and existing.fingerprint == fingerprint:
        return existing
    path = records_file(folder, number)
    summary_file(folder, number).unlink(missing_ok=True)
    batch = ItemBatch(number, fingerprint, [], [], [])
    with files.disk_errors(path, DataError):
        writer = array_record_module.ArrayRecordWriter(f"{path}.new", _WRITER_OPTIONS)
    for item in items:
        built = make_record(item)
        if isinstance(built, Reject):
            batch.rejects.append((built.item, built.reason))
            continue
        data = pack(built)
        with files.disk_errors(path, DataError):
            writer.write(data)
        batch.rows.append(index_row(item.id, built.record, built.fine_hash, len(data), built.complete, built.absent))
        batch.warnings.extend((item.id, warning) for warning in built.warnings)
    with files.disk_errors(path, DataError):
        writer.close()
    os.replace(f"{path}.new", path)
    with files.atomic_write(summary_file(folder, number)) as part:
        part.write_bytes(msgpack.packb(vars(batch)))
    return batch


def records_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.array_record"


def summary_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.summary"


def _read(folder: Path, number: int) -> ItemBatch | None:
    try:
        content = msgpack.unpackb(summary_file(folder, number).read_bytes())
        return ItemBatch(**content) if records_file(folder, number).is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def pack(built: BuiltRecord) -> bytes:
    return msgpack.packb([built.record.to_bytes(), built.complete, list(built.absent)])


def unpack(data: bytes) -> tuple[Record, bool, list[str]]:
    """(record, complete, absent)."""
    record, complete, absent = msgpack.unpackb(data)
    return Record.from_bytes(record), complete, absent


def index_row(name: str, record: Record, fine_hash: bytes, size: int = 0, complete: bool = True, absent: Iterable[str] = ()) -> list:
    """The row of a record in `BuildIndex`. name: id of its item. fine_hash: as returned by `record.perceptual_hash`. size: its bytes."""
    kind = [record.dataset, record.modality, sorted({mask.entity for mask in record.masks}), complete, sorted(absent)]
    pixels = int(record.id[:16], 16) if re.match("[0-9a-f]{16}", record.id) else _number(record.id)
    # Images without a perceptual hash are duplicates only if their pixels are equal.
    coarse_hash = int(record.phash64, 16) if record.phash64 else pixels
    return [name, pixels, coarse_hash.to_bytes(8, "little") + fine_hash, size, record.group, record.split, kind]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass
class BuildIndex:
    """Columns of n numbers, one per record in the order of the items, and the tables that `group` and `kind` index."""

    pixels: array = field(default_factory=lambda: array("Q"))  # hash of the pixels
    hashes: array = field(default_factory=lambda: array("Q"))  # five per record, which `splits.NearDuplicates` compares
    sizes: array = field(default_factory=lambda: array("Q"))  # bytes
    group: array = field(default_factory=lambda: array("L"))
    kind: array = field(default_factory=lambda: array("L"))
    groups: dict[str, int] = field(default_factory=dict)
    # (dataset, modality, entities, complete, absent) -> its number; many images share one
    kinds: dict[tuple, int] = field(default_factory=dict)
    given_splits: dict[str, set[str]] = field(default_factory=dict)  # group -> splits that the source assigns to its records
    offsets: list[int] = field(default_factory=lambda: [0])  # records offsets[b] … offsets[b + 1] - 1 are those of batch b
    fingerprints: list[str] = field(default_factory=list)
    rejected: int = 0
    warnings: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.pixels)

    def add(self, batch: ItemBatch) -> None:
        for _, pixels, hashes, size, group, split, (dataset, modality, entities, complete, absent) in batch.rows:
            self.pixels.append(pixels)
            self.hashes.frombytes(hashes)
            self.sizes.append(size)
            self.group.append(self.groups.setdefault(group, len(self.groups)))
            kind = (dataset, modality, tuple(entities), complete, tuple(absent))
            self.kind.append(self.kinds.setdefault(kind, len(self.kinds)))
            if split:
                self.given_splits.setdefault(group, set()).add(split)
        self.offsets.append(len(self.pixels))
        self.fingerprints.append(batch.fingerprint)
        self.rejected += len(batch.rejects)
        self.warnings.update(warning for _, warning in batch.warnings)

    def locate(self, number: int) -> tuple[int, int]:
        """(batch, row in it) of a record."""
        batch = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return batch, number - self.offsets[batch]

    def ids(self) -> list[str]:
        """The id of each record: the hash of its pixels, with -2, -3, … appended for later records with the same pixels."""
        count: Counter[int] = Counter()
        ids = []
        for pixels in self.pixels:
            count[pixels] += 1
            ids.append(f"{pixels:016x}" + f"-{count[pixels]}" * (count[pixels] > 1))
        return ids

    def outlines(self, ids: Iterable[str], group_of: Callable[[int], str] | None = None) -> Iterator[Record]:
        """The properties of each record that are known without its pixels; masks have only names."""
        groups, kinds = list(self.groups), list(self.kinds)
        masks = [[Mask(entity, entity, {}, 0, []) for entity in kind[2]] for kind in kinds]
        for number, (record_id, group, kind) in enumerate(zip(ids, self.group, self.kind, strict=True)):
            dataset, modality = kinds[kind][:2]
            yield Record(
                id=record_id, image=b"", format="png", height=0, width=0, modality=modality, dataset=dataset, split="",
                group=group_of(number) if group_of else groups[group], masks=masks[kind],
            )  # fmt: skip


class ItemNames(Sequence[str]):
    """The id of each record's item by the record's number, read back from the batches."""

    def __init__(self, folder: Path, index: BuildIndex):
        self._index = index
        self._rows = lru_cache(maxsize=64)(lambda batch: [row[0] for row in _read(folder, batch).rows])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> str:
        batch, row = self._index.locate(number)
        return self._rows(batch)[row]


def read_records(folder: Path, places: Iterable[tuple[int, int, str]], counts: Sequence[int]) -> Iterator[tuple[Record, bool, list[str]]]:
    """(record, complete, absent) at each (batch, row in it, …), in their order. counts: number of records in each batch. One batch
    is open at a time."""
    current, source = -1, None
    for batch, row, _ in places:
        if batch != current:
            current, path = batch, records_file(folder, batch)
            source = array_record_data_source.ArrayRecordDataSource([f"{path}[0:{counts[batch]}]"])
        yield unpack(source[row])
