"""A whole build: the same bytes however it comes about, nothing half-written, and what stops it."""

import json
import shutil
import signal
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.builder import item_batches, question_generation
from mimo_jax.data.builder.build_plan import LeakError, Options
from mimo_jax.data.builder.pipeline import build
from mimo_jax.data.builder.readers import open_reader
from mimo_jax.data.builder.validate import find_faults
from mimo_jax.data.records import DataError, damaged_files, open_records, read_info
from mimo_jax.errors import UserError
from tests.data.builder.chat_server import chat_server
from tests.data.builder.sources_made import BATCH_SIZE, contents, picture, run, write_source

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(item_batches, "BATCH_SIZE", BATCH_SIZE)


def built(source, out, workers=1, **options):
    options = {"shares": SHARES, "shard_bytes": 9000} | options
    return build(open_reader("manifest", source), out, Options(**options), workers, progress=False)


def records_of(out):
    return [(split, record) for split in read_info(out)["splits"] for record in open_records(out, split)]


def test_a_build_is_complete_and_the_same_for_any_number_of_workers(tmp_path):
    source = write_source(tmp_path / "in", 14)
    info = built(source, tmp_path / "a")
    assert find_faults(tmp_path / "a", progress=False) == []
    assert (info["items"], info["rejected"], info["seed"]) == (14, 0, 0)
    assert sum(split["records"] for split in info["splits"].values()) == 14
    assert any(len(split["shards"]) > 1 for split in info["splits"].values())
    found, splits = {}, defaultdict(set)
    for split, record in records_of(tmp_path / "a"):
        found[record.source] = record
        splits[record.group].add(split)
        assert record.samples and {mask.entity for mask in record.masks} == {"liver", "spleen"}
        assert (record.dataset, record.licence) == ("mine", "CC0-1.0")
    assert set(found) == {f"n{i}" for i in range(14)}
    assert all(found[f"n{i}"].image == (source / f"images/{i}.png").read_bytes() for i in range(14))
    assert all(len(of) == 1 for of in splits.values()) and set.union(*splits.values()) == set(SHARES)
    built(source, tmp_path / "b", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "in"]
    built(source, tmp_path / "c", seed=1)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


KILL = """
import os
from mimo_jax.data.builder import {module} as module
inner, count = module.{name}, 0
def counted(*args):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), {signal})
    return inner(*args)
module.{name} = counted
"""


@pytest.mark.parametrize(
    "module, name, at", [("item_batches", "make_record", 10), ("pipeline", "write_shard", 3), ("pipeline", "join_shards", 1)]
)
def test_after_a_kill_the_same_command_resumes(tmp_path, module, name, at):
    source = write_source(tmp_path / "in")
    build(open_reader("manifest", source), tmp_path / "whole", Options(), progress=False)
    done = run(source, tmp_path / "out", before=KILL.format(module=module, name=name, at=at, signal=9))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.building/batches").glob("*.summary")}
    assert len(kept) == (2 if name == "make_record" else 3)
    done = run(source, tmp_path / "out", before="item_batches.make_record = lambda item: sys.exit('made again')" if len(kept) == 3 else "")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.building").exists()


def test_a_request_to_stop_ends_with_75_and_the_same_command_resumes(tmp_path):
    source = write_source(tmp_path / "in")
    build(open_reader("manifest", source), tmp_path / "whole", Options(), progress=False)
    done = run(source, tmp_path / "out", before=KILL.format(module="item_batches", name="make_record", at=6, signal=int(signal.SIGTERM)))
    assert done.returncode == 75 and "run the same command again" in done.stderr
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.building/batches").glob("*.summary"))) == 2  # the current batch was finished
    assert run(source, tmp_path / "out").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_batch_of_other_items_is_built_again(tmp_path):
    source = write_source(tmp_path / "in")
    run(source, tmp_path / "out", before=KILL.format(module="pipeline", name="join_shards", at=1, signal=9))
    lines = (source / "manifest.jsonl").read_text().splitlines()
    changed = json.loads(lines[5])
    changed["masks"][0]["entity"] = "stomach"
    (source / "manifest.jsonl").write_text("\n".join([*lines[:5], json.dumps(changed), *lines[6:]]))
    assert run(source, tmp_path / "out").returncode == 0
    build(open_reader("manifest", source), tmp_path / "whole", Options(), progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_rejects_are_listed_and_too_many_stop_it(tmp_path):
    source = write_source(tmp_path / "in")
    good = (source / "images/3.png").read_bytes()
    (source / "images/3.png").write_bytes(good[:60])
    done = run(source, tmp_path / "out")
    assert done.returncode == 2 and "1 of 12 items have no record, such as n3: " in done.stderr and "--max-rejects" in done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1 and not (tmp_path / "out").exists()
    done = run(source, tmp_path / "out", "--max-rejects", "0.1")
    assert done.returncode == 3 and "rejects.jsonl" in done.stderr
    (line,) = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    assert line["id"] == "n3" and "damaged or truncated" in line["reason"]
    assert len(records_of(tmp_path / "out")) == 11 and damaged_files(tmp_path / "out") == []
    assert run(source, tmp_path / "other").returncode == 2
    (source / "images/3.png").write_bytes(good)  # fixed: it is read again
    assert run(source, tmp_path / "other").returncode == 0


def test_a_source_without_items_leaves_nothing(tmp_path):
    source = write_source(tmp_path / "in", 1)
    (source / "manifest.jsonl").write_text("")
    with pytest.raises(DataError, match="has no record"):
        built(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_suspicious_items_are_in_the_warnings(tmp_path):
    source = write_source(tmp_path / "in")
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(source / "images/5_liver.png")
    info = built(source, tmp_path / "out")
    assert info["warnings"] == {"empty mask, left out": 1} and info["unknown_entities"] == []
    assert json.loads((tmp_path / "out/warnings.jsonl").read_text()) == {"id": "n5", "warning": "empty mask, left out"}
    (tmp_path / "out/warnings.jsonl").write_text("")
    assert damaged_files(tmp_path / "out") == [f"{tmp_path / 'out/warnings.jsonl'}: differs from what was written"]


def shown_twice(folder, **changes):
    """Picture 0 of case0 again as that of case5, as a JPEG."""
    source = write_source(folder, pictures={10: 0}, **changes)
    Image.fromarray(picture(0)).save(source / "images/10.jpg", quality=85)
    lines = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    lines[10]["image"] = "images/10.jpg"
    (source / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source


GIVEN = {f"line{i}": {"split": "train" if i < 8 else "test"} for i in range(12)}


@pytest.mark.parametrize("exact", [True, False])
def test_duplicates_across_splits_are_refused_with_the_pairs(tmp_path, exact):
    source = write_source(tmp_path / "in", pictures={10: 0}, **GIVEN) if exact else shown_twice(tmp_path / "in", **GIVEN)
    with pytest.raises(LeakError) as error:
        built(source, tmp_path / "out")
    first, pair = str(error.value).splitlines()
    assert "1 pairs" in first and "--duplicates group" in first and pair == "  n0 (train) and n10 (test)"
    with pytest.raises(LeakError):  # both splits are the source's own
        built(source, tmp_path / "out", duplicates="group")
    info = built(source, tmp_path / "out", duplicates="drop")
    assert info["warnings"]["near-duplicate of an image of another split, left out"] == 1
    found = {record.source: split for split, record in records_of(tmp_path / "out")}
    assert found == {f"n{i}": "train" if i < 8 else "test" for i in range(1, 12)}


def test_duplicates_may_share_a_split(tmp_path):
    source = shown_twice(tmp_path / "in")
    refused = [seed for seed in range(6) if leaks(source, tmp_path / "x", seed)]
    assert refused
    info = built(source, tmp_path / "out", duplicates="group", seed=refused[0])
    split_of = {record.source: split for split, record in records_of(tmp_path / "out")}
    assert len({split_of[name] for name in ("n0", "n1", "n10", "n11")}) == 1
    assert info["warnings"]["near-duplicate of another image"] == 1
    noted = [json.loads(line) for line in (tmp_path / "out/warnings.jsonl").read_text().splitlines()]
    assert noted == [{"id": "n0", "warning": "near-duplicate of another image", "other": "n10"}]


def leaks(source, out, seed):
    try:
        built(source, out, seed=seed)
    except LeakError:
        return True
    shutil.rmtree(out)
    return False


def test_the_same_picture_again_in_a_case_is_another_record(tmp_path):
    source = write_source(tmp_path / "in", pictures={1: 0})
    info = built(source, tmp_path / "out")
    assert info["warnings"] == {"same pixels as an earlier image": 1}
    ids = {record.source: record.id for _, record in records_of(tmp_path / "out")}
    assert ids["n1"] == f"{ids['n0']}-2" and find_faults(tmp_path / "out", progress=False) == []


def test_splits_of_the_source_are_kept_and_must_agree(tmp_path):
    given = {f"line{i}": {"split": "test"} for i in (4, 5)}
    built(write_source(tmp_path / "in", **given), tmp_path / "out")
    split_of = {record.source: split for split, record in records_of(tmp_path / "out")}
    assert split_of["n4"] == split_of["n5"] == "test"
    torn = write_source(tmp_path / "torn", line4={"split": "test"}, line5={"split": "train"})
    with pytest.raises(DataError, match="group mine/case2: its source puts it into test and train"):
        built(torn, tmp_path / "x")


def test_perspectives(tmp_path):
    source = write_source(tmp_path / "in")
    built(source, tmp_path / "out", perspectives=("I", "II"))
    assert {sample.perspective for _, record in records_of(tmp_path / "out") for sample in record.samples} == {"I", "II"}


@pytest.mark.parametrize("options, message", [
    ({"perspectives": ("V",)}, "perspectives V: use some of vqa"),
    ({"duplicates": "keep"}, "duplicates keep: use one of"),
    ({"shares": {"train": 0.0, "val": 0.0, "test": 0.0}}, "ratios 0,0,0"),
    ({"max_rejects": 2.0}, "max-rejects 2"),
])  # fmt: skip
def test_wrong_options_are_refused_before_the_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        built(write_source(tmp_path / "in", 2), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_builds_of_one_out(tmp_path):
    source = write_source(tmp_path / "in", 4)
    again = "import subprocess, json\nfrom mimo_jax.data.builder import pipeline\ninner = pipeline.make_plan\n"
    again += "def both(*args):\n    print(main(sys.argv[1:]))\n    return inner(*args)\npipeline.make_plan = both\n"
    words = ["data", "build", "--source", "manifest", "--in", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = run(source, tmp_path / "out", before=f"sys.argv = ['mimo', *{words!r}]\n{again}")
    assert done.returncode == 0 and done.stdout.startswith("2\n")
    assert "is being written by another process" in done.stderr
    assert find_faults(tmp_path / "out", progress=False) == []
    done = run(source, tmp_path / "out")
    assert done.returncode == 2 and "exists and is not an empty folder" in done.stderr


@pytest.mark.parametrize("limit", [3000, 60_000])
def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path, limit):
    source = write_source(tmp_path / "in")
    full = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    done = run(source, tmp_path / "out", before=full)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("mimo: error: ")
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out").returncode == 0
    assert find_faults(tmp_path / "out", progress=False) == []


BILE = {"perspective": "III", "about": "", "question": "Which organ makes bile?", "answer": "The liver makes bile.", "grounded": ["liver"]}
BAD = BILE | {"answer": "The liver makes bile and shows a metastasis."}


def test_a_language_model_writes_what_stands_up_and_is_paid_once(tmp_path, monkeypatch):
    source = write_source(tmp_path / "in")
    with chat_server(json.dumps({"questions": [BILE, BAD]})) as chat:
        monkeypatch.setenv("MIMO_LLM_URL", chat.url)
        monkeypatch.setenv("MIMO_LLM_MODEL", "parrot")
        question_generation._client.cache_clear()
        info = built(source, tmp_path / "out", qa="llm", llm_cache=str(tmp_path / "cache"))
    assert info["model"] == "parrot" and info["rejected_questions"] == {"names a structure or finding that the image does not have": 12}
    assert 0 < len(chat.asked) <= 12  # of the same facts, once
    for _, record in records_of(tmp_path / "out"):
        written = [sample for sample in record.samples if sample.perspective in ("III", "IV")]
        others = [sample for sample in written if not sample.gen]
        assert all(sample.kind in ("absent", "unmarked") for sample in others)  # what is not there is asked from templates
        written = [sample for sample in written if sample.gen]
        assert [sample.turns[1].text for sample in written] == [BILE["answer"]] and written[0].gen["model"] == "parrot"
        assert {sample.perspective for sample in record.samples} >= {"I", "II"}
    assert find_faults(tmp_path / "out", progress=False) == []
    question_generation._client.cache_clear()  # no endpoint any more
    built(source, tmp_path / "again", qa="llm", llm_cache=str(tmp_path / "cache"))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    monkeypatch.delenv("MIMO_LLM_URL")
    with pytest.raises(UserError, match="MIMO_LLM_URL: is not set"):
        built(source, tmp_path / "x", qa="llm")
