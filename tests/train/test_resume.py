"""What a resumed run keeps of its first start: the number of its steps, and its data."""

import copy
import json
import shutil

import pytest

from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import ConfigError, SourceConfig
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import RecordFolder, write_records
from mimo_jax.train import loop, resume
from tests.data import handmade
from tests.tiny_config import quick_config, tiny_config


@pytest.fixture
def begun(tmp_path):
    """(config, its sources, a run that was begun with them)"""
    write_records(tmp_path / "data", [handmade.record(i, "train") for i in range(6)], {"name": "handmade"})
    config = tiny_config()
    config.data.sources = {"a": SourceConfig(str(tmp_path / "data"))}
    sources = open_sources(config, "train")
    checkpoint.open_run(tmp_path / "run", config)
    resume.write_fingerprints(sources, tmp_path / "run")
    checkpoint.start_run(tmp_path / "run", config, {})
    return config, sources, tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 4), ("batch_size", 8), ("samples_per_image", 1), ("buckets", "192"), ("length_grouping", 4), ("fraction", 0.5),
        ("split", "val"), ("augment", True), ("prompt_kinds", "box"), ("chat_template", "llava"), ("system_prompt", "Hello."),
    ],
)  # fmt: skip
def test_a_setting_that_changes_the_batches_is_refused(begun, name, value):
    config, sources, run = begun
    setattr(config.data, name, value)
    with pytest.raises(ConfigError, match=rf"config.data.{name} \(.* there, {value} here\) changed; .* --init .*run and another --workdir"):
        resume.check_data(config, sources, run)


def test_the_mixture_is_one_of_these_settings(begun):
    config, sources, run = begun
    config.data.weights = config.data.weights | {"IV": 0.0}
    config.data.sources["b"] = SourceConfig("elsewhere", weight=2.0)
    with pytest.raises(ConfigError, match=r"config.data.sources.b.weight \(absent there, 2.0 here\).*config.data.weights.IV"):
        resume.check_data(config, sources, run)


def test_a_setting_that_leaves_the_batches_as_they_are_may_change(begun, tmp_path):
    config, sources, run = begun
    config.data.workers, config.data.cache_mb, config.data.features = 2, 7, True
    resume.check_data(config, sources, run)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    config.data.sources["a"].path = str(tmp_path / "moved")
    resume.check_data(config, open_sources(config, "train"), run)


def test_other_samples_under_the_same_path_are_refused(begun, tmp_path):
    config, _, run = begun
    shutil.rmtree(tmp_path / "data")
    write_records(tmp_path / "data", [handmade.record(i, "train") for i in range(7)], {"name": "handmade"})
    with pytest.raises(ConfigError, match=r"the samples of config.data.sources.a \(.*data\) changed"):
        resume.check_data(config, {"a": RecordFolder(tmp_path / "data", "train")}, run)


def test_epochs_become_steps_once_and_stay_so():
    config = tiny_config()
    assert resume.resolve_steps(config, 100, None) is config
    config.train.epochs, config.data.batch_size = 1.5, 40
    first = resume.resolve_steps(config, 895_000, None)
    assert first.train.steps == 33_563 and config.train.steps == 4  # 1.5 · 895,000 / 40, rounded up
    saved = copy.deepcopy(first)
    assert resume.resolve_steps(config, 900_000, saved).train.steps == 33_563
    config.train.epochs = 3
    assert resume.resolve_steps(config, 895_000, saved).train.steps == 67_125


def test_a_run_counts_its_epochs_says_so_and_refuses_other_batches(tmp_path, capsys):
    write_records(tmp_path / "data", [handmade.record(i, "train") for i in range(2)], {"name": "handmade"})
    config = quick_config()
    config.data.buckets, config.data.samples_per_image = "192", 1
    config.data.sources = {"a": SourceConfig(str(tmp_path / "data"))}
    config.data.weights = {"vqa": 1.0, "I": 1.0}
    config.train.epochs, config.train.reference_batch_size = 0.5, 1
    config.train.learning_rate = 1e-3
    samples = sum(sample.perspective in ("vqa", "I") for record in RecordFolder(tmp_path / "data", "train") for sample in record.samples)
    steps = -(-samples // 8)
    assert loop.train(config, tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert f"{steps:,} steps of 4 samples = {4 * steps / samples:.3g} epochs of {samples:,}: {4 * steps:,} samples, about " in shown
    assert "0.001 (config.train.learning_rate); the config's own is for 1 samples per step: for 4 times as many, the" in shown
    assert "multiplies it by 2\n" in shown
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (saved["steps"], saved["epochs"]) == (steps, 0.5)
    config.data.seed += 1
    with pytest.raises(ConfigError, match="was trained on other batches: config.data.seed"):
        loop.train(config, tmp_path / "run")
