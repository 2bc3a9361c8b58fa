"""Datasets merged, or split again."""

import dataclasses
import os
import subprocess
import sys

import pytest

from mimo_jax.data.builder.build_plan import LeakError, Options
from mimo_jax.data.builder.rewrite import merge_folders, split_folder
from mimo_jax.data.builder.validate import find_faults
from mimo_jax.data.records import DataError, open_records, read_info, write_records
from mimo_jax.errors import UserError
from tests.data import handmade

QUIET = {"progress": False}


def folder(path, numbers, split="train", **changes):
    write_records(path, [dataclasses.replace(handmade.record(n, split), **changes) for n in numbers], {"name": path.name, "seed": 1})
    return path


def records_of(path):
    return {record.id: record for split in read_info(path)["splits"] for record in (r for r in open_records(path, split))}


def test_merge_keeps_every_record_in_its_split(tmp_path):
    one, two = folder(tmp_path / "one", range(5)), folder(tmp_path / "two", range(5, 8), "test")
    info = merge_folders([one, two], tmp_path / "out", Options(), **QUIET)
    assert records_of(tmp_path / "out") == records_of(one) | records_of(two)
    assert {name: split["records"] for name, split in info["splits"].items()} == {"train": 5, "test": 3}
    assert info["name"] == "one+two" and [entry["seed"] for entry in info["merged"]] == [1, 1]
    assert find_faults(tmp_path / "out", **QUIET) == []


def test_merge_finds_what_both_hold(tmp_path):
    one, two = folder(tmp_path / "one", range(3)), folder(tmp_path / "two", (2, 3), "test", group="other")
    with pytest.raises(LeakError, match="1 pairs .*\n  image002 .* and image002 "):
        merge_folders([one, two], tmp_path / "out", Options(), **QUIET)
    info = merge_folders([one, two], tmp_path / "out", Options(duplicates="drop"), **QUIET)
    assert {name: split["records"] for name, split in info["splits"].items()} == {"train": 2, "test": 2}
    same = folder(tmp_path / "same", (2,))
    merge_folders([one, same], tmp_path / "both", Options(), **QUIET)
    found = records_of(tmp_path / "both")
    assert sorted(found) == ["image000", "image001", "image002", "image002-2"]
    assert found["image002-2"].samples[0].sample_id == "image002-2/0"
    torn = folder(tmp_path / "torn", (9,), "val", group="case001")
    with pytest.raises(DataError, match="group case001: .* train and val"):
        merge_folders([one, torn], tmp_path / "x", Options(), **QUIET)
    assert not (tmp_path / "x").exists()


def test_split_again_in_place(tmp_path):
    path = folder(tmp_path / "set", range(20))
    before = records_of(path)
    options = Options(shares={"train": 0.5, "val": 0.25, "test": 0.25}, seed=3)
    info = split_folder(path, None, "group", options, **QUIET)
    assert {name: split["records"] for name, split in info["splits"].items()} == {"train": 10, "val": 5, "test": 5}
    after = records_of(path)
    assert {key: dataclasses.replace(record, split="") for key, record in after.items()} == {
        key: dataclasses.replace(record, split="") for key, record in before.items()
    }
    assert (info["seed"], info["split_seed"], info["ratios"]["train"]) == (1, 3, 0.5)
    assert find_faults(path, **QUIET) == [] and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_split_by_dataset(tmp_path):
    records = [dataclasses.replace(handmade.record(n), dataset=f"d{n % 3}") for n in range(12)]
    write_records(tmp_path / "set", records, {})
    split_folder(tmp_path / "set", tmp_path / "out", "dataset", Options(), **QUIET)
    split_of: dict[str, set] = {}
    for record in records_of(tmp_path / "out").values():
        split_of.setdefault(record.dataset, set()).add(record.split)
    assert sorted(map(sorted, split_of.values())) == [["test"], ["train"], ["val"]]
    assert len(open_records(tmp_path / "set", "train")) == 12


def test_a_failed_split_leaves_the_old_one(tmp_path):
    path = folder(tmp_path / "set", range(3))
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        split_folder(path, path, "group", Options(), **QUIET)
    assert len(open_records(path, "train")) == 3


def test_a_split_that_was_killed_between_its_renames_is_made_good(tmp_path):
    path = folder(tmp_path / "set", range(3))
    code = """if 1:
        import os, sys
        from mimo_jax.data.builder.build_plan import Options
        from mimo_jax.data.builder.rewrite import split_folder
        inner = os.rename
        def rename(source, target):
            inner(source, target)
            if target.name == "set.old":
                os._exit(9)
        os.rename = rename
        split_folder(sys.argv[1], None, "group", Options(), progress=False)"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=env, timeout=120).returncode == 9
    assert not path.exists()
    info = split_folder(path, None, "group", Options(seed=3), **QUIET)
    assert info["split_seed"] == 3 and find_faults(path, **QUIET) == []
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
