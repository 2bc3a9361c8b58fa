"""A run, resumed and profiled: the trace is there and readable, and the run is as it was."""

import gzip
import json
import shutil

import pytest

from mimo_jax.cli import main
from mimo_jax.config import SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.train import goodput, loop, profile
from tests.tiny_config import quick_config


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    build_phantoms(folder, 24, seed=5, progress=False)
    return folder


def config_for(phantoms):
    config = quick_config()
    config.data.sources = {"phantom": SourceConfig(path=str(phantoms))}
    config.train.steps, config.train.checkpoint_every, config.train.keep_last = 3, 1, 3
    return config


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "a"
    assert loop.train(config_for(phantoms), run) == 0
    return run


def test_a_trace_is_written_and_the_run_stays_as_it_was(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main.main(["profile", "--workdir", str(run), "--steps", "2", "--after", "1"]) == 0
    shown = capsys.readouterr().out
    assert "traced 2 steps after step 4" in shown and "https://ui.perfetto.dev" in shown and "ms/step" in shown
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.parts[len(run.parts)] != "profile"} == before
    (trace,) = run.glob("profile/*/plugins/profile/*/*.trace.json.gz")
    operations = profile.read_operations(trace)
    assert any("dot" in name or "fusion" in name for name in operations)
    with gzip.open(trace, "rt") as file:
        steps = [event for event in json.load(file)["traceEvents"] if event.get("name") == "train"]
    assert len(steps) == 2


def test_what_a_crash_made_to_be_done_again_is_told_once_and_counts_as_lost(run, phantoms, tmp_path):
    """The last step was never saved."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "steps" / "3")
    assert loop.train(config_for(phantoms), again) == 0
    rows = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    events = [event["event"] for event in goodput.read_events(again / goodput.FILE)]
    assert events.count("start") == 2 and events.count("restore") == 1 and events.count("stop") == 2
    account = goodput.Account()
    for event in goodput.read_events(again / goodput.FILE):
        account.add(event)
    assert account.losses()["repeated steps"] > 0


def test_a_run_without_a_whole_step_is_refused(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run / "config.json", empty)
    assert main.main(["profile", "--workdir", str(empty)]) == 2
    assert "has no complete step" in capsys.readouterr().err
    assert [path.name for path in empty.iterdir()] == ["config.json"]


def test_operations_of_a_tpu_are_those_of_its_line(tmp_path):
    """Its events do not say that they are operations; a loop's time is that of what it holds."""
    events = [
        {"ph": "M", "pid": 3, "tid": 1, "name": "thread_name", "args": {"name": "XLA Ops"}},
        {"ph": "M", "pid": 3, "tid": 2, "name": "thread_name", "args": {"name": "Steps"}},
        {"ph": "X", "pid": 3, "tid": 1, "name": "while.2", "ts": 0, "dur": 9000},
        {"ph": "X", "pid": 3, "tid": 1, "name": "fusion.7", "ts": 0, "dur": 3000},
        {"ph": "X", "pid": 3, "tid": 1, "name": "fusion.7", "ts": 3000, "dur": 3000},
        {"ph": "X", "pid": 3, "tid": 1, "name": "all-reduce.1", "ts": 6000, "dur": 2000},
        {"ph": "X", "pid": 3, "tid": 2, "name": "1", "ts": 0, "dur": 9000},
        {},
    ]
    trace = tmp_path / "a.trace.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": events}, file)
    operations = profile.read_operations(trace)
    assert operations == {"fusion.7": (6.0, 2), "all-reduce.1": (2.0, 1)}
    assert profile.table(operations, 2)[1].split() == ["3.00", "75.0%", "1", "fusion.7"]
