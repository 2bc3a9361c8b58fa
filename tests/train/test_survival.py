"""`mimo train` as several processes, one of which is told to stop; and what goes on from there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mimo_jax.checkpoints import checkpoint
from mimo_jax.data.builder.phantom_set import build_phantoms

CONFIG = """
from tests.tiny_config import quick_config

def get_config():
    config = quick_config()
    config.data.buckets = "192"
    config.train.checkpoint_every = 100000
    config.train.eval_every, config.train.eval_samples, config.train.num_overlays = 2, 8, 0
    config.train.final_learning_rate = config.train.learning_rate  # the same at a step, whatever the number of them
    return config
"""


def start(folder, run, steps: int, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "mimo_jax.cli", "train", "--config", str(folder / "small.py"), "--data", str(folder / "phantom")]
    command += ["--workdir", str(run), f"--config.train.steps={steps}"]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(run) -> dict[int, float]:
    path = run / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture
def folder(tmp_path):
    build_phantoms(tmp_path / "phantom", 24, seed=5, progress=False)
    (tmp_path / "small.py").write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on_as_if_nothing_had_been(folder):
    """SIGTERM goes to one of the two; what they saved is held against a run of one process that was left alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MIMO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "MIMO_PROCESSES": "2"}
    run, alone = folder / "run", folder / "alone"
    pair = [start(folder, run, 100000, MIMO_PROCESS=str(i), **told) for i in range(2)]
    try:
        until = time.monotonic() + 300
        while len(losses(run)) < 3:
            assert time.monotonic() < until and pair[0].poll() is None, "training did not start"
            time.sleep(0.1)
        pair[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [75, 75], said
    assert "run the same command to resume" in said[0][1] and "run the same command" not in said[1][1]
    done = checkpoint.resolve(run)[1]
    assert max(losses(run)) == done

    for where in (run, alone):
        process = start(folder, where, done + 2)
        assert process.wait(timeout=300) == 0, process.stderr.read()
    asked = [json.loads((of / "eval" / "00000002" / "report.json").read_text())["n"] for of in (run, alone)]
    assert asked[0] == asked[1]  # by two processes, and by one
    assert sum(asked[0]["samples"].values()) + asked[0]["unusable"] == 8 > asked[0]["unusable"]
    there, here = losses(run), losses(alone)
    assert there.keys() == here.keys()
    np.testing.assert_allclose([there[step] for step in here], list(here.values()), rtol=1e-5)
