"""Floating-point operations per sample, by part of the model: 2 for each multiply-add of a matrix product, nothing else.

Axis letters: R turns, I image tokens, L instruction tokens, P prompt tokens, Q tokens of one turn's X_q, T tokens of the sequence,
S <SEG> slots, g side of SAM's grid, p = g*g, w window side in tokens.

A matrix needs twice its size for every token that it is applied to; one table says how many tokens of one sample that is. Products of
two activations (attention) are counted separately. The count is what the model needs, not what a program does: causal attention is half
a square; recomputation (remat) and the wider keys of folded relative positions are not counted. XLA's cost_analysis counts the body of a
loop once and kernels not at all, so it cannot be used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from mimo_jax import parameters, pathtree
from mimo_jax.config import Config
from mimo_jax.models import mimo, registry
from mimo_jax.models.counts import attention_flops

# part -> itself and the parts that feed it: if a parameter of one of them trains, gradients flow through the part's activations. Where
# X_img is made of SAM's features, "vision" stands for "sam_encoder".
_FED_BY = {"vision": {"vision"}, "sam_encoder": {"sam_encoder"}, "aligner": {"vision", "prompt", "embedding", "aligner"}}
_FED_BY["llm"] = _FED_BY["aligner"] | {"llm"}
_FED_BY["lm_head"] = _FED_BY["llm"] | {"lm_head"}
_FED_BY["seg_projection"] = _FED_BY["llm"] | {"seg_projection"}
_FED_BY["sam_decoder"] = _FED_BY["seg_projection"] | {"sam_encoder", "sam_decoder"}

# Matrices whose inputs depend on fewer parts than those that feed their part. Pixels need no gradient.
_READS = {
    r"^(vision|sam_encoder)/patch/": set(),
    r"^aligner/image/": {"vision"},
    r"^sam_decoder/first/(token_to_image/[kv]|image_to_token/q)/": {"sam_encoder"},
}

_DECODER_TOKENS = 6  # tokens per mask in SAM's decoder: IoU, four masks, <SEG>


def forward(config: Config, length: int) -> dict[str, float]:
    """FLOPs of one sample's forward pass by part, with its sequence padded to `length` tokens. What the samples of one image share is
    divided among them; with `config.data.features` an image encoder whose features are stored counts as 0."""
    return _by_part(config, length, lambda part, path: 1)


def step(config: Config, length: int) -> dict[str, float]:
    """FLOPs of one sample's training step by part: the forward pass, and the backward pass as far as something trains. A frozen matrix
    has no weight gradient; a part that no trained parameter feeds has no gradient at all."""
    rates = parameters.multipliers(config, mimo.abstract(config)[1])
    moving = {path.split("/")[0] for path, rate in rates.items() if rate is not None}
    if config.model.vision.from_sam() and "sam_encoder" in moving:
        moving |= {"vision"}

    def passes(part: str, path: str | None) -> int:
        if path is None:  # a product of two activations: a gradient for each
            return 3 if _FED_BY[part] & moving else 1
        reads = pathtree.first_match(path, {**_READS, r"": _FED_BY[part]}, "flops")
        return 1 + (rates[path] is not None) + bool(reads & moving)

    return _by_part(config, length, passes)


def _by_part(config: Config, length: int, passes: Callable[[str, str | None], int]) -> dict[str, float]:
    """FLOPs of each part: the sum over its matrices (part, path) and other products (part, None), each multiplied by `passes` of it."""
    sums: dict[str, float] = defaultdict(float)
    tokens, by_part = _counts(config, length)
    for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items():
        count = pathtree.first_match(path, tokens, "flops")
        if count:
            part = path.split("/")[0]
            sums[part] += 2.0 * leaf.size * count * passes(part, path)
    for part, products in by_part.items():
        sums[part] += products * passes(part, None)
    stored = mimo.feature_shapes(config) if config.data.features else {}
    cached = {"sam_encoder": bool(stored), "vision": "x_img" in stored}
    return {part: 0.0 if cached.get(part) else total for part, total in sums.items()}


def _counts(config: Config, length: int) -> tuple[dict[str, float], dict[str, float]]:
    """(ordered path regex -> tokens of one sample that the matrix is applied to, 0 for what is not a matrix or is only looked up;
    part -> FLOPs of one sample's products of two activations: of queries with keys, and of weights with values)."""
    m, s = config.model, config.model.sam
    share = 1 / config.data.samples_per_image  # a sample's part of what is computed once per image
    tower, llm, encoder = (registry.part(m, section).matmul_counts for section in ("vision", "llm", "sam"))
    vision, language, sam = tower(m.vision), llm(m.llm, length), encoder(m.sam)
    aligner = registry.part(m, "aligner").matmul_counts(m, share)
    places, words = s.grid() ** 2, _DECODER_TOKENS * m.max_segs
    tokens = {
        r"(bias|scale|token|tokens|embedding|rel_pos_[hw])$|^(prompt|embedding|sam_prompt)/": 0,
        **{pattern: count * share for pattern, count in (vision.tokens | sam.tokens).items()},
        **aligner.tokens,
        **language.tokens,
        r"^lm_head/": length,
        r"^seg_projection/": m.max_segs,
        r"^sam_decoder/first/(token_to_image/[kv]|image_to_token/q)/": places * share,
        r"^sam_decoder/.*(token_to_image/[kv]|image_to_token/[qo]|final_attention/[kv])/": places * m.max_segs,
        r"^sam_decoder/upscale1/": places * m.max_segs,
        r"^sam_decoder/upscale2/": 4 * places * m.max_segs,
        r"^sam_decoder/(hyper|iou_head)/": m.max_segs,
        r"^sam_decoder/": words,
    }
    across = attention_flops(_DECODER_TOKENS, places, s.decoder_width // 2)
    among = attention_flops(_DECODER_TOKENS, _DECODER_TOKENS, s.decoder_width)
    masks = 2.0 * 16 * places * s.decoder_width / 8
    products = {
        "vision": share * vision.products,
        "aligner": aligner.products,
        "llm": language.products,
        "sam_encoder": share * sam.products,
        "sam_decoder": m.max_segs * (s.decoder_layers * (2 * across + among) + across + masks),
    }
    return tokens, products
