"""Parts that the package does not know, registered from outside as a user would: one kind of each section of the model.

Axis letters: N images, B batch, H image side, g grid, D width, C decoder width, T new tokens, S cache slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_convert import rows
from checkpoints_convert.layouts import Component, register_component, sam_decoder_indices
from checkpoints_convert.rows import Row
from mimo_jax.model_config import AlignerConfig, LlmConfig, ModelConfig, SamConfig, VisionConfig
from mimo_jax.models import registry
from mimo_jax.models.counts import MatmulCounts, attention_flops
from mimo_jax.models.layers import Linear, gelu, patch_embedding
from mimo_jax.models.sam_decoder import MaskDecoder
from mimo_jax.models.scan import SCAN, ScanConfig

HALF = (127.5, 127.5, 127.5)

# --- a vision tower: patches, one hidden layer, and two registers in front


@dataclass
class MixerConfig(VisionConfig):
    kind: str = "mixer"
    image_size: int = 32
    width: int = 24
    cells: int = 4

    def grid(self) -> int:
        return self.cells

    def extra_tokens(self) -> int:
        return 2


class Mixer(nnx.Module):
    def __init__(self, cfg: MixerConfig, *, dtype, param_dtype, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patch = patch_embedding(cfg.image_size // cfg.cells, cfg.width, use_bias=True, **types)
        self.registers = nnx.Param(jax.random.normal(rngs.params(), (2, cfg.width), param_dtype))
        self.mix = Linear(cfg.width, cfg.width, **types)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[N, H, H, 3] -> X_img [N, 2 + g*g, D]."""
        x = self.patch(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + gelu(self.mix(x))
        registers = jnp.broadcast_to(self.registers[...].astype(x.dtype), (len(x), 2, x.shape[-1]))
        return jnp.concatenate([registers, x], axis=1)


def mixer_counts(cfg: MixerConfig) -> MatmulCounts:
    return MatmulCounts({r"^vision/registers$": 0, r"^vision/": cfg.grid() ** 2}, 0.0)


registry.register_vision_tower(
    "mixer",
    registry.VisionTower(
        MixerConfig, Mixer, HALF, HALF, mixer_counts, shardings={r"^vision/mix/kernel$": ("embed", "mlp")}, component="mixer"
    ),
)
register_component(
    "mixer",
    Component(
        "mixer",
        (*rows.conv("mixer.stem", "vision/patch"), Row("mixer.registers", "vision/registers"), *rows.linear("mixer.mix", "vision/mix")),
        r"mixer\.registers$",
        section="vision",
        kinds=("mixer",),
    ),
)

# --- a language model: every token reads the mean of those before it; its cache is the tokens themselves


@dataclass
class MeanConfig(LlmConfig):
    kind: str = "mean"
    vocab_size: int = 512
    width: int = 16
    max_length: int = 256


class MeanLanguage(nnx.Module):
    def __init__(self, cfg: MeanConfig, lora, targets, *, dtype, param_dtype, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        self.width, self.dtype = cfg.width, dtype
        self.up = Linear(cfg.width, 2 * cfg.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = Linear(2 * cfg.width, cfg.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def new_cache(self, batch: int, length: int) -> jax.Array:
        return jnp.zeros((batch, length, self.width), self.dtype)

    @staticmethod
    def extend_cache(cache: jax.Array, length: int) -> jax.Array:
        return jnp.pad(cache, [(0, 0), (0, length - cache.shape[1]), (0, 0)])

    @staticmethod
    def cache_length(cache: jax.Array) -> int:
        return cache.shape[1]

    @staticmethod
    def cache_axes() -> tuple[str | None, ...]:
        return None, None, None

    def __call__(self, x: jax.Array, positions: jax.Array, cache: jax.Array | None = None):
        """x [B, T, D] at positions int [B, T] -> hidden [B, T, D], with a cache [B, S, D] also that."""
        x = x.astype(self.dtype)
        memory = x if cache is None else cache.at[jnp.arange(len(x))[:, None], positions].set(x)
        before = jnp.arange(memory.shape[1]) <= positions[..., None]  # [B, T, S]
        mean = jnp.einsum("bts,bsd->btd", before.astype(x.dtype), memory) / (positions[..., None] + 1).astype(x.dtype)
        hidden = x + self.down(gelu(self.up(mean)))
        return hidden if cache is None else (hidden, memory)


def mean_counts(cfg: MeanConfig, length: int) -> MatmulCounts:
    return MatmulCounts({r"^llm/": length}, attention_flops(length, length, cfg.width) / 2)


registry.register_language_model("mean", registry.LanguageModel(MeanConfig, MeanLanguage, mean_counts, component="mean"))
register_component(
    "mean",
    Component(
        "mean of tokens",
        (*rows.vocabulary("{base,grounding}"), *rows.linear("mean.up", "llm/up"), *rows.linear("mean.down", "llm/down")),
        r"mean\.up\.weight$",
        section="llm",
        kinds=("mean",),
    ),
)

# --- a mask encoder: three scales, the finer ones for a decoder of its own, as SAM 2's


@dataclass
class ScalesConfig(SamConfig):
    kind: str = "scales"
    image_size: int = 64
    cells: int = 8

    def grid(self) -> int:
        return self.cells


class ScalesEncoder(nnx.Module):
    def __init__(self, cfg: ScalesConfig, *, dtype, param_dtype, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        step, c = cfg.image_size // cfg.cells, cfg.decoder_width
        types = {"use_bias": True, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.coarse = patch_embedding(step, c, **types)
        self.middle = patch_embedding(step // 2, c // 4, **types)
        self.fine = patch_embedding(step // 4, c // 8, **types)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[N, H, H, 3] -> [N, g, g, C], [N, 2g, 2g, C/4], [N, 4g, 4g, C/8]."""
        return self.coarse(pixels), self.middle(pixels), self.fine(pixels)


class ScalesDecoder(MaskDecoder):
    def upscale(self, image: jax.Array, finer: Sequence[jax.Array] = ()) -> jax.Array:
        middle, fine = (scale[:, None].astype(self.dtype) for scale in finer)
        return gelu(self.upscale2(gelu(self.upscale_norm(self.upscale1(image) + middle))) + fine)


def scales_counts(cfg: ScalesConfig) -> MatmulCounts:
    g = cfg.grid()
    return MatmulCounts({f"^sam_encoder/{name}/": (k * g) ** 2 for name, k in (("coarse", 1), ("middle", 2), ("fine", 4))}, 0.0)


registry.register_mask_encoder(
    "scales", registry.MaskEncoder(ScalesConfig, ScalesEncoder, HALF, HALF, scales_counts, decoder=ScalesDecoder, component="scales")
)
register_component(
    "scales",
    Component(
        "three scales",
        (*(row for name in ("coarse", "middle", "fine") for row in rows.conv(f"scales.{name}", f"sam_encoder/{name}")), *rows.SAM_DECODER),
        r"scales\.coarse\.weight$",
        section="sam",
        kinds=("scales",),
        indices=sam_decoder_indices,
    ),
)

# --- an aligner: the image's mean, shifted by the mean of the instruction


@dataclass
class MeanAlignerConfig(AlignerConfig):
    kind: str = "mean"

    def image_only(self) -> bool:
        return False

    def query_tokens(self, image: int, prompts: int) -> int:
        return 3


class MeanAligner(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, dtype, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        out = cfg.llm.width
        self.image = Linear(cfg.vision.width, out, dtype=dtype, rngs=rngs)
        self.visual = Linear(cfg.prompt.width, out, dtype=dtype, rngs=rngs)

    def __call__(self, image, image_code, text, text_mask, visual, visual_mask):
        """See `mimo_jax.models.aligner.CrossAttentionAligner`: one token of the image, one of the instruction, one of the prompts."""

        def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
            return (x * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]

        of_image = jnp.repeat(self.image(image.mean(1)), len(text) // len(image), axis=0)
        return jnp.stack([of_image, mean(text, text_mask), mean(self.visual(visual), visual_mask)], axis=1), None


def mean_aligner_counts(cfg: ModelConfig, share: float) -> MatmulCounts:
    return MatmulCounts({r"^aligner/image/": share, r"^aligner/visual/": cfg.max_turns * cfg.prompt.max_tokens}, 0.0)


registry.register_aligner("mean", registry.AlignerKind(MeanAlignerConfig, MeanAligner, mean_aligner_counts, component="mean_aligner"))
register_component(
    "mean_aligner",
    Component(
        "mean aligner",
        (*rows.linear("mean_aligner.image", "aligner/image"), *rows.linear("mean_aligner.visual", "aligner/visual")),
        r"mean_aligner\.image\.weight$",
        section="aligner",
        kinds=("mean",),
        indices=lambda model: {"unused": np.arange(0)},
    ),
)
