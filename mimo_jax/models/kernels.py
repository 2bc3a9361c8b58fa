"""Attention of long sequences without its matrix of logits: which kernel serves where, and the kernels.

Axis letters: B batch, T queries, S keys, H heads, G key-value heads, K head width, V value width, C queries of a chunk.

Short sequences, masks of any shape and biases are left to `attention`'s plain form, which XLA fuses well enough.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mimo_jax.models.mesh import MeshContext
from mimo_jax.sharding import LOGICAL_AXES, mesh_axes

_CHUNK_LOGITS = 2**20  # of one head in one chunk
_LONG = 2**21  # logits of one head from which on they are not to exist at once
_FLASH = 256  # tokens from which on a flash kernel is worth its start


def choose(at: MeshContext, dtype, queries: int, keys: int, width: int) -> str:
    """ "splash" (TPU, Pallas), "cudnn" (NVIDIA), "chunked" (anywhere, logits of a few queries at a time) or "plain", for attention
    without a mask or a causal one, of heads `width` wide.

    Splash wants whole tiles of 128 tokens, and its mesh: XLA cannot split it. cuDNN wants 16 bits, a width that 8 divides, and takes 128
    of it before Hopper, 256 from there on."""
    if at.platform == "tpu" and queries == keys and queries >= _FLASH and queries % 128 == 0 and (at.mesh is not None or at.devices == 1):
        return "splash"
    if at.platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and queries == keys and queries >= _FLASH and width % 8 == 0:
        if at.capability >= 8 and width <= (256 if at.capability >= 9 else 128):
            return "cudnn"
    return "chunked" if queries * keys >= _LONG else "plain"


def run_splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool, at: MeshContext, interpret: bool = False) -> jax.Array:
    """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] -> [B, T, H, V], each device with its own samples and heads. interpret: run the kernel
    on any device, slowly."""
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    shares = 1 if at.mesh is None else math.prod(at.mesh.shape[axis] for axis in LOGICAL_AXES["kv_heads"])
    if groups % shares:
        shares = 1
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
    )
    mask = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (heads // shares)), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def local(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    q = (q * scale).astype(q.dtype)
    if at.mesh is None:
        return local(q, k, v)
    spec = mesh_axes("batch", "sequence", "kv_heads" if shares > 1 else None)
    return jax.shard_map(local, mesh=at.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)


def run_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """Shapes as `run_splash`. V is padded with zeros to K, as JAX asks for."""
    width = v.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - width)])
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="cudnn")[..., :width]


def run_chunked(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """q [B, T, H, K], k [B, S, H, K], v [B, S, H, V] -> [B, T, H, V]: the plain form for C queries after C, logits [B, H, C, S]; the
    backward pass makes them anew."""
    b, length, h, width = q.shape
    chunk = max(1, _CHUNK_LOGITS // k.shape[1])
    pieces = -(-length // chunk)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def body(_, piece):
        q, first = piece
        logits = jnp.einsum("bhck,bhsk->bhcs", q, k, preferred_element_type=jnp.float32) * scale
        if causal:
            rows = first + jnp.arange(chunk)[:, None]
            logits = jnp.where(jnp.arange(k.shape[2])[None] <= rows, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return None, jnp.einsum("bhcs,bhsv->bhcv", weights, v)

    q = jnp.pad(q, [(0, 0), (0, pieces * chunk - length), (0, 0), (0, 0)])
    q = q.reshape(b, pieces, chunk, h, width).transpose(1, 0, 3, 2, 4)
    _, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (q, np.arange(pieces) * chunk))
    return out.transpose(1, 0, 3, 2, 4).reshape(b, pieces * chunk, h, -1)[:, :length]
