"""MIMO: from an image, a question and visual prompts to an answer in words and a mask for every <SEG>.

Axis letters: N images, B samples (B = N * K: sample b belongs to image b // K), R turns, T tokens of the
sequence, Q tokens of one turn's X_q, L instruction tokens, P prompt tokens or points, S <SEG> slots, I image tokens, H side of an input
image in pixels, D width of the language model, Dc width of the vision tower, C width of SAM's features, g side of the grid of SAM (of
the vision tower in attention maps), M side of a mask, V vocabulary.

As in the paper: X_img = vision tower(image), or what SAM's encoder computes, pooled (`vision.kind` "sam"); X_vis = visual prompt
encoder(prompts); X_q = Aligner(X_img, X_txt, X_vis);
hidden = LLM(template with X_q spliced in); masks = SAM decoder(SAM encoder(image), proj(hidden at <SEG>)).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax import parameters
from mimo_jax.config import Config
from mimo_jax.models import mesh, registry, standard_parts  # noqa: F401 (standard_parts registers the package's own parts)
from mimo_jax.models import scan as layer_scan
from mimo_jax.models.layers import Linear
from mimo_jax.models.llama import LanguageHead, TokenEmbedding
from mimo_jax.models.sam_decoder import SamPromptEncoder
from mimo_jax.models.scan import ScanConfig
from mimo_jax.models.visual_prompt import VisualPromptEncoder


def normalize(pixels: jax.Array, size: jax.Array, mean: tuple, std: tuple, dtype, pixel_norm: str = "imagenet") -> jax.Array:
    """uint8 [N, H, H, 3] -> pixels in `dtype`, zero outside the content `size` int [N, 2] (height, width).

    pixel_norm: see `SamConfig.pixel_norm`. "minmax" takes one minimum and one maximum of all channels of an image's content, after it was
    resized, as MedSAM's MedSAM_Inference.py does: (x - min) / max(max - min, 1e-8)."""
    x = pixels.astype(jnp.float32)
    rows = jnp.arange(pixels.shape[1])[None, :, None, None] < size[:, 0, None, None, None]
    cols = jnp.arange(pixels.shape[2])[None, None, :, None] < size[:, 1, None, None, None]
    content = rows & cols
    if pixel_norm == "imagenet":
        x = (x - jnp.asarray(mean)) / jnp.asarray(std)
    elif pixel_norm == "minmax":
        low = x.min((1, 2, 3), keepdims=True, where=content, initial=255.0)
        high = x.max((1, 2, 3), keepdims=True, where=content, initial=0.0)
        x = (x - low) / jnp.maximum(high - low, 1e-8)
    else:
        x = x / 255.0
    return jnp.where(content, x, 0.0).astype(dtype)


# Output of SAM's image encoder: [N, g, g, C], or a tuple of arrays, one for each scale.
Features = Any
FEATURES = ("x_img", "sam_stages", "sam_features")  # how names of stored features begin; see `MimoModel.image_features`


def _pack(features: Features) -> dict[str, Any]:
    """SAM's features as entries of a batch: "sam_features", or "sam_features_0", … for several scales."""
    return {f"sam_features_{i}": scale for i, scale in enumerate(features)} if isinstance(features, tuple) else {"sam_features": features}


def _unpack(packed: Mapping[str, Any]) -> Features:
    """Inverse of `_pack`; other entries are ignored."""
    if "sam_features" in packed:
        return packed["sam_features"]
    return tuple(packed[f"sam_features_{i}"] for i in range(sum(key.startswith("sam_features_") for key in packed)))


class SegProjection(nnx.Module):
    """proj(r_seg): Linear(D, D), ReLU, Linear(D, C), as LISA's text_hidden_fcs."""

    def __init__(self, width: int, out: int, *, dtype, rngs: nnx.Rngs):
        self.hidden = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.hidden(x)))


class MimoModel(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        m = config.model
        dtype, base_dtype = jnp.dtype(m.dtype), jnp.float32
        self.config, self.dtype = m, dtype
        scan = ScanConfig(m.remat, m.unroll)
        types = {"dtype": dtype, "param_dtype": base_dtype}
        tower, aligner, llm, sam = (registry.part(m, section) for section in ("vision", "aligner", "llm", "sam"))
        self.vision = tower.build(m.vision, scan=scan, rngs=rngs, **types)
        grounding = len(m.grounding_tokens())
        self.prompt = None if m.aligner.image_only() else VisualPromptEncoder(m.prompt, m.vision, dtype=dtype, rngs=rngs)
        self.aligner = aligner.build(m, dtype=dtype, scan=scan, rngs=rngs)
        self.embedding = TokenEmbedding(m.llm, grounding=grounding, rngs=rngs, **types)
        self.llm = llm.build(m.llm, m.lora, config.lora_targets(), scan=scan, rngs=rngs, **types)
        self.lm_head = LanguageHead(m.llm, grounding=grounding, rngs=rngs, **types)
        self.seg_projection = SegProjection(m.llm.width, m.sam.decoder_width, dtype=dtype, rngs=rngs)
        self.sam_encoder = sam.build(m.sam, scan=scan, rngs=rngs, **types)
        self.sam_prompt = SamPromptEncoder(m.sam, rngs=rngs, **types)
        self.sam_decoder = sam.decoder(m.sam, rngs=rngs, **types)

    # --- what is computed once per image

    def encode(self, views: Mapping[str, jax.Array]) -> tuple[jax.Array, Features]:
        """N images -> X_img [N, I, Dc], and SAM's features: [N, g, g, C], or the tuple of arrays of a kind with several scales.

        views: the arrays of `data.transforms.preprocess`, or stored features in their place, as `data.loading.features` reads them."""
        made = self.image_features(views)
        features = _unpack(made)
        if not self.config.vision.from_sam():
            return made["x_img"], features
        return self.vision(jax.tree.leaves(features)[0], made.get("sam_stages")), features

    def image_features(self, views: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The outputs of the image encoders by their names in a batch: SAM's features (`_pack`), and "x_img", or "sam_stages" if X_img is
        made of SAM's features and stages. What `views` has as stored features is not computed."""
        made = {name: self._from_bits(array) for name, array in views.items() if name.startswith(FEATURES)}
        if not any(name.startswith("sam_features") for name in made):
            made |= self.encode_sam(views["sam_image"], views["sam_size"])
        if not self.config.vision.from_sam() and "x_img" not in made:
            made["x_img"] = self.encode_vision(views["vision_image"], views["vision_size"])
        return made

    def encode_vision(self, vision_image: jax.Array, vision_size: jax.Array) -> jax.Array:
        """uint8 [N, H, H, 3], content size [N, 2] -> X_img [N, I, Dc] of a vision tower with an encoder of its own."""
        tower = registry.part(self.config, "vision")
        return self.vision(normalize(vision_image, vision_size, tower.mean, tower.std, self.dtype))

    def encode_sam(self, sam_image: jax.Array, sam_size: jax.Array) -> dict[str, jax.Array]:
        """uint8 [N, H, H, 3], content size [N, 2] -> SAM's part of `image_features`."""
        encoder, vision = registry.part(self.config, "sam"), self.config.vision
        pixels = normalize(sam_image, sam_size, encoder.mean, encoder.std, self.dtype, self.config.sam.pixel_norm)
        if not (vision.from_sam() and vision.stage_numbers()):
            return _pack(self.sam_encoder(pixels))
        *stages, features = self.sam_encoder.feature_maps(pixels)
        return _pack(features) | {"sam_stages": self.vision.pool_stages(stages)}

    # --- what is computed once per turn

    def align(
        self, image: jax.Array, instruction_ids: jax.Array, instruction_mask: jax.Array, prompt_xy: jax.Array, prompt_kind: jax.Array
    ) -> jax.Array:
        """X_img [N, I, Dc], instruction [B, R, L], prompts [B, R, P(, 2)] -> X_q [B, R, Q, D]; each turn uses only its own text and
        prompts."""
        return self.align_with_attention(image, instruction_ids, instruction_mask, prompt_xy, prompt_kind)[0]

    def align_with_attention(self, image, instruction_ids, instruction_mask, prompt_xy, prompt_kind) -> tuple[jax.Array, jax.Array | None]:
        """The result of `align`, and where in the image the queries of each turn attend: logits [B, R, g, g] on the grid of the vision
        tower, or None if `aligner.kind` has no queries."""
        b, r, _ = instruction_ids.shape
        if self.prompt is None:
            x_q = jnp.repeat(self.aligner.project_image(image), b * r // image.shape[0], axis=0)
            return x_q.reshape(b, r, *x_q.shape[1:]), None

        def fold(x: jax.Array) -> jax.Array:
            return x.reshape(b * r, *x.shape[2:])

        visual = self.prompt(fold(prompt_xy), fold(prompt_kind))
        text = mesh.constrain_batch(self.embedding(fold(instruction_ids)))
        x_q, attention_map = self.aligner(image, self.prompt.image_code(), text, fold(instruction_mask), visual, fold(prompt_kind) > 0)
        if attention_map is not None:
            g = self.config.vision.grid()
            attention_map = attention_map[:, -g * g :].reshape(b, r, g, g)  # without the class token
        return x_q.reshape(b, r, *x_q.shape[1:]), attention_map

    # --- the language model

    def embed(self, input_ids: jax.Array, query_index: jax.Array, x_q: jax.Array) -> jax.Array:
        """ids [B, T], query_index [B, T] (turn * Q + q, or -1), X_q [B, R, Q, D] -> [B, T, D] with X_q spliced in."""
        queries = x_q.reshape(x_q.shape[0], -1, x_q.shape[-1])
        spliced = jnp.take_along_axis(queries, jnp.maximum(query_index, 0)[..., None], axis=1)
        return jnp.where((query_index >= 0)[..., None], spliced, self.embedding(input_ids))

    def decode(self, x: jax.Array, positions: jax.Array, cache: Any = None, **dropout: jax.Array):
        """See `Llama.__call__`."""
        return self.llm(x, positions, cache, **dropout)

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache of the language model for `batch` rows of `length` tokens."""
        return self.llm.new_cache(batch, length)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> fp32 [..., V]; the grounding tokens come last."""
        return self.lm_head(hidden)

    # --- from <SEG> to masks

    def seg_hidden(self, hidden: jax.Array, seg_index: jax.Array) -> jax.Array:
        """hidden [B, T, D], positions of <SEG> [B, S] -> r_seg [B, S, D]: the state of the token itself, or the one that predicts it."""
        index = seg_index - 1 if self.config.seg_state == "predict" else seg_index
        return jnp.take_along_axis(hidden, jnp.maximum(index, 0)[..., None], axis=1)

    def segment(
        self,
        features: Features,
        seg_states: jax.Array,
        points: tuple[jax.Array, jax.Array] | None = None,
        masks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """SAM features of N images, r_seg [B, S, D] -> mask logits fp32 [B, S, M, M], predicted IoU fp32 [B, S].

        proj(r_seg) is the only sparse prompt and `no_mask` the dense one, as in LISA; all masks of an image share its keys.
        points: (xy [B, P, 2] in pixels of SAM's frame, labels int [B, P]), added to proj(r_seg) at every <SEG> of a sample; labels
        are those of `SamPromptEncoder.embed_points`, and below -1 for padding. masks: logits [B, S, M, M] for the dense
        prompt, such as those that an earlier call returned."""
        b, s, _ = seg_states.shape
        n = jax.tree.leaves(features)[0].shape[0]
        sparse = self.seg_projection(seg_states)[:, :, None]  # [B, S, 1, C]
        valid_mask = None
        if points is not None:
            xy, labels = points
            point_tokens = self.sam_prompt.embed_points(xy + 0.5, jnp.maximum(labels, -1))[:, None]
            sparse = jnp.concatenate([jnp.broadcast_to(point_tokens, (b, s, *point_tokens.shape[2:])), sparse], axis=2)
            valid_mask = jnp.pad(labels >= -1, [(0, 0), (0, 1)], constant_values=True)[:, None]
            valid_mask = jnp.broadcast_to(valid_mask, (b, s, valid_mask.shape[-1])).reshape(n, b // n * s, -1)
        dense = self.sam_prompt.no_mask()
        if masks is not None:
            dense = self.sam_prompt.embed_masks(masks.astype(self.dtype))
            dense = dense.reshape(n, b // n * s, *dense.shape[2:])
        sparse = sparse.reshape(n, b // n * s, *sparse.shape[2:])
        logits, iou = self.sam_decoder(features, self.sam_prompt.dense_pe(), sparse, dense, valid_mask=valid_mask)
        return logits.reshape(b, s, *logits.shape[-2:]), iou.reshape(b, s)

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Teacher-forced forward pass: a batch of `data/loading/loader.py`, with images or with their features ->
        {"hidden" [B, T, D], "masks" [B, S, M, M], "iou" [B, S], "attention_map" [B, R, g, g] or None}.

        The training step adds "dropout_keys" [B] (`lora.sample_keys`), without which nothing is dropped out."""
        image, features = mesh.constrain_batch(self.encode(batch))
        turns = (batch[key] for key in ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind"))
        x_q, attention_map = self.align_with_attention(image, *turns)
        x = mesh.constrain_batch(self.embed(batch["input_ids"], batch["query_index"], x_q))
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        dropout = {"dropout_keys": batch["dropout_keys"]} if "dropout_keys" in batch else {}
        hidden = mesh.constrain_batch(self.decode(x, positions, **dropout))
        masks, iou = self.segment(features, self.seg_hidden(hidden, batch["seg_index"]))
        return {"hidden": hidden, "masks": masks, "iou": iou, "attention_map": attention_map}

    def _from_bits(self, x: jax.Array) -> jax.Array:
        """uint16, the bits of bfloat16 as `data.loading.features` stores them -> the same values in `dtype`."""
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(self.dtype)


def feature_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of one image that are stored instead of its pictures, by their names in a batch: those of
    `MimoModel.image_features`, but not X_img if the vision tower trains beside a frozen SAM: its picture stays in the batch. Where both
    train, a run cannot use features, and these are all that a run with frozen encoders could."""
    shapes = {key: leaf.shape[1:] for key, leaf in _feature_shapes(config.model_json()).items()}
    rates = parameters.multipliers(config, abstract(config)[1])
    moving = {path.split("/")[0] for path, rate in rates.items() if rate is not None}
    if "vision" in moving and "sam_encoder" not in moving:
        del shapes["x_img"]
    return shapes


@functools.lru_cache(maxsize=32)
def _feature_shapes(model_json: str) -> dict[str, jax.ShapeDtypeStruct]:
    config = Config.from_dict({"model": json.loads(model_json)})
    graphdef, shapes = abstract(config)
    m = config.model

    def image(name: str, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        pixels, size = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return {f"{name}_image": pixels, f"{name}_size": size}

    views = image("vision", m.vision.image_size) | image("sam", m.sam.image_size)
    return jax.eval_shape(lambda params, views: layer_scan.bind(graphdef, params).image_features(views), shapes, views)


def abstract(config: Config):
    """(graphdef, nested dict of ShapeDtypeStruct): the whole model without its arrays. It is traced once per model config."""
    graphdef, shapes = _abstract(config.model_json())
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)


@functools.lru_cache(maxsize=32)
def _abstract(model_json: str):
    config = Config.from_dict({"model": json.loads(model_json)})
    return layer_scan.abstract(lambda rngs: MimoModel(config, rngs))


def init_params(config: Config, key: jax.Array) -> dict:
    """Nested dict of parameters drawn from `key`."""
    return layer_scan.init_params(lambda rngs: MimoModel(config, rngs), key)
