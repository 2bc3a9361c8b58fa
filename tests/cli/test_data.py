"""`mimo data` from the command line: what it prints, writes and refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimo_jax.cli import main
from mimo_jax.data.records import open_records, read_info, write_records
from tests.data import handmade
from tests.data.builder.sources_made import write_source


def mimo(*words) -> int:
    return main.main(["data", *map(str, words)])


@pytest.mark.parametrize("verb", ["phantom", "build", "merge", "split", "stats", "validate", "view"])
def test_help_shows_examples(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        mimo(verb, "--help")
    assert stopped.value.code == 0
    assert f"  mimo data {verb} " in capsys.readouterr().out.split("examples:")[1]


def test_from_a_source_to_pictures(tmp_path, capsys):
    source, out = write_source(tmp_path / "in", 10, line9={"modality": "MR"}), tmp_path / "out"
    words = ["build", "--source", "manifest", "--in", source, "--out", out, "--workers", 1, "--ratios", "0.6,0.2,0.2", "--seed", 4]
    assert mimo(*words, "--perspectives", "I,II,IV") == 0
    said = capsys.readouterr().out
    assert f"{out} test: " in said and sum(split["records"] for split in read_info(out)["splits"].values()) == 10
    assert set(read_info(out)["splits"]["train"]["perspectives"]) <= {"I", "II", "IV"}
    assert mimo("validate", out, "--workers", 1) == 0 and "10 records" in capsys.readouterr().out
    assert mimo("stats", out, "--json", "--plots", tmp_path / "plots") == 0
    assert json.loads(capsys.readouterr().out)["modality"] == {"CT": 9, "MR": 1}
    assert (tmp_path / "plots/entity.png").is_file()
    assert mimo("split", out, "--ratios", "1,0,0") == 0 and set(read_info(out)["splits"]) == {"train"}
    assert mimo("merge", out, "--out", tmp_path / "all") == 0 and len(open_records(tmp_path / "all", "train")) == 10
    for index, height in (("3", 512), ("0-9", 1024)):
        assert mimo("view", tmp_path / "all", "--index", index, "--out", tmp_path / "view.png") == 0
        with Image.open(tmp_path / "view.png") as image:
            assert image.height > height / 2 and np.asarray(image.convert("RGB")).std() > 10


def test_an_empty_split_is_explained_by_its_reason(tmp_path, capsys):
    """Too few groups only where groups were divided: a source that is all test has enough of them."""
    all_test = write_source(tmp_path / "held_out", 4, **{f"line{i}": {"split": "test"} for i in range(4)})
    assert mimo("build", "--source", "manifest", "--in", all_test, "--out", tmp_path / "a", "--workers", 1) == 0
    said = capsys.readouterr().out
    assert "nothing in train, val: its source puts all groups into other splits" in said and "too few" not in said
    single = write_source(tmp_path / "single", 1)
    assert mimo("build", "--source", "manifest", "--in", single, "--out", tmp_path / "b", "--workers", 1) == 0
    assert "nothing in val, test: there are too few groups" in capsys.readouterr().out


def test_a_flipped_byte_ends_with_2_and_names_the_file(tmp_path, capsys):
    write_records(tmp_path / "set", [handmade.record(i) for i in range(3)], {})
    shard = next((tmp_path / "set").glob("train-*.array_record"))
    data = bytearray(shard.read_bytes())
    data[data.find(handmade.record(1).image[64:96])] ^= 1
    shard.write_bytes(data)
    assert mimo("validate", tmp_path / "set", "--workers", 1) == 2
    said = capsys.readouterr().err
    assert f"{shard}: differs" in said and f"{shard}, record 1: cannot be read" in said and "mimo: error: " in said.splitlines()[-1]


@pytest.mark.parametrize("words, said", [
    ("build --source manifst --in . --out o", "source manifst: is unknown; did you mean manifest?"),
    ("build --source manifest --in none --out o", "none: no such file or folder"),
    ("build --source manifest --in {in} --out {in}", "exists and is not an empty folder"),
    ("build --source manifest --in {in} --out o --ratios 1,2", "'1,2' is not TRAIN,VAL,TEST"),
    ("build --source manifest --in {in} --out o --max-rejects 7", "'7' is not from 0 to 1"),
    ("build --source manifest --in {in} --out o --perspectives V", "perspectives V: use some of vqa, I, II, III, IV"),
    ("build --source manifest --in {in} --out o --option x", "'x' is not NAME=VALUE"),
    ("build --source manifest --in {in} --out o --option x=1", "has no option x"),
    ("validate {in}", "has no dataset_info.json"),
    ("stats {in}", "has no dataset_info.json"),
    ("split {in}", "has no dataset_info.json"),
    ("merge {in} --out o", "has no dataset_info.json"),
    ("view {in} --out a.png", "has no dataset_info.json"),
    ("view {in} --out a.jpg", "give a name that ends in .png"),
    ("view {in} --out a.png --index 5-3", "'5-3' is not a record number such as 12"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch, words, said):
    source = write_source(tmp_path / "in", 2)
    monkeypatch.chdir(tmp_path)
    assert mimo(*words.replace("{in}", str(source)).split()) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_real_images(tmp_path, capsys):
    path = os.environ.get("MIMO_REAL_DATA")
    if not path:
        pytest.skip("MIMO_REAL_DATA names no folder with real images")
    items = len((Path(path) / "manifest.jsonl").read_text().splitlines())
    out = tmp_path / "out"
    assert mimo("build", "--source", "manifest", "--in", path, "--out", out, "--workers", 1) == 0
    assert sum(split["records"] for split in read_info(out)["splits"].values()) == items
    assert set(read_info(out)["splits"]) == {"train", "val", "test"}
    assert mimo("validate", out, "--workers", 1) == 0
    assert mimo("stats", out) == 0 and "pathology" in capsys.readouterr().out
    assert mimo("view", out, "--split", "test", "--index", "0-4", "--out", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 2000
