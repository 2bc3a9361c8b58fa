"""`mimo compile`: the report, for virtual CPU devices and, where libtpu is installed, for a real TPU topology."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax import pathtree, sharding
from mimo_jax.analysis import aot
from mimo_jax.analysis.hardware import find_hardware
from mimo_jax.analysis.topology import Topology
from mimo_jax.config import ConfigError
from mimo_jax.data.loading.features import FeatureFolder
from mimo_jax.models import mimo
from mimo_jax.train.state import TrainSetup
from mimo_jax.train.step import lower_step
from tests.tiny_config import frozen_config, random_batch, tiny_config

# `mimo compile`, and in the same process what its arguments take: the state, the base and the batch of one device.
RUN = """
import json, sys
import jax, numpy as np
from mimo_jax.cli.main import main
code = main(sys.argv[1:])
from mimo_jax import sharding
from mimo_jax.config_flags import find_config, read_config_file
from mimo_jax.analysis import aot
from mimo_jax.train.state import TrainSetup

def size(shapes, places):
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
    return sum(int(np.prod(place.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf, place in leaves)

config = read_config_file(find_config(sys.argv[sys.argv.index("--config") + 1]))
config.mesh.data, config.mesh.frozen_sharding, config.data.batch_size = 2, "sharded", 8
plan = TrainSetup(config, sharding.make_mesh(config.mesh))
batch = aot.abstract_batch(config, plan.mesh, 96)
sizes = {"state": size(plan.state, plan.state_shardings), "frozen": size(plan.frozen, plan.frozen_shardings)}
print(json.dumps(sizes | {"batch": size(batch, {key: leaf.sharding for key, leaf in batch.items()})}), file=sys.stderr)
sys.exit(code)
"""


CONFIG = "from tests.tiny_config import quick_config as get_config\n"


def compiled(tmp_path, *flags: str, run: list[str]) -> tuple[dict, subprocess.CompletedProcess]:
    """The report of `mimo compile` in a process of its own."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    out = tmp_path / "report.json"
    line = [sys.executable, *run, "compile", "--config", str(tmp_path / "tiny.py"), "--out", str(out), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done


@pytest.mark.slow
def test_virtual_devices(tmp_path):
    """Nothing but the state comes out of a step, in its place."""
    flags = "--config.mesh.data=2 --config.mesh.frozen_sharding=sharded --topology cpu:4 --batch-per-chip 2 --length 96"
    report, done = compiled(tmp_path, *flags.split(), run=["-c", RUN])
    assert report["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1} and report["chips"] == 4
    assert report["fits"] is report["estimate"] is report["hbm_bytes"] is report["largest_batch"] is None
    assert report["frozen_outputs"] == report["uncounted_loops"] == report["remedies"] == []
    sizes = json.loads(done.stderr.splitlines()[-1])
    assert 0.98 * sum(sizes.values()) < report["argument_bytes"] <= sum(sizes.values()), "arrays that the step does not read are left away"
    assert report["alias_bytes"] == pytest.approx(sizes["state"], rel=0.02) and report["output_bytes"] - report["alias_bytes"] < 8192
    assert {axis for row in report["collectives"] for axis in row["axes"]} == {"data", "fsdp"}
    assert {row["kind"] for row in report["collectives"]} >= {"all-gather", "all-reduce"}
    assert report["program_flops"] > 0.8 * 2 * report["flops_per_sample"], "two samples a device"
    assert "4 chips (cpu)" in done.stdout and "all-gather" in done.stdout and report["base_reason"] in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is missing; pip install "mimo_jax[tpu]"')
def test_a_tpu_topology(tmp_path):
    """Without the image encoders: compiling for TPU is slow."""
    flags = "--topology v5e:2x2 --batch-per-chip 2 --length 96 --config.mesh.frozen_sharding=sharded --config.data.features=True"
    flags += " --config.freeze=^(vision|sam_encoder)/"
    report, done = compiled(tmp_path, *flags.split(), run=["-m", "mimo_jax.cli"])
    assert report["chip"] == "TPU v5e" and report["mesh"]["fsdp"] == 4 and report["hbm_bytes"] == int(15.75 * 2**30)
    assert report["fits"] and report["frozen_outputs"] == report["uncounted_loops"] == []
    assert 0 < report["argument_bytes"] < report["peak_hbm_bytes"] < 2**28
    assert sum(row["bytes"] for row in report["collectives"]) > 0 and not any(row["network"] for row in report["collectives"])
    assert report["estimate"]["samples_per_second"] == pytest.approx(8 / report["estimate"]["step_s"])
    assert "it fits" in done.stdout and report["versions"]["libtpu"]


def test_the_batch_is_what_the_loader_makes():
    config = frozen_config()
    mesh = sharding.make_mesh(config.mesh)
    made = aot.abstract_batch(config, mesh, 96)
    expected = random_batch(config, length=96)
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in made.items()} == {key: (x.shape, x.dtype) for key, x in expected.items()}
    config.data.features = True
    stored = aot.abstract_batch(config, mesh, 96)
    blank = FeatureFolder(Path("nowhere"), mimo.feature_shapes(config)).padding()
    assert set(made) - set(stored) == {"vision_image", "sam_image"}
    assert {key: (stored[key].shape[1:], stored[key].dtype) for key in blank} == {key: (x.shape, x.dtype) for key, x in blank.items()}
    config.freeze = "^sam_encoder/"
    assert set(made) - set(aot.abstract_batch(config, mesh, 96)) == {"sam_image"}  # a vision tower that trains reads pictures


def test_a_frozen_output_is_named():
    config = tiny_config()
    config.trainables = {r"^(llm|sam_encoder)/": None, r".": 1.0}
    plan = TrainSetup(config, sharding.make_mesh(config.mesh))
    loss = jax.ShapeDtypeStruct((), "float32")
    assert aot.frozen_outputs(plan.state, (plan.state, {"loss": loss})) == []
    path, leaf = next((path, leaf) for path, leaf in pathtree.flatten(plan.frozen).items() if path.endswith("gate/kernel"))
    assert aot.frozen_outputs(plan.state, (plan.state, {"loss": loss, path: leaf})) == [f"[1]['{path}']"]


def test_the_estimate_is_a_roofline():
    row = find_hardware("TPU v5e")
    report = {"batch_per_chip": 2, "chips": 4, "flops_per_sample": 0.5 * row.flops, "program_flops": 2 * row.flops}
    report |= {"hbm_traffic_bytes": row.bandwidth, "collectives": [{"network": False, "bytes": 3 * row.link}]}
    made = aot.estimate(report, row)
    assert [made[f"{name}_s"] for name in ("compute", "memory", "link", "network", "step")] == [2, 1, 3, 0, 3]
    assert made["bound"] == "link" and made["mfu"] == pytest.approx(1 / 3)
    assert made["samples_per_second"] == pytest.approx(8 / 3) and made["samples_per_second_per_chip"] == pytest.approx(2 / 3)
    report["collectives"].append({"network": True, "bytes": 5 * row.network})
    assert aot.estimate(report, row)["bound"] == "network"


@given(st.integers(1, 40), st.floats(0.1, 8), st.floats(0, 12), st.integers(1, 3), st.floats(0, 0.3))
def test_the_largest_batch_is_found_in_few_compilations(start, each, base, unit, bend):
    """Memory in GiB of a chip with 15.75: base + each · batch, and a little more the larger the batch is."""
    tried = []

    def peak(batch: int) -> float:
        return base + each * batch * (1 + bend * batch / 100)

    def compile_with(batch: int) -> dict:
        tried.append(batch)
        return {"peak_hbm_bytes": peak(batch)}

    first = {"batch_per_chip": start * unit, "hbm_bytes": 15.75, "peak_hbm_bytes": peak(start * unit)}
    found = aot.largest_batch(first, unit, compile_with)
    assert len(tried) <= 5 and all(batch % unit == 0 for batch in tried)
    assert found == 0 or peak(found) <= 0.9 * 15.75
    assert peak(max(1.1 * found, found + unit)) > 0.9 * 15.75, "not far from the best"


@pytest.mark.parametrize(
    ("failure", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.50G) exceeds (15.75G).", 36.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.5G.", 20.25),
        ("RESOURCE_EXHAUSTED: no more is said", None),
    ],
)
def test_a_compiler_that_gives_up_says_how_much_it_needs(failure, needed):
    made = aot._memory(None, failure + "\nlargest allocations: …", "tpu")
    assert made["peak_hbm_bytes"] == (None if needed is None else needed * 2**30)
    assert made["out_of_memory"] == failure and made["temp_bytes"] is None


def test_what_does_not_fit_comes_with_remedies(monkeypatch):
    config = tiny_config()
    mesh = jax.sharding.AbstractMesh((1, 4, 2, 1), sharding.AXES)
    made = aot._remedies(config, mesh, 4)
    flags = ["--config.mesh.frozen_sharding=sharded", "--config.mesh.data=1 --config.mesh.fsdp=8", "--config.model.remat=full"]
    assert made == [*flags, "--config.train.grad_accum_steps=2", "--batch-per-chip 2", "more chips"]
    report = {
        **{"config": "tiny", "topology": "v5e:2x4", "chips": 8, "chip": "TPU v5e", "mesh": dict(mesh.shape), "base_reason": "base …"},
        **{"batch_per_chip": 4, "length": 96, "compile_seconds": 1.0, "collectives": None, "estimate": None, "frozen_outputs": []},
        **{"argument_bytes": 2**30, "output_bytes": 2**20, "temp_bytes": 15 * 2**30, "alias_bytes": 0, "peak_hbm_bytes": 16 * 2**30},
        **{"hbm_bytes": 15.75 * 2**30, "fits": False, "remedies": made, "largest_batch": 3, "out_of_memory": None},
    }
    printed = aot.table(report).splitlines()
    assert printed[-1].startswith("it does not fit: 102% of a chip's memory; try --config.mesh.frozen_sharding=sharded, or ")
    assert "largest batch that fits: 3 samples per chip" in printed


def test_mistakes_are_told_before_anything_is_compiled():
    config = tiny_config()
    here = Topology("cpu", (1,))
    with pytest.raises(ConfigError, match=r"--length 512: is more than config.model.llm.max_length \(256\)"):
        aot.compile_step(config, here, lower_step, 2, 512)
    with pytest.raises(ConfigError, match="--batch-per-chip 3: must be a multiple of 2, with config.data.samples_per_image 2"):
        aot.compile_step(config, here, lower_step, 3)
    assert config.data.batch_size == 4, "the caller's config is as it was"
