"""The evaluations of a run: what was interrupted is made up by the same command, and nothing is done twice."""

import json

import pytest

from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.config import SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.errors import EXIT_TEMPFAIL
from mimo_jax.train import loop
from mimo_jax.train.evaluations import CALIBRATION, FINAL, PERIODIC, Evaluations
from tests.tiny_config import quick_config


class Died(Exception):
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    build_phantoms(folder, 24, seed=5, progress=False)
    config = quick_config()
    config.data.buckets = "192"
    config.data.sources = {"phantom": SourceConfig(path=str(folder))}
    config.train.steps, config.train.checkpoint_every, config.train.eval_every = 2, 100, 1
    config.train.eval_samples, config.train.num_overlays, config.train.calibrate_samples = 4, 1, 4
    return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing interrupts."""
    run = tmp_path_factory.mktemp("run") / "whole"
    assert loop.train(config, run) == 0
    return run


def reports(run) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in run.glob("eval/*/report.json")}


def test_each_stage_has_a_mark_and_a_run_that_dies_in_one_goes_on_there(config, whole, tmp_path, monkeypatch):
    stages = [(PERIODIC, 1), (CALIBRATION, 2), (FINAL, 2)]
    real, begun = Evaluations._run_stage, []

    def run_stage(self, stage, step, params):
        begun.append((stage, step))
        if dies and begun[-1] == dies[0]:
            raise Died
        real(self, stage, step, params)

    monkeypatch.setattr(Evaluations, "_run_stage", run_stage)
    for number, stage in enumerate(stages):
        dies = [stage]
        with pytest.raises(Died):
            loop.train(config, tmp_path / "run")
        assert begun == stages[max(0, number - 1) : number + 1]
        begun.clear()
        assert Checkpoints(tmp_path / "run").latest() == stage[1]  # saved before it is evaluated
    dies = []
    assert loop.train(config, tmp_path / "run") == 0 and begun == stages[-1:]
    begun.clear()
    assert loop.train(config, tmp_path / "run") == 0 and begun == []
    assert reports(tmp_path / "run") == reports(whole) and len(reports(whole)) == 2


@pytest.mark.parametrize(("polls", "step"), [(3, 1), (4, 2)])
def test_a_stop_within_an_evaluation_is_followed_there_and_the_evaluation_made_up(
    config, whole, tmp_path, monkeypatch, capsys, polls, step
):
    """Polls: before anything, before the first step, in the one window of the evaluation of step 1, in the calibration of step 2."""
    run, number = tmp_path / "run", 0

    def requested(self):
        nonlocal number
        number += 1
        return number >= polls

    with monkeypatch.context() as patched:
        patched.setattr(loop.PreemptionGuard, "requested", requested)
        assert loop.train(config, run) == EXIT_TEMPFAIL
    assert Checkpoints(run).latest() == step and f"stopped at step {step}, state saved" in capsys.readouterr().err
    assert loop.train(config, run) == 0
    assert reports(run) == reports(whole)
    losses = [[json.loads(line)["loss"] for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (run, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert [json.loads(line)["event"] for line in (run / "goodput.jsonl").read_text().splitlines()][-1] == "stop"


def test_a_stop_before_the_first_step_is_followed_and_nothing_is_lost(config, whole, tmp_path, monkeypatch):
    for polls in (1, 2):  # before anything is written; after the base and the config are
        calls = []
        with monkeypatch.context() as patched:
            patched.setattr(
                loop.PreemptionGuard, "requested", lambda self, polls=polls, calls=calls: calls.append(1) or len(calls) >= polls
            )
            assert loop.train(config, tmp_path / "run") == EXIT_TEMPFAIL
        assert (tmp_path / "run").exists() == (polls == 2)
    assert loop.train(config, tmp_path / "run") == 0
    assert reports(tmp_path / "run") == reports(whole)
