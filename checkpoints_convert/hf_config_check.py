"""Compares a checkpoint's config.json with the configuration: wrong values that shapes do not reveal, such as heads, eps and
activation, would silently make a conversion useless.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.layouts import COMPONENTS
from mimo_jax.config import Config
from mimo_jax.errors import UserError


class SettingsError(UserError):
    """A source whose settings differ from the configuration; the message lists the flags that make them agree."""

    listing = True


class Setting(NamedTuple):
    """key in config.json, field of `config.model`, and the value that a missing key means (None: unknown)."""

    key: str
    field: str
    default: Any = None


_CLIP = (
    Setting("hidden_size", "vision.width", 768),
    Setting("num_hidden_layers", "vision.layers", 12),
    Setting("num_attention_heads", "vision.heads", 12),
    Setting("intermediate_size", "vision.mlp_width", 3072),
    Setting("hidden_act", "vision.activation", "quick_gelu"),
    Setting("layer_norm_eps", "vision.eps", 1e-5),
    Setting("image_size", "vision.image_size", 224),
    Setting("patch_size", "vision.patch_size", 32),
)
_LLAMA = (
    Setting("hidden_size", "llm.width"),
    Setting("num_hidden_layers", "llm.layers"),
    Setting("num_attention_heads", "llm.heads"),
    Setting("num_key_value_heads", "llm.kv_heads"),
    Setting("intermediate_size", "llm.mlp_width"),
    Setting("rms_norm_eps", "llm.eps", 1e-6),
    Setting("rope_theta", "llm.rope_theta", 10000.0),
)
_SAM_HF = (
    Setting("hidden_size", "sam.width"),
    Setting("num_hidden_layers", "sam.layers"),
    Setting("num_attention_heads", "sam.heads"),
    Setting("image_size", "sam.image_size", 1024),
    Setting("patch_size", "sam.patch_size", 16),
    Setting("window_size", "sam.window", 14),
)
_LORA = (Setting("r", "lora.rank"),)
# Keys of variants of Llama with another computation -> supported values.
_LLAMA_ONLY = {
    "rope_scaling": (None,), "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
    "quantization_config": (None,),
}  # fmt: skip
_LORA_ONLY = {
    "use_dora": (None, False), "use_rslora": (None, False), "bias": (None, "none"), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "fan_in_fan_out": (None, False), "layers_to_transform": (None,), "peft_type": (None, "LORA"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # other values also change the base
}  # fmt: skip
_SECTIONS = {"vision": "vision tower", "aligner": "aligner", "llm": "language model", "sam": "mask encoder"}
_PROJECTIONS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}


def check_settings(name: str, path: Path, parts: set[str], config: Config) -> str | None:
    """Raise SettingsError if the config.json in the folder of a source differs from the configuration. Returns a remark
    if there is no config.json."""
    folder = path if path.is_dir() else path.parent
    settings = read_settings(folder / "config.json")
    problems: list[str] = []
    if "lora" in parts and (folder / "adapter_config.json").is_file():
        adapter = read_settings(folder / "adapter_config.json")
        problems += _differing(_LORA, adapter, config) + _unsupported(_LORA_ONLY, adapter)
        targets = adapter.get("target_modules")
        wanted = sorted(config.lora_targets())
        if isinstance(targets, list) and sorted(_PROJECTIONS.get(t.rsplit(".", 1)[-1], t) for t in set(targets)) != wanted:
            named = ",".join(_PROJECTIONS.get(t.rsplit(".", 1)[-1], t) for t in targets)
            problems.append(f"target_modules is {targets}: set --config.model.lora.targets={named}")
    mismatches = {c.section: c.kinds[0] for c in (COMPONENTS[part] for part in sorted(parts)) if not c.fits(config.model)}
    for section, kind in mismatches.items():
        now = getattr(config.model, section).kind
        problems.append(f"its {_SECTIONS[section]} is not of kind {now}: set --config.model.{section}.kind={kind}")
    if mismatches.keys() - {"aligner"}:  # the settings of another kind have other fields
        raise SettingsError(_listed(folder, problems))
    if "llama" in parts and settings:
        settings = _llama(settings)
        problems += _differing(_LLAMA, settings, config) + _unsupported(_LLAMA_ONLY, settings)
    kind = str(settings.get("model_type", ""))  # next to a single file there may be an unrelated config.json
    if parts & {"clip", "clip_open"} and "llama" not in parts and settings and (not kind or kind.startswith("clip")):
        vision = settings.get("vision_config", settings)
        problems += _differing(_CLIP, vision, config)
    if parts == {"sam"} and kind == "sam" and settings.get("vision_config"):
        problems += _differing(_SAM_HF, settings["vision_config"], config)
        blocks = config.model.sam.layers // config.model.sam.global_every
        global_layers = [(i + 1) * config.model.sam.global_every - 1 for i in range(blocks)]
        found = settings["vision_config"].get("global_attn_indexes", global_layers)
        if found != global_layers:
            problems.append(f"global_attn_indexes is {found}, not {global_layers}: set config.model.sam")
    if problems:
        raise SettingsError(_listed(folder, problems))
    if not settings and parts & {"clip", "clip_open", "llama"}:
        return f"{name}: no config.json in {folder}; heads, eps and activation are taken from the configuration"
    return None


def _listed(folder: Path, problems: list[str]) -> str:
    return "\n".join([f"{folder}: its settings differ from the configuration", *(f"  {problem}" for problem in problems)])


def lora_alpha(path: Path) -> float | None:
    """alpha from the adapter_config.json next to LoRA weights, which do not contain it; None if it is missing."""
    return read_settings((path if path.is_dir() else path.parent) / "adapter_config.json").get("lora_alpha")


def check_adapter_base(adapter: Path, llm: Path, declared_base: str | None) -> None:
    """Raise SettingsError for an adapter of another base than `llm`, unless `declared_base` is the base that the adapter names."""
    named = read_settings((adapter if adapter.is_dir() else adapter.parent) / "adapter_config.json").get("base_model_name_or_path")
    if not named or declared_base == named:
        return
    folder = llm if llm.is_dir() else llm.parent
    known = {str(folder), folder.name, str(read_settings(folder / "config.json").get("_name_or_path", ""))}
    if _last(named) not in {_last(name) for name in known if name}:
        raise SettingsError(
            f"{adapter}: is an adapter of {named}, but {llm} has another name; give the adapter's base, or confirm that it is the same "
            f"with --lora-base {named}"
        )


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()


def _llama(settings: dict) -> dict:
    """The config.json of a Llama in one form: transformers 5 groups the rotary settings, and old files lack key-value heads."""
    rope = settings.get("rope_parameters") or {}
    scaled = rope if rope.get("rope_type", "default") != "default" else None
    return settings | {
        "num_key_value_heads": settings.get("num_key_value_heads") or settings.get("num_attention_heads"),
        "rope_theta": settings.get("rope_theta") or rope.get("rope_theta"),
        "rope_scaling": settings.get("rope_scaling") or scaled,
    }


def _differing(settings: tuple[Setting, ...], found: dict, config: Config) -> list[str]:
    lines = []
    for setting in settings:
        section, field = setting.field.split(".")
        configured, original = getattr(getattr(config.model, section), field), found.get(setting.key)
        original = setting.default if original is None else original
        if original is None or original == configured:
            continue
        if isinstance(configured, float) and math.isclose(float(original), configured, rel_tol=1e-6):
            continue
        lines.append(f"{setting.key} is {original}, the configuration has {configured}: set --config.model.{setting.field}={original}")
    return lines


def _unsupported(supported: dict[str, tuple], settings: dict) -> list[str]:
    return [
        f"{key} is {settings[key]}: such models cannot be converted" for key, values in supported.items() if settings.get(key) not in values
    ]


def read_settings(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file. Raises SettingsError if the file is damaged."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise SettingsError(f"{path}: is not JSON; fetch it again") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: is not a JSON object; fetch it again")
    return settings
