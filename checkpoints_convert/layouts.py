"""Detects the models in a file from the names of its tensors, and normalises those names.

A `Component` is a table of rows with a key that identifies it; the text before that key in a file is the component's prefix. A CLIP
tower is thus found in its own file, in a file of all of CLIP, and in a LISA checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_convert import rows
from checkpoints_convert.rows import Row
from mimo_jax.errors import UserError
from mimo_jax.model_config import ModelConfig
from mimo_jax.models.sam_decoder import MASK_TOKENS

# Regex of a key -> its replacement. PEFT wraps the model, since 0.6 also its layers, and adds the name of the adapter; DeepSpeed and
# DataParallel wrap the model again; GLaMM has another name for SAM.
_SPELLINGS = (
    (r"^module\.", ""),
    (r"^base_model\.model\.", ""),
    (r"\.base_layer\.(weight|bias)$", r".\1"),
    (r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight"),
    (r"(^|\.)grounding_encoder\.", r"\1visual_model."),
)

# Names in transformers' SamModel -> those in segment-anything, for files that have a key that matches `_SAM_HF`.
_SAM_HF = r"^vision_encoder\.patch_embed\.projection\.weight$"
_SAM_HF_SPELLINGS = (
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.pos_embed$", "image_encoder.pos_embed"),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    # The same matrix has two names.
    (r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
)  # fmt: skip


class Component(NamedTuple):
    """A part of a model and the tensors that it needs.

    title: shown in messages; probe: regex of the end of a key that only this component has; ignored: regexes of other keys in such
    files, which are not needed. section, kinds: the section of `config.model` and the kinds that the rows fill; empty for parts that
    every model has. indices(model settings): the values of the rows' placeholders, each an array of the shape of the stack's leading
    axes."""

    title: str
    rows: tuple[Row, ...]
    probe: str
    ignored: tuple[str, ...] = ()
    section: str = ""
    kinds: tuple[str, ...] = ()
    indices: Callable[[ModelConfig], dict[str, np.ndarray]] = lambda model: {}

    def fits(self, model: ModelConfig) -> bool:
        """Whether a model with these settings has this component."""
        return not self.section or getattr(model, self.section).kind in self.kinds

    def is_language_model(self) -> bool:
        """Whether this is a language model, with an embedding and a head."""
        return any(row.key == rows.EMBEDDING_KEY for row in self.rows)


def sam_decoder_indices(model: ModelConfig) -> dict[str, np.ndarray]:
    """The values of the placeholders of `rows.SAM_DECODER`."""
    layers = np.arange(1, model.sam.decoder_layers)
    return {"sam_point": np.arange(4), "sam_decoder_layer": layers, "sam_mask": np.arange(MASK_TOKENS)}


def _sam_indices(model: ModelConfig) -> dict[str, np.ndarray]:
    blocks = np.arange(model.sam.layers).reshape(-1, model.sam.global_every)
    return {"sam_windowed": blocks[:, :-1], "sam_global": blocks[:, -1], **sam_decoder_indices(model)}


def _tiny_vit_indices(model: ModelConfig) -> dict[str, np.ndarray]:
    blocks = {f"tiny_vit_{i}": np.arange(depth) for i, depth in enumerate(model.sam.stages("depths"))}
    return {**blocks, **sam_decoder_indices(model)}


def _clip_indices(model: ModelConfig) -> dict[str, np.ndarray]:
    return {"vision_layer": np.arange(model.vision.layers)}


def _llama_indices(model: ModelConfig) -> dict[str, np.ndarray]:
    return {"llm_layer": np.arange(model.llm.layers)}


def _aligner_indices(model: ModelConfig) -> dict[str, np.ndarray]:
    return {"aligner_block": np.arange(model.aligner.blocks)}


COMPONENTS: dict[str, Component] = {}


def register_component(name: str, component: Component) -> None:
    """Add a table of tensors, which the row of a part in `mimo_jax.models.registry` can name. Raises ValueError if the name is in use."""
    if name in COMPONENTS:
        raise ValueError(f"component {name}: is already registered; choose another name")
    COMPONENTS[name] = component


_CLIP = {"section": "vision", "kinds": ("clip",), "indices": _clip_indices}
_LLAMA = {"section": "llm", "kinds": ("llama",), "indices": _llama_indices}
_STANDARD = {
    "clip": Component("CLIP vision tower, transformers", rows.CLIP, r"embeddings\.class_embedding$", rows.CLIP_IGNORED, **_CLIP),
    "clip_open": Component(
        "CLIP vision tower, open_clip", rows.CLIP_OPEN, r"(?<=visual\.)class_embedding$", rows.CLIP_OPEN_IGNORED, **_CLIP
    ),
    "llama": Component("Llama", rows.LLAMA, r"model\.embed_tokens\.weight$", rows.LLAMA_IGNORED, **_LLAMA),
    "lora": Component("LoRA", rows.LORA, r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_A\.weight$", **_LLAMA),
    "sam": Component("SAM", rows.SAM, r"mask_decoder\.iou_token\.weight$", section="sam", kinds=("vit",), indices=_sam_indices),
    "tiny_vit": Component(
        "SAM with TinyViT",
        rows.TINY_VIT,
        r"image_encoder\.patch_embed\.seq\.0\.c\.weight$",
        rows.TINY_VIT_IGNORED,
        section="sam",
        kinds=("tiny_vit",),
        indices=_tiny_vit_indices,
    ),
    "projector": Component(
        "linear projector (LISA, LLaVA)", rows.PROJECTOR_LINEAR, r"model\.mm_projector\.weight$", section="aligner", kinds=("linear",)
    ),
    "projector_mlp": Component(
        "MLP projector (GLaMM, LLaVA 1.5)", rows.PROJECTOR_MLP, r"model\.mm_projector\.0\.weight$", section="aligner", kinds=("mlp",)
    ),
    "seg": Component("projection of <SEG>", rows.SEG_PROJECTION, r"model\.text_hidden_fcs\.0\.0\.weight$"),
    "aligner": Component(
        "Multi-modal Input Aligner",
        rows.ALIGNER,
        r"model\.aligner\.modality_embedding$",
        section="aligner",
        kinds=("cross_attention", "none"),
        indices=_aligner_indices,
    ),
    "prompt": Component("visual prompt encoder", rows.PROMPT, r"model\.visual_prompt\.kind$"),
}
for _name, _component in _STANDARD.items():
    register_component(_name, _component)
# GLaMM's region encoder is not part of this model, but its tensors are kept for export.
KEPT = r"(^|\.)region_encoder\."


class DetectedComponent(NamedTuple):
    """A component of a file and the prefix of its keys in that file."""

    name: str
    prefix: str

    @property
    def component(self) -> Component:
        return COMPONENTS[self.name]


def normalize_keys(keys: Iterable[str]) -> dict[str, list[str]]:
    """Returns {normalised key, as in the tables: the keys of the file that have this normalised form}."""
    keys = list(keys)
    spellings = _SPELLINGS + (_SAM_HF_SPELLINGS if any(re.search(_SAM_HF, key) for key in keys) else ())
    made: dict[str, list[str]] = {}
    for key in keys:
        name = key
        for pattern, replacement in spellings:
            name = re.sub(pattern, replacement, name)
        made.setdefault(name, []).append(key)
    return made


def detect(keys: Iterable[str]) -> list[DetectedComponent]:
    """The components among normalised keys; raises UserError for one that occurs twice."""
    keys = list(keys)
    found = []
    for name, component in COMPONENTS.items():
        matches = ((key, re.search(component.probe, key)) for key in keys)
        prefixes = sorted({key[: match.start()] for key, match in matches if match})
        if len(prefixes) > 1:
            named = ", ".join(prefix or "(none)" for prefix in prefixes)
            raise UserError(
                f"the file has {component.title} {len(prefixes)} times, with prefixes {named}; give the checkpoint of one model"
            )
        found += [DetectedComponent(name, prefix) for prefix in prefixes]
    return [one for one in found if not any(_contains(other, one) for other in found)]


def _contains(other: DetectedComponent, one: DetectedComponent) -> bool:
    """Whether another component also has the key that identifies this one, and an identifying key that this one lacks: then the file
    contains only the other one, such as a language model with Llama's embedding and head."""

    def explains(table: tuple[Row, ...], probe: str) -> bool:
        return any(re.search(probe, row.key) for row in table)

    own, others = one.component, other.component
    return one.prefix == other.prefix and explains(others.rows, own.probe) and not explains(own.rows, others.probe)


def with_prefix(table: Sequence[Row], prefix: str) -> tuple[Row, ...]:
    """The rows with `prefix` before their keys."""
    return tuple(row._replace(key=prefix + row.key) for row in table)
