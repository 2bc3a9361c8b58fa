"""Faults of a record folder: found, and named."""

import dataclasses

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module

from mimo_jax.data.builder.validate import find_faults
from mimo_jax.data.records import DataError, open_records, read_info, write_records
from tests.data import handmade


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "set", [handmade.record(i, "train" if i < 5 else "val") for i in range(7)], {}, shard_bytes=6000)
    return tmp_path / "set"


def faults(folder):
    return find_faults(folder, progress=False)


def test_an_intact_folder_has_no_faults(folder):
    assert faults(folder) == []
    assert find_faults(folder, workers=2, progress=False) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_is_found_and_named(folder, seed):
    """Anywhere within a record's image: the file and the record."""
    rng = np.random.default_rng(seed)
    train = open_records(folder, "train")
    number = int(rng.integers(len(train)))
    shard = folder / train.where(number).split("/")[-1].split(",")[0]
    data = bytearray(shard.read_bytes())
    at = data.find(handmade.record(number).image[64:128]) + int(rng.integers(64))
    data[at] ^= 1 << int(rng.integers(8))
    shard.write_bytes(data)
    found = faults(folder)
    assert f"{shard}: differs from what was written" in found
    assert any(fault.startswith(f"{train.where(number)}: cannot be read") for fault in found) and len(found) == 2


def rewritten(folder, change):
    """Record 0 of train changed by hand, in a shard of the same name."""
    train = open_records(folder, "train")
    shard = read_info(folder)["splits"]["train"]["shards"][0]
    records = [train[i] for i in range(shard["records"])]
    records[0] = change(records[0])
    writer = array_record_module.ArrayRecordWriter(str(folder / shard["file"]), "group_size:1")
    for record in records:
        writer.write(msgpack.packb(vars(record), default=vars))
    writer.close()
    return [fault.split("record 0: ")[1] for fault in faults(folder) if "record 0: " in fault]


def with_mask(record, **changes):
    return dataclasses.replace(record, masks=[dataclasses.replace(record.masks[0], **changes), *record.masks[1:]])


@pytest.mark.parametrize("change, message", [
    (lambda r: dataclasses.replace(r, image=handmade.record(9).image[:-30]), "its image: damaged or truncated"),
    (lambda r: dataclasses.replace(r, image=handmade.png(np.zeros((40, 50), np.uint8))), "its image is 50x40, not 56x40"),
    (lambda r: dataclasses.replace(r, id="0123456789abcdef"), "its id is not the hash of its pixels"),
    (lambda r: dataclasses.replace(r, split="test"), "its split is recorded as test"),
    (lambda r: dataclasses.replace(r, modality="PET"), "modality 'PET' is unknown"),
    (lambda r: with_mask(r, area_px=3), "mask l: area_px or box_xyxy do not match its pixels"),
    (lambda r: with_mask(r, mask_id="s"), "record image000, sample image000/I0: no mask 'l'|no mask 'l'"),
    (lambda r: dataclasses.replace(r, samples=r.samples[1:]), "its samples differ from those in train.samples"),
    (lambda r: dataclasses.replace(r, group="other"), "differs from train.index.npz"),
])  # fmt: skip
def test_inconsistencies_are_named(folder, change, message):
    found = rewritten(folder, change)
    assert any(part in fault for fault in found for part in message.split("|")), found


def test_a_missing_file_and_no_folder(folder, tmp_path):
    (folder / "val.index.npz").unlink()
    found = faults(folder)
    assert f"{folder / 'val.index.npz'}: is missing" in found
    with pytest.raises(DataError, match="has no dataset_info.json"):
        find_faults(tmp_path)
