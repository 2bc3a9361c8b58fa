"""Compares a checkpoint's config.json, or the metadata of a GGUF file, with the configuration: wrong values that shapes do not reveal,
such as heads, eps and activation, would silently make a conversion useless.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.gguf_file import open_gguf
from checkpoints_convert.layouts import COMPONENTS
from checkpoints_convert.readers import gguf_of
from mimo_jax.chat_templates import CHAT_TEMPLATES, ChatTemplate
from mimo_jax.config import Config
from mimo_jax.errors import UserError
from mimo_jax.model_config import ClipConfig


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
    Setting("mlp_ratio", "sam.mlp_ratio", 4.0),
    Setting("output_channels", "sam.decoder_width", 256),
    Setting("num_hidden_layers", "sam.layers"),
    Setting("num_attention_heads", "sam.heads"),
    Setting("image_size", "sam.image_size", 1024),
    Setting("patch_size", "sam.patch_size", 16),
    Setting("window_size", "sam.window", 14),
)
_SAM_HF_DECODER = (
    Setting("mlp_dim", "sam.decoder_mlp_width", 2048),
    Setting("num_hidden_layers", "sam.decoder_layers", 2),
    Setting("num_attention_heads", "sam.decoder_heads", 8),
    Setting("iou_head_hidden_dim", "sam.iou_head_width", 256),
)
_LORA = (Setting("r", "lora.rank"),)
# Values of `model_type` whose settings are known; "": old files, and files by hand.
_LLAMA_TYPES = ("", "llama", "mistral", "llava", "llava_llama", "llava_mistral")  # in LISA's and GLaMM's checkpoints: llava
_CLIP_TYPES = ("", "clip", "clip_vision_model")
_SAM_TYPES = ("", "sam")
# Keys with one supported computation -> its values. A key in no table of this module is an unknown one, and refused unless it is neutral.
_LLAMA_ONLY = {
    "rope_scaling": (None,), "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
    "quantization_config": (None,), "partial_rotary_factor": (None, 1.0),
}  # fmt: skip
_CLIP_ONLY = {"num_channels": (None, 3), "quantization_config": (None,)}
_SAM_VISION_ONLY = {
    "num_channels": (None, 3), "hidden_act": (None, "gelu"), "layer_norm_eps": (None, 1e-6), "qkv_bias": (None, True),
    "use_abs_pos": (None, True), "use_rel_pos": (None, True),
}  # fmt: skip
_SAM_PROMPT_ONLY = {
    "mask_input_channels": (None, 16), "num_point_embeddings": (None, 4), "hidden_act": (None, "gelu"), "layer_norm_eps": (None, 1e-6),
}  # fmt: skip
_SAM_DECODER_ONLY = {
    "hidden_act": (None, "relu"), "attention_downsample_rate": (None, 2), "num_multimask_outputs": (None, 3), "iou_head_depth": (None, 3),
    "layer_norm_eps": (None, 1e-6, 1e-5),
}  # fmt: skip
# Keys that change nothing of what is computed at inference, or that are checked elsewhere: those that transformers gives every model, of
# versions 4 and 5, and those of training and of text generation.
_HARMLESS = frozenset(
    """
    model_type _name_or_path architectures auto_map transformers_version transformers.js_config torch_dtype dtype use_cache vocab_size
    max_position_embeddings max_sequence_length tie_word_embeddings tie_encoder_decoder bos_token_id eos_token_id pad_token_id sep_token_id
    unk_token_id decoder_start_token_id pretraining_tp id2label label2id num_labels problem_type output_attentions output_hidden_states
    return_dict chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size finetuning_task prefix
    task_specific_params tokenizer_class torchscript use_bfloat16 tf_legacy_loss pruned_heads attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal initializer_range initializer_factor attention_dropout dropout hidden_dropout
    gradient_checkpointing is_llama_config max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version
""".split()
)
_LLAMA_HARMLESS = frozenset(("rope_parameters", "head_dim", "sliding_window", "use_sliding_window", "layer_types"))  # see `_llama_layers`
_CLIP_HARMLESS = frozenset(("projection_dim",))  # the projection of the class token is not used
_SAM_HARMLESS = frozenset(  # seen in shapes
    ("global_attn_indexes", "num_pos_feats", "scale", "mlp_dim", "hidden_size", "image_size", "patch_size", "image_embedding_size")
)
# Beginnings of keys of LLaVA, LISA and GLaMM about the vision tower, the projector and the training, beside those of the language model.
_LLAVA = re.compile(
    "mm_|image_|vision_|tune_|freeze_|unfreeze_|pretrain_|use_mm_|tokenizer_|sep_image_|train_mask_decoder|out_dim|with_region|bbox_|"
    "num_level_reg_|num_reg_|select_feature_"
)
_PROJECTOR = (Setting("mm_vision_select_layer", "vision.feature_layer"),)
_LORA_ONLY = {
    "use_dora": (None, False), "use_rslora": (None, False), "bias": (None, "none"), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "fan_in_fan_out": (None, False), "layers_to_transform": (None,), "peft_type": (None, "LORA"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # other values also change the base
}  # fmt: skip
_CHAT_TEMPLATE = "tokenizer.chat_template"  # key in the metadata of a GGUF file
_NEUTRAL = (None, False, "", [], {})  # values of an unknown setting that turn on nothing
_SECTIONS = {"vision": "vision tower", "aligner": "aligner", "llm": "language model", "sam": "mask encoder"}
_PROJECTIONS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}


def check_settings(name: str, path: Path, parts: set[str], config: Config, ignored: Collection[str] = ()) -> str | None:
    """Raise SettingsError if the config.json in the folder of a source, or the metadata of a GGUF file, differs from the configuration, or
    if it may describe a model that computes something else: a `model_type` or a setting that is not known. ignored: unknown keys that
    are accepted. Returns a remark if there is no config.json, or no chat template in a GGUF file that is known."""
    folder = path if path.is_dir() else path.parent
    settings, gguf = settings_of(path), gguf_of(path)
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
    types = _LLAMA_TYPES if "llama" in parts else _SAM_TYPES if parts == {"sam"} else _CLIP_TYPES
    kind = str(settings.get("model_type", ""))
    if parts & {"clip", "clip_open", "llama", "sam"} and kind not in types:
        if path.is_dir() or "llama" in parts:
            problems.append(f"model_type is {kind}: known are {', '.join(filter(None, types))}; such models cannot be converted")
        settings = {}  # next to a single file there may be an unrelated config.json
    if "llama" in parts and settings:
        llava = parts != {"llama"} or kind.startswith("llava")
        problems += _llama_problems(settings, config, {key for key in settings if llava and _LLAVA.match(key)} | set(ignored))
        if parts & {"projector", "projector_mlp"} and isinstance(config.model.vision, ClipConfig):
            problems += _differing(_PROJECTOR, settings, config)
    elif parts & {"clip", "clip_open"} and settings:
        vision = settings.get("vision_config", settings)
        problems += _problems(vision, config, _CLIP, _CLIP_ONLY, _CLIP_HARMLESS | set(ignored))
    elif parts == {"sam"} and settings.get("vision_config"):
        problems += _sam_problems(settings, config, ignored)
    remark = None
    if gguf:
        wrong, remark = _check_chat_template(open_gguf(gguf).metadata.get(_CHAT_TEMPLATE), config, ignored)
        problems += wrong
        if (context := settings.get("max_position_embeddings", math.inf)) < config.model.llm.max_length:
            problems.append(
                f"context_length is {context}, the configuration has {config.model.llm.max_length} tokens: "
                f"set --config.model.llm.max_length={context}"
            )
    if problems:
        raise SettingsError(_listed(gguf or folder, problems))
    if not settings and parts & {"clip", "clip_open", "llama"}:
        return f"{name}: no config.json in {folder}; heads, eps and activation are taken from the configuration"
    return remark and f"{name}: {remark}"


def _llama_problems(settings: dict, config: Config, known: Collection[str]) -> list[str]:
    """Of a Llama or Mistral. Their attention is ours if all of a head is rotated and no window ends within `max_length`."""
    settings, llm = _llama(settings.get("text_config") or settings), config.model.llm
    lines = _problems(settings, config, _LLAMA, _LLAMA_ONLY, _LLAMA_HARMLESS | set(known))
    heads, head_dim = settings["num_attention_heads"], settings.get("head_dim")
    if head_dim and (settings.get("hidden_size"), heads) == (llm.width, llm.heads) and head_dim * heads != llm.width:
        lines.append(f"head_dim is {head_dim}, not hidden_size / num_attention_heads: such models cannot be converted")
    window = settings.get("sliding_window") if settings.get("use_sliding_window") is not False else None
    if window and window < llm.max_length:
        lines.append(
            f"sliding_window is {window}, the configuration has {llm.max_length} tokens: set --config.model.llm.max_length={window}"
        )
    other = set(settings.get("layer_types") or ()) - {"full_attention", "sliding_attention" if window else "full_attention"}
    if other:
        lines.append(f"layer_types has {', '.join(sorted(other))}: such models cannot be converted")
    if settings["rope_scaling"] is None:
        rope = settings.get("rope_parameters") or {}
        lines += [
            f"rope_parameters has {key} {value}: such models cannot be converted"
            for key, value in rope.items()
            if key not in ("rope_theta", "rope_type", "type") and (key, value) != ("partial_rotary_factor", 1.0)
        ]
    return lines


def _sam_problems(settings: dict, config: Config, ignored: Collection[str]) -> list[str]:
    harmless, sam = _SAM_HARMLESS | set(ignored), config.model.sam
    lines = _problems(settings["vision_config"], config, _SAM_HF, _SAM_VISION_ONLY, harmless)
    lines += _problems(settings.get("prompt_encoder_config") or {}, config, (), _SAM_PROMPT_ONLY, harmless)
    lines += _problems(settings.get("mask_decoder_config") or {}, config, _SAM_HF_DECODER, _SAM_DECODER_ONLY, harmless)
    global_layers = list(range(sam.global_every - 1, sam.layers, sam.global_every))
    found = settings["vision_config"].get("global_attn_indexes", global_layers)
    if found != global_layers:
        lines.append(f"global_attn_indexes is {found}, not {global_layers}: set config.model.sam")
    return lines


def _problems(
    found: dict, config: Config, compared: tuple[Setting, ...], supported: dict[str, tuple], harmless: Collection[str]
) -> list[str]:
    """Settings that differ, those that are not supported, and those that no table knows and that are not neutral."""
    known = {setting.key for setting in compared} | supported.keys() | _HARMLESS | set(harmless)
    unknown = [key for key, value in found.items() if key not in known and not key.endswith("dropout") and value not in _NEUTRAL]
    lines = [f"{key} is {str(found[key])[:80]}, an unknown setting: if it changes nothing, give --ignore-setting {key}" for key in unknown]
    return _differing(compared, found, config) + _unsupported(supported, found) + lines


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


def _check_chat_template(text: str | None, config: Config, ignored: Collection[str]) -> tuple[list[str], str | None]:
    """(problem, remark) of the chat template of a GGUF file: that it is another one of `chat_templates` than the configured one, judged by
    the tokens and words around the turns; that there is none, or none of these."""

    def fits(template: ChatTemplate) -> bool:
        return all(mark in text for mark in template.tokens or (template.user.strip(), template.assistant.strip()))

    found, configured = [name for name, template in CHAT_TEMPLATES.items() if text and fits(template)], config.data.chat_template
    if not found:
        return [], f"{'has no chat template' if not text else 'its chat template is not known'}; {configured} is used (data.chat_template)"
    if configured in found or _CHAT_TEMPLATE in ignored:
        return [], None
    return [f"{_CHAT_TEMPLATE} is {found[0]}, the configuration has {configured}: set --config.data.chat_template={found[0]}"], None


def settings_of(path: Path) -> dict:
    """The settings of a file or folder of weights, in the terms of config.json: from that file, or from the metadata of a GGUF file;
    empty if it has none."""
    if gguf := gguf_of(path):
        return open_gguf(gguf).settings()
    return read_settings((path if path.is_dir() else path.parent) / "config.json")


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
