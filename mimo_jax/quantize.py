"""Weights of the language model as integers of 8 or 4 bits, for inference: half or a quarter of the memory of bf16.

Axis letters: ... any leading axes (stacked layers), B rows of x, I inputs, O outputs, G groups of I/G inputs, J inputs of one half.

W[i, o] ≈ scale[g, o] · q[i, o], symmetric, with q rounded to nearest and scale = max|W| / (largest q). int8: one group for the whole
column of an output, q in ±127. int4: groups of at most 64 inputs, q in ±7; rows 2i and 2i+1 share a byte, the even one in its lower
half, so that memory is halved on every backend (XLA's own int4 needs a byte per element outside compiled programs).
"""

from __future__ import annotations

import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp

# The matrices that are stored as integers: those of the language model's layers, nine tenths of its memory.
QUANTIZED = r"^llm/.*/(q|k|v|o|gate|up|down)/kernel$"
_GROUP = 64  # inputs that share a scale in int4


def quantize(kernel: jax.Array, quantization: str) -> dict[str, jax.Array]:
    """A matrix [..., I, O] as the arrays that are stored instead. quantization "": {"kernel"} unchanged; "int8": {"kernel_int8" int8
    [..., I, O], "kernel_scale" fp32 [..., 1, O]}; "int4": {"kernel_int4" uint8 [..., I/2, O], "kernel_scale" fp32 [..., G, O]}."""
    if not quantization:
        return {"kernel": kernel}
    layers = kernel.reshape(-1, *kernel.shape[-2:])
    # One layer after the other, so that only one is in fp32 at a time.
    stored = jax.lax.map(partial(_quantize_layer, quantization=quantization), layers)
    return {name: leaf.reshape(*kernel.shape[:-2], *leaf.shape[1:]) for name, leaf in stored.items()}


def _quantize_layer(kernel: jax.Array, quantization: str) -> dict[str, jax.Array]:
    inputs, outputs = kernel.shape
    groups, q_max = (1, 127) if quantization == "int8" else (inputs // group_size(inputs), 7)
    w = kernel.astype(jnp.float32).reshape(groups, inputs // groups, outputs)
    scale = jnp.max(jnp.abs(w), axis=1) / q_max  # [G, O]
    q = jnp.round(w / jnp.where(scale > 0, scale, 1.0)[:, None]).astype(jnp.int8).reshape(inputs, outputs)
    return {"kernel_int8": q, "kernel_scale": scale} if quantization == "int8" else {"kernel_int4": pack(q), "kernel_scale": scale}


def group_size(inputs: int) -> int:
    """Inputs that share a scale in int4: the largest power of two, at most 64, that divides their number."""
    return min(inputs & -inputs, _GROUP)


def pack(q: jax.Array) -> jax.Array:
    """Integers -8 … 7 [I, O] -> uint8 [I/2, O]."""
    low, high = q[0::2].astype(jnp.uint8), q[1::2].astype(jnp.uint8)
    return (low & 15) | (high << 4)


def unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of `pack`: uint8 [I/2, O] -> the even and the odd rows, each int8 [I/2, O]."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    return (signed << 4) >> 4, signed >> 4


def quantized_matmul(x: jax.Array, stored: dict[str, jax.Array], dtype) -> jax.Array:
    """x [B, I] in `dtype` times one layer's matrix, stored as `quantize` returns it -> [B, O] in `dtype`. It is dequantized here."""
    if "kernel" in stored:
        return x @ stored["kernel"].astype(dtype)
    product, scale = partial(jnp.matmul, preferred_element_type=jnp.float32), stored["kernel_scale"]
    if "kernel_int8" in stored:  # one scale per output can be applied after the product; integers up to 127 are exact in bf16
        return (product(x, stored["kernel_int8"].astype(dtype)) * scale).astype(dtype)
    halves = x.reshape(len(x), -1, 2)  # even and odd inputs separately, so that no matrix has to be interleaved
    even, odd = (_scaled(q, scale).astype(dtype) for q in unpack(stored["kernel_int4"]))
    return (product(halves[..., 0], even) + product(halves[..., 1], odd)).astype(dtype)


def _scaled(q: jax.Array, scale: jax.Array) -> jax.Array:
    """int8 [J, O] times the scales [G, O] of its groups -> fp32 [J, O]."""
    return (q.reshape(scale.shape[0], -1, q.shape[-1]) * scale[:, None]).reshape(q.shape)


def quantize_param(
    path: str, leaf: jax.Array | jax.ShapeDtypeStruct, quantization: str
) -> dict[str, jax.Array] | dict[str, jax.ShapeDtypeStruct]:
    """One parameter of a model, or its shape -> {path: array} of the same model with the language model's matrices quantized to
    `quantization`."""
    if not quantization or not re.search(QUANTIZED, path):
        return {path: leaf}
    made = _jitted()(leaf, quantization) if isinstance(leaf, jax.Array) else _jitted().eval_shape(leaf, quantization)
    return {path.removesuffix("kernel") + name: array for name, array in made.items()}


@lru_cache(maxsize=1)
def _jitted():
    # On a CPU XLA would hoist a float32 copy of all layers in bf16 out of the loop over them.
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if jax.default_backend() == "cpu" else None
    return jax.jit(quantize, static_argnums=1, compiler_options=options)
