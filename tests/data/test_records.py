"""Record folders: written whole or not at all, read back the same."""

import dataclasses
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.loading.sources import not_evaluable
from mimo_jax.data.records import DataError, RecordFolder, damaged_files, open_records, read_info, write_records
from mimo_jax.data.schema import RecordError
from mimo_jax.errors import UserError
from tests.data import handmade

INFO = {"name": "handmade", "builder_version": "1", "seed": 7}


def records(train=5, val=2):
    return [handmade.record(i, "train" if i < train else "val") for i in range(train + val)]


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "set", records(), INFO, shard_bytes=6000)
    return tmp_path / "set"


def test_records_are_read_back_unchanged(folder):
    for split, wanted in (("train", records()[:5]), ("val", records()[5:])):
        found = open_records(folder, split)
        assert len(found) == len(wanted)
        assert [found[i] for i in range(len(found))] == wanted
        assert [found.samples(i) for i in range(len(found))] == [r.samples for r in wanted]


def test_random_access_survives_pickling(folder):
    found = pickle.loads(pickle.dumps(open_records(folder, "train")))
    assert [found[i].id for i in (4, 0, 2)] == ["image004", "image000", "image002"]
    assert found.samples(3)[0].sample_id == "image003/I0"
    with pytest.raises(IndexError):
        found[5]


def test_index_says_what_stands_in_the_records(folder):
    index = open_records(folder, "train").index
    wanted = records()[:5]
    assert index.ids.tolist() == [r.id.encode() for r in wanted]
    assert index.groups.tolist() == [r.group.encode() for r in wanted]
    assert np.diff(index.first).tolist() == [9] * 5
    assert [PERSPECTIVES[i] for i in index.perspective[:9]] == [s.perspective for s in wanted[0].samples]
    assert index.words[0] == len("Segment the liver. The liver is outlined.".split())
    assert index.text_bytes[0] == len("Segment the liver.The liver is outlined.")
    assert index.counts() == {"vqa": 5, "I": 20, "II": 10, "III": 5, "IV": 5}


def test_info_counts_and_hashes(folder):
    info = read_info(folder)
    assert {k: info[k] for k in INFO} == INFO
    train = info["splits"]["train"]
    assert (train["records"], train["groups"], train["masks"], train["samples"]) == (5, 5, 10, 45)
    assert train["perspectives"] == {"vqa": 5, "I": 20, "II": 10, "III": 5, "IV": 5}
    assert (train["modalities"], train["licences"], train["entities"]) == ({"CT": 5}, {"CC0-1.0": 5}, {"liver": 5, "spleen": 5})
    assert train["entity_groups"] == {"liver": 5, "spleen": 5}
    assert len(train["shards"]) > 1 and sum(s["records"] for s in train["shards"]) == 5
    for shard in train["shards"]:
        data = (folder / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    named = {e["file"] for s in info["splits"].values() for e in [*s["shards"], *s["files"]]}
    assert named | {"dataset_info.json"} == {p.name for p in folder.iterdir()}


def test_damage_is_found_and_named(folder):
    assert damaged_files(folder) == []
    shard = sorted(folder.glob("train-0000*"))[1]
    data = bytearray(shard.read_bytes())
    data[100] ^= 255
    shard.write_bytes(data)
    (folder / "val.index.npz").unlink()
    assert damaged_files(folder) == [f"{shard}: differs from what was written", f"{folder / 'val.index.npz'}: is missing"]


def test_an_unreadable_record_names_shard_and_record(folder):
    shard = sorted(folder.glob("train-0000*"))[1]
    shard.write_bytes(bytes(shard.stat().st_size))
    found = open_records(folder, "train")
    first = read_info(folder)["splits"]["train"]["shards"][0]["records"]
    assert found[0] == records()[0]
    with pytest.raises(DataError, match=rf"{shard.name}, record 0: cannot be read"):
        found[first]


def test_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "set").mkdir()
    write_records(tmp_path / "set", records(), INFO)  # an empty one is fine
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        write_records(tmp_path / "set", records(), INFO)
    assert len(open_records(tmp_path / "set", "train")) == 5


def twice():
    yield from records()
    yield handmade.record(0)


def leaking():
    yield from records()
    yield dataclasses.replace(handmade.record(9, "val"), group="case000")


def failing():
    yield from records()
    raise OSError("disk full")


def broken():
    yield from records()
    yield dataclasses.replace(handmade.record(9), height=41)


@pytest.mark.parametrize("made, error, message", [
    (twice, DataError, r"record image000 occurs twice \(train, train\)"),
    (leaking, DataError, "group case000 is in both train and val"),
    (failing, OSError, "disk full"),
    (broken, RecordError, "mask l is 56x40, the image is 56x41"),
    (lambda: iter(()), DataError, "no record to write"),
])  # fmt: skip
def test_a_failed_write_leaves_nothing(tmp_path, made, error, message):
    with pytest.raises(error, match=message):
        write_records(tmp_path / "set", made(), INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_folder_and_does_not_block_the_next(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from mimo_jax.data.records import write_records\n"
        "from tests.data import handmade\n"
        "def made():\n"
        "    yield handmade.record(0)\n"
        "    yield handmade.record(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_records(sys.argv[1], made(), {}, shard_bytes=1)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], env=env, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".set.partial"]  # killed while it wrote
    write_records(tmp_path / "set", records(), INFO)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert damaged_files(tmp_path / "set") == []


def test_another_process_that_writes_is_left_alone(tmp_path):
    def during():
        with pytest.raises(UserError, match="set: is being written by another process; wait for it, or give another --out"):
            write_records(tmp_path / "set", records(), INFO)
        yield from records()

    write_records(tmp_path / "set", during(), INFO)
    assert damaged_files(tmp_path / "set") == []


def test_opening_a_path_that_is_not_a_record_folder(tmp_path, folder):
    with pytest.raises(DataError, match="has no dataset_info.json"):
        open_records(tmp_path, "train")
    with pytest.raises(DataError, match="has no split 'test'; it has train, val"):
        open_records(folder, "test")
    sorted(folder.glob("train-0000*"))[0].unlink()
    with pytest.raises(DataError, match="lacks train-00000-of-0000"):
        open_records(folder, "train")
    (folder / "val.index.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="val.index.npz: index cannot be read"):
        open_records(folder, "val")


def test_groups_of_entities_are_counted_over_all_shards_without_reading_a_record(tmp_path, monkeypatch):
    """Against a count of 1,000 records, of which several have the same group."""
    rng, records, wanted = np.random.default_rng(0), [], defaultdict(set)
    for i in range(1000):
        record = handmade.record(0)
        record.id, record.group, record.samples = f"r{i}", f"g{i // 3}", []
        for mask in record.masks:
            mask.entity = f"structure {rng.integers(400)}"
            wanted[mask.entity].add(record.group)
        records.append(record)
    write_records(tmp_path / "data", records, {"name": "handmade"}, shard_bytes=200_000)
    monkeypatch.setattr(RecordFolder, "__getitem__", None)
    folder = open_records(tmp_path / "data", "train")
    assert len(read_info(tmp_path / "data")["splits"]["train"]["shards"]) > 2
    assert folder.entity_groups == {entity: len(groups) for entity, groups in wanted.items()}
    alone = sorted(entity for entity, groups in wanted.items() if len(groups) == 1)
    assert alone and not_evaluable(folder.entity_groups) == alone
    assert not_evaluable(folder.entity_groups, dict.fromkeys(alone, 1)) == []
