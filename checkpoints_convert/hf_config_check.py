"""What a checkpoint's own config.json says, held against the configuration: numbers that shapes do not show, such as heads, eps
and activation, turn a conversion into nonsense without a word.
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
    """A source whose own settings differ from the configuration; the message lists the flags that would make them agree."""

    listing = True


class Setting(NamedTuple):
    """key in config.json, field of `config.model`, and what an absent key means (None: cannot be told)."""

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
# Of Llamas that compute something else: key -> the values that are served.
_LLAMA_ONLY = {
    "rope_scaling": (None,), "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
    "quantization_config": (None,),
}  # fmt: skip
_LORA_ONLY = {
    "use_dora": (None, False), "use_rslora": (None, False), "bias": (None, "none"), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "fan_in_fan_out": (None, False), "layers_to_transform": (None,), "peft_type": (None, "LORA"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # the others change the base too
}  # fmt: skip
_SECTIONS = {"vision": "vision tower", "aligner": "aligner", "llm": "language model", "sam": "mask encoder"}
_PROJECTIONS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}


def check_settings(name: str, path: Path, parts: set[str], config: Config) -> str | None:
    """SettingsError where the config.json of a source, or beside its file, differs from the configuration. Returns a remark
    where there is none to compare with."""
    folder = path if path.is_dir() else path.parent
    told = read_settings(folder / "config.json")
    problems: list[str] = []
    if "lora" in parts and (folder / "adapter_config.json").is_file():
        adapter = read_settings(folder / "adapter_config.json")
        problems += _differing(_LORA, adapter, config) + _unserved(_LORA_ONLY, adapter)
        targets = adapter.get("target_modules")
        wanted = sorted(config.lora_targets())
        if isinstance(targets, list) and sorted(_PROJECTIONS.get(t.rsplit(".", 1)[-1], t) for t in set(targets)) != wanted:
            named = ",".join(_PROJECTIONS.get(t.rsplit(".", 1)[-1], t) for t in targets)
            problems.append(f"target_modules is {targets}: set --config.model.lora.targets={named}")
    misfits = {c.section: c.kinds[0] for c in (COMPONENTS[part] for part in sorted(parts)) if not c.fits(config.model)}
    for section, kind in misfits.items():
        now = getattr(config.model, section).kind
        problems.append(f"its {_SECTIONS[section]} is not of kind {now}: set --config.model.{section}.kind={kind}")
    if misfits.keys() - {"aligner"}:  # settings of another kind have other fields
        raise SettingsError(_listed(folder, problems))
    if "llama" in parts and told:
        told = _llama(told)
        problems += _differing(_LLAMA, told, config) + _unserved(_LLAMA_ONLY, told)
    kind = str(told.get("model_type", ""))  # of whatever lies beside a lone file
    if parts & {"clip", "clip_open"} and "llama" not in parts and told and (not kind or kind.startswith("clip")):
        vision = told.get("vision_config", told)
        problems += _differing(_CLIP, vision, config)
    if parts == {"sam"} and kind == "sam" and told.get("vision_config"):
        problems += _differing(_SAM_HF, told["vision_config"], config)
        blocks = config.model.sam.layers // config.model.sam.global_every
        whole = [(i + 1) * config.model.sam.global_every - 1 for i in range(blocks)]
        if told["vision_config"].get("global_attn_indexes", whole) != whole:
            problems.append(f"global_attn_indexes is {told['vision_config']['global_attn_indexes']}, not {whole}: set config.model.sam")
    if problems:
        raise SettingsError(_listed(folder, problems))
    if not told and parts & {"clip", "clip_open", "llama"}:
        return f"{name}: no config.json in {folder}; heads, eps and activation are taken from the configuration"
    return None


def _listed(folder: Path, problems: list[str]) -> str:
    return "\n".join([f"{folder}: its own settings are not those of the configuration", *(f"  {problem}" for problem in problems)])


def lora_alpha(path: Path) -> float | None:
    """alpha of the adapter_config.json beside LoRA weights; weights do not show it."""
    return read_settings((path if path.is_dir() else path.parent) / "adapter_config.json").get("lora_alpha")


def check_adapter_base(adapter: Path, llm: Path, said: str | None) -> None:
    """SettingsError for an adapter that names another base than `llm`, unless the user `said` that it is the same one."""
    named = read_settings((adapter if adapter.is_dir() else adapter.parent) / "adapter_config.json").get("base_model_name_or_path")
    if not named or said == named:
        return
    folder = llm if llm.is_dir() else llm.parent
    known = {str(folder), folder.name, str(read_settings(folder / "config.json").get("_name_or_path", ""))}
    if _last(named) not in {_last(name) for name in known if name}:
        raise SettingsError(
            f"{adapter}: is an adapter of {named}, and {llm} does not bear that name; give its base, or say that it is the same "
            f"with --lora-base {named}"
        )


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()


def _llama(told: dict) -> dict:
    """A Llama's config.json in one form: transformers 5 keeps the rotary settings together, old files lack key-value heads."""
    rope = told.get("rope_parameters") or {}
    scaled = rope if rope.get("rope_type", "default") != "default" else None
    return told | {
        "num_key_value_heads": told.get("num_key_value_heads") or told.get("num_attention_heads"),
        "rope_theta": told.get("rope_theta") or rope.get("rope_theta"),
        "rope_scaling": told.get("rope_scaling") or scaled,
    }


def _differing(settings: tuple[Setting, ...], told: dict, config: Config) -> list[str]:
    lines = []
    for setting in settings:
        section, field = setting.field.split(".")
        here, there = getattr(getattr(config.model, section), field), told.get(setting.key)
        there = setting.default if there is None else there
        if there is None or there == here:
            continue
        if isinstance(here, float) and math.isclose(float(there), here, rel_tol=1e-6):
            continue
        lines.append(f"{setting.key} is {there}, the configuration has {here}: set --config.model.{setting.field}={there}")
    return lines


def _unserved(served: dict[str, tuple], told: dict) -> list[str]:
    return [f"{key} is {told[key]}: such models cannot be converted" for key, values in served.items() if told.get(key) not in values]


def read_settings(path: Path) -> dict:
    """The object that a JSON file holds; nothing if there is no such file. SettingsError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise SettingsError(f"{path}: is not JSON; fetch it again") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: is not a JSON object; fetch it again")
    return settings
