"""The tables of the model's parts: what each `kind` of vision tower, aligner, language model and mask encoder is made of.

    register_vision_tower("siglip", VisionTower(SiglipConfig, SiglipVit, MEAN, STD, matmul_counts))

adds one, from any module that is imported before a config names it: by the config file itself, or through MIMO_PLUGINS. The rows of
the package's own parts are in `standard_parts`. Parameters of a part lie below "vision/", "aligner/", "llm/" and "sam_encoder/".
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
    """A row. build(settings, *, dtype, param_dtype, scan, rngs) makes a module that turns pixels [N, H, H, 3], normalised by mean and
    std, into X_img [N, I, settings.width]: `extra_tokens()` first, then the patches row by row.

    mean, std: per channel, of pixels in 0 … 255. matmul_counts(settings): of one image. shardings: rows before those of
    `sharding.RULES`. component: the table of its tensors in `checkpoints_convert.layouts.COMPONENTS`, empty where there is none."""

    settings: type[VisionConfig]
    build: Callable[..., nnx.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    matmul_counts: Callable[[Any], MatmulCounts]
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


@dataclass(frozen=True)
class AlignerKind:
    """A row. build(model settings, *, dtype, scan, rngs) makes a module as `aligner.CrossAttentionAligner`, or, where the settings say
    `image_only()`, as `aligner.LinearProjector`. matmul_counts(model settings, share): of all turns of one sample, `share` of what is
    computed once per image. shardings, component: as of `VisionTower`."""

    settings: type[AlignerConfig]
    build: Callable[..., nnx.Module]
    matmul_counts: Callable[[ModelConfig, float], MatmulCounts]
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


@dataclass(frozen=True)
class LanguageModel:
    """A row. build(settings, lora, targets, *, dtype, param_dtype, scan, rngs) makes a module with the methods of `llama.Llama`: its call,
    `new_cache`, `extend_cache`, `cache_length` and `cache_axes`. Embeddings and head are the same for every kind.
    matmul_counts(settings, length): of one sample of `length` tokens. shardings, component: as of `VisionTower`."""

    settings: type[LlmConfig]
    build: Callable[..., nnx.Module]
    matmul_counts: Callable[[Any, int], MatmulCounts]
    shardings: Shardings = field(default_factory=dict)
    component: str = ""


@dataclass(frozen=True)
class MaskEncoder:
    """A row. build(settings, *, dtype, param_dtype, scan, rngs) makes a module that turns pixels [N, S, S, 3], normalised by mean and std,
    into what its decoder reads: features [N, g, g, C] for `MaskDecoder`, or a tuple of arrays, one for each scale, for a decoder of its
    own. decoder(settings, *, dtype, param_dtype, rngs) makes a module that is called as `MaskDecoder`. The rest as of `VisionTower`."""

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
    """Add a kind of `config.model.vision`. Raises ValueError for one that is registered already, here and in the functions below."""
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
        raise ValueError(f"config.model.{section}.kind {kind}: is registered already; choose another name")
    sharding.add_rules(row.shardings)
    types = get_type_hints(row.settings)
    for entry in fields(row.settings):
        entry.type = types[entry.name]  # postponed annotations are text, and the flags of a command line need the type itself
    table[kind] = row
    KINDS[section][kind] = row.settings


def part(model: ModelConfig, section: str) -> Any:
    """The row of the kind that `config.model.<section>` names; ConfigError for one that is not registered."""
    kind = getattr(model, section).kind
    if kind not in TABLES[section]:
        raise ConfigError(f"config.model.{section}.kind: is {kind!r}; registered are {', '.join(TABLES[section])}")
    return TABLES[section][kind]
