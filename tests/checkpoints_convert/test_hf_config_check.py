"""A checkpoint's own config.json against the configuration."""

import json
import re
from pathlib import Path

import peft
import pytest
import transformers

from checkpoints_convert import hf_config_check
from checkpoints_convert.hf_config_check import SettingsError, check_adapter_base, check_settings, lora_alpha
from mimo_jax.config import Config
from mimo_jax.config_flags import load_config
from mimo_jax.model_config import KINDS, LoraConfig
from tests.checkpoints_convert import originals, torch_models

ADAPTER = {"r": 4, "lora_alpha": 24, "peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b"}


def config() -> Config:
    return originals.mimo_config(lora=LoraConfig(rank=4))


def told(part: str) -> dict:
    """A config.json that agrees with the configuration, as transformers 5 or peft writes it."""
    m = config().model
    if part == "clip":
        return torch_models.clip_model(m.vision).config.to_dict()
    if part == "llama":
        return torch_models.llama_model(m.llm, originals.PIECES).config.to_dict()
    if part == "lora":
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").to_dict() | {
            "target_modules": ["q_proj", "v_proj"]
        }
    vision = transformers.SamVisionConfig(
        hidden_size=m.sam.width, num_hidden_layers=m.sam.layers, num_attention_heads=m.sam.heads, image_size=m.sam.image_size,
        patch_size=m.sam.patch_size, window_size=m.sam.window, global_attn_indexes=[1], output_channels=m.sam.decoder_width,
    )  # fmt: skip
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=m.sam.decoder_width, mlp_dim=m.sam.decoder_mlp_width, num_attention_heads=m.sam.decoder_heads,
        iou_head_hidden_dim=m.sam.iou_head_width,
    )  # fmt: skip
    return transformers.SamConfig(vision_config=vision, mask_decoder_config=decoder).to_dict()


def put(folder: Path, values: dict, name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(values, default=str))
    return folder


def refusal(folder: Path, part: str, values: dict) -> list[str]:
    """The lines of the error about a folder with these settings."""
    put(folder, values, "adapter_config.json" if part == "lora" else "config.json")
    with pytest.raises(SettingsError) as error:
        check_settings("joint", folder, {part}, config())
    first, *lines = str(error.value).split("\n")
    assert first == f"{folder}: its settings differ from the configuration" and error.value.listing
    return lines


def mended(folder: Path, lines: list[str]) -> Config:
    """The configuration with the flags that a refusal names."""
    put(folder, config().to_dict(), "mine.json")
    (folder / "mine.py").write_text(
        "import json\nfrom pathlib import Path\nfrom mimo_jax.config import Config\n\n"
        "def get_config():\n    return Config.from_dict(json.loads((Path(__file__).parent / 'mine.json').read_text()))\n"
    )
    return load_config(["--config", str(folder / "mine.py"), *(re.search(r"set (--config\.\S+)$", line)[1] for line in lines)])


OTHER = {
    "clip": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-6, "image_size": 16, "patch_size": 4,
    },
    "llama": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
    },
    "sam": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "window_size": 7,
        "mlp_ratio": 2.0, "output_channels": 64,
    },
    "lora": {"r": 16, "target_modules": ["q_proj", "k_proj", "down_proj"]},
}  # fmt: skip
FIELDS = {
    "clip": {setting.key: setting.field for setting in hf_config_check._CLIP},
    "llama": {setting.key: setting.field for setting in hf_config_check._LLAMA},
    "sam": {setting.key: setting.field for setting in hf_config_check._SAM_HF},
    "lora": {"r": "lora.rank", "target_modules": "lora.targets"},
}


def changed(part: str, changes: dict) -> dict:
    values = told(part)
    return values | {"vision_config": values["vision_config"] | changes} if part == "sam" else values | changes


@pytest.mark.parametrize("part", OTHER)
def test_settings_that_agree_say_nothing(tmp_path, part):
    put(tmp_path, told(part), "adapter_config.json" if part == "lora" else "config.json")
    assert check_settings("joint", tmp_path, {part}, config()) is None
    assert check_settings("joint", tmp_path / "config.json", {part}, config()) is None


@pytest.mark.parametrize("part, key", [(part, key) for part, values in OTHER.items() for key in values])
def test_one_setting_that_differs_is_named_with_its_flag(tmp_path, part, key):
    value = OTHER[part][key]
    (line,) = refusal(tmp_path, part, changed(part, {key: value}))
    shown = "q,k,down" if key == "target_modules" else value
    assert line.startswith(f"  {key} is {value}") and line.endswith(f": set --config.model.{FIELDS[part][key]}={shown}")


@pytest.mark.parametrize("part", OTHER)
def test_all_that_differ_stand_in_one_error_whose_flags_mend_it(tmp_path, part):
    assert OTHER[part].keys() == FIELDS[part].keys()
    dependent = {"sam": {"global_attn_indexes": [1, 3]}, "llama": {"head_dim": 4}}
    lines = refusal(tmp_path, part, changed(part, OTHER[part] | dependent.get(part, {})))
    flagged = [line for line in lines if "set --config." in line]
    assert len(flagged) == len(OTHER[part])
    check_settings("joint", tmp_path, {part}, mended(tmp_path, flagged))


def test_all_parts_of_a_joint_model_are_looked_at(tmp_path):
    put(tmp_path, told("lora") | {"r": 2}, "adapter_config.json")
    put(tmp_path, told("llama") | {"intermediate_size": 7})
    with pytest.raises(SettingsError, match=r"(?s)r is 2, .*rank=2\n.*intermediate_size is 7"):
        check_settings("joint", tmp_path, {"lora", "llama", "clip", "sam", "seg"}, config())


@pytest.mark.parametrize("part, kind", [("projector", "linear"), ("projector_mlp", "mlp"), ("aligner", "cross_attention")])
def test_the_part_that_aligns_says_the_kind(tmp_path, part, kind):
    mine = config()
    for other in KINDS["aligner"]:
        mine.model.aligner.kind = other
        if other == kind or (other, kind) == ("none", "cross_attention"):  # "none" is the same part with fewer tensors
            assert check_settings("joint", tmp_path, {part}, mine) is None
        else:
            with pytest.raises(SettingsError, match=f"its aligner is not of kind {other}: set --config.model.aligner.kind={kind}$"):
                check_settings("joint", tmp_path, {part}, mine)


# --- files of several ages


def test_rope_parameters_of_transformers_5(tmp_path):
    values = told("llama")
    assert "rope_theta" not in values and values["rope_parameters"]["rope_type"] == "default"
    other = values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert refusal(tmp_path, "llama", other) == [
        "  rope_theta is 1000000.0, the configuration has 10000.0: set --config.model.llm.rope_theta=1000000.0"
    ]


def test_the_first_llamas_config(tmp_path):
    """Without key-value heads, which are then as many as heads, and without the base of the rotary code."""
    values = {key: value for key, value in told("llama").items() if key not in ("num_key_value_heads", "rope_parameters")}
    lines = refusal(tmp_path, "llama", values)
    assert lines == ["  num_key_value_heads is 2, the configuration has 1: set --config.model.llm.kv_heads=2"]
    assert refusal(tmp_path, "llama", values | {"num_key_value_heads": None, "rope_scaling": None, "rope_theta": None}) == lines
    del values["rms_norm_eps"]
    assert refusal(tmp_path, "llama", values)[1].endswith("set --config.model.llm.eps=1e-06")


def test_a_whole_clips_config_has_its_vision_part_read(tmp_path):
    whole = {"hidden_act": "other", "text_config": {"hidden_size": 3}, "vision_config": told("clip")}
    put(tmp_path, whole)
    assert check_settings("clip", tmp_path, {"clip"}, config()) is None
    assert len(refusal(tmp_path, "clip", whole | {"vision_config": told("clip") | {"hidden_act": "quick_gelu"}})) == 1


def test_what_a_clips_config_leaves_out_is_openais_default(tmp_path):
    lines = refusal(tmp_path, "clip", {"vision_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}})
    assert [line.split()[0] for line in lines] == ["intermediate_size", "hidden_act", "image_size", "patch_size"]


def test_a_vision_config_beside_a_language_model_is_not_its_clips(tmp_path):
    put(tmp_path, told("llama") | {"vision_config": {"hidden_size": 5}})
    assert check_settings("joint", tmp_path, {"llama", "clip", "sam"}, config()) is None


def test_global_blocks_of_another_sam(tmp_path):
    lines = refusal(tmp_path, "sam", changed("sam", {"global_attn_indexes": [0]}))
    assert lines == ["  global_attn_indexes is [0], not [1]: set config.model.sam"]


@pytest.mark.parametrize("part", ["clip", "clip_open", "llama"])
def test_no_config_json_is_remarked_upon(tmp_path, part):
    for path in (tmp_path, tmp_path / "model.safetensors"):
        path.touch()
        said = f"llm: no config.json in {tmp_path}; heads, eps and activation are taken from the configuration"
        assert check_settings("llm", path, {part}, config()) == said
    assert check_settings("sam", tmp_path, {"sam"}, config()) is check_settings("lora", tmp_path, {"lora"}, config()) is None


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_text('{"hidden_size": ')
    with pytest.raises(SettingsError, match=f"^{tmp_path / name}: is not JSON; fetch it again$"):
        check_settings("joint", tmp_path, {"llama", "lora"}, config())


# --- models that are not Llama, with tensors like Llama's


def family(kind: str, **more) -> dict:
    """A config.json of the sizes of the configuration, as the class of transformers for this `model_type` writes it."""
    m = config().model.llm
    made = transformers.AutoConfig.for_model(
        kind, vocab_size=originals.PIECES, hidden_size=m.width, intermediate_size=m.mlp_width, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.width // m.heads, rms_norm_eps=m.eps, **more,
    )  # fmt: skip
    return made.to_dict()


@pytest.mark.parametrize("kind, more", [
    ("llama", {"tie_word_embeddings": True, "attention_dropout": 0.1, "pretraining_tp": 2}),  # as SmolLM2 and TinyLlama
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4096}),  # longer than any sequence here
])  # fmt: skip
def test_families_that_compute_what_llama_does_pass(tmp_path, kind, more):
    put(tmp_path, family(kind, **more))
    assert check_settings("llm", tmp_path, {"llama"}, config()) is None


def test_what_vicuna_smollm2_lisa_and_llava_add_to_their_settings_passes(tmp_path):
    vicuna = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "rope_scaling": None, "max_position_embeddings": 4096}
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}
    lisa = {
        "model_type": "llava", "mm_vision_select_layer": -1, "mm_hidden_size": 1024, "tune_mm_mlp_adapter": True, "vision_tower": "clip",
        "out_dim": 256, "train_mask_decoder": True, "image_aspect_ratio": "square", "pretrain_mm_mlp_adapter": None,
    }  # fmt: skip
    for more, parts in ((vicuna, {"llama"}), (smollm2, {"llama"}), (lisa, {"llama", "sam", "seg"})):
        put(tmp_path, told("llama") | more)
        assert check_settings("joint", tmp_path, parts, config()) is None


@pytest.mark.parametrize("kind", ["granite", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "cohere", "olmo", "olmo2", "phi3", "stablelm"])
def test_families_that_compute_something_else_are_refused(tmp_path, kind):
    (line, *_) = refusal(tmp_path, "llama", family(kind))
    assert line.startswith(f"  model_type is {kind}: known are llama, mistral") and line.endswith("such models cannot be converted")


@pytest.mark.parametrize("key, value", [
    ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("attention_multiplier", 0.0078), ("logits_scaling", 8.0),
    ("no_rope_layers", [1, 0]), ("attn_logit_softcapping", 50.0), ("use_qk_norm", True), ("rope_interleaved", True),
])  # fmt: skip
def test_settings_of_such_families_are_refused_whatever_the_model_calls_itself(tmp_path, key, value):
    values = told("llama") | {key: value}
    for _ in range(2):
        assert refusal(tmp_path, "llama", values) == [
            f"  {key} is {value}, an unknown setting: if it changes nothing, give --ignore-setting {key}"
        ]
        values.pop("model_type", None)
    assert check_settings("llm", tmp_path, {"llama"}, config(), [key]) is None


def test_attention_that_is_not_llamas_is_refused(tmp_path):
    base = told("llama")
    assert refusal(tmp_path, "llama", family("mistral", sliding_window=100)) == [
        "  sliding_window is 100, the configuration has 256 tokens: set --config.model.llm.max_length=100"
    ]
    (line,) = refusal(tmp_path, "llama", base | {"head_dim": 16})
    assert line == "  head_dim is 16, not hidden_size / num_attention_heads: such models cannot be converted"
    (line,) = refusal(tmp_path, "llama", base | {"layer_types": ["full_attention", "linear_attention"]})
    assert line.startswith("  layer_types has linear_attention")
    rope = base["rope_parameters"] | {"partial_rotary_factor": 0.5}
    assert refusal(tmp_path, "llama", base | {"rope_parameters": rope})[0].startswith("  rope_parameters has partial_rotary_factor 0.5")


def test_the_layer_that_llava_reads_is_compared(tmp_path):
    mine = config()
    mine.model.aligner.kind = "linear"
    put(tmp_path, told("llama") | {"model_type": "llava", "mm_vision_select_layer": -2})
    with pytest.raises(SettingsError, match="mm_vision_select_layer is -2, .* has -1: set --config.model.vision.feature_layer=-2"):
        check_settings("joint", tmp_path, {"llama", "projector"}, mine)


def test_other_towers_and_mask_decoders_are_refused(tmp_path):
    for part, kind in (("clip", "siglip_vision_model"), ("sam", "sam_hq")):
        (line,) = refusal(tmp_path, part, told(part) | {"model_type": kind})
        assert line.startswith(f"  model_type is {kind}: known are {part}")
    (tmp_path / "clip.pt").touch()  # beside a file, it may be the settings of something else
    put(tmp_path, {"model_type": "bert"})
    assert "no config.json" in check_settings("vision", tmp_path / "clip.pt", {"clip"}, config())
    (line,) = refusal(tmp_path, "clip", told("clip") | {"num_channels": 1})
    assert line == "  num_channels is 1: such models cannot be converted"
    values = told("sam")
    values["mask_decoder_config"] |= {"hidden_act": "gelu", "mlp_dim": 7}
    values["prompt_encoder_config"]["mask_input_channels"] = 8
    lines = refusal(tmp_path, "sam", values)
    assert [line.split()[0] for line in lines] == ["mask_input_channels", "mlp_dim", "hidden_act"]


# --- what cannot be served


@pytest.mark.parametrize("part, key, value", [
    ("llama", "rope_scaling", {"type": "linear", "factor": 8.0}),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "hidden_act", "gelu_pytorch_tanh"),
    ("llama", "quantization_config", {"load_in_4bit": True}),
    ("lora", "use_dora", True),
    ("lora", "use_rslora", True),
    ("lora", "bias", "all"),
    ("lora", "rank_pattern", {"q_proj": 16}),
    ("lora", "alpha_pattern", {"q_proj": 32}),
    ("lora", "fan_in_fan_out", True),
    ("lora", "layers_to_transform", [0]),
    ("lora", "peft_type", "ADALORA"),
    ("lora", "init_lora_weights", "pissa"),
])  # fmt: skip
def test_models_that_compute_something_else(tmp_path, part, key, value):
    assert refusal(tmp_path, part, told(part) | {key: value}) == [f"  {key} is {value}: such models cannot be converted"]


def test_scaled_rope_of_transformers_5(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for values in (told("llama") | {"rope_parameters": rope}, told("llama") | {"rope_parameters": rope, "rope_scaling": None}):
        assert refusal(tmp_path, "llama", values) == [f"  rope_scaling is {rope}: such models cannot be converted"]


# --- adapters


def test_alpha_is_read_beside_the_weights(tmp_path):
    assert lora_alpha(tmp_path) is None
    put(tmp_path, ADAPTER, "adapter_config.json")
    assert lora_alpha(tmp_path) == lora_alpha(tmp_path / "adapter_model.safetensors") == 24


@pytest.fixture
def adapter(tmp_path) -> Path:
    (tmp_path / "adapter").mkdir()
    return put(tmp_path / "adapter", ADAPTER, "adapter_config.json")


@pytest.mark.parametrize("folder, settings_there, said", [
    ("vicuna-7b", {}, None),
    ("Vicuna-7B", {}, None),
    ("base", {"_name_or_path": "lmsys/vicuna-7b"}, None),
    ("base", {"_name_or_path": "/data/vicuna-7b/"}, None),
    ("base", {}, "lmsys/vicuna-7b"),
    ("vicuna-7b", {"_name_or_path": "meta/llama"}, None),
])  # fmt: skip
def test_an_adapter_on_its_base(tmp_path, adapter, folder, settings_there, said):
    (tmp_path / folder).mkdir()
    put(tmp_path / folder, settings_there)
    check_adapter_base(adapter, tmp_path / folder, said)
    (tmp_path / folder / "model.safetensors").touch()
    check_adapter_base(adapter / "adapter_model.safetensors", tmp_path / folder / "model.safetensors", said)


@pytest.mark.parametrize("said", [None, "lmsys/vicuna-13b", "vicuna"])
def test_an_adapter_of_another_base_is_refused(tmp_path, adapter, said):
    (tmp_path / "base").mkdir()
    put(tmp_path / "base", {"_name_or_path": "lmsys/vicuna-7b-v1.5"})
    with pytest.raises(SettingsError, match=f"{adapter}: is an adapter of lmsys/vicuna-7b, but .*/base .*--lora-base lmsys/vicuna-7b$"):
        check_adapter_base(adapter, tmp_path / "base", said)


def test_an_adapter_that_names_no_base_is_taken(tmp_path, adapter):
    put(adapter, ADAPTER | {"base_model_name_or_path": None}, "adapter_config.json")
    check_adapter_base(adapter, tmp_path, None)
