"""Sources of records: record folders, and JSON-lines manifests of images and mask files.

Both are sequences of Record with an `index` and `samples(i)`, so that a loader can plan without reading images. A manifest
is split by group when it is opened, its masks are decoded once and kept as RLE, and its questions are made from templates; build larger
datasets into a record folder instead.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mimo_jax.config import Config
from mimo_jax.data.builder.label_stats import LabelStats
from mimo_jax.data.builder.questions import ask
from mimo_jax.data.builder.readers.manifest import MANIFEST, manifest_lines
from mimo_jax.data.builder.readers.reader import SPLITS
from mimo_jax.data.builder.splits import split_groups
from mimo_jax.data.records import INFO, DataError, Index, IndexBuilder, RecordFolder, read_info
from mimo_jax.data.schema import Mask, Record, RecordError, Sample, encode_mask
from mimo_jax.data.transforms import ImageError, decode_mask, decode_picture
from mimo_jax.errors import config_path

SPLIT_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}  # fractions of a manifest's groups


def open_source(path: str | os.PathLike, split: str, seed: int = 0, max_bad: float = 0.01) -> RecordFolder | Manifest:
    """One split of a record folder, of a JSON-lines manifest, or of a folder with a manifest.jsonl.

    seed: determines the split and the questions of a manifest. The attribute `bad` of a manifest lists the unusable records with the
    reason. Raises DataError if these are more than the fraction `max_bad` of the split, or if the path is none of the three."""
    path = Path(path)
    if (path / INFO).is_file():
        return RecordFolder(path, split)
    if (path / MANIFEST).is_file():
        path = path / MANIFEST
    if path.is_file() and path.suffix == ".jsonl":
        return Manifest(path, split, seed, max_bad)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    raise DataError(f"{path}: is neither a folder with {INFO} nor a manifest .jsonl; make one with `mimo data`")


def has_split(path: str | os.PathLike, split: str) -> bool:
    """Whether `open_source` can give a split of a dataset. A manifest, which is split when it is opened, has all."""
    return not (Path(path) / INFO).is_file() or split in read_info(path)["splits"]


def open_sources(config: Config, split: str) -> dict[str, RecordFolder | Manifest]:
    """Every source of `config.data.sources` with a weight, by name. The split of a manifest does not depend on `data.seed`, so that no
    run trains on data that another is tested on. Raises DataError, which names the source."""
    sources = {}
    for name, source in config.data.sources.items():
        if source.weight < 0:
            raise DataError(f"config.data.sources.{name}.weight: is {source.weight}; must be 0 or more")
        if source.weight:
            with config_path(f"config.data.sources.{name}", source.path):
                sources[name] = open_source(source.path, split, max_bad=config.train.max_bad_samples)
    if not sources:
        raise DataError("config.data.sources: has no source with a weight; add one with --data DIR")
    return sources


class Manifest:
    """One split of a manifest with lines {id, image, masks: [{file, entity, …}], modality, group, width, height, …}, whose paths are
    relative to it. The `absent_entities` of a line are known to be absent, and questions may ask for them. Groups whose lines name a
    `split` are in it; the others are divided by SPLIT_FRACTIONS.

    bad: record id -> reason why it is unusable and omitted. entity_groups: entity -> number of its groups in the split. not_evaluable:
    entities with fewer than two groups in all splits."""

    def __init__(self, path: str | os.PathLike, split: str, seed: int = 0, max_bad: float = 0.01):
        self.path, self.split = Path(path), split
        if split not in SPLIT_FRACTIONS:
            raise DataError(f"{path}: has no split {split!r}; it has {', '.join(SPLIT_FRACTIONS)}")
        lines = list(manifest_lines(self.path))
        outlines = [_outline(line) for line in lines]
        splits = split_groups(outlines, seed, SPLIT_FRACTIONS, _given_splits(self.path, lines, outlines))
        self.not_evaluable = not_evaluable(_entity_groups(outlines))
        split_lines = [(line, o) for line, o in zip(lines, outlines, strict=True) if splits[o.group] == split]
        if not split_lines:
            raise DataError(f"{path}: split {split} is empty; {len(splits)} groups are too few for train, val and test")

        # Labels of a manifest are rarely complete: an entity is known to be absent only if a line says so.
        absent = {outline.id: line.get("absent_entities", []) for line, outline in zip(lines, outlines, strict=True)}
        label_stats = LabelStats.from_records(outlines, absent=absent)
        self.bad: dict[str, str] = {}
        self._choices: list[str] = []  # `transforms.CHOICES` made for the display of the images
        self._records: list[Record] = []
        with ThreadPoolExecutor() as pool:
            for (_, outline), made in zip(split_lines, pool.map(lambda pair: self._load(*pair), split_lines), strict=True):
                if isinstance(made, str):
                    self.bad[outline.id] = made
                    continue
                rng = np.random.default_rng([seed, zlib.crc32(made.id.encode())])
                made.samples = ask(made, rng, label_stats, absent[made.id])
                self._records.append(made)
        for choice, count in sorted(Counter(self._choices).items()):
            warnings.warn(f"{path}, {split}: {count} images: {choice}; mimo data build says which, and takes a window", stacklevel=2)
        if len(self.bad) > max_bad * len(split_lines):
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:3])
            raise DataError(
                f"{path}: {len(self.bad)} of {len(split_lines)} records of {split} are unusable ({shown}); "
                "repair them or raise config.train.max_bad_samples"
            )
        self.entity_groups = _entity_groups(self._records)
        builder = IndexBuilder()
        for record in self._records:
            builder.add(record.id, record.group, record.samples)
        self.index: Index = builder.build()
        self._files = {o.id: self.path.parent / line["image"] for line, o in split_lines}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> Record:
        if not 0 <= position < len(self):
            raise IndexError(f"{self.path}: record {position} of {len(self)}")
        record = self._records[position]
        try:
            image = self._files[record.id].read_bytes()
        except OSError as error:
            raise DataError(f"{self._files[record.id]}: cannot be read ({error.strerror})") from None
        return Record(**{**vars(record), "image": image})

    def samples(self, position: int) -> list[Sample]:
        """The samples of one record, without its image."""
        return self._records[position].samples

    def samples_of(self, positions: Sequence[int]) -> list[list[Sample]]:
        """The samples of several records, without their images."""
        return [self._records[position].samples for position in positions]

    def _load(self, line: dict, outline: Record) -> Record | str:
        """The record without image bytes and samples, or the reason why it is unusable."""
        folder = self.path.parent
        try:
            pixels, choices = decode_picture(folder / line["image"])
            height, width = pixels.shape[:2]
            self._choices += [choice.partition(":")[0] for choice in choices]
            masks = []
            for entry, light in zip(line["masks"], outline.masks, strict=True):
                mask = decode_mask(folder / entry["file"], threshold=line.get("mask_threshold"))
                if mask.shape != (height, width):
                    return f"{folder / entry['file']}: is {mask.shape[1]}x{mask.shape[0]}, the image is {width}x{height}"
                masks.append(
                    encode_mask(mask, light.mask_id, light.entity, instance=light.instance, annotation=entry.get("annotation", ""))
                )
        except (ImageError, RecordError) as error:
            return str(error)
        return Record(**{**vars(outline), "height": height, "width": width, "masks": masks, "split": self.split})


def _given_splits(path: Path, lines: list[dict], outlines: list[Record]) -> dict[str, str]:
    """Group -> split that its lines name. Raises DataError for a group whose lines name two."""
    given: dict[str, str] = {}
    for line, outline in zip(lines, outlines, strict=True):
        if not line.get("split"):
            continue
        split = SPLITS[line["split"]]
        if given.setdefault(outline.group, split) != split:
            raise DataError(f"{path}: group {outline.group} is in splits {given[outline.group]} and {split}; give its lines one split")
    return given


def _outline(line: dict) -> Record:
    """The record of a line without reading its files: masks have names, but no pixels yet."""
    count: dict[str, int] = defaultdict(int)
    masks = []
    for entry in line["masks"]:
        entity = entry["entity"]
        masks.append(Mask(f"{entity.replace(' ', '_')}_{count[entity]}", entity, {}, 0, [], instance=count[entity]))
        count[entity] += 1
    return Record(
        id=line["id"], image=b"", format="jpeg" if line["image"].lower().endswith((".jpg", ".jpeg")) else "png",
        height=0, width=0, modality=line["modality"], dataset=line.get("dataset") or line.get("source_repo", ""), split="",
        group=line["group"], masks=masks, pixel_spacing_mm=line.get("pixel_spacing_mm"), licence=line.get("licence", ""),
        source=line.get("source_path", ""),
    )  # fmt: skip


def _entity_groups(records: Iterable[Record]) -> dict[str, int]:
    """Entity -> number of its groups."""
    groups: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for mask in record.masks:
            groups[mask.entity].add(record.group)
    return {entity: len(of) for entity, of in groups.items()}


def not_evaluable(*splits: Mapping[str, int]) -> list[str]:
    """Entities with fewer than two groups in all splits together, each given as its `entity_groups` (a group is in one split): no split
    can both train on them and test them."""
    total: Counter[str] = Counter()
    for split in splits:
        total.update(split)
    return sorted(entity for entity, count in total.items() if count < 2)
