"""The run as a whole: two steps, stop, resume, the same third step; and what is refused before any work."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mimo_jax import pathtree, sharding
from mimo_jax.checkpoints import checkpoint, loading
from mimo_jax.checkpoints.checkpoint import CheckpointError
from mimo_jax.config import ConfigError, SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.errors import EXIT_TEMPFAIL, UserError
from mimo_jax.model_config import LoraConfig
from mimo_jax.train import loop
from mimo_jax.train.guard import NotFinite
from mimo_jax.train.state import TrainSetup
from tests.data import handmade
from tests.tiny_config import quick_config, random_params, tiny_config

LORA_TABLE = {r"lora_[ab]$|/grounding$": 1.0, r"^(aligner|prompt|seg_projection|sam_decoder)/": 1.0, r".": None}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    build_phantoms(folder, 24, seed=5, progress=False)
    return folder


def config_for(phantoms, **train):
    config = quick_config()
    config.data.sources = {"phantom": SourceConfig(path=str(phantoms))}
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def params_at(run, step: int) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(loading.load_params(run / "steps" / str(step))).items()}


def rows(run) -> dict[int, dict]:
    timing = {"samples_per_second", "tokens_per_second", "step_seconds", "data_wait", "tflops_per_device", "eta_seconds", "goodput"}
    timing |= {"rss_gib", "rss_peak_gib"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if k not in timing} for line in lines}


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory):
    """Three steps without a stop."""
    run = tmp_path_factory.mktemp("run") / "whole"
    assert loop.train(config_for(phantoms, steps=3, checkpoint_every=1, keep_last=3), run) == 0
    return run


def test_resume_gives_the_same_third_step(phantoms, whole, tmp_path, monkeypatch):
    """A stop after two steps of three, then the same command: loss and parameters are bit-identical."""
    config = config_for(phantoms, steps=3, checkpoint_every=1, keep_last=3)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(loop.PreemptionGuard, "should_stop_after", lambda self, step: step == 2)
        assert loop.train(config, stopped) == EXIT_TEMPFAIL
    assert checkpoint.Checkpoints(stopped).latest() == 2
    assert loop.train(config, stopped) == 0
    assert rows(stopped)[3] == rows(whole)[3]
    a, b = params_at(whole, 3), params_at(stopped, 3)
    assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(phantoms, tmp_path):
    """A real process, a real signal in the middle of training, and more of them in the last save."""
    run = tmp_path / "run"
    script = (
        "import sys; from tests.train.test_loop import *; from pathlib import Path; wait = checkpoint.Checkpoints.wait;"
        "checkpoint.Checkpoints.wait = lambda self: os.kill(os.getpid(), signal.SIGTERM) or wait(self);"
        f"sys.exit(loop.train(config_for({str(phantoms)!r}, steps=100000, checkpoint_every=100000), Path({str(run)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "training did not start"
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors.decode()
    assert b"run the same command to resume" in errors
    done = checkpoint.Checkpoints(run).latest()
    assert done is not None and done >= 3
    more = config_for(phantoms, steps=done + 1)
    assert loop.train(more, run) == 0
    assert max(rows(run)) == done + 1


def test_lora_from_a_trained_base_leaves_every_frozen_bit(phantoms, whole, tmp_path):
    config = config_for(phantoms, steps=2, learning_rate=1e-2)
    config.model.lora = LoraConfig(rank=2, alpha=2.0, targets="q,v")
    config.trainables = dict(LORA_TABLE)
    config.init.path, config.init.reinit, config.tokenizer = str(whole), r"lora_[ab]$", ""
    run = tmp_path / "lora"
    assert loop.train(config, run) == 0
    base, tuned = params_at(whole, 3), params_at(run, 2)
    trained = r"/grounding$|^(aligner|prompt|seg_projection|sam_decoder)/"
    frozen = [path for path in base if not re.search(trained, path)]
    assert frozen and all(np.array_equal(base[p], tuned[p]) for p in frozen)
    assert any(not np.array_equal(base[p], tuned[p]) for p in base if p.startswith("aligner/"))
    assert (run / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_grounding_tokens_that_a_base_lacks_are_drawn_like_its_rows(tmp_path):
    config, base = tiny_config(seg_position="bare"), tiny_config()  # <SEG> alone, and all three tokens
    params = pathtree.flatten(random_params(base))
    params |= {path: 1 + 0.02 * params[path] for path in ("embedding/base", "lm_head/base")}
    checkpoint.start_run(tmp_path / "base", base, {})
    checkpoint.write_step(tmp_path / "base", 0, iter(params.items()), {})
    config.init.path, config.init.reinit = str(tmp_path / "base"), "/grounding$"
    made = pathtree.flatten(loop._initial_params(TrainSetup(config, sharding.make_mesh(config.mesh))))
    for path, axis in (("embedding/grounding", 0), ("lm_head/grounding", 1)):
        rows = params[path.replace("grounding", "base")]
        standard = (np.asarray(made[path]) - rows.mean(axis, keepdims=True)) / rows.std(axis, keepdims=True)
        assert standard.size == 16 and 0.4 < standard.std() < 1.8 and abs(standard.mean()) < 1
    np.testing.assert_array_equal(made["lm_head/base"], params["lm_head/base"])


def test_init_refuses_another_model_and_names_the_parameters(phantoms, tmp_path):
    config, base = config_for(phantoms), tmp_path / "base"
    checkpoint.start_run(base, config, {})
    checkpoint.write_step(base, 0, iter(pathtree.flatten(random_params(config)).items()), {})
    handmade.tokenizer(base)
    config.model.llm.mlp_width *= 2
    config.init.path, config.tokenizer = str(base), ""
    with pytest.raises(CheckpointError, match="llm/layers/block/down/kernel"):
        loop.train(config, tmp_path / "run")


def test_a_run_directory_of_another_config_is_refused(phantoms, tmp_path):
    config = config_for(phantoms, steps=5)
    checkpoint.start_run(tmp_path / "run", config, {})
    config.model.llm.width *= 2
    with pytest.raises(UserError, match="llm.width"):
        loop.train(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(phantoms, tmp_path):
    config = config_for(phantoms, steps=30, learning_rate=1e38, warmup_steps=2, checkpoint_every=1, max_grad_norm=1e30)
    with pytest.raises(NotFinite, match=r"last good checkpoint is step \d+"):
        loop.train(config, tmp_path / "run")
    good = checkpoint.Checkpoints(tmp_path / "run").latest()
    assert good is not None
    values = params_at(tmp_path / "run", good)
    assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.data, "sources", {}), "config.data.sources"),
        (lambda c: setattr(c, "tokenizer", ""), "config.tokenizer"),
        (lambda c: setattr(c, "tokenizer", "nowhere.json"), "nowhere.json"),
        (lambda c: setattr(c, "trainables", {r"^llm/": 1.0}), "no row matches"),
        (lambda c: setattr(c.mesh, "tensor", 3), "config.mesh"),
    ],
)
def test_what_cannot_run_is_said_before_any_work(phantoms, tmp_path, change, message):
    config = config_for(phantoms)
    change(config)
    with pytest.raises((ConfigError, UserError), match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "steps").exists()


def test_a_run_writes_metrics_overlays_and_a_report(phantoms, tmp_path, capsys):
    config = config_for(phantoms, steps=2, eval_samples=6, num_overlays=2, calibrate_samples=6)
    assert loop.train(config, tmp_path / "run") == 0
    assert "scores are not calibrated" in capsys.readouterr().err  # one image of val has too few structures
    out = tmp_path / "run" / "eval" / "00000002"
    assert set(json.loads((out / "report.json").read_text())["miou"]) == {"I", "II", "III", "IV"}
    assert len(list(out.glob("*.png"))) == 2
    assert set(rows(tmp_path / "run")) == {1, 2}
    assert list((tmp_path / "run" / "tensorboard").iterdir())
