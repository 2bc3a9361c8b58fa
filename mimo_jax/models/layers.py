"""Layers that several parts of the model share.

Axis letters: N images, H image side in pixels, I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def layer_norm(width: int, eps: float, *, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis, with statistics in float32 and in two passes, as in torch."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def patch_embedding(size: int, width: int, *, use_bias: bool, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """[N, H, H, 3] -> [N, H/size, H/size, width], one token for each patch of size x size pixels."""
    return nnx.Conv(
        3, width, (size, size), strides=size, padding="VALID", use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), exact, with erf as in torch. The default of jax.nn is the tanh approximation, and its exact form uses the slower erfc."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x), which OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


class Linear(nnx.Linear):
    """nnx.Linear over the last axis, [..., I] -> [..., O], with all leading axes folded into one.

    The weight gradient then contracts one axis; with two axes, XLA on the CPU is four times slower."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
