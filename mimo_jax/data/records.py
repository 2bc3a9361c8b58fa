"""Record folders: image-major ArrayRecord shards with an index, written atomically and read at random.

train-00000-of-00003.array_record   records of one split, one per ArrayRecord group: a random read takes 0.07 ms
train.samples.array_record          only the samples of the same records, so that texts can be read without images
train.index.npz                     per record: id, group; per sample: perspective, words, bytes of text, user turns
dataset_info.json                   counts, licences, SHA-256 of every file, and information about the builder
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgpack
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.open_files import OpenFiles, remedy_for
from mimo_jax.data.schema import Record, Sample, Target, Turn
from mimo_jax.errors import UserError
from mimo_jax.files import atomic_folder, disk_errors, sha256

INFO = "dataset_info.json"
SHARD_BYTES = 300 << 20  # a new shard begins once one has this size
SAMPLES = ".samples"  # suffix of the samples of a shard, next to it until its split is joined
_WRITER_OPTIONS = "group_size:1"


class DataError(UserError):
    """Data that cannot be written, read or used; the message names the file or field and the remedy."""


@dataclasses.dataclass
class Index:
    """The facts that the loader needs about n records and their m samples without reading them."""

    ids: np.ndarray  # bytes [n]
    groups: np.ndarray  # bytes [n]
    first: np.ndarray  # int64 [n + 1]; samples first[i] … first[i + 1] - 1 are record i's
    perspective: np.ndarray  # int8 [m], index into config.PERSPECTIVES
    words: np.ndarray  # int32 [m], of all turns
    text_bytes: np.ndarray  # int32 [m], UTF-8; no text has more tokens than bytes
    turns: np.ndarray  # int32 [m], user turns

    def save(self, path: Path) -> None:
        np.savez(path, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @staticmethod
    def load(path: Path) -> Index:
        """Raises DataError if the file cannot be read. In an index of an earlier version, which has no turns, they are all -1."""
        try:
            with np.load(path, allow_pickle=False) as columns:
                earlier = {} if "turns" in columns else {"turns": np.full(len(columns["words"]), -1, np.int32)}
                return Index(**earlier, **{f.name: columns[f.name] for f in dataclasses.fields(Index) if f.name not in earlier})
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise DataError(f"{path}: index cannot be read ({error}); build the dataset again") from None

    def counts(self) -> dict[str, int]:
        """The number of samples of each perspective that occurs."""
        return {p: int(n) for i, p in enumerate(PERSPECTIVES) if (n := np.count_nonzero(self.perspective == i))}


@dataclasses.dataclass
class IndexBuilder:
    """Collects an Index record by record, without keeping texts."""

    ids: list[str] = dataclasses.field(default_factory=list)
    groups: list[str] = dataclasses.field(default_factory=list)
    num_samples: list[int] = dataclasses.field(default_factory=list)  # per record
    sample_rows: list[list[int]] = dataclasses.field(default_factory=list)  # per sample: perspective, words, bytes of text, user turns

    def add(self, record_id: str, group: str, samples: list[Sample]) -> None:
        self.ids.append(record_id)
        self.groups.append(group)
        self.num_samples.append(len(samples))
        for sample in samples:
            texts = [turn.text for turn in sample.turns]
            words, text_bytes = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
            self.sample_rows.append([PERSPECTIVES.index(sample.perspective), words, text_bytes, len(texts) // 2])

    def extend(self, other: IndexBuilder) -> None:
        for field in dataclasses.fields(self):
            getattr(self, field.name).extend(getattr(other, field.name))

    def build(self) -> Index:
        columns = np.array(self.sample_rows, np.int64).reshape(-1, 4).T
        return Index(
            ids=np.array([record_id.encode() for record_id in self.ids], np.bytes_),
            groups=np.array([group.encode() for group in self.groups], np.bytes_),
            first=np.concatenate([[0], np.cumsum(self.num_samples)]).astype(np.int64),
            perspective=columns[0].astype(np.int8),
            words=columns[1].astype(np.int32),
            text_bytes=columns[2].astype(np.int32),
            turns=columns[3].astype(np.int32),
        )


@dataclasses.dataclass
class Shard:
    """A written shard, with the information about its records that the index and the counts of its split need."""

    file: str  # its samples are next to it, with the suffix SAMPLES
    sha256: str
    bytes: int
    index: IndexBuilder
    masks: int
    entities: dict[str, int]  # entity -> number of records
    modalities: dict[str, int]
    licences: dict[str, int]
    entity_groups: dict[str, list[str]]  # entity -> its groups


class ShardWriter:
    """Writes one shard to `path` record by record; it is complete once `close` returns. Raises DataError if the disk is full."""

    def __init__(self, path: Path):
        self.path, self.num_bytes = path, 0  # num_bytes: size of the records so far
        with disk_errors(path, DataError):
            self._records = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._samples = array_record_module.ArrayRecordWriter(f"{path}{SAMPLES}", _WRITER_OPTIONS)
        self._shard = Shard(path.name, "", 0, IndexBuilder(), 0, Counter(), Counter(), Counter(), {})
        self._entity_groups: dict[str, set[str]] = defaultdict(set)

    def add(self, record: Record) -> None:
        record.check()
        data, shard = record.to_bytes(), self._shard
        with disk_errors(self.path, DataError):
            self._records.write(data)
            self._samples.write(msgpack.packb(record.samples, default=vars))
        self.num_bytes += len(data)
        shard.index.add(record.id, record.group, record.samples)
        shard.masks += len(record.masks)
        shard.entities.update({mask.entity for mask in record.masks})
        shard.modalities[record.modality] += 1
        shard.licences[record.licence or "unknown"] += 1
        for mask in record.masks:
            self._entity_groups[mask.entity].add(record.group)

    def close(self) -> Shard:
        with disk_errors(self.path, DataError):
            self._records.close()
            self._samples.close()
        self._shard.entity_groups = {entity: sorted(groups) for entity, groups in self._entity_groups.items()}
        self._shard.bytes, self._shard.sha256 = self.path.stat().st_size, sha256(self.path)
        return self._shard


def join_shards(folder: Path, shards: Mapping[str, Sequence[Shard]], info: dict) -> dict:
    """Turn `folder`, which contains the shards of each split, into a record folder. Returns the contents of its dataset_info.json:
    `info` and counts."""
    with disk_errors(folder, DataError):
        written = {**info, "splits": {split: _join_split(folder, split, shards[split]) for split in sorted(shards)}}
        (folder / INFO).write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return written


def _join_split(folder: Path, split: str, shards: Sequence[Shard]) -> dict:
    samples, files, builder = folder / f"{split}.samples.array_record", [], IndexBuilder()
    writer = array_record_module.ArrayRecordWriter(str(samples), _WRITER_OPTIONS)
    for i, shard in enumerate(shards):
        samples_file = folder / f"{shard.file}{SAMPLES}"
        for row in array_record_data_source.ArrayRecordDataSource([f"{samples_file}[0:{len(shard.index.ids)}]"]):
            writer.write(row)
        samples_file.unlink()
        name = f"{split}-{i:05d}-of-{len(shards):05d}.array_record"
        (folder / shard.file).rename(folder / name)
        builder.extend(shard.index)
        files.append({"file": name, "records": len(shard.index.ids), "bytes": shard.bytes, "sha256": shard.sha256})
    writer.close()
    index = builder.build()
    index.save(folder / f"{split}.index.npz")
    entities = sorted({entity for shard in shards for entity in shard.entity_groups})
    side_files = [samples, folder / f"{split}.index.npz"]
    return {
        "records": len(index.ids),
        "groups": len(set(index.groups.tolist())),
        "masks": sum(shard.masks for shard in shards),
        "samples": len(index.perspective),
        "perspectives": index.counts(),
        **{name: _totals(getattr(shard, name) for shard in shards) for name in ("modalities", "entities", "licences")},
        "entity_groups": {entity: len(set().union(*(shard.entity_groups.get(entity, ()) for shard in shards))) for entity in entities},
        "shards": files,
        "files": [{"file": path.name, "sha256": sha256(path)} for path in side_files],
    }


def _totals(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def write_records(
    out_dir: str | os.PathLike, records: Iterable[Record], info: dict, shard_bytes: int = SHARD_BYTES, replace: bool = False
) -> dict:
    """Write `records`, by their `split`, to a new folder; returns the contents of its dataset_info.json.

    info: information about the builder (name, builder_version, seed, …). A new shard begins once one has `shard_bytes`. The folder
    appears under its name only when it is complete; with `replace`, it then replaces an existing one. Raises UserError if `out_dir` is
    not empty and `replace` is not set, DataError if an id occurs twice or a group is in two splits, RecordError for a record that
    violates the schema.
    """
    with atomic_folder(out_dir, replace) as folder:
        writers: dict[str, ShardWriter] = {}
        shards: dict[str, list[Shard]] = {}
        split_of_id: dict[str, str] = {}
        split_of_group: dict[str, str] = {}
        for record in records:
            if record.id in split_of_id:
                raise DataError(f"{out_dir}: record {record.id} occurs twice ({split_of_id[record.id]}, {record.split})")
            split_of_id[record.id] = record.split
            group_split = split_of_group.setdefault(record.group, record.split)
            if group_split != record.split:
                raise DataError(f"{out_dir}: group {record.group} is in both {group_split} and {record.split}; split by group")
            done = shards.setdefault(record.split, [])
            if record.split in writers and writers[record.split].num_bytes >= shard_bytes:
                done.append(writers.pop(record.split).close())
            if record.split not in writers:
                writers[record.split] = ShardWriter(folder / f"{record.split}-{len(done):05d}.part")
            writers[record.split].add(record)
        if not writers:
            raise DataError(f"{out_dir}: no record to write; check the source")
        for split, writer in writers.items():
            shards[split].append(writer.close())
        return join_shards(folder, shards, info)


def read_info(path: str | os.PathLike) -> dict:
    """dataset_info.json of a record folder. Raises DataError."""
    try:
        return json.loads((Path(path) / INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: has no {INFO}; give a folder written by `mimo data`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{Path(path) / INFO}: cannot be read ({error}); copy or build the dataset again") from None


def samples_digest(path: str | os.PathLike, split: str) -> str:
    """The recorded SHA-256 of the samples of a split. Raises DataError as `read_info` does."""
    return next(entry["sha256"] for entry in read_info(path)["splits"][split]["files"] if entry["file"].startswith(f"{split}.samples"))


def damaged_files(path: str | os.PathLike) -> list[str]:
    """One line for each file of a record folder that is missing or whose SHA-256 differs from the recorded one. Reads every byte."""
    problems, info = [], read_info(path)
    for entry in (*(entry for split in info["splits"].values() for entry in [*split["shards"], *split["files"]]), *info.get("files", ())):
        file = Path(path) / entry["file"]
        if not file.is_file():
            problems.append(f"{file}: is missing")
        elif sha256(file) != entry["sha256"]:
            problems.append(f"{file}: differs from what was written")
    return problems


class RecordFolder:
    """One split of a record folder, as a sequence of Record; picklable, and readable from several threads."""

    def __init__(self, path: str | os.PathLike, split: str):
        self.path, self.split = Path(path), split
        splits = read_info(path)["splits"]
        if split not in splits:
            raise DataError(f"{path}: has no split {split!r}; it has {', '.join(sorted(splits))}")
        self.index = Index.load(self.path / f"{split}.index.npz")
        self.bad: dict[str, str] = {}  # always empty: records were checked when they were written
        # Entity -> number of its groups; None in a folder of an earlier version.
        self.entity_groups: dict[str, int] | None = splits[split].get("entity_groups")
        self._shards = splits[split]["shards"]
        self._ends = np.cumsum([shard["records"] for shard in self._shards])
        names = [shard["file"] for shard in self._shards]
        missing = [name for name in [*names, f"{split}.samples.array_record"] if not (self.path / name).is_file()]
        if missing:
            raise DataError(f"{path}: lacks {', '.join(missing)}; build the dataset again")
        if self._ends[-1] != len(self.index.ids):
            raise DataError(f"{path}: {INFO} has {self._ends[-1]} records of {split}, the index {len(self.index.ids)}; build it again")
        self._files = OpenFiles(_open_shard)
        self._samples = array_record_data_source.ArrayRecordDataSource([f"{self.path}/{split}.samples.array_record[0:{len(self)}]"])

    def __len__(self) -> int:
        return len(self.index.ids)

    def __getitem__(self, position: int) -> Record:
        """The record at `position`. Raises IndexError past the end, DataError naming shard and record if it cannot be read."""
        position = self._checked(position)
        try:
            shard, place = self._place(position)
            return Record.from_bytes(self._files[self.path / self._shards[shard]["file"]][place])
        except Exception as error:  # the reader's C++ raises various errors; a damaged record fails in msgpack or the dataclass
            remedy = remedy_for(error, "copy or build the dataset again")
            raise DataError(f"{self.where(position)}: cannot be read ({_first_line(error)}); {remedy}") from error

    def where(self, position: int) -> str:
        """The shard and the record's position in it, for errors."""
        shard, place = self._place(position)
        return f"{self.path / self._shards[shard]['file']}, record {place}"

    def _place(self, position: int) -> tuple[int, int]:
        """(number of the shard, place in it) of a record."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, position - (int(self._ends[shard - 1]) if shard else 0)

    def samples(self, position: int) -> list[Sample]:
        """The samples of one record, without its image."""
        return self.samples_of([position])[0]

    def samples_of(self, positions: Sequence[int]) -> list[list[Sample]]:
        """The samples of several records, without their images, in one read."""
        positions = [self._checked(position) for position in positions]
        try:
            return [_samples(data) for data in self._samples.__getitems__(positions)]
        except Exception as error:
            where = f"{self.path}/{self.split}.samples.array_record, records {positions[0]} … {positions[-1]}"
            raise DataError(f"{where}: cannot be read ({_first_line(error)}); copy or build the dataset again") from error

    def _checked(self, position: int) -> int:
        position = int(position)
        if not 0 <= position < len(self):
            raise IndexError(f"{self.path}: record {position} of {len(self)}")
        return position


def _open_shard(path: Path) -> array_record_data_source.ArrayRecordDataSource:
    return array_record_data_source.ArrayRecordDataSource([str(path)])


def _samples(data: bytes) -> list[Sample]:
    rows = msgpack.unpackb(data)
    return [Sample(**{**s, "turns": [Turn(**t) for t in s["turns"]], "targets": [Target(**t) for t in s["targets"]]}) for s in rows]


def open_records(path: str | os.PathLike, split: str) -> RecordFolder:
    """One split of a folder written by `write_records`. Raises DataError if it is not a record folder or has no such split."""
    return RecordFolder(path, split)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
