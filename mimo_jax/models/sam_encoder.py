"""SAM's image encoder: a vision transformer of windowed and global blocks, and a convolutional neck.

Axis letters: N images (or windows), S image side in pixels, g tokens on a side, n windows on a side, w window side in tokens,
D width, C decoder width.

Source: Kirillov et al. 2023 after Li et al. 2022 (ViTDet). The parameters correspond one to one to those of segment-anything's
ImageEncoderViT. The blocks form stages of (global_every - 1) windowed blocks and a global one, scanned within and over stages,
so that 32 blocks compile as two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import SamVitConfig
from mimo_jax.models.attention import attention, fold_relative_position
from mimo_jax.models.counts import MatmulCounts, attention_flops
from mimo_jax.models.layers import Linear, gelu, layer_norm, patch_embedding
from mimo_jax.models.scan import SCAN, ScanConfig, ScannedLayers, rematerialised

# Per channel, RGB, for pixels in 0 .. 255. SAM normalises first and pads with zeros afterwards.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
EPS = 1e-6


def to_windows(x: jax.Array, w: int) -> jax.Array:
    """[N, g, g, D] -> [N*n*n, w, w, D], n windows on a side, with zeros beyond the right and bottom edge of the grid."""
    n, g, _, d = x.shape
    side = -(-g // w)
    pad = side * w - g
    x = jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0)))
    return x.reshape(n, side, w, side, w, d).swapaxes(2, 3).reshape(n * side * side, w, w, d)


def from_windows(x: jax.Array, g: int) -> jax.Array:
    """Inverse of `to_windows` for a grid of g x g."""
    w, d = x.shape[1], x.shape[-1]
    side = -(-g // w)
    x = x.reshape(-1, side, side, w, w, d).swapaxes(2, 3)
    return x.reshape(-1, side * w, side * w, d)[:, :g, :g]


class SamBlock(nnx.Module):
    """Pre-norm attention over windows of `window` tokens (0: over the whole grid), and MLP."""

    def __init__(self, cfg: SamVitConfig, window: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.heads, self.window = cfg.heads, window
        side = window or cfg.grid()
        hidden = int(cfg.width * cfg.mlp_ratio)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layer_norm(cfg.width, EPS, **types)
        self.q = Linear(cfg.width, cfg.width, **types)
        self.k = Linear(cfg.width, cfg.width, **types)
        self.v = Linear(cfg.width, cfg.width, **types)
        self.o = Linear(cfg.width, cfg.width, **types)
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * side - 1, cfg.width // cfg.heads), param_dtype))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * side - 1, cfg.width // cfg.heads), param_dtype))
        self.mlp_norm = layer_norm(cfg.width, EPS, **types)
        self.up = Linear(cfg.width, hidden, **types)
        self.down = Linear(hidden, cfg.width, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, g, g, D] -> the same."""
        y = self.attention_norm(x)
        if self.window:
            # Padding is attended to like any token: segment-anything does not mask it, and was trained in this way.
            y = from_windows(self.attention(to_windows(y, self.window)), x.shape[1])
        else:
            y = self.attention(y)
        x = x + y
        return x + self.down(gelu(self.up(self.mlp_norm(x))))

    def attention(self, x: jax.Array) -> jax.Array:
        """Self-attention with decomposed relative position, x [N, w, w, D] -> the same."""
        n, w, _, d = x.shape
        q, k, v = (project(x).reshape(n, w * w, self.heads, -1) for project in (self.q, self.k, self.v))
        q, k = fold_relative_position(q, k, self.rel_pos_h[...], self.rel_pos_w[...], scale=(d // self.heads) ** -0.5)
        return self.o(attention(q, k, v, scale=1.0).reshape(x.shape))


class SamStage(nnx.Module):
    """(global_every - 1) windowed blocks and a global one."""

    def __init__(self, cfg: SamVitConfig, *, dtype, param_dtype, scan: ScanConfig, rngs: nnx.Rngs):
        self.scan = scan
        types = {"dtype": dtype, "param_dtype": param_dtype}
        if cfg.global_every > 1:
            self.windowed = ScannedLayers(lambda r: SamBlock(cfg, cfg.window, rngs=r, **types), cfg.global_every - 1, rngs=rngs, scan=scan)
        else:
            self.windowed = None
        self.global_block = SamBlock(cfg, 0, rngs=rngs, **types)

    def __call__(self, x: jax.Array, with_output: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x [N, g, g, D] -> the same, twice if `with_output`: to go on with, and as the stage's output."""
        if self.windowed is not None:
            x = self.windowed(x)
        x = rematerialised(self.global_block, self.scan.remat)(x)
        return (x, x) if with_output else x


class SamEncoder(nnx.Module):
    """ViT and neck."""

    def __init__(self, cfg: SamVitConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        self.dtype = dtype
        types = {"dtype": dtype, "param_dtype": param_dtype}
        g = cfg.grid()
        c = cfg.decoder_width
        self.patch = patch_embedding(cfg.patch_size, cfg.width, use_bias=True, rngs=rngs, **types)
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), (g, g, cfg.width), param_dtype) * 0.02)
        # The blocks are rematerialised one by one, inside the stage.
        self.stages = ScannedLayers(
            lambda r: SamStage(cfg, scan=scan, rngs=r, **types),
            cfg.layers // cfg.global_every,
            rngs=rngs,
            scan=ScanConfig(unroll=scan.unroll),
        )
        self.neck_in = nnx.Conv(cfg.width, c, (1, 1), use_bias=False, rngs=rngs, **types)
        self.neck_in_norm = layer_norm(c, EPS, rngs=rngs, **types)
        self.neck_out = nnx.Conv(c, c, (3, 3), padding="SAME", use_bias=False, rngs=rngs, **types)
        self.neck_out_norm = layer_norm(c, EPS, rngs=rngs, **types)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels float [N, S, S, 3], normalised (`SamConfig.pixel_norm`), then set to zero outside the content
        -> features [N, g, g, C]."""
        return self.neck(self.stages(self.embed(pixels)))

    def feature_maps(self, pixels: jax.Array) -> tuple[jax.Array, ...]:
        """As the call -> the output of each stage [N, g, g, D], then the features."""
        x, outputs = self.stages(self.embed(pixels), True, with_output=True)
        return (*outputs, self.neck(x))

    def embed(self, pixels: jax.Array) -> jax.Array:
        return self.patch(pixels) + self.position_embedding[...].astype(self.dtype)

    def neck(self, x: jax.Array) -> jax.Array:
        return self.neck_out_norm(self.neck_out(self.neck_in_norm(self.neck_in(x))))


def matmul_counts(cfg: SamVitConfig) -> MatmulCounts:
    """Counts of one image. The relative position terms are products of each query with a row of each table."""
    g = cfg.grid()
    windows, stages = -(-g // cfg.window), cfg.layers // cfg.global_every

    def block(side: int) -> float:  # of side x side tokens
        return attention_flops(side**2, side**2, cfg.width) + 4.0 * side**3 * cfg.width

    windowed = r"^sam_encoder/stages/block/windowed/block/[qkvo]/"
    products = stages * ((cfg.global_every - 1) * windows**2 * block(cfg.window) + block(g))
    return MatmulCounts({windowed: (windows * cfg.window) ** 2, r"^sam_encoder/": g**2}, products)
