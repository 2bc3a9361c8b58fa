"""Runs as jobs, under a SLURM made of scripts: what is submitted, waited for, and found again by the next sweep."""

import json
import sys

import pytest

from mimo_jax.cli import main
from mimo_jax.sweep import jobs
from mimo_jax.sweep.jobs import ClusterWorker, SweepCluster, job_name
from mimo_jax.sweep.run import LocalWorker
from tests.sweep.small import ABLATIONS
from tests.sweep.test_plan import plan

SBATCH = """#!/usr/bin/env bash
[[ $1 == --test-only ]] && exit "${REFUSED:-0}"
echo "$*" >>"$FAKE/sbatch.calls"
echo "47$(wc -l <"$FAKE/sbatch.calls");cluster"
"""
# Every job runs for two looks, and then has done its work: the report is what shows it.
SQUEUE = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/squeue.calls"
looks=$(grep -c -- "-j $3 " "$FAKE/squeue.calls")
((looks > 2)) || { echo RUNNING && exit; }
[[ -n ${IDLE:-} ]] || for run in "$RUNS"/*; do echo "$REPORT" >"$run/test.json"; done
echo "slurm_load_jobs error: Invalid job id specified" >&2 && exit 1
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in {"sbatch": SBATCH, "squeue": SQUEUE, "stat": "#!/bin/sh\necho nfs\n", "mimo": "#!/bin/sh\n"}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("FAKE", str(tools))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.0)
    (tmp_path / "data").mkdir()
    return tools


def calls(cluster, tool):
    file = cluster / f"{tool}.calls"
    return file.read_text().splitlines() if file.exists() else []


def test_every_run_is_submitted_once_and_waited_for(cluster, tmp_path, monkeypatch, capsys):
    data, runs = str(tmp_path / "data"), str(tmp_path / "runs")
    values = dict.fromkeys(("I", "II", "III", "IV"), 0.5)
    report = {"data": data, "split": "test", "limit": None, "miou": values, "vqa_closed_accuracy": 0.5}
    monkeypatch.setenv("REPORT", json.dumps(report))
    words = ["--config", ABLATIONS, "--data", data, "--workdir", runs, "--backend", "slurm", "--launch=--accelerator h100:8 --nodes 2"]
    assert main.main(["sweep", *words, "--seeds", "5"]) == 0
    submitted = calls(cluster, "sbatch")
    assert len(submitted) == 2  # both at a time
    assert all("--nodes 2 --gpus-per-node h100:8" in line for line in submitted)
    assert all(f"mimo train --config {ABLATIONS} --workdir {runs}/" in line for line in submitted)
    assert sum(line.endswith("--config.data.fraction=1e-06 --config.data.seed=5 --config.train.seed=5") for line in submitted) == 1
    assert "| rare | 1 | 0.500 (+0.000) |" in capsys.readouterr().out
    assert not list((tmp_path / "runs").glob("*/job.json"))


def test_a_job_is_found_again_and_not_submitted_twice(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("IDLE", "1")
    (tmp_path / "configs").mkdir()
    run = plan(ABLATIONS, base=ABLATIONS, workdir=tmp_path / "runs", data=(str(tmp_path / "data"),)).runs[0]
    slurm = SweepCluster("slurm", ("--accelerator", "cpu"))
    first = ClusterWorker(run, slurm)
    assert first.poll(stopping=False)
    assert json.loads((run.folder / "job.json").read_text())["id"] == "471"
    assert not first.poll(stopping=True)  # it stops, the job does not
    here = LocalWorker(run)
    assert not here.poll(stopping=False) and here.reason.startswith("job 471 was submitted for it; sweep with --backend slurm")
    second = ClusterWorker(run, slurm)
    assert second.poll(stopping=False) and second.poll(stopping=False)
    assert not second.poll(stopping=False)
    assert second.reason == f"job 471 ended before its training; see {run.folder}.launch"
    assert len(calls(cluster, "sbatch")) == 1 and not (run.folder / "job.json").exists()


def test_a_job_that_is_refused_is_told_with_the_launchers_reason(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSED", "1")
    run = plan(ABLATIONS, base=ABLATIONS, workdir=tmp_path / "runs", data=(str(tmp_path / "data"),)).runs[0]
    job = ClusterWorker(run, SweepCluster("slurm", ("--accelerator", "h100:8")))
    assert not job.poll(stopping=False)
    assert job.reason.startswith("not submitted: SLURM rejects this job: see sbatch --test-only")


@pytest.mark.parametrize(
    ("answer", "code", "error", "alive"),
    [
        ("", 0, "", True),
        ("Completed", 0, "", False),
        ("", 1, 'Error from server (NotFound): jobsets "a" not found', False),
        ("", 1, "Unable to connect to the server", True),  # nothing is known: look again
    ],
)
def test_whether_a_jobset_is_at_work(cluster, answer, code, error, alive):
    (cluster / "kubectl").write_text(
        f"#!/bin/sh\necho \"$*\" >>\"$FAKE/kubectl.calls\"\nprintf '{answer}'\necho '{error}' >&2\nexit {code}\n"
    )
    (cluster / "kubectl").chmod(0o755)
    assert SweepCluster("gke", ("--image", "a:1", "--namespace", "mine")).is_alive("base") == alive
    assert calls(cluster, "kubectl") == ["get jobset base --namespace mine -o jsonpath={.status.terminalState}"]


def test_long_names_keep_their_seed_and_hash():
    assert job_name("base-s0-1832d8ed") == "base-s0-1832d8ed"
    long = job_name("aligner-cross-attention-no-map-loss-s0-89f59cbd")
    assert long == "aligner-cross-attention-no-m-s0-89f59cbd" and len(long) == 40
    assert job_name("aligner-cross-attention-no-map-loss-s12-89f59cbd").endswith("-s12-89f59cbd")
