"""Record folders: image-major ArrayRecord shards with an index, written whole or not at all, read at random.

train-00000-of-00003.array_record   records of one split, one per group: a random read costs 0.07 ms
train.samples.array_record          the same records' samples alone: texts can be read without images
train.index.npz                     per record: id, group; per sample: perspective, words, bytes of text
dataset_info.json                   counts, licences, SHA-256 of every file, and what the builder says of itself
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgpack
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.schema import Record, Sample, Target, Turn
from mimo_jax.errors import UserError

INFO = "dataset_info.json"
_WRITER = "group_size:1"


class DataError(UserError):
    """Data that cannot be written, read or used; the message names the file or field and the remedy."""


@dataclasses.dataclass
class Index:
    """What planning needs of n records and their m samples, without reading them."""

    ids: np.ndarray  # bytes [n]
    groups: np.ndarray  # bytes [n]
    first: np.ndarray  # int64 [n + 1]; samples first[i] … first[i + 1] - 1 are record i's
    perspective: np.ndarray  # int8 [m], index into config.PERSPECTIVES
    words: np.ndarray  # int32 [m], of all turns
    text_bytes: np.ndarray  # int32 [m], UTF-8; no text has more tokens than bytes

    def save(self, path: Path) -> None:
        np.savez(path, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @staticmethod
    def load(path: Path) -> Index:
        try:
            with np.load(path, allow_pickle=False) as columns:
                return Index(**{f.name: columns[f.name] for f in dataclasses.fields(Index)})
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise DataError(f"{path}: index cannot be read ({error}); build the dataset again") from None

    def counts(self) -> dict[str, int]:
        """Samples of each perspective that there is."""
        return {p: int(n) for i, p in enumerate(PERSPECTIVES) if (n := np.count_nonzero(self.perspective == i))}


class IndexBuilder:
    """Collects an Index record by record; texts are not kept."""

    def __init__(self):
        self.ids: list[bytes] = []
        self.groups: list[bytes] = []
        self.first = [0]
        self.rows: list[tuple[int, int, int]] = []

    def add(self, record_id: str, group: str, samples: list[Sample]) -> None:
        self.ids.append(record_id.encode())
        self.groups.append(group.encode())
        for sample in samples:
            texts = [turn.text for turn in sample.turns]
            self.rows.append(
                (PERSPECTIVES.index(sample.perspective), sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts))
            )
        self.first.append(len(self.rows))

    def build(self) -> Index:
        columns = np.array(self.rows, np.int64).reshape(-1, 3).T
        return Index(
            ids=np.array(self.ids, np.bytes_),
            groups=np.array(self.groups, np.bytes_),
            first=np.array(self.first, np.int64),
            perspective=columns[0].astype(np.int8),
            words=columns[1].astype(np.int32),
            text_bytes=columns[2].astype(np.int32),
        )


def write_records(out_dir: str | os.PathLike, records: Iterable[Record], info: dict, shard_bytes: int = 300 << 20) -> dict:
    """Write `records`, by their `split`, to a new folder; returns what stands in its dataset_info.json.

    info: what the builder says of itself (name, builder_version, seed, …). A new shard begins once one holds `shard_bytes`.
    The folder appears under its name only when it is whole. Raises DataError if `out_dir` holds anything, if an id comes
    twice, or if a group is in two splits; RecordError for a record that breaks the schema.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir}: exists and is not an empty folder; give another --out or remove it")
    work = _claim(out_dir)
    try:
        writers: dict[str, _SplitWriter] = {}
        split_of_id: dict[str, str] = {}
        split_of_group: dict[str, str] = {}
        for record in records:
            record.check()
            if record.id in split_of_id:
                raise DataError(f"{out_dir}: record {record.id} comes twice ({split_of_id[record.id]}, {record.split})")
            split_of_id[record.id] = record.split
            known = split_of_group.setdefault(record.group, record.split)
            if known != record.split:
                raise DataError(f"{out_dir}: group {record.group} is in both {known} and {record.split}; split by group")
            if record.split not in writers:
                writers[record.split] = _SplitWriter(work, record.split, shard_bytes)
            writers[record.split].add(record)
        if not writers:
            raise DataError(f"{out_dir}: there is no record to write")
        written = {**info, "splits": {split: writer.close() for split, writer in sorted(writers.items())}}
        (work / INFO).write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (work / "writer.json").unlink()
        os.rename(work, out_dir)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return written


def _claim(out_dir: Path) -> Path:
    """The temporary sibling that this process alone writes to; what a killed writer left there is removed."""
    work = out_dir.parent / f".{out_dir.name}.writing"
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    if work.exists():
        try:
            owner = json.loads((work / "writer.json").read_text())
        except (OSError, ValueError):
            owner = me
        if owner["host"] != me["host"] or (owner["pid"] != me["pid"] and _alive(owner["pid"])):
            raise DataError(f"{out_dir}: is being written by process {owner['pid']} on {owner['host']}; if it is not, remove {work}")
        shutil.rmtree(work)
    work.mkdir()
    (work / "writer.json").write_text(json.dumps(me))
    return work


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _SplitWriter:
    """Shards, samples and index of one split."""

    def __init__(self, work: Path, split: str, shard_bytes: int):
        self.work, self.split, self.shard_bytes = work, split, shard_bytes
        self.samples = array_record_module.ArrayRecordWriter(str(work / f"{split}.samples.array_record"), _WRITER)
        self.shard = None
        self.shard_records: list[int] = []
        self.filled = 0
        self.index = IndexBuilder()
        self.modalities, self.licences, self.entities = Counter(), Counter(), Counter()
        self.masks = 0

    def add(self, record: Record) -> None:
        if self.shard is None or self.filled >= self.shard_bytes:
            if self.shard is not None:
                self.shard.close()
            self.shard = array_record_module.ArrayRecordWriter(str(self._part(len(self.shard_records))), _WRITER)
            self.shard_records.append(0)
            self.filled = 0
        data = record.to_bytes()
        self.shard.write(data)
        self.shard_records[-1] += 1
        self.filled += len(data)
        self.samples.write(msgpack.packb([dataclasses.asdict(sample) for sample in record.samples]))
        self.index.add(record.id, record.group, record.samples)
        self.modalities[record.modality] += 1
        self.licences[record.licence or "unknown"] += 1
        self.entities.update({mask.entity for mask in record.masks})
        self.masks += len(record.masks)

    def close(self) -> dict:
        self.shard.close()
        self.samples.close()
        files = []
        for i, records in enumerate(self.shard_records):
            path = self.work / f"{self.split}-{i:05d}-of-{len(self.shard_records):05d}.array_record"
            self._part(i).rename(path)
            files.append({"file": path.name, "records": records, "bytes": path.stat().st_size, "sha256": _sha256(path)})
        index = self.index.build()
        index.save(self.work / f"{self.split}.index.npz")
        beside = [self.work / f"{self.split}.{name}" for name in ("samples.array_record", "index.npz")]
        return {
            "records": len(index.ids),
            "groups": len(set(index.groups.tolist())),
            "masks": self.masks,
            "samples": len(index.perspective),
            "perspectives": index.counts(),
            "modalities": dict(sorted(self.modalities.items())),
            "entities": dict(sorted(self.entities.items())),
            "licences": dict(sorted(self.licences.items())),
            "shards": files,
            "files": [{"file": path.name, "sha256": _sha256(path)} for path in beside],
        }

    def _part(self, number: int) -> Path:
        return self.work / f"{self.split}-{number:05d}.part"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_info(path: str | os.PathLike) -> dict:
    """dataset_info.json of a record folder. Raises DataError."""
    try:
        return json.loads((Path(path) / INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: holds no {INFO}; give a folder written by `mimo data`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{Path(path) / INFO}: cannot be read ({error})") from None


def damaged_files(path: str | os.PathLike) -> list[str]:
    """One line for each file of a record folder that is missing or whose SHA-256 is not the recorded one. Reads every byte."""
    problems = []
    for split in read_info(path)["splits"].values():
        for entry in [*split["shards"], *split["files"]]:
            file = Path(path) / entry["file"]
            if not file.is_file():
                problems.append(f"{file}: is missing")
            elif _sha256(file) != entry["sha256"]:
                problems.append(f"{file}: differs from what was written")
    return problems


class RecordFolder:
    """One split of a record folder, as a sequence of Record that can be pickled and read from several threads."""

    def __init__(self, path: str | os.PathLike, split: str):
        self.path, self.split = Path(path), split
        splits = read_info(path)["splits"]
        if split not in splits:
            raise DataError(f"{path}: has no split {split!r}; it has {', '.join(sorted(splits))}")
        self.index = Index.load(self.path / f"{split}.index.npz")
        self.bad: dict[str, str] = {}  # nothing was refused: records were checked when they were written
        self._shards = splits[split]["shards"]
        self._ends = np.cumsum([shard["records"] for shard in self._shards])
        names = [shard["file"] for shard in self._shards]
        missing = [name for name in [*names, f"{split}.samples.array_record"] if not (self.path / name).is_file()]
        if missing:
            raise DataError(f"{path}: lacks {', '.join(missing)}; build the dataset again")
        if self._ends[-1] != len(self.index.ids):
            raise DataError(f"{path}: {INFO} counts {self._ends[-1]} records of {split}, the index {len(self.index.ids)}; build it again")
        # With the number of records in brackets, shards are opened only when one of them is read.
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f"{self.path / shard['file']}[0:{shard['records']}]" for shard in self._shards]
        )
        self._samples = array_record_data_source.ArrayRecordDataSource([f"{self.path}/{split}.samples.array_record[0:{len(self)}]"])

    def __len__(self) -> int:
        return len(self.index.ids)

    def __getitem__(self, position: int) -> Record:
        """Raises IndexError past the end, DataError naming shard and record for one that cannot be read."""
        position = self._checked(position)
        try:
            return Record.from_bytes(self._records[position])
        except Exception as error:  # the reader's C++ raises several kinds; a damaged record fails in msgpack or the dataclass
            shard = int(np.searchsorted(self._ends, position, side="right"))
            within = position - (int(self._ends[shard - 1]) if shard else 0)
            raise DataError(f"{self.path / self._shards[shard]['file']}, record {within}: cannot be read ({_line(error)})") from error

    def samples(self, position: int) -> list[Sample]:
        """The samples of one record, without its image."""
        position = self._checked(position)
        try:
            rows = msgpack.unpackb(self._samples[position])
            return [Sample(**{**s, "turns": [Turn(**t) for t in s["turns"]], "targets": [Target(**t) for t in s["targets"]]}) for s in rows]
        except Exception as error:
            raise DataError(f"{self.path}/{self.split}.samples.array_record, record {position}: cannot be read ({_line(error)})") from error

    def _checked(self, position: int) -> int:
        position = int(position)
        if not 0 <= position < len(self):
            raise IndexError(f"{self.path}: record {position} of {len(self)}")
        return position


def open_records(path: str | os.PathLike, split: str) -> RecordFolder:
    """One split of a folder written by `write_records`. Raises DataError if it is none, or has no such split."""
    return RecordFolder(path, split)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
