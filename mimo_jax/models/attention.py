"""The attention of every tower; for long sequences it calls a kernel of `kernels`.

Axis letters: B batch, T queries, S keys, H heads, G key-value heads, K head width, V value width,
N groups of rows that share J prefix keys, g side of a token grid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mimo_jax.models import kernels, mesh


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    prefix_kv: tuple[jax.Array, jax.Array] | None = None,
    causal: bool = False,
) -> jax.Array:
    """softmax(scale · q kᵀ + bias) v, with the softmax in float32.

    q [B, T, H, K], k [B, S, H, K], v [B, S, H, V] -> [B, T, H, V] in the dtype of v. k and v may have fewer heads G, each of which
    serves H/G consecutive heads of q (grouped-query attention; a mask is then the same for all heads, and there is no bias).
    mask: bool, broadcastable to [B, H, T, S], True where a query may attend; a query that may attend nowhere gets the mean of all
    values, not NaN. bias: broadcastable to [B, H, T, S]. scale: K ** -0.5 by default.
    prefix_kv: further keys and values [N, J, H, K], [N, J, H, V], unmasked; rows n·B/N … (n+1)·B/N - 1 attend to the n-th. The
    result is the same as if they were repeated for each row and placed before k and v.
    causal: query t attends only to keys 0 … t; use it instead of a mask, so that a kernel can be used (`kernels`).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None and bias is None and prefix_kv is None:
        context = mesh.current()
        kernel = kernels.select_kernel(context, q.dtype, q.shape[1], k.shape[1], q.shape[3])
        if kernel == "splash":
            return kernels.run_splash(q, k, v, scale, causal, context)
        if kernel == "cudnn":
            return kernels.run_cudnn(q, k, v, scale, causal)
        if kernel == "chunked":
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
            return kernels.run_chunked(q, k, v, scale, causal)
    if causal:
        mask = (jnp.arange(k.shape[1]) <= jnp.arange(q.shape[1])[:, None])[None, None]
    if k.shape[2] < q.shape[2]:
        return _attend_grouped(q, k, v, mask, scale)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # heads first: batched matrix products without a transposed operand
    logits = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    if prefix_kv is None:
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bhts,bhsv->bhtv", weights, v).swapaxes(1, 2)

    k_prefix, v_prefix = (x.swapaxes(1, 2) for x in prefix_kv)
    (b, h, t, _), n, j = q.shape, k_prefix.shape[0], k_prefix.shape[2]

    def group_rows(x: jax.Array) -> jax.Array:  # [B, H, T, .] -> [N, H, B/N * T, .]: rows that share keys are in one matrix product
        return x.reshape(n, b // n, h, t, -1).swapaxes(1, 2).reshape(n, h, b // n * t, -1)

    def ungroup_rows(x: jax.Array) -> jax.Array:
        return x.reshape(n, h, b // n, t, -1).swapaxes(1, 2).reshape(b, h, t, -1)

    logits_prefix = ungroup_rows(jnp.einsum("nhtk,nhjk->nhtj", group_rows(q), k_prefix, preferred_element_type=jnp.float32)) * scale
    weights = jax.nn.softmax(jnp.concatenate([logits_prefix, logits], axis=-1), axis=-1).astype(v.dtype)
    out = ungroup_rows(jnp.einsum("nhtj,nhjv->nhtv", group_rows(weights[..., :j]), v_prefix))
    return (out + jnp.einsum("bhts,bhsv->bhtv", weights[..., j:], v)).swapaxes(1, 2)


def _attend_grouped(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, scale: float) -> jax.Array:
    """The heads of q that share keys are stacked along the query axis, so that keys and values are not repeated."""
    b, t, h, _ = q.shape
    groups = k.shape[2]
    q = q.reshape(b, t, groups, h // groups, -1).transpose(0, 3, 1, 2, 4).reshape(b, h // groups * t, groups, -1)
    if mask is not None:
        mask = jnp.tile(jnp.broadcast_to(mask, (*mask.shape[:-2], t, k.shape[1])), (1, 1, h // groups, 1))
    out = attention(q, k, v, mask=mask, scale=scale)
    return out.reshape(b, h // groups, t, groups, -1).transpose(0, 2, 3, 1, 4).reshape(b, t, h, -1)


def fold_relative_position(q: jax.Array, k: jax.Array, rows: jax.Array, columns: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """SAM's decomposed relative position, folded into queries and keys, so that every kernel can be used without a bias.

    q, k [B, g*g, H, K]; rows, columns [2g-1, K]: entry d + g - 1 is for a query d rows (columns) after its key.
    Returns q' = [scale·q, rel_h, rel_w] and k' = [k, onehot(row), onehot(column)], both [B, g*g, H, K + 2g], with
    q'·k' = scale · q·k + q·rows[Δy] + q·columns[Δx] exactly. The position terms use the unscaled q, as in
    segment-anything's `add_decomposed_rel_pos`. Call `attention` on them with scale=1.
    """
    b, t, h, _ = q.shape
    g = (rows.shape[0] + 1) // 2
    offset = jnp.arange(g)[:, None] - jnp.arange(g)[None, :] + g - 1  # [query, key]
    grid = q.reshape(b, g, g, h, -1)
    rel_h = jnp.einsum("byxhk,ysk->byxhs", grid, rows.astype(q.dtype)[offset])
    rel_w = jnp.einsum("byxhk,xsk->byxhs", grid, columns.astype(q.dtype)[offset])
    position = jnp.concatenate([rel_h, rel_w], axis=-1).reshape(b, t, h, 2 * g)

    one = jnp.eye(g, dtype=k.dtype)
    place = jnp.concatenate([jnp.repeat(one, g, axis=0), jnp.tile(one, (g, 1))], axis=-1)  # [g*g, 2g]
    place = jnp.broadcast_to(place[None, :, None, :], (b, t, h, 2 * g))
    return jnp.concatenate([q * scale, position], axis=-1), jnp.concatenate([k, place], axis=-1)
