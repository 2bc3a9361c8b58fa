"""SAM's prompt encoder and mask decoder: from the features of an image and sparse prompts to masks.

Axis letters: B images, S masks of an image, n sparse prompts of a mask, t decoder tokens (IoU, masks, prompts),
g side of the feature grid, p = g*g, C width, K mask tokens (4), m masks returned (1 or 3). In `DecoderAttention`: X, Y the S masks
or 1, a queries, b keys.

Source: Kirillov et al. 2023. The parameters correspond one to one to those of segment-anything's PromptEncoder and MaskDecoder. Here
many masks share one image: its features and their positional encoding are not repeated for each mask until they differ between masks,
which is after the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import SamConfig
from mimo_jax.models.attention import attention
from mimo_jax.models.layers import Linear, gelu, layer_norm
from mimo_jax.models.scan import ScannedLayers

MASK_TOKENS = 4  # token 0 is the mask of an unambiguous prompt, 1 .. 3 are the alternatives of an ambiguous one
MASK_PROMPT_WIDTH = 16
CONV_EPS = 1e-6  # eps of LayerNorm over channels of a feature map; the transformer uses 1e-5


class SamPromptEncoder(nnx.Module):
    """Points, boxes and masks to prompt embeddings.

    Coordinates are (x, y) in the continuous frame [0, image_size]: pixel i spans [i, i + 1]. segment-anything expects
    pixel indices and adds 0.5 itself; here the caller adds it (`geometry`).
    """

    def __init__(self, cfg: SamConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = dtype
        c, mid = cfg.decoder_width, MASK_PROMPT_WIDTH
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))

        # The Fourier frequencies stay float32: rounded to bfloat16, the encoding is off by up to 0.13 (see `pe_dtype`).
        self.gaussian = nnx.Param(jax.random.normal(rngs.params(), (2, c // 2), jnp.float32))
        self.point_embedding = embedding(4, c)  # point out, point in, box top left, box bottom right
        self.not_a_point_embedding = embedding(c)
        self.no_mask_embedding = embedding(c)
        self.mask_down1 = nnx.Conv(1, mid // 4, (2, 2), strides=2, padding="VALID", **types)
        self.mask_norm1 = layer_norm(mid // 4, CONV_EPS, **types)
        self.mask_down2 = nnx.Conv(mid // 4, mid, (2, 2), strides=2, padding="VALID", **types)
        self.mask_norm2 = layer_norm(mid, CONV_EPS, **types)
        self.mask_out = nnx.Conv(mid, c, (1, 1), **types)

    def __call__(
        self,
        points: tuple[jax.Array, jax.Array] | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """(xy [..., n, 2], labels int [..., n]: 1 in, 0 out, -1 none), boxes [..., 4], mask logits [..., 4g, 4g]
        -> (sparse [..., n', C], dense [..., g, g, C], or [C] without masks), the inputs of `MaskDecoder`.

        Points without a box are followed by one "not a point", as in SAM's training."""
        sparse = []
        if points is not None:
            xy, labels = points
            if boxes is None:
                xy = jnp.pad(xy, [(0, 0)] * (xy.ndim - 2) + [(0, 1), (0, 0)])
                labels = jnp.pad(labels, [(0, 0)] * (labels.ndim - 1) + [(0, 1)], constant_values=-1)
            sparse.append(self.embed_points(xy, labels))
        if boxes is not None:
            sparse.append(self.embed_boxes(boxes))
        if not sparse:
            lead = (1,) if masks is None else masks.shape[:-2]
            sparse.append(jnp.zeros((*lead, 0, self.cfg.decoder_width), self.dtype))
        dense = self.no_mask() if masks is None else self.embed_masks(masks)
        return jnp.concatenate(sparse, axis=-2), dense

    def dense_pe(self) -> jax.Array:
        """Positional encoding of the feature grid, float32 [g, g, C]."""
        g = self.cfg.grid()
        centres = (jnp.arange(g) + 0.5) / g
        x, y = jnp.meshgrid(centres, centres)
        return self.positional_encoding(jnp.stack([x, y], axis=-1))

    def no_mask(self) -> jax.Array:
        """The dense prompt without a mask: [C], the same at every position."""
        return self.no_mask_embedding[...].astype(self.dtype)

    def embed_points(self, xy: jax.Array, labels: jax.Array) -> jax.Array:
        """xy [..., n, 2], labels int [..., n]: 1 in, 0 out, -1 none, 2 and 3 a box's top left and bottom right -> [..., n, C]."""
        none = (labels == -1)[..., None]
        code = jnp.where(none, 0.0, self.positional_encoding(xy / self.cfg.image_size))
        kind = jnp.where(none, self.not_a_point_embedding[...], self.point_embedding[...][jnp.maximum(labels, 0)])
        return (code + kind).astype(self.dtype)

    def embed_boxes(self, boxes: jax.Array) -> jax.Array:
        """[x0, y0, x1, y1] [..., 4] -> [..., 2, C], a token for each corner."""
        corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
        return (self.positional_encoding(corners / self.cfg.image_size) + self.point_embedding[2:]).astype(self.dtype)

    def embed_masks(self, masks: jax.Array) -> jax.Array:
        """Mask logits [..., 4g, 4g] -> [..., g, g, C]."""
        x = masks.reshape(-1, *masks.shape[-2:], 1)
        x = gelu(self.mask_norm1(self.mask_down1(x)))
        x = self.mask_out(gelu(self.mask_norm2(self.mask_down2(x))))
        return x.reshape(*masks.shape[:-2], *x.shape[1:])

    def positional_encoding(self, xy: jax.Array) -> jax.Array:
        """Random Fourier features of xy [..., 2] in 0 .. 1 -> float32 [..., C], with every step rounded to `pe_dtype`."""

        def rounded(x: jax.Array) -> jax.Array:  # no cast to bfloat16 and back, because XLA may remove that
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if self.cfg.pe_dtype == "bfloat16" else x

        centred = rounded(2.0 * xy.astype(jnp.float32) - 1.0)
        # Two products and a sum instead of a matmul: an accelerator would round the angles of a matmul to bfloat16.
        g = rounded(self.gaussian[...].astype(jnp.float32))
        angle = rounded(2.0 * jnp.pi * rounded(centred[..., 0:1] * g[0] + centred[..., 1:2] * g[1]))
        return rounded(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1))


class DecoderAttention(nnx.Module):
    """Multi-head attention of width `inner` within a residual stream of width `width`."""

    def __init__(self, width: int, inner: int, heads: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.heads = heads
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q = Linear(width, inner, **types)
        self.k = Linear(width, inner, **types)
        self.v = Linear(width, inner, **types)
        self.o = Linear(inner, width, **types)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, valid_mask: jax.Array | None = None) -> jax.Array:
        """q [B, X, a, C], k and v [B, Y, b, C] -> [B, max(X, Y), a, C]; X and Y are the S masks, or 1 if all masks share them.
        valid_mask: bool [B, Y, b], the keys that queries may attend to; None for all."""
        q, k, v = self.q(q), self.k(k), self.v(v)
        batch, masks, length, _ = q.shape
        if k.shape[1] > 1:
            masks = k.shape[1]
            q = jnp.broadcast_to(q, (batch, masks, *q.shape[2:]))
        # Queries do not attend to one another, so with shared keys (leading axis B, not B*S) those of all masks are processed together.
        q, k, v = (x.reshape(batch * k.shape[1], -1, self.heads, x.shape[-1] // self.heads) for x in (q, k, v))
        mask = None if valid_mask is None else valid_mask.reshape(q.shape[0], 1, 1, -1)
        return self.o(attention(q, k, v, mask).reshape(batch, masks, length, -1))


class TwoWayBlock(nnx.Module):
    """Tokens attend to one another and to the image, then the image attends to the tokens; post-norm.

    The self-attention of the first block has no positional encoding and no residual connection: it replaces the tokens."""

    def __init__(self, cfg: SamConfig, *, first: bool, dtype, param_dtype, rngs: nnx.Rngs):
        self.first = first
        c, heads = cfg.decoder_width, cfg.decoder_heads
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.self_attention = DecoderAttention(c, c, heads, **types)
        self.self_norm = layer_norm(c, 1e-5, **types)
        self.token_to_image = DecoderAttention(c, c // 2, heads, **types)
        self.token_norm = layer_norm(c, 1e-5, **types)
        self.up = Linear(c, cfg.decoder_mlp_width, **types)
        self.down = Linear(cfg.decoder_mlp_width, c, **types)
        self.mlp_norm = layer_norm(c, 1e-5, **types)
        self.image_to_token = DecoderAttention(c, c // 2, heads, **types)
        self.image_norm = layer_norm(c, 1e-5, **types)

    def __call__(self, carry: tuple[jax.Array, jax.Array], token_code: jax.Array, image_code: jax.Array, valid_mask: jax.Array | None):
        """(tokens [B, S, t, C], image [B, 1 or S, p, C]), their positional encodings, the valid tokens bool [B, S, t] or None
        -> (tokens, image [B, S, p, C])."""
        tokens, image = carry
        if self.first:
            tokens = self.self_attention(tokens, tokens, tokens, valid_mask)
        else:
            coded = tokens + token_code
            tokens = tokens + self.self_attention(coded, coded, tokens, valid_mask)
        tokens = self.self_norm(tokens)
        tokens = self.token_norm(tokens + self.token_to_image(tokens + token_code, image + image_code, image))
        tokens = self.mlp_norm(tokens + self.down(jax.nn.relu(self.up(tokens))))
        image = self.image_norm(image + self.image_to_token(image + image_code, tokens + token_code, tokens, valid_mask))
        return tokens, image


class Upscale(nnx.Module):
    """ConvTranspose with kernel 2 and stride 2: windows do not overlap, so it is a matmul and a pixel shuffle."""

    def __init__(self, width: int, out: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (width, 2, 2, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., h, w, width] -> [..., 2h, 2w, out]."""
        *lead, h, w, _ = x.shape
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(x.shape[-1], -1)  # folded: see layers.Linear
        y = y.reshape(-1, h, w, 2, 2, bias.size).swapaxes(2, 3)  # [., h, 2, w, 2, out]
        return y.reshape(*lead, 2 * h, 2 * w, -1) + bias


class HypernetworkMlps(nnx.Module):
    """One MLP of three layers for each mask token; the parameters are stacked on a leading axis K."""

    def __init__(self, width: int, out: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)

        def linear(outputs: int) -> nnx.Einsum:
            return nnx.Einsum(
                "bski,kio->bsko", (MASK_TOKENS, width, outputs), (MASK_TOKENS, outputs),
                kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.layer1, self.layer2, self.layer3 = linear(width), linear(width), linear(out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, K, C] -> [B, S, K, out]."""
        return self.layer3(jax.nn.relu(self.layer2(jax.nn.relu(self.layer1(x)))))


class IouHead(nnx.Module):
    """An MLP of three layers that predicts the IoU of the mask of each mask token."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layer1 = Linear(width, hidden, **types)
        self.layer2 = Linear(hidden, hidden, **types)
        self.layer3 = Linear(hidden, MASK_TOKENS, preferred_element_type=jnp.float32, **types)  # so that few scores are equal

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> float32 [..., K]."""
        return self.layer3(jax.nn.relu(self.layer2(jax.nn.relu(self.layer1(x)))))


class MaskDecoder(nnx.Module):
    def __init__(self, cfg: SamConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        c = cfg.decoder_width
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.iou_token = nnx.Param(jax.random.normal(rngs.params(), (c,), param_dtype))
        self.mask_tokens = nnx.Param(jax.random.normal(rngs.params(), (MASK_TOKENS, c), param_dtype))
        self.first = TwoWayBlock(cfg, first=True, rngs=rngs, **types)
        if cfg.decoder_layers > 1:
            self.rest = ScannedLayers(lambda r: TwoWayBlock(cfg, first=False, rngs=r, **types), cfg.decoder_layers - 1, rngs=rngs)
        else:
            self.rest = None
        self.final_attention = DecoderAttention(c, c // 2, cfg.decoder_heads, rngs=rngs, **types)
        self.final_norm = layer_norm(c, 1e-5, rngs=rngs, **types)
        self.upscale1 = Upscale(c, c // 4, rngs=rngs, **types)
        self.upscale_norm = layer_norm(c // 4, CONV_EPS, rngs=rngs, **types)
        self.upscale2 = Upscale(c // 4, c // 8, rngs=rngs, **types)
        self.hyper = HypernetworkMlps(c, c // 8, rngs=rngs, **types)
        self.iou_head = IouHead(c, cfg.iou_head_width, rngs=rngs, **types)

    def __call__(
        self,
        features: jax.Array | tuple[jax.Array, ...],
        image_pe: jax.Array,
        sparse: jax.Array,
        dense: jax.Array,
        multimask: bool = False,
        valid_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """features [B, g, g, C], or a tuple of these and of finer ones for `upscale`; image_pe [g, g, C], sparse [B, S, n, C],
        dense [C] or [B, S, g, g, C]
        -> mask logits float32 [B, S, m, 4g, 4g], predicted IoU float32 [B, S, m].

        m = 1: the mask of token 0. multimask: m = 3, those of tokens 1 .. 3. sparse and dense: see `SamPromptEncoder`. valid_mask: bool
        [B, S, n], the sparse prompts to use; the result is the same as if the others were omitted; None for all."""
        features, *finer = features if isinstance(features, tuple) else (features,)
        b, s, _, c = sparse.shape
        g = features.shape[1]
        output_tokens = jnp.concatenate([self.iou_token[...][None], self.mask_tokens[...]]).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(output_tokens, (b, s, *output_tokens.shape)), sparse.astype(self.dtype)], axis=2)
        image = features.astype(self.dtype)[:, None] + dense.astype(self.dtype)
        image = image.reshape(b, -1, g * g, c)
        image_code = image_pe.astype(self.dtype).reshape(g * g, c)

        if valid_mask is not None:
            valid_mask = jnp.concatenate([jnp.ones((b, s, output_tokens.shape[0]), bool), valid_mask], axis=2)
        token_code = tokens
        tokens, image = self.first((tokens, image), token_code, image_code, valid_mask)
        if self.rest is not None:
            tokens, image = self.rest((tokens, image), token_code, image_code, valid_mask)
        tokens = self.final_norm(tokens + self.final_attention(tokens + token_code, image + image_code, image))

        image = self.upscale(image.reshape(b, s, g, g, c), finer)
        chosen = slice(1, None) if multimask else slice(0, 1)
        hyper = self.hyper(tokens[:, :, 1 : 1 + MASK_TOKENS])[:, :, chosen]
        masks = jnp.einsum("bsmc,bshwc->bsmhw", hyper, image, preferred_element_type=jnp.float32)
        return masks, self.iou_head(tokens[:, :, 0])[..., chosen]

    def upscale(self, image: jax.Array, finer: Sequence[jax.Array] = ()) -> jax.Array:
        """[B, S, g, g, C] -> [B, S, 4g, 4g, C/8]. finer: features of the B images at higher resolution; SAM has none, and subclasses add
        theirs here."""
        return gelu(self.upscale2(gelu(self.upscale_norm(self.upscale1(image)))))
