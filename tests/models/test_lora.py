"""LoRA against peft."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

from mimo_jax.models.lora import LoraLinear, dropout, merge_lora, sample_keys


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


class _Mask(torch.nn.Module):
    """torch's dropout with a mask that is given."""

    def __init__(self, factors: np.ndarray):
        super().__init__()
        self.factors = torch.tensor(factors)

    def forward(self, x):
        return x * self.factors


def test_dropout_equals_peft_with_the_same_mask():
    """Output and gradients: the base sees the whole input, A the one with elements dropped out and the others divided by 1 - p."""
    layer = LoraLinear(10, 12, rank=4, alpha=6.0, dropout=0.3, rngs=nnx.Rngs(0))
    layer.lora_b[...] = jnp.asarray(np.random.default_rng(0).normal(size=(4, 12)), jnp.float32)
    keys = sample_keys(seed=1, step=jnp.int32(7), samples=3)
    x = np.random.default_rng(1).normal(size=(3, 5, 10)).astype(np.float32)
    factors = np.asarray(dropout(jnp.ones_like(x), 0.3, keys))
    assert set(np.unique(factors)) == {np.float32(0), np.float32(1 / 0.7)}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.3)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(10, 12, bias=False)), config)
    linear = model.base_model.model[0]
    assert isinstance(linear.lora_dropout["default"], torch.nn.Dropout)
    linear.lora_dropout["default"] = _Mask(factors)
    with torch.no_grad():
        linear.base_layer.weight.copy_(torch.tensor(np.asarray(layer.kernel[...]).T))
        linear.lora_A["default"].weight.copy_(torch.tensor(np.asarray(layer.lora_a[...]).T))
        linear.lora_B["default"].weight.copy_(torch.tensor(np.asarray(layer.lora_b[...]).T))
    given = torch.tensor(x, requires_grad=True)
    want = model(given)
    (want**2).sum().backward()
    graphdef, state = nnx.split(layer)

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x, keys)
        return (y**2).sum(), y

    (grads, grad_x), got = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, jnp.asarray(x))
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_x, given.grad.numpy(), rtol=1e-4, atol=1e-4)
    for name, weight in (("lora_a", linear.lora_A["default"].weight), ("lora_b", linear.lora_B["default"].weight)):
        np.testing.assert_allclose(grads[name][...], weight.grad.numpy().T, rtol=1e-4, atol=1e-4)
    model.eval()
    linear.lora_dropout["default"] = torch.nn.Dropout(0.3).eval()
    np.testing.assert_allclose(layer(jnp.asarray(x)), model(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_expectation_and_variance_of_dropout_are_those_of_torch():
    """E = x and Var = x² p / (1 - p), over 20,000 samples."""
    x, p, count = np.array([0.5, -2.0, 3.0], np.float32), 0.05, 20_000
    ours = np.asarray(dropout(jnp.broadcast_to(x, (count, 3)), p, sample_keys(0, jnp.int32(3), count)))
    torch.manual_seed(0)
    theirs = torch.nn.functional.dropout(torch.tensor(x).expand(count, 3), p).numpy()
    for values in (ours, theirs):
        np.testing.assert_allclose(values.mean(0), x, rtol=0.01)
        np.testing.assert_allclose(values.var(0), x**2 * p / (1 - p), rtol=0.1)
    assert abs(np.corrcoef((ours == 0).T.astype(float))[0, 1]) < 0.05
