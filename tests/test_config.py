import os
from pathlib import Path

import pytest

from mimo_jax import pathtree
from mimo_jax.config import Config, ConfigError, SourceConfig
from mimo_jax.config_flags import PACKAGED, find_config, load_config
from tests.tiny_config import tiny_config

NAMES = ["tiny", "tiny_finetune", "tiny_lora", "lite", "lite_stages", "lite_vit", "small", "mimo_7b", "lisa_7b"]

# One path of every group of parameters -> does it train?
GROUPS = {
    "vision/layers/block/mlp/fc1/kernel": False,
    "prompt/point/embedding": True,
    "aligner/queries": True,
    "llm/layers/block/attention/q/kernel": False,
    "llm/layers/block/attention/q/lora_a": True,
    "llm/layers/block/attention/v/lora_b": True,
    "llm/norm/scale": False,
    "embedding/base": False,
    "embedding/grounding": True,
    "lm_head/base": False,
    "lm_head/grounding": True,
    "seg_projection/fc1/kernel": True,
    "sam_encoder/stages/block/attention/qkv/kernel": False,
    "sam_prompt/no_mask/embedding": False,
    "sam_decoder/iou_head/fc1/kernel": True,
}


def load(*overrides: str, config: str = "tiny", **sources: str) -> Config:
    return load_config(["--config", config, *overrides], {name: SourceConfig(path=path) for name, path in sources.items()})


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configs_are_valid_survive_json_and_say_how_they_are_launched(name):
    config = load(config=f"configs/{name}.py")
    assert config.name == name
    assert Config.from_dict(config.to_dict()) == config
    assert f"mimo train --config configs/{name}.py" in (PACKAGED / f"{name}.py").read_text().split('"""')[1]


def test_every_packaged_config_is_tested():
    others = ("__init__", "ablations")  # groups of overrides: tests/sweep/test_plan.py
    assert sorted(NAMES) == sorted(p.stem for p in PACKAGED.glob("*.py") if p.stem not in others)


@pytest.mark.parametrize("name", ["tiny_lora", "small", "mimo_7b"])
def test_the_recipe_of_the_paper_freezes_the_encoders_and_the_language_model(name):
    table = load(config=name).trainables
    assert {path: pathtree.first_match(path, table, "trainables") is not None for path in GROUPS} == GROUPS


def test_lisa_trains_every_word_and_keeps_its_projector():
    table = load(config="lisa_7b").trainables
    groups = {path: trains for path, trains in GROUPS.items() if not path.startswith("prompt/")}  # it has none
    trains = {path: pathtree.first_match(path, table, "trainables") is not None for path in groups}
    assert trains == groups | {"embedding/base": True, "lm_head/base": True, "aligner/queries": False}


def test_tiny_trains_everything_but_sams_prompt_encoder():
    table = load(config="tiny").trainables
    assert [path for path in GROUPS if pathtree.first_match(path, table, "trainables") is None] == ["sam_prompt/no_mask/embedding"]


def test_full_size_is_the_default_and_agrees_with_its_sources():
    model, lisa, small = (load(config=name).model for name in ("mimo_7b", "lisa_7b", "small"))
    assert (model.vision.width, model.vision.layers, model.vision.activation, model.vision.eps) == (1280, 32, "gelu", 1e-5)
    assert (model.llm.vocab_size, model.llm.width, model.llm.mlp_width, model.llm.eps) == (32000, 4096, 11008, 1e-5)
    assert (model.sam.width, model.sam.layers // model.sam.global_every) == (1280, 4)
    assert (lisa.vision.width, lisa.vision.activation, lisa.aligner.kind, lisa.seg_state) == (1024, "quick_gelu", "linear", "predict")
    assert (lisa.vision.image_fit, lisa.vision.resample, lisa.grounding_tokens()) == ("crop", "bicubic", ("<SEG>",))
    assert (lisa.vision.image_size // lisa.vision.patch_size) ** 2 == lisa.aligner.queries
    assert (small.llm.kv_heads, small.llm.layers, small.sam.global_every) == (4, 22, 3)


def test_overrides_are_typed_and_the_last_one_holds():
    config = load("--config.train.steps", "7", "--config.train.learning_rate=1e-4", "--config.data.augment", "--config.train.steps=8")
    assert (config.train.steps, config.train.learning_rate, config.data.augment) == (8, 1e-4, True)
    assert load("--noconfig.data.augment").data.augment is False
    assert load("--config.train.loss.ce=2").train.loss.ce == 2.0
    assert load("--config.data.weights.vqa=0").data.weights["vqa"] == 0.0


def test_a_run_is_as_long_as_its_epochs_or_its_steps():
    assert load(config="mimo_7b").train.epochs == 3
    stepped = load("--config.train.steps=7", config="mimo_7b").train
    assert (stepped.steps, stepped.epochs) == (7, 0)
    assert load("--config.train.epochs=0.5").train.epochs == 0.5
    with pytest.raises(ConfigError, match="config.train.epochs: is 2, but config.train.steps is given too; give one of them"):
        load("--config.train.steps=7", "--config.train.epochs=2")


def test_sources_are_named_on_the_line_and_then_set():
    config = load("--config.data.sources.a.weight=2", "--config.data.sources.b.path=/b", "--config.data.sources['c-d'].path=/c", a="/a")
    assert config.data.sources == {"a": SourceConfig("/a", 2.0), "b": SourceConfig("/b"), "c-d": SourceConfig("/c")}


def test_image_tokens_are_two_names_or_none():
    assert load().image_tokens() == () and load(config="lisa_7b").image_tokens() == ("<im_start>", "<im_end>")
    assert load("--config.data.image_tokens=<a>, <b>").image_tokens() == ("<a>", "<b>")
    assert load("--config.data.image_tokens=", config="lisa_7b").image_tokens() == ()


def test_one_load_leaves_nothing_behind_for_the_next():
    load("--config.train.steps=7", a="/a")
    config = load()
    assert config.train.steps != 7 and not config.data.sources


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("--config.train.stesp=5", r"config\.train\.stesp: is unknown; did you mean config\.train\.steps\?"),
        ("--config.modle.lora.rank=5", r"config\.modle: is unknown; did you mean config\.model\?"),
        ("--config.steps=5", r"did you mean config\.train\.steps\?"),
        ("--config.zebra=5", r"config\.zebra: is unknown; known are name, model"),
        ("--config.train.steps.more=5", r"config\.train\.steps\.more: is unknown; config\.train\.steps is a single value"),
        ("--config.data.weights.V=1", r"did you mean config\.data\.weights\.IV\?"),
        ("--config.data.sources.a.pth=1", r"did you mean config\.data\.sources\.a\.path\?"),
        ("--config.data.sources.a-b.path=1", r"data\.sources\['my-data'\]\.path"),
        ("--config.train=5", r"config\.train: is a group of settings; name one of them, such as config\.train\.steps"),
        ("--config.trainables['^sam_prompt/']=1", r"change it in the config file"),
        ("--config.train.steps=many", r"config\.train\.steps=many: invalid literal"),
        ("--config.data.augment=perhaps", r"Non-boolean"),
        ("--config.model.seg_state=before", r"config\.model\.seg_state: is 'before'; use token or predict"),
        ("--confgi.train.steps=5", r"--confgi\.train\.steps: is unknown"),
        ("stray", r"'stray' is not an override"),
    ],
)
def test_a_wrong_override_is_one_line_with_the_right_name(override, answer):
    with pytest.raises(ConfigError, match=answer) as error:
        load(override)
    assert "\n" not in str(error.value)


def test_a_config_is_found_by_path_then_among_the_packaged_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/tiny.py") == PACKAGED / "tiny.py" == find_config("tiny")
    Path("tiny").mkdir()
    assert find_config("tiny") == PACKAGED / "tiny.py"
    Path("mine.py").write_text("from configs import tiny\ndef get_config():\n    c = tiny.get_config()\n    c.name = 'mine'; return c\n")
    assert load(config="mine.py").name == "mine"
    with pytest.raises(ConfigError, match=r"configs/tinny\.py: no such file; packaged are .* \(did you mean tiny\?\)"):
        find_config("configs/tinny.py")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def get_config():\n    return 3", r"defines no get_config\(\) that returns"),
        ("x = 1", r"defines no get_config\(\)"),
        ("from mimo_jax.config import Config\ndef get_config():\n    c = Config()\n    c.train.steps = 0\n    return c", "trainables"),
    ],
)
def test_a_broken_config_file_is_named_in_one_line(text, answer, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(text + os.linesep)
    with pytest.raises(ConfigError, match=answer) as error:
        load(config=str(file))
    assert "\n" not in str(error.value)


def test_every_field_survives_json_and_an_unknown_one_is_named():
    config = tiny_config()
    config.data.sources = {"a": SourceConfig("/a", 2.0, "I,II")}
    config.mesh.data = 4
    assert Config.from_dict(config.to_dict()) == config
    values = config.to_dict()
    values["model"]["vision"]["colour"] = 1
    with pytest.raises(ConfigError, match=r"config\.model\.vision: unknown field colour; known are activation, "):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "answer"),
    [
        ("model.vision.patch_size", 7, "model.vision.patch_size: must divide"),
        ("model.llm.kv_heads", 3, "model.llm.kv_heads"),
        ("model.lora.targets", "q,z", "model.lora.targets: z unknown"),
        ("model.vision.resample", "nearest", "model.vision.resample: is 'nearest'; use bilinear or bicubic"),
        ("model.seg_position", "before", "model.seg_position: is 'before'; use inside, after or bare"),
        ("data.image_tokens", "<im_start>", "data.image_tokens: is '<im_start>'; name two tokens"),
        ("data.image_tokens", "<im_start>,", "data.image_tokens: is '<im_start>,'; name two tokens"),
        ("data.image_tokens", "<a>,<b>,<c>", "data.image_tokens: is '<a>,<b>,<c>'; name two tokens"),
        ("model.aligner.kind", "magic", "model.aligner.kind: is 'magic'; use one of cross_attention"),
        ("model.sam.image_fit", "crop", "model.sam.image_fit: is 'crop'; use pad or stretch"),
        ("data.fraction", 0.0, "data.fraction: is 0; must be above 0"),
        ("data.mixed_prompts", 1.5, "data.mixed_prompts: is 1.5; must be from 0 to 1"),
        ("data.prompt_kinds", "point,lasso", "data.prompt_kinds: is 'point,lasso'; name some of point, box, scribble"),
        ("data.prompt_kinds", "", "data.prompt_kinds: is ''; name some of point, box, scribble"),
        ("train.loss.mask_side", -1, "train.loss.mask_side: must be 0 or more"),
        ("freeze", "^sam_(", "freeze: is '^sam_('; this is not a regular expression"),
        ("data.buckets", "64,x", "data.buckets: '64,x' is not a list of lengths"),
        ("data.buckets", "512", "data.buckets: must not exceed"),
        ("data.samples_per_image", 3, "data.samples_per_image: must divide"),
        ("train.grad_accum_steps", 3, "train.grad_accum_steps: must divide"),
        ("train.steps", 0, "train.steps: must be at least 1"),
        ("train.epochs", -1.0, "train.epochs: must be 0 or more"),
    ],
)
def test_what_cannot_run_is_refused_by_its_field(path, value, answer):
    config = tiny_config()
    *parents, name = path.split(".")
    holder = config
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, name, value)
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert str(error.value).startswith(f"config.{answer}")


@pytest.mark.parametrize(("kind", "fit"), [("mlp", "pad"), ("cross_attention", "crop")])
def test_the_attention_map_loss_is_refused_without_queries_and_where_the_grid_is_cut(kind, fit):
    config = tiny_config()
    config.model.aligner.kind, config.model.vision.image_fit = kind, fit
    config.validate()
    config.train.loss.attention_map = 1.0
    with pytest.raises(ConfigError, match=r"^config\.train\.loss\.attention_map: needs an aligner with an attention map"):
        config.validate()
