"""The Multi-modal Input Aligner: learnable queries read the image, the instruction and the user's prompts.

Axis letters: N images, B turns of them (B = N * copies: turn b is of image b // copies), Q queries, I image tokens,
L instruction tokens, P prompt tokens, M keys of a turn, W aligner width, D width of the language model.

MIMO, section "Multi-modal Input Aligner": X_q cross-attends to (X_img, X_q^t, X_q^v), then a linear
projection into the language model. Image keys carry the position code of the prompts, through the
same projection, so that a point and the patch under it have similar keys; and every token of the prompts and of the instruction
attends to the image before the queries read it, so that "what is here?" and "is there one?" take one step of attention, not two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import ModelConfig
from mimo_jax.models.attention import attention
from mimo_jax.models.layers import Linear
from mimo_jax.models.scan import SCAN, ScanConfig, ScannedLayers


class AlignerAttention(nnx.Module):
    """Multi-head attention of x [B, Q, W] over memory [B, M, W] and, before it, what the rows of an image share [N, J, W]."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs, tie_qk_init: bool = False):
        """tie_qk_init: keys begin with the queries' projection, so that like first attends to like."""
        self.heads = heads

        def linear() -> Linear:
            return Linear(width, width, dtype=dtype, rngs=rngs)

        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        if tie_qk_init:
            self.k.kernel = nnx.Param(self.q.kernel[...])

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None, shared: jax.Array | None = None) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        both = None if shared is None else (heads(self.k(shared)), heads(self.v(shared)))
        out = attention(heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory)), mask=mask, shared=both)
        return self.o(out.reshape(x.shape))

    def scores(self, x: jax.Array, shared: jax.Array) -> jax.Array:
        """[B, J] float32: what the softmax takes of each shared key, summed over heads, the mean over x's tokens."""
        n, _, w = shared.shape
        q = self.q(x.mean(axis=1)).reshape(n, -1, w)
        scores = jnp.einsum("nbw,njw->nbj", q, self.k(shared), preferred_element_type=jnp.float32)
        return scores.reshape(x.shape[0], -1) * (w // self.heads) ** -0.5


class AlignerBlock(nnx.Module):
    """Self-attention over the queries, cross-attention to the memory, MLP ×4; pre-norm."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        self.self_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.self_attention = AlignerAttention(width, heads, dtype=dtype, rngs=rngs)
        self.cross_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.cross_attention = AlignerAttention(width, heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, keys_image: jax.Array, keys_turn: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the queries [B, Q, W] and how much they attend to each place of the image [B, I], as logits."""
        y = self.self_norm(x)
        x = x + self.self_attention(y, y)
        y = self.cross_norm(x)
        x = x + self.cross_attention(y, keys_turn, mask, shared=keys_image)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)))), self.cross_attention.scores(y, keys_image)


def sinusoid(length: int, width: int) -> jax.Array:
    """[L, W] sinusoidal code of the place in the instruction, so that word order reaches the queries."""
    frequency = 10000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :width]


class Aligner(nnx.Module):
    """X_q of one turn from its image, instruction and prompts. `kind`:

    cross_attention  learnable queries over image, text and prompts: Q = aligner.queries
    none             the paper's ablation: the three projected and concatenated, Q = I + L + P
    linear, mlp      the image projected alone (LISA; GLaMM and LLaVA-1.5): Q = I
    """

    def __init__(self, cfg: ModelConfig, *, dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        a, width, out = cfg.aligner, cfg.aligner.width, cfg.llm.width
        self.kind, self.dtype = a.kind, dtype
        linear = lambda i, o: Linear(i, o, dtype=dtype, rngs=rngs)  # noqa: E731
        if a.kind == "linear":
            self.project = linear(cfg.vision.width, out)
        elif a.kind == "mlp":
            self.project = linear(cfg.vision.width, out)
            self.project_out = linear(out, out)
        else:
            width = a.width if a.kind == "cross_attention" else out
            self.image = linear(cfg.vision.width, width)
            self.text = linear(out, width)
            self.visual = linear(cfg.prompt.width, width)
            self.modality_embedding = nnx.Param(jax.random.normal(rngs.params(), (3, width)) * 0.02)
            self.null_prompt = nnx.Param(jax.random.normal(rngs.params(), (width,)) * 0.02)
        if a.kind == "cross_attention":
            self.image_norm = nnx.LayerNorm(cfg.vision.width, dtype=dtype, rngs=rngs)
            self.text_norm = nnx.LayerNorm(out, dtype=dtype, rngs=rngs)
            self.turn_to_image = AlignerAttention(width, a.heads, dtype=dtype, rngs=rngs, tie_qk_init=True)
            self.queries = nnx.Param(jax.random.normal(rngs.params(), (a.queries, width)))
            self.blocks = ScannedLayers(lambda r: AlignerBlock(width, a.heads, dtype=dtype, rngs=r), a.blocks, rngs=rngs, scan=scan)
            self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
            self.project = linear(width, out)

    def project_image(self, image: jax.Array) -> jax.Array:
        """X_q of every turn of each image, [N, I, Dc] -> [N, I, D], for the kinds that read the image alone."""
        if self.kind == "linear":
            return self.project(image)
        return self.project_out(jax.nn.gelu(self.project(image), approximate=False))

    def __call__(
        self, image: jax.Array, image_code: jax.Array, text: jax.Array, text_mask: jax.Array, visual: jax.Array, visual_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """X_q of B turns [B, Q, D], and where in the image the queries of the last block attend [B, I] (logits; None without
        queries); for the kinds that read text and prompts.

        image [N, I, Dc], image_code [I, Wp], text [B, L, D] with mask bool [B, L], visual [B, P, Wp] with mask [B, P]. Where
        a turn has no prompt at all, a learned null token stands in the first place."""
        copies = text.shape[0] // image.shape[0]
        modality = self.modality_embedding[...].astype(self.dtype)
        b, p = visual_mask.shape
        none = ~visual_mask.any(axis=1)
        null = none[:, None] & (jnp.arange(p) == 0)
        valid_mask = visual_mask | null
        if self.kind == "cross_attention":
            image, text = self.image_norm(image), self.text_norm(text)
        text = text + sinusoid(text.shape[1], text.shape[2]).astype(self.dtype)
        keys_image = self.image(image) + self.visual(image_code) + modality[0]
        keys_text = self.text(text) + modality[1]
        keys_visual = jnp.where(null[..., None], self.null_prompt[...].astype(self.dtype), self.visual(visual)) + modality[2]
        if self.kind == "none":
            keep_text, keep_visual = text_mask[..., None], valid_mask[..., None]
            return jnp.concatenate([jnp.repeat(keys_image, copies, axis=0), keys_text * keep_text, keys_visual * keep_visual], axis=1), None

        keys_turn = jnp.concatenate([keys_text, keys_visual], axis=1)
        read = self.turn_to_image(keys_turn.reshape(image.shape[0], -1, keys_turn.shape[-1]), keys_image)  # all turns of an image together
        keys_turn = keys_turn + read.reshape(keys_turn.shape)
        mask = jnp.concatenate([text_mask, valid_mask], axis=1)[:, None, None, :]  # [B, 1, 1, L + P]
        x = jnp.broadcast_to(self.queries[...].astype(self.dtype), (b, *self.queries.shape))
        x, attention_maps = self.blocks(x, keys_image, keys_turn, mask, with_output=True)
        return self.project(self.norm(x)), attention_maps[-1]
