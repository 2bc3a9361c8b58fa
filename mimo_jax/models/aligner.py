"""The Multi-modal Input Aligner: learnable queries read the image, the instruction and the user's prompts.

Axis letters: N images, B turns (B = N * copies: turn b belongs to image b // copies), Q queries, I image tokens,
L instruction tokens, P prompt tokens, M keys of a turn, J keys that the turns of an image share, W aligner width,
D width of the language model, Dc width of the vision tower, Wp width of the visual prompt encoder.

MIMO, section "Multi-modal Input Aligner": X_q cross-attends to (X_img, X_q^t, X_q^v) and is then projected linearly into the language
model. Image keys carry the positional encoding of the prompts, through the same projection, so that a point and the patch under it
have similar keys. Every token of the prompts and of the instruction attends to the image before the queries attend to it, so that
"what is here?" and "is there one?" need one step of attention instead of two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.model_config import ModelConfig
from mimo_jax.models.attention import attention
from mimo_jax.models.counts import MatmulCounts, attention_flops
from mimo_jax.models.layers import Linear
from mimo_jax.models.scan import SCAN, ScanConfig, ScannedLayers


class AlignerAttention(nnx.Module):
    """Multi-head attention of x [B, Q, W] over memory [B, M, W] and over `prefix` [N, J, W], which the turns of an image share."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs, tie_qk_init: bool = False):
        """tie_qk_init: the key projection is initialised with the query projection, so that similar tokens attend to each other first."""
        self.heads = heads

        def linear() -> Linear:
            return Linear(width, width, dtype=dtype, rngs=rngs)

        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        if tie_qk_init:
            self.k.kernel = nnx.Param(self.q.kernel[...])

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None, prefix: jax.Array | None = None) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        prefix_kv = None if prefix is None else (heads(self.k(prefix)), heads(self.v(prefix)))
        out = attention(heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory)), mask=mask, prefix_kv=prefix_kv)
        return self.o(out.reshape(x.shape))

    def scores(self, x: jax.Array, prefix: jax.Array) -> jax.Array:
        """[B, J] float32: the attention logits of each key of `prefix` [N, J, W], summed over heads and averaged over the tokens of x."""
        n, _, w = prefix.shape
        q = self.q(x.mean(axis=1)).reshape(n, -1, w)
        scores = jnp.einsum("nbw,njw->nbj", q, self.k(prefix), preferred_element_type=jnp.float32)
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
        """x [B, Q, W], keys_image [N, I, W], keys_turn [B, M, W], mask bool [B, 1, 1, M] -> the queries [B, Q, W], and how much they
        attend to each image token [B, I], as logits."""
        y = self.self_norm(x)
        x = x + self.self_attention(y, y)
        y = self.cross_norm(x)
        x = x + self.cross_attention(y, keys_turn, mask, prefix=keys_image)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)))), self.cross_attention.scores(y, keys_image)


def sinusoid(length: int, width: int) -> jax.Array:
    """[L, W] sinusoidal encoding of the position in the instruction, so that word order reaches the queries."""
    frequency = 10000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :width]


class PromptedAligner(nnx.Module):
    """Base class of the aligners that read image, instruction and prompts: it projects all three to keys of one width W."""

    def __init__(self, cfg: ModelConfig, width: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.image = Linear(cfg.vision.width, width, dtype=dtype, rngs=rngs)
        self.text = Linear(cfg.llm.width, width, dtype=dtype, rngs=rngs)
        self.visual = Linear(cfg.prompt.width, width, dtype=dtype, rngs=rngs)
        self.modality_embedding = nnx.Param(jax.random.normal(rngs.params(), (3, width)) * 0.02)
        self.null_prompt = nnx.Param(jax.random.normal(rngs.params(), (width,)) * 0.02)

    def keys(
        self, image: jax.Array, image_code: jax.Array, text: jax.Array, visual: jax.Array, visual_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Arguments as in `CrossAttentionAligner.__call__` -> keys of the image [N, I, W], of the text [B, L, W] and of the prompts
        [B, P, W], and which prompt keys are valid, bool [B, P]. If a turn has no prompt, its first prompt key is a learned null token."""
        modality = self.modality_embedding[...].astype(self.dtype)
        no_prompt = ~visual_mask.any(axis=1)
        null = no_prompt[:, None] & (jnp.arange(visual_mask.shape[1]) == 0)
        text = text + sinusoid(text.shape[1], text.shape[2]).astype(self.dtype)
        keys_image = self.image(image) + self.visual(image_code) + modality[0]
        keys_text = self.text(text) + modality[1]
        keys_visual = jnp.where(null[..., None], self.null_prompt[...].astype(self.dtype), self.visual(visual)) + modality[2]
        return keys_image, keys_text, keys_visual, visual_mask | null


class CrossAttentionAligner(PromptedAligner):
    """Learnable queries over image, text and prompts: Q = aligner.queries."""

    def __init__(self, cfg: ModelConfig, *, dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        a, width, out = cfg.aligner, cfg.aligner.width, cfg.llm.width
        super().__init__(cfg, width, dtype=dtype, rngs=rngs)
        self.image_norm = nnx.LayerNorm(cfg.vision.width, dtype=dtype, rngs=rngs)
        self.text_norm = nnx.LayerNorm(out, dtype=dtype, rngs=rngs)
        self.turn_to_image = AlignerAttention(width, a.heads, dtype=dtype, rngs=rngs, tie_qk_init=True)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (a.queries, width)))
        self.blocks = ScannedLayers(lambda r: AlignerBlock(width, a.heads, dtype=dtype, rngs=r), a.blocks, rngs=rngs, scan=scan)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.project = Linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(
        self, image: jax.Array, image_code: jax.Array, text: jax.Array, text_mask: jax.Array, visual: jax.Array, visual_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """X_q of B turns [B, Q, D], and where in the image the queries of the last block attend [B, I], as logits (None for a kind
        without an attention map).

        image [N, I, Dc], image_code [I, Wp], text [B, L, D] with mask bool [B, L], visual [B, P, Wp] with mask [B, P]."""
        image, text = self.image_norm(image), self.text_norm(text)
        keys_image, keys_text, keys_visual, valid_mask = self.keys(image, image_code, text, visual, visual_mask)
        keys_turn = jnp.concatenate([keys_text, keys_visual], axis=1)
        keys_by_image = keys_turn.reshape(image.shape[0], -1, keys_turn.shape[-1])  # the keys of all turns of an image are one sequence
        attended = self.turn_to_image(keys_by_image, keys_image)
        keys_turn = keys_turn + attended.reshape(keys_turn.shape)
        mask = jnp.concatenate([text_mask, valid_mask], axis=1)[:, None, None, :]  # [B, 1, 1, L + P]
        x = jnp.broadcast_to(self.queries[...].astype(self.dtype), (len(text), *self.queries.shape))
        x, attention_maps = self.blocks(x, keys_image, keys_turn, mask, with_output=True)
        return self.project(self.norm(x)), attention_maps[-1]


class ConcatAligner(PromptedAligner):
    """The paper's ablation ("none"): image, instruction and prompts projected and concatenated, Q = I + L + P."""

    def __init__(self, cfg: ModelConfig, *, dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        super().__init__(cfg, cfg.llm.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, image: jax.Array, image_code: jax.Array, text: jax.Array, text_mask: jax.Array, visual: jax.Array, visual_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """See `CrossAttentionAligner.__call__`; there is no attention map."""
        keys_image, keys_text, keys_visual, valid_mask = self.keys(image, image_code, text, visual, visual_mask)
        keys_image = jnp.repeat(keys_image, len(text) // len(image), axis=0)
        return jnp.concatenate([keys_image, keys_text * text_mask[..., None], keys_visual * valid_mask[..., None]], axis=1), None


class LinearProjector(nnx.Module):
    """A linear projection of the image alone (LISA): Q = I."""

    def __init__(self, cfg: ModelConfig, *, dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        self.project = Linear(cfg.vision.width, cfg.llm.width, dtype=dtype, rngs=rngs)

    def project_image(self, image: jax.Array) -> jax.Array:
        """X_q of every turn of each image, [N, I, Dc] -> [N, I, D]."""
        return self.project(image)


class MlpProjector(LinearProjector):
    """A projection of the image alone by two layers (GLaMM and LLaVA-1.5): Q = I."""

    def __init__(self, cfg: ModelConfig, *, dtype=jnp.float32, scan: ScanConfig = SCAN, rngs: nnx.Rngs):
        super().__init__(cfg, dtype=dtype, scan=scan, rngs=rngs)
        self.project_out = Linear(cfg.llm.width, cfg.llm.width, dtype=dtype, rngs=rngs)

    def project_image(self, image: jax.Array) -> jax.Array:
        return self.project_out(jax.nn.gelu(self.project(image), approximate=False))


def cross_attention_counts(cfg: ModelConfig, share: float) -> MatmulCounts:
    """Counts of all turns of one sample; share: see `registry.AlignerKind`."""
    a, width = cfg.aligner, cfg.aligner.width
    keys = a.max_text + cfg.prompt.max_tokens
    image, turn, queries = cfg.vision.tokens() * share, cfg.max_turns * keys, cfg.max_turns * a.queries
    tokens = _projection_counts(cfg, share) | {
        r"^aligner/turn_to_image/[qo]/": turn,
        r"^aligner/turn_to_image/[kv]/": image,
        r"^aligner/blocks/block/cross_attention/[kv]/": image + turn,
        r"^aligner/(blocks|project)/": queries,
    }
    reading = attention_flops(keys, cfg.vision.tokens(), width)
    block = attention_flops(a.queries, a.queries, width) + attention_flops(a.queries, cfg.vision.tokens() + keys, width)
    return MatmulCounts(tokens, cfg.max_turns * (reading + a.blocks * block))


def concat_counts(cfg: ModelConfig, share: float) -> MatmulCounts:
    """Counts of all turns of one sample; share: see `registry.AlignerKind`."""
    return MatmulCounts(_projection_counts(cfg, share), 0.0)


def projector_counts(cfg: ModelConfig, share: float) -> MatmulCounts:
    """Counts of one sample, whose turns share the image; share: see `registry.AlignerKind`."""
    return MatmulCounts({r"^aligner/project": cfg.vision.tokens() * share}, 0.0)


def _projection_counts(cfg: ModelConfig, share: float) -> dict[str, float]:
    return {
        r"^aligner/(modality_embedding|null_prompt|queries)$": 0,
        r"^aligner/image/": cfg.vision.tokens() * share,
        r"^aligner/text/": cfg.max_turns * cfg.aligner.max_text,
        r"^aligner/visual/": cfg.max_turns * cfg.prompt.max_tokens,
    }
