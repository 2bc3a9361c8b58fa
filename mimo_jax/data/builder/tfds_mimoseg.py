"""The TensorFlow Datasets builder `mimoseg` of a record folder, written and read without TensorFlow.

    builder = MimoSeg("data/mine", data_dir="tfds")
    builder.download_and_prepare()
    for example in tfds.builder_from_directory(builder.data_path).as_data_source("train"): ...

An example consists of the image (uint8 RGB [H, W, 3]), the record's other fields, its masks as COCO RLE, and its samples with targets and
turns as JSON. `record_of` restores the record from it, except the bytes of the image file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mimo_jax.data.records import RecordFolder, read_info
from mimo_jax.data.schema import Mask, Record, Sample, Target, Turn

_TEXTS = ("id", "format", "modality", "dataset", "group", "slice_axis", "orientation", "phash64", "licence", "source")
_NUMBERS = ("channels", "src_bit_depth", "slice_index")
_LISTS = ("pixel_spacing_mm", "window")  # of two numbers, or empty


class MimoSeg(tfds.core.GeneratorBasedBuilder):
    """The splits, images, masks and samples of a folder that `mimo data build` wrote."""

    name = "mimoseg"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder: str | os.PathLike, **options):
        """options: those of tfds builders, such as data_dir. Raises DataError if `folder` is not a record folder."""
        self._folder, self._dataset_info = folder, read_info(folder)
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        text, integer = tfds.features.Text(), tfds.features.Scalar(np.int64)
        number = tfds.features.Sequence(tfds.features.Scalar(np.float64))
        mask = dict.fromkeys(("mask_id", "entity", "entity_id", "class_raw", "annotation", "parent_mask_id", "counts"), text)
        mask |= {"instance": integer, "area_px": integer, "box_xyxy": tfds.features.Tensor(shape=(4,), dtype=np.int64)}
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "masks": tfds.features.Sequence(mask),
            "samples": text,
            **dict.fromkeys(_TEXTS, text),
            **dict.fromkeys(_NUMBERS, integer),
            **dict.fromkeys(_LISTS, number),
            "flags": tfds.features.Sequence(text),
        }
        licences = sorted({licence for split in self._dataset_info["splits"].values() for licence in split["licences"]})
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), license="; ".join(licences))

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._dataset_info["splits"]}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        records = RecordFolder(self._folder, split)
        for record in (records[i] for i in range(len(records))):
            yield record.id, _example(record)


def _example(record: Record) -> dict[str, Any]:
    masks = [{**{k: v for k, v in vars(mask).items() if k != "rle"}, "counts": mask.rle["counts"]} for mask in record.masks]
    example = {name: getattr(record, name) for name in (*_TEXTS, *_NUMBERS)} | {name: getattr(record, name) or [] for name in _LISTS}
    samples = json.dumps([dataclasses.asdict(sample) for sample in record.samples], ensure_ascii=False)
    return example | {
        "image": io.BytesIO(record.image),
        "masks": masks,
        "samples": samples,
        "flags": record.flags,
    }  # TensorFlow would be needed to encode an array


def record_of(example: Mapping[str, Any], split: str) -> Record:
    """The record of an example of a data source, with an empty image file."""
    height, width = example["image"].shape[:2]
    values = {name: _text(example[name]) for name in _TEXTS} | {name: int(example[name]) for name in _NUMBERS}
    values |= {name: np.asarray(example[name]).tolist() or None for name in _LISTS}
    columns = example["masks"]
    masks = []
    for i in range(len(columns["mask_id"])):
        row = {name: column[i] for name, column in columns.items()}
        rle = {"size": [height, width], "counts": _text(row.pop("counts"))}
        numbers = {name: np.asarray(row.pop(name)).tolist() for name in ("instance", "area_px", "box_xyxy")}
        masks.append(Mask(rle=rle, **numbers, **{name: _text(value) for name, value in row.items()}))
    samples = [
        Sample(**{**s, "turns": [Turn(**t) for t in s["turns"]], "targets": [Target(**t) for t in s["targets"]]})
        for s in json.loads(_text(example["samples"]))
    ]
    flags = [_text(flag) for flag in example["flags"]]
    return Record(image=b"", height=height, width=width, split=split, masks=masks, samples=samples, flags=flags, **values)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
