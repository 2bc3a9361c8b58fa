"""Llama with grouped-query attention, LoRA and a KV cache; the rows of the grounding tokens are separate parameters.

Axis letters: B batch, T new tokens, S cache slots, D width, H heads, G key-value heads, K head width,
F MLP width, V base vocabulary, E grounding tokens, N layers.

The semantics are those of transformers' LlamaForCausalLM: rotate-half rotary embedding with HF-permuted weights,
RMSNorm in fp32, SwiGLU.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import GROUNDING_TOKENS, LlamaConfig, LlmConfig, LoraConfig
from mimo_jax.models.attention import attention
from mimo_jax.models.counts import MatmulCounts, attention_flops
from mimo_jax.models.lora import LoraLinear
from mimo_jax.models.scan import SCAN, ScanConfig, ScannedLayers


class RmsNorm(nnx.Module):
    """x / rms(x) * scale, computed in fp32 for every dtype."""

    def __init__(self, width: int, eps: float, *, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


def rotary(positions: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] -> (cos, sin), each fp32 [B, T, 1, K]."""
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate-half rotary embedding of x [B, T, H, K]."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


class LlamaLayer(nnx.Module):
    """Pre-norm attention and SwiGLU. It is called on (x, cache), so that the cache is a carry of the scan and updated in place."""

    def __init__(self, cfg: LlamaConfig, lora: LoraConfig, targets: tuple[str, ...], *, dtype, param_dtype, rngs: nnx.Rngs):
        head_width = cfg.width // cfg.heads
        self.heads, self.kv_heads, self.head_width = cfg.heads, cfg.kv_heads, head_width
        self.matrices = cfg.lora_names()

        def linear(name: str, inputs: int, outputs: int) -> LoraLinear:
            rank = lora.rank if name in targets else 0
            how = {"rank": rank, "alpha": lora.alpha, "dropout": lora.dropout, "quantization": cfg.quantization}
            return LoraLinear(inputs, outputs, **how, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.attention_norm = RmsNorm(cfg.width, cfg.eps, param_dtype=param_dtype)
        self.q = linear("q", cfg.width, cfg.heads * head_width)
        self.k = linear("k", cfg.width, cfg.kv_heads * head_width)
        self.v = linear("v", cfg.width, cfg.kv_heads * head_width)
        self.o = linear("o", cfg.heads * head_width, cfg.width)
        self.mlp_norm = RmsNorm(cfg.width, cfg.eps, param_dtype=param_dtype)
        self.gate = linear("gate", cfg.width, cfg.mlp_width)
        self.up = linear("up", cfg.width, cfg.mlp_width)
        self.down = linear("down", cfg.mlp_width, cfg.width)

    def __call__(self, carry, positions, cos: jax.Array, sin: jax.Array, mask, dropout_keys=None, *, index: jax.Array):
        """mask [B, 1, T, S] or None; dropout_keys and the rest are those of `Llama.__call__`. index: the number of the layer."""
        x, cache = carry
        b, t, _ = x.shape
        keys = dict.fromkeys(self.matrices)
        if dropout_keys is not None:  # every matrix of every layer drops out other elements
            fold = jax.vmap(jax.random.fold_in, (0, None))
            keys = {name: fold(dropout_keys, index * len(self.matrices) + i) for i, name in enumerate(self.matrices)}
        y = self.attention_norm(x)
        q = rotate(self.q(y, keys["q"]).reshape(b, t, self.heads, self.head_width), cos, sin)
        k = rotate(self.k(y, keys["k"]).reshape(b, t, self.kv_heads, self.head_width), cos, sin)
        v = self.v(y, keys["v"]).reshape(b, t, self.kv_heads, self.head_width)
        if cache is not None:
            rows, groups, slots = jnp.arange(b)[:, None, None], jnp.arange(self.kv_heads)[None, :, None], positions[:, None, :]
            new = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
            cache = {name: kept.at[index, rows, groups, slots].set(new[name].astype(kept.dtype)) for name, kept in cache.items()}
            k, v = (cache[name][index].astype(x.dtype).swapaxes(1, 2) for name in ("k", "v"))
        x = x + self.o(attention(q, k, v, mask=mask, causal=cache is None).reshape(b, t, -1), keys["o"])
        y = self.mlp_norm(x)
        x = x + self.down(jax.nn.silu(self.gate(y, keys["gate"])) * self.up(y, keys["up"]), keys["down"])
        return x, cache


class Llama(nnx.Module):
    """The decoder layers and the final norm; embeddings and head are `TokenEmbedding` and `LanguageHead`."""

    def __init__(
        self,
        cfg: LlamaConfig,
        lora: LoraConfig,
        targets: tuple[str, ...],
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        scan: ScanConfig = SCAN,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        self.dtype = dtype
        self.layers = ScannedLayers(
            lambda r: LlamaLayer(cfg, lora, targets, dtype=dtype, param_dtype=param_dtype, rngs=r), cfg.layers, rngs=rngs, scan=scan
        )
        self.norm = RmsNorm(cfg.width, cfg.eps, param_dtype=param_dtype)

    def new_cache(self, batch: int, length: int) -> dict[str, jax.Array]:
        """Zeros {"k", "v"}, each [N, B, G, S, K], with heads first, as attention reads them at every token. Slot s of a row is for
        the token at position s."""
        shape = (self.cfg.layers, batch, self.cfg.kv_heads, length, self.cfg.width // self.cfg.heads)
        return {"k": jnp.zeros(shape, self.dtype), "v": jnp.zeros(shape, self.dtype)}

    @staticmethod
    def extend_cache(cache: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
        """The same cache with room for `length` tokens."""
        return jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, length - a.shape[3]), (0, 0)]), cache)

    @staticmethod
    def cache_length(cache: dict[str, jax.Array]) -> int:
        """S, the number of tokens that a cache has room for."""
        return cache["k"].shape[3]

    @staticmethod
    def cache_axes() -> tuple[str | None, ...]:
        """Logical axes (`sharding.LOGICAL_AXES`) of every array of a cache."""
        return None, None, "kv_heads", None, None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: dict[str, jax.Array] | None = None,
        dropout_keys: jax.Array | None = None,
    ):
        """x [B, T, D] at `positions` int [B, T] (0 … T-1 without a cache) -> hidden [B, T, D] after the final norm.

        With a cache, new keys and values are written to the slots `positions`, a query at position p attends to
        slots 0 … p, and (hidden, cache) is returned. Rows are filled from slot 0 without gaps, so right padding needs no mask:
        a padded slot is beyond every real query, and the next real token overwrites it.

        dropout_keys [B] (`lora.sample_keys`): LoRA's dropout, in training alone.
        """
        mask = None
        if cache is not None:
            mask = (jnp.arange(self.cache_length(cache)) <= positions[:, :, None])[:, None]  # [B, 1, T, S]
        cos, sin = rotary(positions, self.cfg.width // self.cfg.heads, self.cfg.rope_theta)
        index = {"index": jnp.arange(self.cfg.layers)}
        out, cache_out = self.layers((x.astype(self.dtype), cache), positions, cos, sin, mask, dropout_keys, per_layer=index)
        hidden = self.norm(out)
        return hidden if cache is None else (hidden, cache_out)


def matmul_counts(cfg: LlamaConfig, length: int) -> MatmulCounts:
    """Counts of one sample of `length` tokens; causal attention is half a square."""
    return MatmulCounts({r"^llm/": length}, cfg.layers * attention_flops(length, length / 2, cfg.width))


# Standard deviation of randomly initialised rows. It is far above the customary 0.02, so that words stand out from what the layers of a
# small model add to them before it has learnt anything. Tokens that are added to a trained model are drawn by `draw_grounding` instead.
EMBEDDING_STD = 0.5
# Parameters of the grounding tokens -> the axis of the tokens in them and in the base.
GROUNDING_AXES = {"embedding/grounding": 0, "lm_head/grounding": 1}


def draw_grounding(path: str, base: jax.Array, num_tokens: int, key: jax.Array) -> jax.Array:
    """Initial values of a parameter of the grounding tokens, fp32, that fit the trained base of the language model: [E, D] for base [V, D]
    of the embedding, [D, E] for base [D, V] of the head. Each of the D entries is normal with the mean and standard deviation that it
    has over the base vocabulary.

    With EMBEDDING_STD instead, rows of a base with a deviation of 0.02 are drowned: the state of <SEG> is then nearly the same in every
    context. `resize_token_embeddings` of transformers takes the same statistics, but scales the covariance by 1e-9, so that its new
    tokens are equal but for 1 part in 10,000; these three must differ from the first step on."""
    axis = GROUNDING_AXES[path]
    base = base.astype(jnp.float32)
    mean, std = base.mean(axis, keepdims=True), base.std(axis, keepdims=True)
    shape = (num_tokens, base.shape[1]) if axis == 0 else (base.shape[0], num_tokens)
    return mean + std * jax.random.normal(key, shape, jnp.float32)


class TokenEmbedding(nnx.Module):
    """Rows of the base vocabulary [V, D] and of the grounding tokens [E, D]; with LoRA only the latter train."""

    def __init__(
        self, cfg: LlmConfig, *, grounding: int = len(GROUNDING_TOKENS), dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        """grounding: E."""
        self.dtype = dtype
        self.base = nnx.Param(jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.width), param_dtype) * EMBEDDING_STD)
        self.grounding = nnx.Param(jax.random.normal(rngs.params(), (grounding, cfg.width), jnp.float32) * EMBEDDING_STD)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [...] in 0 … V+E-1 -> [..., D]."""
        size = self.base.shape[0]
        base = jnp.take(self.base[...], jnp.minimum(ids, size - 1), axis=0).astype(self.dtype)
        grounding = jnp.take(self.grounding[...], jnp.maximum(ids - size, 0), axis=0).astype(self.dtype)
        return jnp.where((ids < size)[..., None], base, grounding)


class LanguageHead(nnx.Module):
    """hidden [..., D] -> logits fp32 [..., V + E]; the columns of the grounding tokens are a separate parameter and come last."""

    def __init__(
        self, cfg: LlmConfig, *, grounding: int = len(GROUNDING_TOKENS), dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        """grounding: E."""
        self.dtype = dtype
        self.base = nnx.Param(jax.random.normal(rngs.params(), (cfg.width, cfg.vocab_size), param_dtype) * cfg.width**-0.5)
        self.grounding = nnx.Param(jax.random.normal(rngs.params(), (cfg.width, grounding), jnp.float32) * cfg.width**-0.5)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = hidden.astype(self.dtype)
        # Summed in float32: rounded to bfloat16, the two largest logits are equal in several percent of the rows.
        product = partial(jnp.matmul, hidden, preferred_element_type=jnp.float32)
        parts = [product(columns[...].astype(self.dtype)) for columns in (self.base, self.grounding)]
        return jnp.concatenate(parts, axis=-1)
