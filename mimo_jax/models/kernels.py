"""Attention of long sequences without the full matrix of logits: the choice of a kernel, and the kernels.

Axis letters: B batch, T queries, S keys, H heads, G key-value heads, K head width, V value width, C queries of a chunk.

Short sequences, arbitrary masks and biases use the plain form in `attention`, which XLA fuses well enough.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mimo_jax.models.mesh import MeshContext
from mimo_jax.sharding import LOGICAL_AXES, mesh_axes

_CHUNK_LOGITS = 2**20  # logits of one head in one chunk
_LONG = 2**21  # from this number of logits per head on, they are not all in memory at once
_FLASH = 256  # from this number of tokens on, a flash kernel is worth its launch


def select_kernel(context: MeshContext, dtype, queries: int, keys: int, width: int) -> str:
    """The kernel for attention without a mask or with a causal one, for heads of this width: "splash" (TPU, Pallas), "cudnn" (NVIDIA),
    "chunked" (any device, logits of a few queries at a time) or "plain".

    Splash needs whole tiles of 128 tokens and, on several devices, a mesh, because XLA cannot partition it. cuDNN needs a 16-bit dtype
    and a width that is a multiple of 8: at most 128 before Hopper, at most 256 since."""
    flash = queries == keys and queries >= _FLASH
    if context.platform == "tpu" and flash and queries % 128 == 0 and (context.mesh is not None or context.devices == 1):
        return "splash"
    if context.platform == "gpu" and flash and jnp.dtype(dtype).itemsize == 2 and width % 8 == 0:
        if context.capability >= 8 and width <= (256 if context.capability >= 9 else 128):
            return "cudnn"
    return "chunked" if queries * keys >= _LONG else "plain"


def run_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool, context: MeshContext, interpret: bool = False
) -> jax.Array:
    """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] -> [B, T, H, V]; each device computes its own samples and heads. interpret: run the
    kernel on any device, slowly."""
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    head_shards = 1 if context.mesh is None else math.prod(context.mesh.shape[axis] for axis in LOGICAL_AXES["kv_heads"])
    if groups % head_shards:
        head_shards = 1
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
    )
    mask = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (heads // head_shards)), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def local(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    q = (q * scale).astype(q.dtype)
    if context.mesh is None:
        return local(q, k, v)
    spec = mesh_axes("batch", "sequence", "kv_heads" if head_shards > 1 else None)
    return jax.shard_map(local, mesh=context.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)


def run_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """Shapes as in `run_splash`. V is padded with zeros to K, as JAX requires."""
    width = v.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - width)])
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="cudnn")[..., :width]


def run_chunked(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """q [B, T, H, K], k [B, S, H, K], v [B, S, H, V] -> [B, T, H, V]: the plain form for C queries at a time, with logits [B, H, C, S],
    which the backward pass recomputes."""
    b, length, h, width = q.shape
    chunk = max(1, _CHUNK_LOGITS // k.shape[1])
    num_chunks = -(-length // chunk)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def body(_, piece):
        q, first = piece
        logits = jnp.einsum("bhck,bhsk->bhcs", q, k, preferred_element_type=jnp.float32) * scale
        if causal:
            rows = first + jnp.arange(chunk)[:, None]
            logits = jnp.where(jnp.arange(k.shape[2])[None] <= rows, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return None, jnp.einsum("bhcs,bhsv->bhcv", weights, v)

    q = jnp.pad(q, [(0, 0), (0, num_chunks * chunk - length), (0, 0), (0, 0)])
    q = q.reshape(b, num_chunks, chunk, h, width).transpose(1, 0, 3, 2, 4)
    _, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (q, np.arange(num_chunks) * chunk))
    return out.transpose(1, 0, 3, 2, 4).reshape(b, num_chunks * chunk, h, -1)[:, :length]
