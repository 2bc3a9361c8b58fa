"""Integers in place of the language model's matrices: how far off, how large, and what the model makes of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax import pathtree, quantize
from mimo_jax.config import QUANTIZATIONS, ConfigError
from mimo_jax.data.prompts import Prompts
from mimo_jax.infer.engine.compiled import compiler_options
from mimo_jax.infer.engine.requests import Request
from mimo_jax.infer.predictor import Mimo
from mimo_jax.model_config import LlamaConfig, LoraConfig
from mimo_jax.models import mimo, scan
from tests.data.handmade import tokenizer
from tests.tiny_config import random_params, tiny_config


def held_as(params: dict, quantization: str) -> dict:
    """All parameters of a model with its language model's matrices in integers."""
    made = {}
    for path, leaf in pathtree.flatten(params).items():
        made |= quantize.quantize_param(path, jnp.asarray(leaf), quantization)
    return pathtree.unflatten(made)


def dequantize(held: dict) -> np.ndarray:
    """What `quantize` made of one layer, as a matrix fp32 [I, O] again."""
    if "kernel_int8" in held:
        q = np.asarray(held["kernel_int8"])
    else:
        q = np.stack(quantize.unpack(held["kernel_int4"]), axis=1).reshape(-1, held["kernel_int4"].shape[-1])
    scale = np.asarray(held["kernel_scale"])
    return q * np.repeat(scale, len(q) // len(scale), axis=0)


def widened(params: dict) -> dict:
    """What `held_as` made, as matrices again: stacked layers one by one."""
    flat, made = pathtree.flatten(params), {}
    for path, leaf in flat.items():
        root, _, name = path.rpartition("/")
        if not name.startswith("kernel_"):
            made[path] = leaf
        elif name != "kernel_scale":
            layers = [{name: leaf[n], "kernel_scale": flat[f"{root}/kernel_scale"][n]} for n in range(len(leaf))]
            made[f"{root}/kernel"] = np.stack([dequantize(layer) for layer in layers])
    return pathtree.unflatten(made)


# --- one matrix


@settings(max_examples=25)
@given(st.sampled_from([(16, 3), (96, 5), (128, 1)]), st.sampled_from(QUANTIZATIONS), st.integers(-20, 20), st.integers(0, 2**31))
def test_no_weight_is_further_off_than_half_a_step(shape, quantization, magnitude, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_t(3, shape).astype(np.float32) * np.float32(2.0**magnitude)
    kernel[:, 0] = 0  # a dead output
    held = quantize.quantize(jnp.asarray(kernel), quantization)
    groups = 1 if quantization == "int8" else shape[0] // quantize.group_size(shape[0])
    assert held["kernel_scale"].shape == (groups, shape[1])
    scale = np.repeat(np.asarray(held["kernel_scale"]), shape[0] // groups, axis=0)
    found = dequantize(held)
    assert (np.abs(found - kernel) <= scale * 0.5001).all()
    assert (found[:, 0] == 0).all()
    assert np.abs(found).max() == pytest.approx(np.abs(kernel).max(), rel=1e-6), "the largest is kept"


def test_four_bits_pack_and_unpack_and_take_half_a_byte():
    q = np.random.default_rng(0).integers(-8, 8, (64, 7)).astype(np.int8)
    packed = quantize.pack(jnp.asarray(q))
    assert packed.dtype == jnp.uint8 and packed.nbytes * 2 == q.size
    even, odd = quantize.unpack(packed)
    np.testing.assert_array_equal(even, q[0::2])
    np.testing.assert_array_equal(odd, q[1::2])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_layers_are_made_one_by_one(quantization, dtype):
    """Equal to each alone, and without a wide copy of all of them."""
    stacked = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256, 64)), dtype)
    held = quantize.quantize_param("llm/layers/block/q/kernel", stacked, quantization)
    for n in (0, 7):
        alone = quantize.quantize_param("llm/layers/block/q/kernel", stacked[n], quantization)
        for path, leaf in alone.items():
            np.testing.assert_array_equal(held[path][n], leaf)
    memory = quantize._jitted().lower(stacked, quantization).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 256 * 64 * 4


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_product_is_that_with_the_widened_matrix(quantization):
    rng = np.random.default_rng(1)
    kernel, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((128, 24), (5, 128)))
    held = quantize.quantize(kernel, quantization)
    np.testing.assert_allclose(quantize.quantized_matmul(x, held, jnp.float32), x @ dequantize(held), rtol=1e-5, atol=1e-5)
    rough = np.asarray(quantize.quantized_matmul(x.astype(jnp.bfloat16), held, jnp.bfloat16), np.float32)
    error = np.linalg.norm(rough - np.asarray(x @ kernel)) / np.linalg.norm(x @ kernel)
    assert error < {"int8": 0.02, "int4": 0.15}[quantization]


# --- the model


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_what_is_held_is_what_the_model_of_that_config_expects(quantization):
    config = tiny_config(lora=LoraConfig(rank=2))
    held = held_as(random_params(config), quantization)
    expected = mimo.abstract(config.with_quantization(quantization))[1]
    assert {p: (x.shape, x.dtype) for p, x in pathtree.flatten(held).items()} == {
        p: (x.shape, x.dtype) for p, x in pathtree.flatten(expected).items()
    }
    names = {path.split("/")[3] for path in pathtree.flatten(held) if re.search(f"kernel_{quantization}$", path)}
    assert names == {"q", "k", "v", "o", "gate", "up", "down"}


def test_answers_are_those_of_the_widened_model(tmp_path, quantization="int4"):
    config = tiny_config(lora=LoraConfig(rank=2))
    words, image = tokenizer(tmp_path), np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    requests = [Request(image, "Segment the liver."), Request(image, "What is this?", Prompts(boxes=np.array([[2.0, 3, 20, 14]])))]
    held = held_as(random_params(config), quantization)
    got = Mimo(config.with_quantization(quantization), held, words).predict(requests)
    wide = Mimo(config, widened(held), words).predict(requests)
    for a, b in zip(got, wide, strict=True):
        assert a.text == b.text and len(a.entities) == len(b.entities)
        for x, y in zip(a.entities, b.entities, strict=True):
            assert (x.mask != y.mask).mean() < 0.01 and x.score == pytest.approx(y.score, abs=1e-3)


@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "bfloat16"), ("int4", "float32")])
def test_one_layer_is_widened_at_a_time(quantization, dtype):
    llm = LlamaConfig(vocab_size=64, width=256, layers=12, heads=4, kv_heads=4, mlp_width=512, max_length=64)
    config = tiny_config(llm=llm, dtype=dtype, frozen_dtype=dtype).with_quantization(quantization)
    graphdef, params = mimo.abstract(config)
    x, positions = jax.ShapeDtypeStruct((1, 8, llm.width), jnp.dtype(dtype)), jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def forward(params, x, positions):
        return scan.bind(graphdef, params).decode(x, positions)

    memory = jax.jit(forward, compiler_options=compiler_options(config)).lower(params, x, positions).compile().memory_analysis()
    layer = 4 * (4 * llm.width * llm.width + 3 * llm.width * llm.mlp_width)  # bytes in fp32
    assert memory.temp_size_in_bytes < 2 * layer


def test_weights_are_named_and_must_be_possible():
    with pytest.raises(ConfigError, match="quantization: is 'int3'; use one of int8, int4"):
        tiny_config().with_quantization("int3")
    odd = tiny_config()
    odd.model.llm.mlp_width = 33
    assert odd.with_quantization("int8").model.llm.quantization == "int8"
    with pytest.raises(ConfigError, match="int4 needs an even width.*use int8"):
        odd.with_quantization("int4")
    with pytest.raises(ConfigError, match="config.model.llm.quantization: is for inference only.*--quantize int8"):
        tiny_config().with_quantization("int8").validate()
