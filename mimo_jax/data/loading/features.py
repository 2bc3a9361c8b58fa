"""Features of frozen image encoders, stored next to the records: `mimo data encode` writes them, and training reads them instead of images.

DATA/features/FINGERPRINT/SHARD.vision.npy   uint16 [n, I, Dc]: X_img as the bits of bfloat16, which numpy does not have; not if the
                                           vision tower trains, or reads SAM's features
                          SHARD.sam.npy    uint16 [n, g, g, C]: SAM's features; SHARD.sam_0.npy, … for several scales
                          SHARD.sam_stages.npy   uint16 [n, I, S]: the stages of SAM's encoder that X_img has, pooled
                          SHARD.json       for each row: id of the record, SHA-256 of its image, CRC-32; written last

Axis letters: n images of a shard, I image tokens, Dc width of the vision tower, g side of SAM's grid, C width of SAM's features, S
channels of its stages together.

For a manifest, DATA is its path with ".d" appended. The fingerprint is that of the encoders (`encode_features.fingerprint`). A shard is
named after the ids that it contains, and is valid once its .json exists, so that several processes can write at the same time, and a
killed one resumes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mimo_jax import files
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.open_files import OpenFiles, remedy_for
from mimo_jax.data.records import DataError, RecordFolder
from mimo_jax.data.schema import Record

SHARD_BYTES = 128 << 20  # buffered in memory before a shard is written
_READERS = 16  # threads that read the .json files of shards
_ENCODE_AGAIN = "mimo data encode again"


def feature_folder(source: RecordFolder | Manifest, fingerprint: str) -> Path:
    return _features_root(source) / fingerprint[:16]


def open_features(source: RecordFolder | Manifest, fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> FeatureFolder:
    """The features of a source. shapes: see `FeatureFolder`. Raises DataError with the remedy if the source has no features of these
    encoders, or if they cannot be read."""
    folder = feature_folder(source, fingerprint)
    if not folder.is_dir():
        others = " (only those of other weights or settings)" if _features_root(source).is_dir() else ""
        raise DataError(
            f"config.data.features: {source.path} has no features of this run's encoders{others}; write them with "
            f"mimo data encode --checkpoint CHECKPOINT --data {source.path}, of the checkpoint that this run starts from"
        )
    return FeatureFolder(folder, shapes)


def _features_root(source: RecordFolder | Manifest) -> Path:
    return (source.path if source.path.is_dir() else Path(f"{source.path}.d")) / "features"


class FeatureFolder:
    """The features of the records of one source, by their ids. It can be pickled and read from several threads. A few tens of bytes per
    image are kept in memory, and a bounded number of files is open."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        """shapes: shapes of the features of one image, by name in a batch (`mimo.feature_shapes`)."""
        self.path, self.shapes = path, dict(shapes)
        abouts = sorted(path.glob("*.json"))
        self._shards = [about.stem for about in abouts]
        with ThreadPoolExecutor(_READERS) as pool:
            tables = list(pool.map(self._table, abouts))
        counts = np.array([len(ids) for ids, _ in tables], np.int64)
        ids = np.concatenate([ids for ids, _ in tables] or [np.zeros(0, np.bytes_)])
        order = np.argsort(ids, kind="stable")  # of equal ids, the last is used
        self._ids = ids[order]
        starts = np.cumsum(counts) - counts
        rows = np.concatenate([values for _, values in tables] or [np.zeros(0, self._row_type())])
        rows["shard"] = np.repeat(np.arange(len(counts)), counts)
        rows["row"] = np.arange(len(ids)) - np.repeat(starts, counts)
        self._rows = rows[order]
        self._files = OpenFiles(_open_array)

    def _row_type(self) -> np.dtype:
        """Of an image: its shard, its row in it, the SHA-256 of its image, and the CRC-32 of its features in the order of `shapes`."""
        return np.dtype([("shard", np.int32), ("row", np.int32), ("image", np.bytes_, 32), ("crc32", np.uint32, len(self.shapes))])

    def _table(self, about: Path) -> tuple[np.ndarray, np.ndarray]:
        """(ids, bytes [n]; rows [n] without shard and row) of a shard."""
        try:
            rows = json.loads(about.read_text(encoding="utf-8"))
            values = [(0, 0, row["picture"].encode(), [row["crc32"][key] for key in self.shapes]) for row in rows]
            return np.array([row["id"].encode() for row in rows], np.bytes_), np.array(values, self._row_type())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = remedy_for(error, f"remove it and run {_ENCODE_AGAIN}")
            raise DataError(f"{about}: cannot be read ({error}); {remedy}") from None

    def __len__(self) -> int:
        return len(np.unique(self._ids))

    def __contains__(self, record_id: str) -> bool:
        return self._find(record_id) is not None

    def _find(self, record_id: str) -> np.void | None:
        name = record_id.encode()
        place = int(np.searchsorted(self._ids, name, side="right")) - 1
        return self._rows[place] if place >= 0 and self._ids[place] == name else None

    def read(self, record: Record) -> dict[str, np.ndarray]:
        """Features by name in a batch: uint16, the bits of bfloat16. Raises DataError if there are none, if
        they belong to another image, or if they are damaged."""
        found = self._find(record.id)
        if found is None:
            raise DataError(f"record {record.id}: has no features in {self.path}; run {_ENCODE_AGAIN}")
        shard, row = self._shards[found["shard"]], int(found["row"])
        if found["image"].decode() != image_digest(record):
            raise DataError(f"record {record.id}: its features are of another image; remove {self.path} and run {_ENCODE_AGAIN}")
        features = {key: self._read(shard, key, row) for key in self.shapes}
        for (key, values), checksum in zip(features.items(), found["crc32"].tolist(), strict=True):
            if values.shape != self.shapes[key] or zlib.crc32(values) != checksum:
                raise DataError(f"{self._file(shard, key)}, row {row}: is damaged; remove {shard}.json and run {_ENCODE_AGAIN}")
        return features

    def padding(self) -> dict[str, np.ndarray]:
        """Zeros instead of the features of an image that has none."""
        return {key: np.zeros(shape, np.uint16) for key, shape in self.shapes.items()}

    def _file(self, shard: str, key: str) -> Path:
        return self.path / f"{shard}.{_file_name(key)}.npy"

    def _read(self, shard: str, key: str, row: int) -> np.ndarray:
        file = self._file(shard, key)
        try:
            return np.array(self._files[file][row])
        except (OSError, ValueError, EOFError, IndexError) as error:
            remedy = remedy_for(error, f"remove {shard}.json and run {_ENCODE_AGAIN}")
            raise DataError(f"{file}: cannot be read ({error}); {remedy}") from None


def _open_array(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


class FeatureWriter:
    """Appends shards to a folder of features."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: list[dict] = []
        self._values: dict[str, list[np.ndarray]] = {}
        path.mkdir(parents=True, exist_ok=True)

    def add(self, record: Record, features: dict[str, np.ndarray]) -> None:
        """Add the features of a record, as `FeatureFolder.read` returns them."""
        features = {key: np.ascontiguousarray(values) for key, values in features.items()}
        checksums = {key: zlib.crc32(values) for key, values in features.items()}
        self._rows.append({"id": record.id, "picture": image_digest(record), "crc32": checksums})
        for key, values in features.items():
            self._values.setdefault(key, []).append(values)
        if sum(values.nbytes for values in features.values()) * len(self._rows) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard; without this call it is lost."""
        if not self._rows:
            return
        shard = _digest([row["id"] for row in self._rows])
        for key, values in self._values.items():
            np.save(self.path / f"{shard}.{_file_name(key)}.npy", np.stack(values))
        with files.atomic_write(self.path / f"{shard}.json") as part:
            part.write_text(json.dumps(self._rows, indent=0) + "\n", encoding="utf-8")
        self._rows, self._values = [], {}


def _file_name(key: str) -> str:
    """The name of a feature in file names, from its name in a batch: "vision", "sam", or "sam_0", … for several scales."""
    return "vision" if key == "x_img" else key.replace("sam_features", "sam")


def image_digest(record: Record) -> str:
    """Hash of everything that determines a record's pixels."""
    return hashlib.sha256(record.image + json.dumps(record.window and list(record.window)).encode()).hexdigest()[:32]


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
