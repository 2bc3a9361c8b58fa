"""LoRA against peft."""

import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

from mimo_jax.models.lora import LoraLinear, merge_lora


def _layer(rank=4, alpha=6.0):
    layer = LoraLinear(10, 12, rank=rank, alpha=alpha, rngs=nnx.Rngs(0))
    if rank:
        layer.lora_b[...] = jnp.asarray(np.random.default_rng(0).normal(size=(rank, 12)), jnp.float32)
    return layer


def test_forward_equals_peft():
    layer = _layer()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(10, 12, bias=False)), config)
    linear = model.base_model.model[0]
    with torch.no_grad():
        linear.base_layer.weight.copy_(torch.tensor(np.asarray(layer.kernel[...]).T))
        linear.lora_A["default"].weight.copy_(torch.tensor(np.asarray(layer.lora_a[...]).T))
        linear.lora_B["default"].weight.copy_(torch.tensor(np.asarray(layer.lora_b[...]).T))
    x = np.random.default_rng(1).normal(size=(5, 10)).astype(np.float32)
    np.testing.assert_allclose(layer(jnp.asarray(x)), model(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_step_zero_equals_the_base():
    layer = LoraLinear(10, 12, rank=4, alpha=8.0, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 10))
    np.testing.assert_array_equal(layer(x), x @ layer.kernel[...])
    assert np.abs(layer.lora_a[...]).max() > 0


def test_rank_zero_makes_no_parameters():
    assert set(nnx.to_pure_dict(nnx.state(_layer(rank=0)))) == {"kernel"}


def test_merge_computes_the_same():
    layer = _layer()
    flat = {f"llm/q/{name}": value for name, value in nnx.to_pure_dict(nnx.state(layer)).items()}
    merged = merge_lora(flat, alpha=6.0)
    assert set(merged) == {"llm/q/kernel"}
    x = np.random.default_rng(1).normal(size=(5, 10)).astype(np.float32)
    np.testing.assert_allclose(x @ merged["llm/q/kernel"], layer(jnp.asarray(x)), rtol=1e-5, atol=1e-5)


def test_merge_folds_stacked_layers_one_by_one():
    rng = np.random.default_rng(0)
    flat = {
        "llm/q/kernel": jnp.asarray(rng.normal(size=(3, 4, 5))),
        "llm/q/lora_a": jnp.asarray(rng.normal(size=(3, 4, 2))),
        "llm/q/lora_b": jnp.asarray(rng.normal(size=(3, 2, 5))),
    }
    merged = merge_lora(flat, alpha=1.0)["llm/q/kernel"]
    for i in range(3):
        want = flat["llm/q/kernel"][i] + flat["llm/q/lora_a"][i] @ flat["llm/q/lora_b"][i] / 2
        np.testing.assert_allclose(merged[i], want, rtol=1e-5)
