"""The same records through TensorFlow Datasets, without TensorFlow."""

import dataclasses
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mimo_jax.data.builder.tfds_mimoseg import MimoSeg, record_of
from mimo_jax.data.records import DataError, open_records, write_records
from mimo_jax.data.transforms import decode_image
from tests.data import handmade


def test_a_data_source_yields_the_records(tmp_path):
    records = [dataclasses.replace(handmade.record(i, "train" if i < 3 else "val"), pixel_spacing_mm=[0.5, 0.25]) for i in range(4)]
    records.append(dataclasses.replace(handmade.record(4, "val"), masks=[], samples=[]))
    write_records(tmp_path / "set", records, {})
    builder = MimoSeg(tmp_path / "set", data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    read = tfds.builder_from_directory(builder.data_path)
    assert {name: split.num_examples for name, split in read.info.splits.items()} == {"train": 3, "val": 2}
    assert read.info.redistribution_info.license == "CC0-1.0"
    for split in ("train", "val"):
        source, wanted = read.as_data_source(split), open_records(tmp_path / "set", split)
        by_id = {record.id: record for record in (wanted[i] for i in range(len(wanted)))}
        for example in (source[i] for i in range(len(source))):
            found = record_of(example, split)
            record = by_id.pop(found.id)
            assert found == dataclasses.replace(record, image=b"")
            np.testing.assert_array_equal(example["image"], decode_image(record.image))
        assert not by_id
    assert "tensorflow" not in sys.modules


def test_it_needs_a_record_folder(tmp_path):
    with pytest.raises(DataError, match="has no dataset_info.json"):
        MimoSeg(tmp_path, data_dir=tmp_path / "tfds")
