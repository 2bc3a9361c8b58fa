"""`mimo sweep` as a command: the exact output of a dry run, and a real sweep that is stopped, resumes, and tolerates a failing run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_jax.cli import main
from mimo_jax.data.builder.phantom_set import build_phantoms
from tests.sweep.small import ABLATIONS
from tests.sweep.test_paper_tables import PEERS
from tests.sweep.test_paper_tables import report as paper_report

GOLDEN = Path(__file__).parent / "golden"
WORDS = ("--config", "configs/ablations.py", "--data", "data/phantom", "--workdir", "runs/ablations", "--config.train.steps=500")
DRY = ("--only", "aligner", "--seeds", "0,3", "--limit", "200", "--dry-run")
BACKENDS = {
    "local": WORDS,
    "slurm": (*WORDS, "--backend", "slurm", "--launch=--accelerator h100:8"),
    "gke": (
        *(
            "--config",
            "configs/ablations.py",
            "--data",
            "phantom=/gcs/bucket/data",
            "--workdir",
            "/gcs/bucket/ablations",
            "--backend",
            "gke",
        ),
        "--launch=--accelerator v5e:4x4 --image gcr.io/p/mimo:1",
    ),
}


def mimo(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mimo_jax.cli", "sweep", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_prints_runs_and_commands(backend, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["sweep", *BACKENDS[backend], *DRY]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path), "HERE").replace(str(Path(main.__file__).parents[2]), "CHECKOUT")
    assert printed == (GOLDEN / f"{backend}.txt").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--only", "alinger"], "--only alinger: is not a group of configs/ablations.py; its groups are aligner, data"),
        (["--seeds", "0,x"], "argument --seeds: 'x' is not a whole number of 0 or more"),
        (["--data", "other=data/b"], "--test: is missing; with several --data, name the dataset whose test split is evaluated"),
        (["--config.train.stesp=3"], "config.train.stesp: is unknown; did you mean config.train.steps?"),
        (["--launch=--nodes 2"], "--launch --nodes 2: applies only to a cluster; add --backend slurm or gke"),
        (["--backend", "gke"], "--workdir runs/ablations: mount the bucket where jobs find it (gcsfuse BUCKET /gcs/BUCKET)"),
        (["--base-config", "configs/tinny.py"], "--config configs/tinny.py: no such file"),
    ],
)
def test_what_cannot_be_swept_is_told_before_any_work(words, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["sweep", *WORDS, *words]) == 2
    said = capsys.readouterr().err
    assert answer in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_finished_sweep_gives_the_tables_of_the_paper(tmp_path, monkeypatch, capsys):
    """All runs have their reports, so the command only writes the summaries."""
    monkeypatch.chdir(tmp_path)
    words = ["sweep", *WORDS, "--only", "aligner,data", "--seeds", "0,1"]
    assert main.main([*words, "--dry-run"]) == 0
    runs = {line.split("# ")[1].split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("# ")}
    about = {"data": str(tmp_path / "data/phantom"), "split": "test", "limit": None}
    for run in runs:
        folder = tmp_path / "runs/ablations" / run
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps(paper_report(0.5 if "none" in run else 0.6) | about | {"vqa_closed_accuracy": 0.5}))
    (tmp_path / "peers.csv").write_text(PEERS)
    assert main.main([*words, "--peers", "peers.csv"]) == 0
    text = (tmp_path / "runs/ablations/paper.md").read_text()
    assert text in capsys.readouterr().out and "| SAM (box) | - | 0.571 [1] | - | 0.583 [1] |" in text
    assert "| MIMO without aligner | 0.500 ± 0.000 |" in text and "| MIMO | 0.600 ± 0.000 |" in text and "| 25 % | 0.600 ± 0.000 |" in text
    (tmp_path / "peers.csv").write_text("table,model,column,value,address\nmiou,SAM,II,0.5,\n")
    assert main.main([*words, "--peers", "peers.csv"]) == 2 and "give the address of the page" in capsys.readouterr().err


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_and_outlives_a_run_that_fails(tmp_path):
    data, runs = tmp_path / "phantom", tmp_path / "runs"
    build_phantoms(data, 24, seed=5, progress=False)
    words = ["--config", ABLATIONS, "--data", str(data), "--workdir", str(runs), "--limit", "4", "--config.train.checkpoint_every=1"]
    words += ["--config.train.steps=12"]

    begun = mimo(*words)
    wait_for(lambda: any(runs.glob("base-s0-*/steps/*/manifest.json")))
    begun.send_signal(signal.SIGTERM)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode == 75, err
    assert err == "stopped; run the same command to resume\n" and "base-s0" in out and "stopped" in out
    (base,) = runs.iterdir()  # nothing else was begun
    first = max(int(step.name) for step in (base / "steps").iterdir())
    assert first < 12

    again = mimo(*words)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 3, err
    steps = [json.loads(line)["step"] for line in (base / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))  # none twice
    (rare,) = runs.glob("mine-rare-s0-*")
    assert err.splitlines() == [f"mimo: {rare.name}: failed: mimo train ended with exit code 2; see {rare / 'train.log'}"]
    assert "(config.data.fraction 1e-06)" in (rare / "train.log").read_text()
    found = json.loads((runs / "summary.json").read_text())["groups"]["mine"]
    assert {variant: row["missing"] for variant, row in found.items()} == {"plain": [], "rare": [rare.name]}
    assert (runs / "summary.png").is_file() and "| plain | 1 |" in (runs / "summary.md").read_text()

    refused = mimo(*words[:-1], "--config.train.steps=13")
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert err.startswith(f"mimo: error: {base}: has another config: config.train.steps (12 there, 13 here); give the same flags")
    assert len(err.splitlines()) == 1


def test_a_run_that_something_else_works_on_is_left_alone(tmp_path):
    """The lock is the child's too: a training that outlives its killed sweep is not joined by a second one."""
    from mimo_jax.sweep.run import LocalWorker, run_all

    class Run:
        name, folder = "a", tmp_path / "a"

        @staticmethod
        def remaining():
            return [["--version"]]

    first = LocalWorker(Run)
    assert first.poll(stopping=False)
    failed, stopped = run_all([Run], LocalWorker, 1)
    assert failed == {"a": "another process is working on it; wait for that process, or end it"} and not stopped
    wait_for(lambda: not first.poll(stopping=False))
    assert first.reason == "" and "mimo_jax" in (tmp_path / "a" / "--version.log").read_text()
