"""Features of frozen image encoders, kept beside the records: written by `mimo data encode`, read instead of decoding pictures.

DATA/features/FINGERPRINT/SHARD.vision.npy   uint16 [n, I, Dc]: X_img, the bits of bfloat16, which numpy has not
                          SHARD.sam.npy    uint16 [n, g, g, C]: SAM's features; SHARD.sam_0.npy, … of several scales
                          SHARD.json       of each row: id of the record, SHA-256 of its picture, CRC-32; written last

Of a manifest, DATA is its path and ".d". The fingerprint is that of the encoders (`train.encode`). A shard is named by what it
holds and counts once its .json stands, so that processes write side by side, and a killed one goes on.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mimo_jax import files
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.records import DataError, RecordFolder
from mimo_jax.data.schema import Record

SHARD_BYTES = 128 << 20  # held in memory until they are written


def feature_folder(source: RecordFolder | Manifest, fingerprint: str) -> Path:
    return _home(source) / fingerprint[:16]


def open_features(source: RecordFolder | Manifest, fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> FeatureFolder:
    """shapes: as of `FeatureFolder`. DataError with the remedy if a source has none of these encoders, or one that cannot be read."""
    folder = feature_folder(source, fingerprint)
    if not folder.is_dir():
        others = " (only those of other weights or settings)" if _home(source).is_dir() else ""
        raise DataError(
            f"config.data.features: {source.path} has no features of this run's encoders{others}; write them with "
            f"mimo data encode --checkpoint CHECKPOINT --data {source.path}, of the checkpoint that this run starts from"
        )
    return FeatureFolder(folder, shapes)


def _home(source: RecordFolder | Manifest) -> Path:
    return (source.path if source.path.is_dir() else Path(f"{source.path}.d")) / "features"


class FeatureFolder:
    """The features of the records of one source, by their ids; can be pickled and read from several threads."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        """shapes: of the features of one picture, by name in a batch (`mimo.feature_shapes`)."""
        self.path, self.shapes = path, dict(shapes)
        self._rows: dict[str, tuple[str, int, str, dict[str, int]]] = {}  # id -> shard, row, SHA-256 of the picture, CRC-32 by key
        self._open: dict[str, np.ndarray] = {}
        for about in sorted(path.glob("*.json")):
            try:
                rows = json.loads(about.read_text(encoding="utf-8"))
                self._rows.update((row["id"], (about.stem, at, row["picture"], row["crc32"])) for at, row in enumerate(rows))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{about}: cannot be read ({error}); remove it and run mimo data encode again") from None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._rows

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def read(self, record: Record) -> dict[str, np.ndarray]:
        """Features by name in a batch, uint16, the bits of bfloat16. Raises DataError where there are none, where
        they are of another picture, and where they are not as they were written."""
        if record.id not in self._rows:
            raise DataError(f"record {record.id}: has no features in {self.path}; run mimo data encode again")
        shard, row, picture, sums = self._rows[record.id]
        if picture != picture_digest(record):
            raise DataError(f"record {record.id}: its features are of another picture; remove {self.path} and run mimo data encode again")
        found = {key: np.array(self._array(shard, key)[row]) for key in self.shapes}
        for key, values in found.items():
            if values.shape != self.shapes[key] or zlib.crc32(values) != sums[key]:
                raise DataError(f"{self._file(shard, key)}, row {row}: is damaged; remove {shard}.json and run mimo data encode again")
        return found

    def blank(self) -> dict[str, np.ndarray]:
        """For a picture that has none."""
        return {key: np.zeros(shape, np.uint16) for key, shape in self.shapes.items()}

    def _file(self, shard: str, key: str) -> Path:
        return self.path / f"{shard}.{_file_name(key)}.npy"

    def _array(self, shard: str, key: str) -> np.ndarray:
        file = self._file(shard, key)
        if file.name not in self._open:
            try:
                self._open[file.name] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{file}: cannot be read ({error}); remove {shard}.json and run mimo data encode again") from None
        return self._open[file.name]


class FeatureWriter:
    """Appends shards to a folder of features."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: list[dict] = []
        self._values: dict[str, list[np.ndarray]] = {}
        path.mkdir(parents=True, exist_ok=True)

    def add(self, record: Record, features: dict[str, np.ndarray]) -> None:
        """`features` as `FeatureFolder.read` gives them."""
        features = {key: np.ascontiguousarray(values) for key, values in features.items()}
        sums = {key: zlib.crc32(values) for key, values in features.items()}
        self._rows.append({"id": record.id, "picture": picture_digest(record), "crc32": sums})
        for key, values in features.items():
            self._values.setdefault(key, []).append(values)
        if sum(values.nbytes for values in features.values()) * len(self._rows) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added since; without it, that is lost."""
        if not self._rows:
            return
        shard = _digest([row["id"] for row in self._rows])
        for key, values in self._values.items():
            np.save(self.path / f"{shard}.{_file_name(key)}.npy", np.stack(values))
        with files.atomic_write(self.path / f"{shard}.json") as part:
            part.write_text(json.dumps(self._rows, indent=0) + "\n", encoding="utf-8")
        self._rows, self._values = [], {}


def _file_name(key: str) -> str:
    """Of a feature by its name in a batch: "vision", "sam", or "sam_0", … of several scales."""
    return "vision" if key == "x_img" else key.replace("sam_features", "sam")


def picture_digest(record: Record) -> str:
    """Of all that decides a record's pixels."""
    return hashlib.sha256(record.image + json.dumps(record.window and list(record.window)).encode()).hexdigest()[:32]


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
