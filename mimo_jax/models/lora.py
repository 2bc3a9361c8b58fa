"""A linear map with an optional low-rank update (LoRA).

Axis letters: ... any leading axes, I inputs, O outputs, R rank.

y = x W + (alpha / rank) (x A) B, as in PEFT: A is uniform in ±1/sqrt(I) and B is zero, so that the update is
zero at the start. Rank 0 makes no parameters. W may be stored as integers (`quantize`) for inference.

In training, x is dropped out before A, as with PEFT's `lora_dropout`: an element is zero with probability p, otherwise divided by 1 - p.
x W is never dropped out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax import quantize


def _uniform(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def sample_keys(seed: int, step: jax.Array, samples: int) -> jax.Array:
    """Keys of the dropout of one step, [B] for B samples. They depend on the seed, the step and the row of the sample in the batch alone,
    so that a resumed run and one on another mesh drop out the same elements."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(samples))


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """x [B, ...] with each element zero with probability `rate`, otherwise divided by 1 - rate. keys [B]: one for each sample."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


class LoraLinear(nnx.Module):
    """[..., I] -> [..., O] without a bias (Llama's projections have none)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rank: int = 0,
        alpha: float = 1.0,
        dropout: float = 0.0,
        quantization: str = "",
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """quantization: "" for W in `param_dtype`, or "int8", "int4"."""
        stored = quantize.quantize(jax.random.normal(rngs.params(), (inputs, outputs), param_dtype) * inputs**-0.5, quantization)
        for name, leaf in stored.items():
            setattr(self, name, nnx.Param(leaf))
        self.storage = tuple(stored)
        self.dtype = dtype
        self.scale = alpha / rank if rank else 0.0
        self.dropout = dropout
        if rank:  # these parameters train, so they are always fp32
            self.lora_a = nnx.Param(_uniform(rngs.params(), (inputs, rank), jnp.float32))
            self.lora_b = nnx.Param(jnp.zeros((rank, outputs), jnp.float32))

    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """dropout_keys [B], one for each row of x [B, ..., I]: drop out x before A; None outside training."""
        lead, inputs = x.shape[:-1], x.shape[-1]
        dropped = x if dropout_keys is None or not self.scale else dropout(x, self.dropout, dropout_keys)
        x, dropped = x.reshape(-1, inputs), dropped.reshape(-1, inputs)  # one contracted axis in the weight gradient: see layers.Linear
        y = quantize.quantized_matmul(x, {name: getattr(self, name)[...] for name in self.storage}, self.dtype)
        if self.scale:
            y = y + (dropped @ self.lora_a[...].astype(self.dtype)) @ self.lora_b[...].astype(self.dtype) * self.scale
        return y.reshape(*lead, -1)


def merge_lora(flat: dict[str, jax.Array], alpha: float) -> dict[str, jax.Array]:
    """Fold every update into its base matrix: {path: array} with `…/lora_a`, `…/lora_b` -> without them, W + (alpha/R) A B.

    Stacked layers (leading axes) are folded layer by layer. The sum is computed in fp32 and cast to the dtype of W."""
    merged = {path: leaf for path, leaf in flat.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path, a in flat.items():
        if path.endswith("/lora_a"):
            root = path.removesuffix("/lora_a")
            kernel, b = flat[f"{root}/kernel"], flat[f"{root}/lora_b"]
            update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * (alpha / a.shape[-1])
            merged[f"{root}/kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return merged
