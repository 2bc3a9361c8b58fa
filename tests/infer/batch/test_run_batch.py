"""Many requests through one small model with random weights: what is written, what fails, and what survives a kill."""

import csv
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import jax.numpy as jnp
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint
from mimo_jax.cli import main
from mimo_jax.data.images.volume import open_volume
from mimo_jax.data.prompts import prompts_from_mask
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import NO_MASKS
from mimo_jax.infer.batch.job import write_summary
from mimo_jax.infer.batch.run_batch import BatchResult, run_batch
from mimo_jax.infer.predictor import Mimo
from mimo_jax.infer.volume import ask_volume
from tests.data.handmade import tokenizer as make_tokenizer
from tests.data.medical_files import dicom, nifti, saved, series
from tests.tiny_config import random_params, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(max_turns=2)
    config.generate.batch_size = 2  # a window of 8 requests
    frozen, train = pathtree.partition(random_params(config), lambda path: path.startswith("vision/"))
    checkpoint.open_run(folder, config)
    make_tokenizer(folder)
    checkpoint.start_run(folder, config, frozen)
    steps = checkpoint.Checkpoints(folder)
    steps.save(3, {"params": train, "opt": {}, "step": jnp.int32(3)}, {})
    steps.wait()
    return folder


@pytest.fixture(scope="module")
def mimo(run):
    return Mimo.load(run)


def film(path, seed=0, height=40, width=56):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return path


def films(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        film(folder / f"{i:03d}.png", i)
    return folder


def requests(folder, *rows):
    path = folder / "requests.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(out):
    with open(out / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def never():
    raise AssertionError("a model was loaded")


def test_answers_are_those_of_a_chat_in_the_order_of_the_requests(mimo, tmp_path):
    pictures = [film(tmp_path / f"{i}.png", i, 30 + i, 50) for i in range(3)]
    mask = np.zeros((30, 50), bool)
    mask[5:20, 8:30] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    box = [[2, 3, 20, 14]]
    rows = [
        {"id": "a", "image": "0.png", "question": "What is this?", "boxes": box},
        {"image": "1.png", "question": "Segment the liver. " * 9},
        {"id": "talk", "image": "0.png", "question": ["Which organ makes bile?", "What does it do?"], "points": [[5, 6, 1]]},
        {"image": "2.png", "question": "Is there a liver?", "max_new_tokens": 3},
        {"id": "painted", "image": "0.png", "mask": "mask.png"},
    ]
    mimo.engine.counts.clear()
    done = run_batch(lambda: mimo, requests(tmp_path, *rows), tmp_path / "out", "Segment the liver.", save=(".png", ".npy"))
    assert done == BatchResult(5, 5, 0, False, 0) and (tmp_path / "out" / "failed.jsonl").read_text() == ""
    assert mimo.engine.counts["images"] == 3
    lines = read(tmp_path / "out" / "answers.jsonl")
    assert [line["id"] for line in lines] == ["a", "00002-1", "talk", "00004-2", "painted"]
    assert [line["image"] for line in lines] == [row["image"] for row in rows]

    chat = mimo.open(pictures[0])
    turns = [chat.ask("Which organ makes bile?", points=[[5, 6, 1]]), chat.ask("What does it do?")]
    alone = [mimo.open(pictures[0]).ask("What is this?", boxes=box), mimo.open(pictures[2]).ask("Is there a liver?", max_new_tokens=3)]
    assert [t["text"] for t in lines[2]["turns"]] == [t.text for t in turns] and lines[2]["turns"][1]["question"] == "What does it do?"
    assert [lines[0]["text"], lines[3]["text"]] == [a.text for a in alone] and lines[3]["truncated"]
    plain, pointed = (mimo.open(pictures[0]).ask("Segment the liver.", scribbles=s) for s in ((), prompts_from_mask(mask).scribbles))
    assert plain.text != pointed.text == lines[4]["text"]
    files = [name for line in lines for turn in line.get("turns", [line]) for name in turn["files"]]
    assert {"a.png", "a.npy", "talk.png", "talk@2.png", "talk@2.npy"} < set(files) <= set(os.listdir(tmp_path / "out"))
    for line in lines:
        for turn in line.get("turns", [line]):
            masks = np.load(tmp_path / "out" / turn["files"][1])
            assert [int(m.sum()) for m in masks] == [e["area_px"] for e in turn["entities"]]


def test_the_table_has_a_row_for_each_structure_and_says_where_there_is_none(tmp_path):
    entity = {
        "phrase": "-liver",
        "entity": "liver",
        "box_xyxy": [1, 2, 3, 4],
        "area_px": 5,
        "area_mm2": 2.5,
        "score": 0.25,
        "uncertain": True,
    }
    empty = {"phrase": "", "entity": "", "box_xyxy": None, "area_px": 0, "score": 0.9, "uncertain": False}
    nothing = {"question": "Q1", "entities": [], "unanswered": ["spleen"]}
    lines = [
        {"id": "a", "image": "=1+1.png", "question": 'Which, "there"?', "entities": [entity, empty]},
        {
            "id": "b",
            "image": "b.png",
            "turns": [nothing, {"question": "Q2\nmore", "entities": [entity]}],
        },
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(tmp_path)
    assert [list(row.values()) for row in table(tmp_path)] == [
        ["a", "'=1+1.png", 'Which, "there"?', "'-liver", "liver", "5", "2.5", "1,2,3,4", "", "", "", "0.25", "yes"],
        ["a", "'=1+1.png", 'Which, "there"?', "unnamed", "", "0", "", "", "", "", "", "0.9", "no"],
        ["b", "b.png", "Q1", "spleen (not answered)", *[""] * 9],
        ["b", "b.png", "Q1", NO_MASKS, *[""] * 9],
        ["b", "b.png", "Q2\nmore", "'-liver", "liver", "5", "2.5", "1,2,3,4", "", "", "", "0.25", "yes"],
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "summary.csv"]


def bomb(path):
    """A PNG of a few bytes that says to be 100000 x 100000."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT")


def test_what_cannot_be_asked_is_listed_with_the_reason_and_the_rest_is_done(mimo, tmp_path, monkeypatch, capsys):
    film(tmp_path / "good.png")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    bomb(tmp_path / "bomb.png")
    nifti(tmp_path / "volume.nii.gz", np.zeros((6, 5, 4), np.int16), np.eye(4))
    Image.new("1", (9, 9), 1).save(tmp_path / "mask.png")
    ask = {"image": "good.png", "question": "What is this?"}
    expected = [
        (ask | {"id": "first"}, None),
        ("{", "requests.jsonl, line 2: is not JSON"),
        (ask | {"questoin": "?"}, "'questoin' is unknown; did you mean question?"),
        (ask | {"id": "FIRST"}, "id FIRST is also that of request 1"),
        (ask | {"image": "zero.png"}, "zero.png: not an image of a supported format"),
        (ask | {"image": "text.png"}, "text.png: not an image of a supported format"),
        (ask | {"image": "bomb.png"}, "Image size (10000000000 pixels) exceeds limit"),
        (ask | {"image": "volume.nii.gz"}, "is a volume; choose a slice, such as slice k:2: i (near sagittal) has 6"),
        (ask | {"image": "volume.nii.gz", "slice": "k:9"}, "slice k:9 does not exist"),
        (ask | {"points": [[99, 2]]}, "prompts: point 0: (99, 2) is outside the image of 56x40"),
        (ask | {"mask": "mask.png"}, "mask mask.png: a mask has 9x9 pixels, the image 56x40"),
        (ask | {"boxes": [[1, 2, 3, 4]] * 9}, "this model accepts 12 per turn"),
        (ask | {"question": "liver " * 500}, "leaves no room to answer, shorten it"),
        (ask | {"question": ["Why?", "liver " * 500]}, "turn 2: question: takes"),
        (ask | {"id": "last"}, None),
    ]
    path = requests(tmp_path, *[row for row, _ in expected])
    monkeypatch.setattr(Mimo, "load", lambda *_: mimo)
    assert main.main(["batch", "--checkpoint", "c", "--in", str(path), "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr()
    assert (
        f"13 requests failed at least in part; see the reasons in {tmp_path / 'out' / 'failed.jsonl'}" in said.err
        and "2 answers in" in said.out
    )
    assert [line["id"] for line in read(tmp_path / "out" / "answers.jsonl")] == ["first", "last"]
    failed = read(tmp_path / "out" / "failed.jsonl")
    assert [f["line"] for f in failed] == [n for n, (_, says) in enumerate(expected, 1) if says]
    for failure, says in zip(failed, filter(None, (says for _, says in expected)), strict=True):
        assert says in failure["reason"] and "\n" not in failure["reason"]
    assert failed[-1]["file"] == "good.png" and len(table(tmp_path / "out")) >= 2


def test_a_folder_with_medical_files_is_saved_on_their_grids(mimo, tmp_path):
    folder = films(tmp_path / "in", 1)
    (folder / "notes.txt").write_text("no picture")
    values = np.random.default_rng(0).integers(0, 999, (20, 30)).astype(np.uint16)
    written_on = dicom(values)
    written_on.BurnedInAnnotation = "YES"
    saved(written_on, folder / "a.dcm")
    saved(dicom(values), folder / "b.dcm")
    nifti(folder / "c.nii", values[:, :, None].astype(np.int16), np.diag([2.0, 3, 4, 1]))
    done = run_batch(lambda: mimo, folder, tmp_path / "out", "Segment the liver.", save=(".nii.gz",))
    assert done == BatchResult(5, 4, 2, False, 1)
    failed = read(tmp_path / "out" / "failed.jsonl")
    assert [f["file"] for f in failed] == ["000.png", "notes.txt"] and "has no geometry" in failed[0]["reason"]
    assert "not an image of a supported format" in failed[1]["reason"]
    lines = read(tmp_path / "out" / "answers.jsonl")
    assert [line["files"] for line in lines] == [[], *([f"0000{n}-{name}.nii.gz"] for n, name in ((2, "a"), (3, "b"), (4, "c")))]
    warned = {line["image"]: line["warnings"] for line in read(tmp_path / "out" / "warnings.jsonl")}
    assert warned == {line["image"]: line["warnings"] for line in lines if line["warnings"]}
    assert "the image may contain burned-in text, such as a patient's name" in warned["a.dcm"]

    done = run_batch(lambda: mimo, folder, tmp_path / "seg", "Segment the liver.", save=(".dcm",), max_new_tokens=12)
    refused = [failure["file"] for failure in read(tmp_path / "seg" / "failed.jsonl")]
    assert (done.answered, done.failed) == (4, len(refused)) and "notes.txt" in refused
    for line in read(tmp_path / "seg" / "answers.jsonl"):
        painted = [e for e in line["entities"] if e["area_px"]]
        assert len(line["files"]) == bool(painted and line["image"].endswith(".dcm"))
        assert (line["image"] in refused) == bool(painted and not line["image"].endswith(".dcm"))
        for name in line["files"]:
            assert len(pydicom.dcmread(tmp_path / "seg" / name).SegmentSequence) == len(painted)


def test_whole_scans_are_asked_slice_by_slice(mimo, tmp_path):
    folder = tmp_path / "in"
    values = np.random.default_rng(0).integers(0, 999, (3, 20, 30)).astype(np.uint16)
    (folder / "a").mkdir(parents=True)
    nifti(folder / "a" / "head.nii", values.T.astype(np.int16), np.diag([2.0, 3, 4, 1]))
    series(folder / "b", values)
    film(folder / "b" / "film.png")
    done = run_batch(lambda: mimo, folder, tmp_path / "out", "Segment the liver.", save=(".nii.gz", ".png"), volumes=True)
    assert done == BatchResult(3, 3, 1, False, 0)
    (failed,) = read(tmp_path / "out" / "failed.jsonl")
    assert failed["file"] == "b/film.png" and "has no geometry" in failed["reason"]
    head, scan, _ = read(tmp_path / "out" / "answers.jsonl")
    assert (head["image"], scan["image"], scan["files"]) == ("a/head.nii", "b", ["00002-b.nii.gz", "00002-b.png"])
    alone = ask_volume(mimo, open_volume(folder / "b"), "Segment the liver.").to_json()
    assert scan == {"id": "00002-b", "image": "b", "question": "Segment the liver.", **alone, "files": scan["files"]}
    labels = np.asanyarray(nibabel.load(tmp_path / "out" / head["files"][0]).dataobj)
    assert labels.shape == (30, 20, 3) and len(np.unique(labels)) == 1 + sum(bool(s["voxels"]) for s in head["structures"])
    rows = table(tmp_path / "out")
    assert [(r["image"], r["voxels"], r["volume_mm3"]) for r in rows if r["voxels"]] == [
        (line["image"], str(s["voxels"]), str(s["volume_mm3"])) for line in (head, scan) for s in line["structures"]
    ]

    ask = {"image": "in/b", "question": "What is this?"}
    head = {"image": "in/a/head.nii", "question": "What is this?"}
    path = requests(
        tmp_path,
        *(head | {"slice": "coronal:all"}, ask | {"points": [[1, 2]]}, ask | {"question": ["What is this?", "Why?"]}),
        *(ask | {"slice": "2", "points": [[1, 2]]}, head | {"slice": "k:1"}, ask | {"series": 2}),
    )
    assert run_batch(lambda: mimo, path, tmp_path / "some") == BatchResult(6, 3, 3, False, 0)
    answers = read(tmp_path / "some" / "answers.jsonl")
    assert [len(line.get("texts", "1")) for line in answers] == [20, 1, 1]
    reasons = [failure["reason"] for failure in read(tmp_path / "some" / "failed.jsonl")]
    assert (
        all("a volume takes one question without prompts" in reason for reason in reasons[:2]) and "series 2 does not exist" in reasons[2]
    )


def test_what_cannot_be_done_is_said_before_a_model_is_loaded(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    one = films(tmp_path / "in", 1)
    out = tmp_path / "out"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    (tmp_path / "closed").write_text("a file")
    bad = requests(tmp_path, "{", "[]")
    for arguments, options, says in (
        ((empty, out, "?"), {}, "contains no request"),
        ((tmp_path / "gone", out, "?"), {}, "no such file or folder"),
        ((one, out), {}, "with --question"),
        ((one, out, " "), {}, "question: is empty"),
        ((bad, out), {"volumes": True}, "omit --volumes"),
        ((bad, out), {}, "no request is valid; the first: requests.jsonl, line 1: is not JSON"),
        ((one, out, "?"), {"save": (".gif",)}, ".gif: cannot be saved for each answer"),
        ((one, out, "?"), {"window": "liver"}, "window liver: is unknown"),
        ((one, tmp_path / "used", "?"), {}, "contains other files and no job"),
        ((one, tmp_path / "used", "?"), {"resume": True}, "contains other files and no job"),
        ((one, tmp_path / "closed" / "out", "?"), {}, "cannot be written"),
    ):
        with pytest.raises(UserError, match=says):
            run_batch(never, *arguments, **options)
    with pytest.raises(UserError, match="is not a checkpoint"):
        run_batch(lambda: Mimo.load(tmp_path), one, out, "?")
    assert not out.exists() and (tmp_path / "used" / "thesis.txt").read_text() == "mine"


def test_a_job_goes_on_only_with_resume_and_only_if_it_is_the_same(mimo, tmp_path, monkeypatch):
    folder, out = films(tmp_path / "in", 3), tmp_path / "out"
    first = run_batch(lambda: mimo, folder, out, "What is this?", resume=True)  # of nothing: begins
    before = (out / "answers.jsonl").read_bytes()
    with pytest.raises(UserError, match="contains this job, 3 of 3 requests done; add --resume"):
        run_batch(never, folder, out, "What is this?")
    with pytest.raises(UserError, match=r"contains another job \(question, save differ\)"):
        run_batch(never, folder, out, "Is there a liver?", resume=True, save=(".png",))
    (out / "summary.csv").unlink()
    assert run_batch(never, folder, out, "What is this?", resume=True) == first and len(table(out)) >= 3
    film(folder / "more.png")
    with pytest.raises(UserError, match=r"contains another job \(count, requests differ\)"):
        run_batch(never, folder, out, "What is this?", resume=True)
    assert (out / "answers.jsonl").read_bytes() == before
    (out / "answers.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="no job that can be resumed"):
        run_batch(never, folder, out, "What is this?", resume=True)


def test_large_files_make_small_windows(mimo, tmp_path, monkeypatch):
    folder, asked, real = films(tmp_path / "in", 7), [], mimo.generate
    size = max(file.stat().st_size for file in folder.iterdir())
    monkeypatch.setattr("mimo_jax.infer.batch.run_batch._MAX_WINDOW_BYTES", size * 2)
    monkeypatch.setattr(mimo, "generate", lambda requests: asked.append(len(requests)) or real(requests))
    assert run_batch(lambda: mimo, folder, tmp_path / "out", "What is this?").answered == 7
    assert asked == [3, 3, 1]


def test_a_signal_lets_the_window_be_finished_and_the_rest_goes_on_later(mimo, tmp_path, monkeypatch, capsys):
    folder, out = films(tmp_path / "in", 20), tmp_path / "out"
    line = ["batch", "--checkpoint", "c", "--in", str(folder), "--out", str(out), "--question", "What is this?"]
    monkeypatch.setattr(Mimo, "load", lambda *_: mimo)
    for number, done in ((signal.SIGTERM, 8), (signal.SIGINT, 16)):
        with monkeypatch.context() as patch:
            real = mimo.generate
            patch.setattr(mimo, "generate", lambda asked, real=real, number=number: os.kill(os.getpid(), number) or real(asked))
            assert main.main([*line, "--resume"]) == 75
        assert f"stopped after {done} requests; run the same command with --resume to continue" in capsys.readouterr().err
        assert len(read(out / "answers.jsonl")) == done and not (out / "summary.csv").exists()
    monkeypatch.setattr(mimo, "origin", "another model")
    with pytest.raises(UserError, match="this is another model; give that --checkpoint"):
        run_batch(lambda: mimo, folder, out, "What is this?", resume=True)
    monkeypatch.undo()
    assert run_batch(lambda: mimo, folder, out, "What is this?", resume=True).answered == 20
    run_batch(lambda: mimo, folder, tmp_path / "whole", "What is this?")
    for name in ("answers.jsonl", "failed.jsonl", "summary.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_is_said_and_the_job_goes_on_afterwards(mimo, tmp_path):
    folder, out = films(tmp_path / "in", 12), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2200, limits[1]))  # bytes of any file
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; fix that and run the same command with --resume"):
            run_batch(lambda: mimo, folder, out, "What is this?")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run_batch(lambda: mimo, folder, out, "What is this?", resume=True).answered == 12
    assert [line["id"] for line in read(out / "answers.jsonl")] == [f"{n + 1:05d}-{n:03d}" for n in range(12)]


def test_a_killed_process_is_gone_on_with_to_the_same_bytes(run, mimo, tmp_path):
    """And no second process writes to its folder meanwhile."""
    films(tmp_path / "in", 6)
    rows = [{"image": f"in/{i % 7:03d}.png", "question": ["What is this?", "Why?"][: 1 + i % 2]} for i in range(64)]
    path, out = requests(tmp_path, *rows), tmp_path / "out"
    line = ["batch", "--checkpoint", str(run), "--in", str(path), "--save", ".npy", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "mimo_jax.cli", *line], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list((out / "windows").glob("[0-9]*")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match="is being written by another process"):
            run_batch(lambda: mimo, path, out, save=(".npy",), resume=True)
    finally:
        process.kill()
        process.communicate()
    windows = sorted((out / "windows").glob("[0-9]*"))
    assert 0 < len(windows) < 8 and windows[0].name.startswith("000000001-000000008_")
    (out / "windows" / ".0123456789abcdef.part").write_bytes(b'{"id": "00')  # as a kill amid writing leaves it
    done = run_batch(lambda: mimo, path, out, save=(".npy",), resume=True)
    assert done == run_batch(lambda: mimo, path, tmp_path / "whole", save=(".npy",))
    assert (done.answered, done.failed) == (55, 9)  # one of the seven images is missing
    for file in (tmp_path / "whole").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("lost", ["last", "last torn", "middle", "all", "end"])
def test_a_lost_machine_loses_only_what_was_not_closed(mimo, tmp_path, monkeypatch, lost):
    """On a bucket, what the machine had not closed is not there; the longest whole prefix of the job is gone on with."""
    folder, out, asked = films(tmp_path / "in", 30), tmp_path / "out", []
    real, calls = mimo.generate, 4 if lost == "end" else 3

    def generate(requests):
        if len(asked) == calls:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return real(requests)

    monkeypatch.setattr(mimo, "generate", generate)
    if lost == "end":
        monkeypatch.setattr("mimo_jax.infer.batch.job.write_summary", lambda out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_batch(lambda: mimo, folder, out, "What is this?")
    monkeypatch.undo()
    windows = sorted((out / "windows").iterdir())
    assert asked == [8, 8, 8, 6][:calls] and len(windows) == calls
    for window in {"last": windows[2:], "middle": windows[1:2], "all": windows}.get(lost, []):
        window.unlink()
    if lost == "last torn":
        windows[2].write_bytes(windows[2].read_bytes()[:100])
    if lost == "end":  # answers.jsonl was written, but not closed
        (out / "answers.jsonl").unlink()
    again = []
    monkeypatch.setattr(mimo, "generate", lambda requests: again.append(len(requests)) or real(requests))
    done = run_batch(lambda: mimo, folder, out, "What is this?", resume=True)
    assert sum(again) == {"last": 14, "last torn": 14, "middle": 22, "all": 30, "end": 0}[lost]
    assert done == run_batch(lambda: mimo, folder, tmp_path / "whole", "What is this?") and done.answered == 30
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
