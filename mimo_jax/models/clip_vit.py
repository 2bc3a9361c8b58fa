"""CLIP's vision transformer: an image to X_img.

Axis letters: N images, H image side in pixels, g patches on a side, I tokens (class token, then g*g patches), D width.

Source: Radford et al. 2021. The parameters correspond one to one to those of transformers' CLIPVisionModel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import ClipConfig
from mimo_jax.models.attention import attention
from mimo_jax.models.counts import MatmulCounts, attention_flops
from mimo_jax.models.layers import Linear, gelu, layer_norm, patch_embedding, quick_gelu
from mimo_jax.models.scan import SCAN, ScanConfig, ScannedLayers

# Per channel, RGB, for pixels in 0 .. 255; published for 0 .. 1.
MEAN = tuple(255.0 * mean for mean in (0.48145466, 0.4578275, 0.40821073))
STD = tuple(255.0 * std for std in (0.26862954, 0.26130258, 0.27577711))

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class ClipLayer(nnx.Module):
    """Pre-norm self-attention and MLP on x [N, I, D]."""

    def __init__(self, cfg: ClipConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.heads = cfg.heads
        self.activation = ACTIVATIONS[cfg.activation]
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layer_norm(cfg.width, cfg.eps, **types)
        self.q = Linear(cfg.width, cfg.width, **types)
        self.k = Linear(cfg.width, cfg.width, **types)
        self.v = Linear(cfg.width, cfg.width, **types)
        self.o = Linear(cfg.width, cfg.width, **types)
        self.mlp_norm = layer_norm(cfg.width, cfg.eps, **types)
        self.up = Linear(cfg.width, cfg.mlp_width, **types)
        self.down = Linear(cfg.mlp_width, cfg.width, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attention_norm(x)
        q, k, v = (project(y).reshape(*y.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        x = x + self.o(attention(q, k, v).reshape(x.shape))
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class ClipVit(nnx.Module):
    """The whole tower. Layers above `cfg.feature_layer` and the last norm have parameters, so that a checkpoint can be converted
    completely in both directions, but they do not run."""

    def __init__(self, cfg: ClipConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = dtype
        types = {"dtype": dtype, "param_dtype": param_dtype}
        tokens = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.patch = patch_embedding(cfg.patch_size, cfg.width, use_bias=False, rngs=rngs, **types)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (cfg.width,), param_dtype) * cfg.width**-0.5)
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), (tokens, cfg.width), param_dtype) * 0.2)
        self.pre_norm = layer_norm(cfg.width, cfg.eps, rngs=rngs, **types)
        self.layers = ScannedLayers(lambda r: ClipLayer(cfg, rngs=r, **types), cfg.layers, rngs=rngs, scan=scan)
        self.post_norm = layer_norm(cfg.width, cfg.eps, rngs=rngs, **types)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels float [N, H, H, 3], normalised by MEAN and STD -> X_img [N, I, D], the hidden state
        `cfg.feature_layer`: patches row by row from the top left, after the class token if `cfg.class_token`."""
        patches = self.patch(pixels)
        n, g, _, d = patches.shape
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (n, 1, d))
        x = jnp.concatenate([class_token, patches.reshape(n, g * g, d)], axis=1)
        x = self.pre_norm(x + self.position_embedding[...].astype(self.dtype))
        x = self.layers(x, num_layers=self.cfg.feature_layer % (self.cfg.layers + 1))
        return x if self.cfg.class_token else x[:, 1:]


def matmul_counts(cfg: ClipConfig) -> MatmulCounts:
    """Counts of one image, for the layers that run."""
    patches, run = cfg.grid() ** 2, cfg.feature_layer % (cfg.layers + 1)
    tokens = {r"^vision/patch/": patches, r"^vision/layers/": (patches + 1) * run / cfg.layers}
    return MatmulCounts(tokens, run * attention_flops(patches + 1, patches + 1, cfg.width))
