"""Registries of the model's parts, with one row for each `kind` of vision tower, aligner, language model and mask encoder.

    register_vision_tower("siglip", VisionTower(SiglipConfig, SiglipVit, MEAN, STD, matmul_counts))

adds a row. The module that calls it must be imported before a config names the kind: by the config file itself, or through MIMO_PLUGINS.
The rows of the package's own parts are in `standard_parts`. The paths of a part's parameters begin with "vision/", "aligner/", "llm/" or
"sam_encoder/".

Axis letters: N images, H and S side of an input image in pixels, I image tokens, g side of SAM's grid, C width of SAM's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from flax import nnx

from mimo_jax import sharding
from mimo_jax.config import ConfigError
from mimo_jax.model_config import KINDS, AlignerConfig, LlmConfig, ModelConfig, SamConfig, VisionConfig
from mimo_jax.models.counts import MatmulCounts
from mimo_jax.models.sam_decoder import MaskDecoder

Shardings = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class VisionTower:
    """A kind of vision tower.

    build(settings, *, dtype, param_dtype, scan, rngs): makes a module that maps pixels [N, H, H, 3], normalised by mean and std, to X_img
    [N, I, settings.width]: `extra_tokens()` first, then the patches row by row. If `settings.from_sam()`, it has the interface of
    `sam_features.SamFeatures` instead.
    mean, std: per channel, of pixels in 0 … 255; None if `settings.from_sam()`. matmul_counts(settings): counts of one image. shardings:
    rows placed before those of `sharding.RULES`. component: name of the table of its tensors in
    `checkpoints_convert.layouts.COMPONENTS`; empty if there is none."""

    settings: type[VisionConfig]
    build: Callable[..., nnx.Module]
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    matmul_counts: Callable[[Any], MatmulCounts]
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


@dataclass(frozen=True)
class AlignerKind:
    """A kind of aligner.

    build(model settings, *, dtype, scan, rngs): makes a module with the interface of `aligner.CrossAttentionAligner`, or of
    `aligner.LinearProjector` if `settings.image_only()`. matmul_counts(model settings, share): counts of all turns of one sample, with
    the fraction `share` of the work done once per image. shardings, component: as in `VisionTower`."""

    settings: type[AlignerConfig]
    build: Callable[..., nnx.Module]
    matmul_counts: Callable[[ModelConfig, float], MatmulCounts]
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


@dataclass(frozen=True)
class LanguageModel:
    """A kind of language model. Embeddings and head are the same for every kind.

    build(settings, lora, targets, *, dtype, param_dtype, scan, rngs): makes a module with the methods of `llama.Llama`: its call,
    `new_cache`, `extend_cache` and `cache_axes`. `dropout_keys` is passed in training with `lora.dropout` to a kind with `lora_names`.
    matmul_counts(settings, length): counts of one sample of `length` tokens. shardings, component: as in `VisionTower`."""

    settings: type[LlmConfig]
    build: Callable[..., nnx.Module]
    matmul_counts: Callable[[Any, int], MatmulCounts]
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


@dataclass(frozen=True)
class MaskEncoder:
    """A kind of mask encoder.

    build(settings, *, dtype, param_dtype, scan, rngs): makes a module that maps pixels [N, S, S, 3], normalised as `settings.pixel_norm`
    says (by default with mean and std), to the input of its decoder: features [N, g, g, C] for `MaskDecoder`, or a tuple of arrays, one
    for each scale, for another decoder. A module whose stages other parts read also has `feature_maps(pixels)`: a tuple of arrays
    [N, g_i, g_i, C_i] of the sizes `settings.feature_maps()`, from the first stage to the output of the call, which is the last.
    decoder(settings, *, dtype, param_dtype, rngs): makes a module with the call of `MaskDecoder`.
    The other fields are as in `VisionTower`."""

    settings: type[SamConfig]
    build: Callable[..., nnx.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    matmul_counts: Callable[[Any], MatmulCounts]
    decoder: Callable[..., nnx.Module] = MaskDecoder
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


Part = VisionTower | AlignerKind | LanguageModel | MaskEncoder

VISION_TOWERS: dict[str, VisionTower] = {}
ALIGNERS: dict[str, AlignerKind] = {}
LANGUAGE_MODELS: dict[str, LanguageModel] = {}
MASK_ENCODERS: dict[str, MaskEncoder] = {}
# Section of `ModelConfig` -> its table.
TABLES: dict[str, dict[str, Any]] = {"vision": VISION_TOWERS, "aligner": ALIGNERS, "llm": LANGUAGE_MODELS, "sam": MASK_ENCODERS}


def register_vision_tower(kind: str, row: VisionTower) -> None:
    """Add a kind of `config.model.vision`. This and the functions below raise ValueError for a kind that is already registered."""
    _register("vision", kind, row)


def register_aligner(kind: str, row: AlignerKind) -> None:
    """Add a kind of `config.model.aligner`."""
    _register("aligner", kind, row)


def register_language_model(kind: str, row: LanguageModel) -> None:
    """Add a kind of `config.model.llm`."""
    _register("llm", kind, row)


def register_mask_encoder(kind: str, row: MaskEncoder) -> None:
    """Add a kind of `config.model.sam`."""
    _register("sam", kind, row)


def _register(section: str, kind: str, row: Part) -> None:
    table = TABLES[section]
    if kind in table or KINDS[section].get(kind, row.settings) is not row.settings:
        raise ValueError(f"config.model.{section}.kind {kind}: is already registered; choose another name")
    sharding.add_rules(row.shardings)
    types = get_type_hints(row.settings)
    for entry in fields(row.settings):
        entry.type = types[entry.name]  # postponed annotations are text, but command-line flags need the type itself
    table[kind] = row
    KINDS[section][kind] = row.settings


def part(model: ModelConfig, section: str) -> Any:
    """The row of the kind that `config.model.<section>` names. Raises ConfigError if it is not registered."""
    kind = getattr(model, section).kind
    if kind not in TABLES[section]:
        raise ConfigError(f"config.model.{section}.kind: is {kind!r}; registered are {', '.join(TABLES[section])}")
    return TABLES[section][kind]
