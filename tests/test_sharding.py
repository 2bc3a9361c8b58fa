"""The one table: it covers every parameter of every config, and full-size specs do what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mimo_jax import parameters, pathtree, sharding
from mimo_jax.analysis import hardware
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import QUANTIZATIONS, ConfigError, MeshConfig
from mimo_jax.config_flags import find_config, read_config_file
from mimo_jax.eval.metrics import iou
from mimo_jax.model_config import LlamaConfig
from mimo_jax.models import mimo
from tests.data.handmade import tokenizer
from tests.tiny_config import random_params, tiny_config

FULL = ("tiny", "tiny_lora", "small", "mimo_7b", "lisa_7b")


@pytest.fixture(scope="module", params=FULL)
def shapes(request):
    config = read_config_file(find_config(f"configs/{request.param}.py"))
    return request.param, pathtree.flatten(mimo.abstract(config)[1])


def test_every_parameter_of_every_config_is_covered(shapes):
    _, flat = shapes
    for path, leaf in flat.items():
        assert len(sharding.spec(path, leaf.shape)) <= len(leaf.shape)


@pytest.mark.parametrize("shapes", ["small", "mimo_7b", "lisa_7b"], indirect=True)
def test_big_matrices_are_all_sharded(shapes):
    """Nothing above 8 M parameters a layer may be replicated by oversight."""
    _, flat = shapes
    for path, leaf in flat.items():
        if leaf.ndim >= 2 and leaf.shape[-1] * leaf.shape[-2] > 8_000_000:
            assert set(sharding.spec(path, leaf.shape)) >= {"fsdp", "tensor"}, path


def test_specs_are_written_for_trailing_axes():
    assert sharding.spec("llm/layers/block/q/kernel", (32, 4096, 4096)) == P(None, "fsdp", "tensor")
    assert sharding.spec("sam_encoder/stages/block/windowed/block/o/kernel", (4, 7, 1280, 1280)) == P(None, None, "tensor", "fsdp")
    assert sharding.spec("embedding/base", (32000, 4096)) == P("tensor", "fsdp")


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="no row matches parameter 'novel/kernel'"):
        sharding.spec("novel/kernel", (2, 2))


def test_a_mesh_must_fill_the_devices():
    count = jax.device_count()
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"slice": 1, "data": 1, "fsdp": count, "tensor": 1}
    with pytest.raises(ConfigError, match="config.mesh: 1 x 1 x -1 x"):
        sharding.make_mesh(MeshConfig(tensor=count + 1))
    with pytest.raises(ConfigError, match="config.mesh: 1 x -1 x -1 x 1 does not fill"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=-1))
    with pytest.raises(ConfigError, match="config.mesh: 2 x 1 x 1 x 1 does not make"):
        sharding.make_mesh(MeshConfig(slices=2, fsdp=1))


class Described:
    """A device of a machine that is not at hand, as far as a mesh looks at it."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index, self.coords, self.core_on_chip = number, slice_index, (number % 2, number // 2 % 2, 0), 0


def test_slices_are_told_by_the_devices():
    with pytest.raises(ConfigError, match="config.mesh.slices: is 3, but the devices form 2 slices; set it to 2, or to 0"):
        sharding.make_mesh(MeshConfig(slices=3), [Described(number, number // 4) for number in range(8)])


def test_an_axis_that_does_not_divide_stays_whole_and_says_why():
    """LISA's 32,003 rows on four devices."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 4), sharding.AXES)
    shapes = {"embedding/base": (32003, 4096), "lm_head/base": (4096, 32003), "llm/layers/block/q/kernel": (32, 4096, 4096)}
    tree = pathtree.unflatten({path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in shapes.items()})
    unsharded = {}
    placed = {path: place.spec for path, place in pathtree.flatten(sharding.param_shardings(tree, mesh, unsharded)).items()}
    assert placed["embedding/base"] == P(None, "fsdp") and placed["lm_head/base"] == P("fsdp", None)
    assert placed["llm/layers/block/q/kernel"] == P(None, "fsdp", "tensor")
    assert unsharded["embedding/base"] == "4 does not divide an axis of size 32003 of parameter embedding/base"
    assert set(unsharded) == {"embedding/base", "lm_head/base"}


def test_every_axis_is_named_in_one_place():
    """Rules name logical axes, logical axes mesh axes; no other module knows a mesh axis that parameters are split over."""
    assert {axis for axes in sharding.RULES.values() for axis in axes} - {None} <= sharding.LOGICAL_AXES.keys()
    assert {axis for axes in sharding.LOGICAL_AXES.values() for axis in axes} == set(sharding.AXES)
    package = Path(sharding.__file__).parent
    naming = {str(path.relative_to(package)) for path in package.rglob("*.py") if re.search(r'"(fsdp|tensor)"', path.read_text())}
    assert naming == {"sharding.py"}


def test_the_table_of_logical_axes_places_activations_and_parameters(monkeypatch):
    assert sharding.mesh_axes("batch", "sequence", "heads") == P(("slice", "data", "fsdp"), None, "tensor")
    assert sharding.mesh_axes(None, "embed") == P(None, "fsdp") and sharding.mesh_axes() == P()
    monkeypatch.setitem(sharding.LOGICAL_AXES, "vocab", ("fsdp", "tensor"))
    assert sharding.spec("lm_head/base", (4096, 32000)) == P("fsdp", ("fsdp", "tensor"))


MACHINES = {  # mesh sizes, kind of the device
    "v5e-16": ((1, 1, 16, 1), "TPU v5 lite"),
    "v5e-256": ((1, 1, 256, 1), "TPU v5 lite"),
    "v5e-2x16": ((2, 1, 16, 1), "TPU v5 lite"),
    "v5p-32": ((1, 1, 16, 1), "TPU v5"),
    "h100-8": ((1, 1, 4, 2), "NVIDIA H100 80GB HBM3"),
}
GOLDEN = Path(__file__).parent / "shardings"


@pytest.mark.parametrize("machine", MACHINES)
def test_the_full_model_lies_where_the_golden_file_says(machine):
    """MIMO_REWRITE_GOLDEN=1 writes them again; review the difference like code."""
    sizes, kind = MACHINES[machine]
    config = read_config_file(find_config("configs/mimo_7b.py"))
    shapes = mimo.abstract(config)[1]
    rates = parameters.multipliers(config, shapes)
    train, frozen = pathtree.partition(parameters.with_dtypes(config, shapes), lambda path: rates[path] is not None)
    mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
    placed = sharding.model_shardings(config.mesh, mesh, hardware.find_hardware(kind).memory, train, frozen)
    lines = [f"mimo_7b on {machine}: {dict(mesh.shape)}", placed.reason, *placed.unsharded.values()]
    for what, tree, places in (("trained", train, placed.train), ("frozen", frozen, placed.frozen)):
        lines.append(f"{what}: {sharding.bytes_per_device(tree, places) / 2**20:,.1f} MiB a device")
        flat = pathtree.flatten(places)
        for path, leaf in pathtree.flatten(tree).items():
            spec = ", ".join("-" if axis is None else axis for axis in flat[path].spec) or "-"
            lines.append(f"  {path} {leaf.dtype}{list(leaf.shape)}: {spec}")
    text = "\n".join(lines) + "\n"
    path = GOLDEN / f"mimo_7b-{machine}.txt"
    if os.environ.get("MIMO_REWRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs"


@pytest.mark.parametrize(
    ("base", "fsdp", "memory", "reason"),
    [
        ("auto", 4, None, "base sharded over 4: the memory of the devices is not known"),
        ("auto", 4, 2**30, "base replicated: it needs 0.2 of 1.0 GiB per device"),
        ("auto", 4, 2**28, "base sharded over 4: replicated it would need 0.2 of 0.2 GiB per device, more than 50%"),
        ("auto", 1, 2**28, "base replicated: the mesh has no fsdp axis to split it over"),
        ("replicated", 4, 2**28, "base replicated: set by config.mesh.frozen_sharding"),
        ("sharded", 4, 2**30, "base sharded: set by config.mesh.frozen_sharding"),
    ],
)
def test_the_base_is_replicated_where_it_fits(base, fsdp, memory, reason):
    frozen = {"embedding": {"base": jax.ShapeDtypeStruct((2**14, 2**13), "bfloat16")}}
    mesh = jax.sharding.AbstractMesh((1, 1, fsdp, 1), sharding.AXES)
    placed = sharding.model_shardings(MeshConfig(frozen_sharding=base), mesh, memory, {}, frozen)
    assert placed.reason == reason
    assert placed.frozen["embedding"]["base"].spec == P("tensor", "fsdp" if "sharded" in reason.split(":")[0] else None)


@pytest.mark.parametrize("weights", QUANTIZATIONS)
def test_integers_are_sharded_as_the_matrices_that_they_stand_for(weights):
    config = read_config_file(find_config("configs/mimo_7b.py"))
    wide, held = (pathtree.flatten(mimo.abstract(c)[1]) for c in (config, config.with_quantization(weights)))
    for path, leaf in held.items():
        assert len(sharding.spec(path, leaf.shape)) <= len(leaf.shape)
        if path.endswith(f"kernel_{weights}"):
            kernel = path.removesuffix(f"_{weights}")
            partition = sharding.spec(kernel, wide[kernel].shape)
            assert sharding.spec(path, leaf.shape) == partition
            assert sharding.spec(f"{kernel}_scale", held[f"{kernel}_scale"].shape)[-1] == partition[-1], "with the outputs"
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 8), sharding.AXES)
    unsharded = {}
    sharding.param_shardings(mimo.abstract(config.with_quantization(weights))[1], mesh, unsharded)
    assert not unsharded, "all divide"


SPLIT = """
import json, sys
import jax, numpy as np
from mimo_jax import pathtree, sharding
from mimo_jax.infer.predictor import Mimo
mimo = Mimo.load(sys.argv[1], quantization=sys.argv[2])
image = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
chat = mimo.open(image)
answers = [chat.ask(question) for question in ("Segment the liver.", "What is this?")]
flat = pathtree.flatten(mimo.engine.params)
cache = mimo.engine.new_cache(1, 128)["k"]
print(json.dumps({
    "texts": [a.text for a in answers],
    "masks": [np.packbits(e.mask).tolist() for a in answers for e in a.entities],
    "mesh": dict(sharding.inference_mesh(mimo.config.model.llm).shape) if jax.device_count() > 1 else {},
    "shares": {path: leaf.size / leaf.addressable_shards[0].data.size for path, leaf in flat.items()},
    "cache": cache.size / cache.addressable_shards[0].data.size,
}))
"""


@pytest.mark.parametrize(("heads", "kv_heads", "weights"), [(4, 4, ""), pytest.param(4, 1, "int8", marks=pytest.mark.slow)])
def test_four_devices_answer_as_one_does_and_share_the_model(tmp_path, heads, kv_heads, weights):
    """By heads where these divide, else by parameters; a vocabulary that does not divide stays whole."""
    config = tiny_config(llm=LlamaConfig(vocab_size=511, width=32, layers=2, heads=heads, kv_heads=kv_heads, mlp_width=64, max_length=256))
    tokenizer(tmp_path, 511)
    params = random_params(config)
    params["lm_head"]["grounding"] *= 4  # so that it says <SEG>
    checkpoint.open_run(tmp_path, config)
    checkpoint.start_run(tmp_path, config, params)
    checkpoint.write_step(tmp_path, 0, iter(()), {})
    found = []
    for devices in (1, 4):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        run = [sys.executable, "-c", SPLIT, str(tmp_path), weights]
        done = subprocess.run(run, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    one, four = found
    assert four["texts"] == one["texts"] and len(one["masks"]) == len(four["masks"]) > 0
    for a, b in zip(one["masks"], four["masks"], strict=True):
        assert iou(np.unpackbits(np.array(a, np.uint8)) > 0, np.unpackbits(np.array(b, np.uint8)) > 0) >= 0.999
    assert set(one["shares"].values()) == {1.0}
    by_heads = kv_heads == 4
    assert four["mesh"] == {"slice": 1, "data": 1, "fsdp": 1 if by_heads else 4, "tensor": 4 if by_heads else 1}
    split = {path for path, share in four["shares"].items() if share == 4}
    kernel = f"kernel_{weights}" if weights else "kernel"
    assert {f"llm/layers/block/{name}/{kernel}" for name in ("q", "k", "v", "o", "gate", "up", "down")} <= split
    assert ("embedding/base" in split) == (not by_heads)  # 511 rows of 32 columns
    assert four["cache"] == (4 if by_heads else 1)
