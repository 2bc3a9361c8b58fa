"""Rows of figures: what they hold, where they go, and that no step is told twice."""

import importlib.util
import json
import math
import struct
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from mimo_jax.analysis import flops, hardware
from mimo_jax.config import ConfigError
from mimo_jax.train import metrics, writers
from mimo_jax.train.goodput import Goodput
from mimo_jax.train.hooks import StepInfo
from mimo_jax.train.metrics import Metrics
from mimo_jax.train.writers import MetricWriters
from tests.tiny_config import tiny_config

LENGTH, SAMPLES = 96, 4


def step_info(step: int, finite: float = 1.0, last: bool = False) -> StepInfo:
    values = {"loss": 2.0 * step if finite else math.nan, "ce": 1.0, "learning_rate": step / 10, "input_tokens": 300.0, "finite": finite}
    on_device = {name: jnp.float32(value) for name, value in values.items()}
    return StepInfo(step, {}, on_device, SAMPLES, last, dict, LENGTH, wait=0.01, dispatch=0.0)


def run(tmp_path, infos, first: int = 0, **train) -> list[dict]:
    """The rows of metrics.jsonl after these infos, of which each takes 50 ms."""
    config = tiny_config()
    config.train.log_every, config.train.steps = 2, 8
    for name, value in train.items():
        setattr(config.train, name, value)
    with Goodput(tmp_path, time.time(), first, 8) as goodput, MetricWriters(config, tmp_path, first) as told:
        hook = Metrics(config, goodput, told)
        for one in infos:
            time.sleep(0.05)
            hook(one)
        hook.close()
    return [json.loads(line) for line in (tmp_path / writers.FILE).read_text().splitlines()]


def test_a_row_holds_means_and_what_clock_and_machine_add(tmp_path):
    rows = run(tmp_path, [step_info(1), step_info(2), step_info(3, last=True)])
    assert [row["step"] for row in rows] == [2, 3]
    row = rows[0]
    assert row["loss"] == 3.0 and row["learning_rate"] == pytest.approx(0.2) and row["skipped"] == 0 and "finite" not in row
    assert row["step_seconds"] >= 0.025 and row["samples_per_second"] * row["step_seconds"] == pytest.approx(SAMPLES)
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(300)
    assert row["data_wait"] * row["step_seconds"] == pytest.approx(0.01)
    needed = sum(flops.step(tiny_config(), LENGTH).values()) * SAMPLES
    assert row["tflops_per_device"] * 1e12 * row["step_seconds"] == pytest.approx(needed)
    assert "mfu" not in row and 0 < row["rss_gib"] <= row["rss_peak_gib"] * 1.01
    assert row["eta_seconds"] == pytest.approx(6 * row["step_seconds"]) and 0 < row["goodput"] <= 1


def test_utilisation_where_the_device_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "find_hardware", lambda kind: hardware.TABLE[r"H100"])
    row = run(tmp_path, [step_info(1), step_info(2)])[0]
    assert row["mfu"] == pytest.approx(row["tflops_per_device"] / 989)
    needed, real = (sum(flops.step(tiny_config(), length).values()) for length in (LENGTH, 300 // SAMPLES))
    assert row["mfu_without_padding"] == pytest.approx(row["mfu"] * real / needed) and real < needed


def test_what_is_pending_is_written_where_a_run_stops(tmp_path):
    with Goodput(tmp_path, time.time(), 0, 8) as goodput, MetricWriters(tiny_config(), tmp_path, 0) as told:
        hook = Metrics(tiny_config(), goodput, told)
        hook.every = 2
        for step in (1, 2, 3):
            hook(step_info(step))
        hook.flush()
        hook.flush()
        hook.close()
    rows = [json.loads(line) for line in (tmp_path / writers.FILE).read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 3.0), (3, 6.0)]


def test_steps_that_were_not_finite_count_in_no_mean(tmp_path):
    rows = run(tmp_path, [step_info(1), step_info(2, finite=0.0), step_info(3, finite=0.0), step_info(4, finite=0.0)])
    assert (rows[0]["loss"], rows[0]["skipped"]) == (2.0, 1)
    assert (rows[1]["loss"], rows[1]["skipped"]) == (None, 2)
    assert "NaN" not in (tmp_path / writers.FILE).read_text()


def test_steps_that_are_done_again_are_told_once(tmp_path):
    run(tmp_path, [step_info(step) for step in range(1, 7)])
    path = tmp_path / writers.FILE
    before = path.read_text()
    path.write_text(before + '{"step": 8, "lo')
    rows = run(tmp_path, [step_info(step) for step in range(5, 9)], first=4)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert path.read_text().startswith("".join(before.splitlines(keepends=True)[:2]))  # what stands is not touched
    assert {file.name for file in tmp_path.iterdir()} == {writers.FILE, "goodput.jsonl", "tensorboard"}


def events(folder) -> list[Event]:
    """All that lies in a TensorBoard folder."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_tensorboard_gets_rows_and_pictures(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    Image.fromarray(np.full((5, 7, 3), 9, np.uint8)).save(folder / "I_CT_a.png")
    with MetricWriters(tiny_config(), tmp_path, 0) as told:
        told.write_scalars(3, {"loss": 1.5, "iou": None})
        told.write_images(3, folder)
    values = [(event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(3, "loss"), (3, "eval/I_CT_a")]
    assert values[0][1].simple_value == 1.5 and (values[1][1].image.height, values[1][1].image.width) == (5, 7)


class FakeWandb(types.ModuleType):
    """Records what W&B is told; the real library is not among what tests install."""

    def __init__(self):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Image = lambda pixels: pixels.shape
        self.calls, self.refuses = [], ""

    def init(self, **given):
        if self.refuses:
            raise self.errors.Error(self.refuses)
        self.calls.append(("init", given))
        return self

    def log(self, row):
        self.calls.append(("log", row))

    def define_metric(self, name, step_metric):
        self.calls.append(("define_metric", (name, step_metric)))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, [step_info(1), step_info(2)], wandb="project")
    run(tmp_path, [step_info(3), step_info(4)], first=2, wandb="project")
    first, second = (given for name, given in fake.calls if name == "init")
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["project"] == "project"
    assert first["config"]["train"]["log_every"] == 2
    assert [row["step"] for name, row in fake.calls if name == "log"] == [2, 4]
    assert [code for name, code in fake.calls if name == "finish"] == [0, 0]
    run(tmp_path, [], first=4, wandb="another")
    assert fake.calls[-3][1]["id"] != first["id"]


def test_what_wandb_refuses_is_said_in_a_line(tmp_path, monkeypatch):
    fake = FakeWandb()
    fake.refuses = "api_key not configured"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"config.train.wandb: api_key not configured.*WANDB_MODE=offline"):
        run(tmp_path, [], wandb="project")


def test_wandb_must_be_there_before_the_work(monkeypatch):
    config = tiny_config()
    writers.check_writers(config)
    config.train.wandb = "project"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'mimo_jax\[wandb\]'"):
        writers.check_writers(config)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, [step_info(1), step_info(2)], wandb="project")
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))


def test_memory_of_devices_that_tell(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used * hardware.GIB, "peak_bytes_in_use": 2 * self.used * hardware.GIB}

    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device(1), Device(3)])
    assert metrics.memory() == {"hbm_gib": 3, "hbm_peak_gib": 6}
