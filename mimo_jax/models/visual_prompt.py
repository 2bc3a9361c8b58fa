"""The visual prompt encoder: points, boxes and scribbles to X_vis, and the positional encoding that they share with the image.

Axis letters: B batch, R turns, P prompt tokens, I image tokens, W width of X_vis.

A point is one token, a box two (its corners), a scribble several along its line. A token is the random Fourier
encoding of its position plus an embedding of its kind, as in SAM's prompt encoder. See MIMO, section
"visual prompt encoder"; scribbles are an addition of this project.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import PromptConfig, VisionConfig

KINDS = 6  # 0 padding, 1 point inside, 2 point outside, 3 top left of a box, 4 bottom right of a box, 5 scribble


class VisualPromptEncoder(nnx.Module):
    def __init__(self, cfg: PromptConfig, vision: VisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.image_size, self.grid, self.extra_tokens = vision.image_size, vision.grid(), vision.extra_tokens()
        self.fourier_basis = nnx.Param(jax.random.normal(rngs.params(), (2, cfg.width // 2)))
        self.kind = nnx.Param(jax.random.normal(rngs.params(), (KINDS, cfg.width)) * 0.5)

    def positional_encoding(self, xy: jax.Array) -> jax.Array:
        """xy fp32 [..., 2] in pixels of the vision frame (integers are centres) -> [..., W], always computed in fp32."""
        unit = 2.0 * (xy.astype(jnp.float32) + 0.5) / self.image_size - 1.0
        angle = 2.0 * jnp.pi * (unit @ self.fourier_basis[...])
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(self.dtype)

    def image_code(self) -> jax.Array:
        """[I, W]: the encoding of each patch's centre, in the order of X_img; tokens before the patches have that of the image's centre."""
        centre = (jnp.arange(self.grid) + 0.5) * (self.image_size / self.grid) - 0.5
        xy = jnp.stack(jnp.meshgrid(centre, centre, indexing="xy"), axis=-1).reshape(-1, 2)
        if self.extra_tokens:
            xy = jnp.concatenate([jnp.full((self.extra_tokens, 2), (self.image_size - 1) / 2), xy])
        return self.positional_encoding(xy)

    def __call__(self, xy: jax.Array, kind: jax.Array) -> jax.Array:
        """xy [B, R, P, 2], kind int [B, R, P] -> X_vis [B, R, P, W]. Kind 0 (padding) yields its embedding alone."""
        code = self.positional_encoding(xy) * (kind > 0)[..., None].astype(self.dtype)
        return code + jnp.take(self.kind[...], kind, axis=0).astype(self.dtype)
