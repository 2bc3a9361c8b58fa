"""What is printed before the first step, against the plan and the files that it speaks of."""

import copy
import platform
import re

import jax
import pytest

from mimo_jax import files, pathtree, sharding
from mimo_jax.analysis import flops, hardware, run_summary
from mimo_jax.checkpoints import frozen_params
from mimo_jax.config import SourceConfig
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import write_records
from mimo_jax.train.state import TrainSetup
from tests.data import handmade
from tests.tiny_config import tiny_config


@pytest.fixture(scope="module")
def plan():
    config = tiny_config()
    return TrainSetup(config, sharding.make_mesh(config.mesh))


@pytest.fixture
def run(tmp_path, plan):
    """What a begun run holds of itself."""
    files.write_json(tmp_path / "config.json", plan.config.to_dict())
    files.write_json(tmp_path / "base.json", {"fingerprint": frozen_params.fingerprint({}), "leaves": {}})
    return tmp_path


def test_all_is_shown_in_lines_that_fit(plan, run, capsys, tmp_path):
    write_records(tmp_path / "set", [handmade.record(i) for i in range(12)], {})
    plan.config.data.sources["phantom"] = SourceConfig(str(tmp_path / "set"))
    files.write_json(run / "config.json", plan.config.to_dict())
    run_summary.print_summary(plan, open_sources(plan.config, "train"), run, 3)
    del plan.config.data.sources["phantom"]
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 180
    for told in (
        f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib",
        "1 × cpu; mesh slice 1 × data 1 × fsdp 1 × tensor 1",
        "replicated: the mesh has no fsdp axis",
        "phantom (12 images); 4 samples per step, 2 per image, 96 or 192 tokens each",
        f"base {frozen_params.fingerprint({})[:12]}, trained from a seed",
        str(run / "config.json"),
        "0.0% of 24 masks are narrower than a cell of the 32² target, 0.0% than two\n",
        "0.0% of the samples of I to IV segment nothing\n",
        "resuming at step 3 of 4",
    ):
        assert told in shown
    assert "changed since" not in shown and "turns" not in shown


def test_what_a_config_was_changed_in_is_named(plan, run, capsys):
    then = plan.config.to_dict()
    then["train"]["steps"], then["data"]["batch_size"] = 2, 8
    files.write_json(run / "config.json", then)
    run_summary.print_summary(plan, {}, run, 0)
    shown = capsys.readouterr().out
    assert "changed since: data.batch_size 8 → 4, train.steps 2 → 4\n" in shown and "resuming" not in shown


def test_the_parameter_table_adds_up(plan):
    rows = [re.split(r"\s{2,}", line) for line in run_summary.parameter_table(plan)[1:]]
    counts = plan.counts()
    for kind in ("trained", "frozen"):
        numbers = [int(number.replace(",", "")) for part, k, number, *_ in rows if k == kind]
        assert sum(numbers[:-1]) == numbers[-1] == counts[kind]
    assert {part for part, *_ in rows} == {*plan.params, "all"}
    assert {row[3] for row in rows if row[0] == "llm"} == {run_summary.size_of(4 * sum(x.size for x in leaves(plan, "llm")))}


def leaves(plan, part: str) -> list:
    return list(pathtree.flatten(plan.params[part]).values())


def test_memory_counts_what_lies_on_a_device(plan):
    counts = plan.counts()
    told = run_summary.memory_line(plan)
    trained = run_summary.size_of(4 * counts["trained"])
    assert f"trained {trained} + optimizer {run_summary.size_of(8 * counts['trained'])} + gradients {trained}" in told  # Adam: two moments
    assert run_summary.size_of(16 * counts["trained"] + 4 * counts["frozen"]) + " per device" in told


def test_memory_beside_what_the_device_has(plan, monkeypatch):
    monkeypatch.setattr(hardware, "device_memory", lambda device: 80 * hardware.GIB)
    assert " per device of 80.0 GiB, " in run_summary.memory_line(plan)


def test_flops_are_those_of_the_longest_sequence(plan):
    total = sum(flops.step(plan.config, 192).values())
    told = run_summary.flops_line(plan)
    assert f"{run_summary.flops_of(total)} per sample of 192 tokens (llm " in told
    assert f"), {run_summary.flops_of(4 * total)} per step" in told


def test_what_a_compiled_step_takes(monkeypatch):
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((256, 256), "float32")).compile()
    told = run_summary.compiled_step_line(compiled, 56, 12.34)
    assert told.startswith("step        compiled for 56 tokens in 12.3 s: 256 KiB arguments, ") and told.endswith(
        " temporaries, per device"
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert run_summary.compiled_step_line(compiled, 56, 12.34).endswith(" at its peak, per device")


def test_no_commit_is_told_of_what_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(run_summary, "_ROOT", tmp_path)
    assert re.match(r"mimo_jax [\d.]+, Python", run_summary.versions())


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1024 * 1023.9, "1.0 MiB"), (150 * 2**30, "150 GiB")]
)
def test_sizes(size, text):
    assert run_summary.size_of(size) == text


def test_model_settings_unlike_those_of_the_initial_weights_are_named(plan, run, tmp_path, capsys):
    """Their shapes are the same, so nothing else would say that the numbers are others."""
    there = copy.deepcopy(plan.config)
    there.model.sam.pixel_norm, there.model.llm.rope_theta = "minmax", 5e5
    initial = tmp_path / "imported"
    initial.mkdir()
    files.write_json(initial / "config.json", there.to_dict())
    plan.config.init.path = str(initial)
    run_summary.print_summary(plan, {}, run, 0)
    plan.config.init.path = ""
    shown = capsys.readouterr().out
    assert f"; config.model differs from that of {initial}: llm.rope_theta 500000.0 → 10000.0, sam.pixel_norm minmax → imagenet\n" in shown
