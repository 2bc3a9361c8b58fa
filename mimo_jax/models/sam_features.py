"""X_img from SAM's image encoder, without a vision tower beside it: the encoder runs once for the language model and for the masks.

Axis letters: N images, G side of a feature map of the encoder, g side of the grid of X_img, I = g * g its tokens, C channels of SAM's
features, S channels of the stages together.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import SamFeaturesConfig
from mimo_jax.models.counts import MatmulCounts
from mimo_jax.models.scan import SCAN, ScanConfig

_EPS = 1e-6


def average_cells(x: jax.Array, side: int) -> jax.Array:
    """[N, G, G, C] -> the averages over the cells of a grid of `side` on a side, row by row [N, side * side, C]; `side` divides G."""
    n, size, _, c = x.shape
    return x.reshape(n, side, size // side, side, size // side, c).mean(axis=(2, 4)).reshape(n, side * side, c)


class SamFeatures(nnx.Module):
    """Has no parameters."""

    def __init__(self, cfg: SamFeaturesConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype

    def pool_stages(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Outputs of all stages [N, G, G, …] -> those of `cfg.stages` averaged over the cells of X_img [N, I, S]. Every stage is normalised
        over its channels, as the neck normalises SAM's features: the scales of the stages differ."""
        stages = [average_cells(maps[number].astype(jnp.float32), self.cfg.cells) for number in self.cfg.stage_numbers()]
        return jnp.concatenate([jax.nn.standardize(stage, axis=-1, epsilon=_EPS) for stage in stages], axis=-1).astype(self.dtype)

    def __call__(self, features: jax.Array, stages: jax.Array | None) -> jax.Array:
        """SAM's features [N, G, G, C] and the result of `pool_stages` [N, I, S], None without stages -> X_img [N, I, C + S]."""
        x = average_cells(features.astype(jnp.float32), self.cfg.cells).astype(self.dtype)
        return x if stages is None else jnp.concatenate([x, stages], axis=-1)


def matmul_counts(cfg: SamFeaturesConfig) -> MatmulCounts:
    """None: averages are not matrix products."""
    return MatmulCounts({}, 0.0)
