"""The one table: it covers every parameter of every config, and full-size specs do what they say."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mimo_jax import checkpoint, pathtree, sharding
from mimo_jax.config import WEIGHTS, ConfigError, LlamaConfig, MeshConfig
from mimo_jax.eval.metrics import iou
from mimo_jax.flags import find_config, read_config_file
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
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": count, "fsdp": 1, "tensor": 1}
    with pytest.raises(ConfigError, match="config.mesh"):
        sharding.make_mesh(MeshConfig(tensor=count + 1))
    with pytest.raises(ConfigError, match="config.mesh"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=-1))


def test_an_axis_that_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 1, 3), sharding.AXES)
    with pytest.raises(ConfigError, match=r"config.mesh.tensor: 3 does not divide axis of \d+ of parameter"):
        sharding.of_params(mimo.abstract(tiny_config())[1], mesh)


def test_for_inference_an_axis_that_does_not_divide_stays_whole_and_says_why():
    """LISA's 32,003 rows on four devices."""
    mesh = jax.sharding.AbstractMesh((1, 1, 4), sharding.AXES)
    shapes = {"embedding/base": (32003, 4096), "lm_head/base": (4096, 32003), "llm/layers/block/q/kernel": (32, 4096, 4096)}
    tree = pathtree.unflatten({path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in shapes.items()})
    whole = {}
    placed = {path: place.spec for path, place in pathtree.flatten(sharding.of_params(tree, mesh, whole)).items()}
    assert placed["embedding/base"] == P(None, "fsdp") and placed["lm_head/base"] == P("fsdp", None)
    assert placed["llm/layers/block/q/kernel"] == P(None, "fsdp", "tensor")
    assert whole["embedding/base"] == "4 does not divide axis of 32003 of parameter embedding/base"
    assert set(whole) == {"embedding/base", "lm_head/base"}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_integers_are_sharded_as_the_matrices_that_they_stand_for(weights):
    config = read_config_file(find_config("configs/mimo_7b.py"))
    wide, held = (pathtree.flatten(mimo.abstract(c)[1]) for c in (config, config.with_weights(weights)))
    for path, leaf in held.items():
        assert len(sharding.spec(path, leaf.shape)) <= len(leaf.shape)
        if path.endswith(f"kernel_{weights}"):
            kernel = path.removesuffix(f"_{weights}")
            partition = sharding.spec(kernel, wide[kernel].shape)
            assert sharding.spec(path, leaf.shape) == partition
            assert sharding.spec(f"{kernel}_scale", held[f"{kernel}_scale"].shape)[-1] == partition[-1], "with the outputs"
    mesh = jax.sharding.AbstractMesh((1, 1, 8), sharding.AXES)
    sharding.of_params(mimo.abstract(config.with_weights(weights))[1], mesh)  # all divide


SPLIT = """
import json, sys
import jax, numpy as np
from mimo_jax import pathtree, sharding
from mimo_jax.infer.predictor import Mimo
mimo = Mimo.load(sys.argv[1], weights=sys.argv[2])
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


@pytest.mark.parametrize(("heads", "kv_heads", "weights"), [(4, 4, ""), (4, 1, "int8")])
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
    assert four["mesh"] == {"data": 1, "fsdp": 1 if by_heads else 4, "tensor": 4 if by_heads else 1}
    split = {path for path, share in four["shares"].items() if share == 4}
    kernel = f"kernel_{weights}" if weights else "kernel"
    assert {f"llm/layers/block/{name}/{kernel}" for name in ("q", "k", "v", "o", "gate", "up", "down")} <= split
    assert ("embedding/base" in split) == (not by_heads)  # 511 rows of 32 columns
    assert four["cache"] == (4 if by_heads else 1)
