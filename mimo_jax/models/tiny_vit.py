"""TinyViT as SAM's image encoder: a stage of inverted bottlenecks, three stages of window attention, and SAM's neck.

Axis letters: N images, S image side in pixels, g side of a feature map, w window side in tokens, D width of a stage, h heads,
C decoder width.

Source: Wu et al. 2022 (TinyViT) and Zhang et al. 2023 (MobileSAM), whose encoder LiteMedSAM has at 256 pixels and without the strides
of the patch embedding. Every convolution of theirs is followed by a BatchNorm, which is folded into it here: a convolution has a bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.model_config import TinyVitConfig
from mimo_jax.models.attention import attention
from mimo_jax.models.counts import MatmulCounts, attention_flops
from mimo_jax.models.layers import Linear, gelu, layer_norm
from mimo_jax.models.sam_encoder import EPS as NECK_EPS
from mimo_jax.models.sam_encoder import from_windows, to_windows
from mimo_jax.models.scan import SCAN, ScanConfig, ScannedLayers

EPS = 1e-5
STAGES = 4
_SHIFTS = [(i, j) for i in range(3) for j in range(3)]


class DepthwiseConv(nnx.Module):
    """A 3 x 3 convolution of each channel by itself, with zeros around the image, [N, g, g, D] -> [N, ⌈g/stride⌉, ⌈g/stride⌉, D].

    It is a sum of nine shifted products, because XLA's grouped convolution on the CPU is ten times slower. The shifts are slices of the
    padded image with its rows in one axis. Slices of rows and columns take half as long again: XLA sees that the one in the middle is
    the image without padding, and computes what made the image once more in each place."""

    def __init__(self, width: int, *, stride: int = 1, dtype, param_dtype, rngs: nnx.Rngs):
        self.stride, self.dtype = stride, dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3, width), param_dtype) / 3)
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        n, side, _, width = x.shape
        if self.stride > 1:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            parts = (x[:, i : i + side : self.stride, j : j + side : self.stride] * kernel[i, j] for i, j in _SHIFTS)
            return sum(parts) + bias
        row = side + 2
        x = jnp.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0))).reshape(n, -1, width)  # one more row, which the last slice reaches into
        made = sum(x[:, i * row + j : (i + side) * row + j] * kernel[i, j] for i, j in _SHIFTS) + bias
        return made.reshape(n, side, row, width)[:, :, :side]  # the last two of a row are of no place in the image


class ConvBlock(nnx.Module):
    """An inverted bottleneck (MBConv): 1 x 1 to a greater width, depthwise 3 x 3, 1 x 1 back, and the input added."""

    def __init__(self, width: int, hidden: int, **types):
        self.expand = Linear(width, hidden, **types)
        self.depthwise = DepthwiseConv(hidden, **types)
        self.project = Linear(hidden, width, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, g, g, D] -> the same."""
        return gelu(x + self.project(gelu(self.depthwise(gelu(self.expand(x))))))


class Merge(nnx.Module):
    """Between two stages: 1 x 1 to the next width, depthwise 3 x 3 with the stride, 1 x 1."""

    def __init__(self, width: int, out: int, stride: int, **types):
        self.expand = Linear(width, out, **types)
        self.depthwise = DepthwiseConv(out, stride=stride, **types)
        self.project = Linear(out, out, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, g, g, D] -> [N, ⌈g/stride⌉, ⌈g/stride⌉, next D]."""
        return self.project(gelu(self.depthwise(gelu(self.expand(x)))))


class WindowBlock(nnx.Module):
    """Attention in windows of w x w tokens, a depthwise 3 x 3 convolution, and MLP; the convolution alone has no residual."""

    def __init__(self, width: int, heads: int, window: int, mlp_ratio: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.heads, self.window = heads, window
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layer_norm(width, EPS, **types)
        self.qkv = Linear(width, 3 * width, **types)  # head by head: query, key and value of the first head, then of the second
        self.o = Linear(width, width, **types)
        self.position_bias = nnx.Param(jnp.zeros((heads, window**2), param_dtype))  # of |Δrow| * w + |Δcolumn|
        self.depthwise = DepthwiseConv(width, **types)
        self.mlp_norm = layer_norm(width, EPS, **types)
        self.up = Linear(width, mlp_ratio * width, **types)
        self.down = Linear(mlp_ratio * width, width, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, g, g, D] -> the same."""
        # Padding is normalised and attended to like any token, as in the original.
        x = x + from_windows(self.attention(self.attention_norm(to_windows(x, self.window))), x.shape[1])
        x = self.depthwise(x)
        return x + self.down(gelu(self.up(self.mlp_norm(x))))

    def attention(self, x: jax.Array) -> jax.Array:
        """Self-attention in each window, x [N, w, w, D] -> the same."""
        n, w, _, d = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(n, w * w, self.heads, 3 * d // self.heads), 3, axis=-1)
        row, column = np.divmod(np.arange(w * w), w)
        offset = np.abs(row[:, None] - row) * w + np.abs(column[:, None] - column)  # [query, key]
        return self.o(attention(q, k, v, bias=self.position_bias[...][:, offset]).reshape(x.shape))


class TinyVit(nnx.Module):
    """The encoder."""

    def __init__(self, cfg: TinyVitConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        widths, depths, heads, windows = (cfg.stages(name) for name in ("widths", "depths", "heads", "windows"))
        side = 1 if cfg.patch_stride == 1 else 3
        patch = {"kernel_size": (side, side), "strides": cfg.patch_stride, "padding": side // 2, "rngs": rngs, **types}
        self.patch = nnx.Conv(3, widths[0] // 2, **patch)
        self.patch_out = nnx.Conv(widths[0] // 2, widths[0], **patch)

        def block(stage: int, r: nnx.Rngs) -> nnx.Module:
            if stage == 0:
                return ConvBlock(widths[0], cfg.mlp_ratio * widths[0], rngs=r, **types)
            return WindowBlock(widths[stage], heads[stage], windows[stage], cfg.mlp_ratio, rngs=r, **types)

        loop = ScanConfig(scan.remat, unroll=True)  # few blocks; on the CPU, XLA's matrix products are slower in a loop than outside
        for i in range(STAGES):
            setattr(self, f"stage{i}", ScannedLayers(lambda r, i=i: block(i, r), depths[i], rngs=rngs, scan=loop))
        for i, stride in enumerate(cfg.stages("strides")):
            setattr(self, f"merge{i}", Merge(widths[i], widths[i + 1], stride, rngs=rngs, **types))
        c = cfg.decoder_width
        self.neck_in = Linear(widths[-1], c, use_bias=False, rngs=rngs, **types)
        self.neck_in_norm = layer_norm(c, NECK_EPS, rngs=rngs, **types)
        self.neck_out = nnx.Conv(c, c, (3, 3), padding="SAME", use_bias=False, rngs=rngs, **types)
        self.neck_out_norm = layer_norm(c, NECK_EPS, rngs=rngs, **types)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels float [N, S, S, 3], normalised (`SamConfig.pixel_norm`), then set to zero outside the content
        -> features [N, g, g, C]."""
        return self.feature_maps(pixels)[-1]

    def feature_maps(self, pixels: jax.Array) -> tuple[jax.Array, ...]:
        """pixels as for the call -> what each stage returns, [N, g_i, g_i, D_i] (`TinyVitConfig.feature_maps`), then the features."""
        x = self.patch_out(gelu(self.patch(pixels)))
        maps = []
        for i in range(STAGES):
            x = getattr(self, f"stage{i}")(x if i == 0 else getattr(self, f"merge{i - 1}")(x))
            maps.append(x)
        return (*maps, self.neck_out_norm(self.neck_out(self.neck_in_norm(self.neck_in(x)))))


def matmul_counts(cfg: TinyVitConfig) -> MatmulCounts:
    """Counts of one image."""
    grids, widths, windows, depths = cfg.grids(), cfg.stages("widths"), cfg.stages("windows"), cfg.stages("depths")
    tokens = {r"^sam_encoder/patch/": (cfg.image_size // cfg.patch_stride) ** 2, r"^sam_encoder/(patch_out|stage0)/": grids[0] ** 2}
    products = 0.0
    for i in range(1, STAGES):
        padded = (-(-grids[i] // windows[i]) * windows[i]) ** 2
        tokens[rf"^sam_encoder/merge{i - 1}/expand/"] = grids[i - 1] ** 2
        tokens[rf"^sam_encoder/stage{i}/block/(qkv|o)/"] = padded
        tokens[rf"^sam_encoder/(merge{i - 1}|stage{i})/"] = grids[i] ** 2
        products += depths[i] * attention_flops(padded, windows[i] ** 2, widths[i])
    return MatmulCounts(tokens | {r"^sam_encoder/neck": grids[-1] ** 2}, products)
