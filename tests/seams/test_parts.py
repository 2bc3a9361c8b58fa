"""A part of each section that the package does not know: trained, saved, resumed, asked, exported, imported, without a file of the
package touched."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints_convert.export import export_checkpoint
from mimo_jax import pathtree
from mimo_jax.analysis import flops
from mimo_jax.checkpoints import loading
from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.cli import main
from mimo_jax.config import Config, ConfigError, SourceConfig
from mimo_jax.config_flags import load_config
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading.encode_features import encode_checkpoint
from mimo_jax.errors import EXIT_TEMPFAIL
from mimo_jax.infer.engine.requests import Request
from mimo_jax.infer.predictor import Mimo
from mimo_jax.models import mimo, registry
from mimo_jax.train import loop
from tests.data import handmade
from tests.seams import toy_parts
from tests.tiny_config import quick_config

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "vision": toy_parts.MixerConfig(),
    "llm": toy_parts.MeanConfig(),
    "sam": toy_parts.ScalesConfig(decoder_width=32, decoder_heads=2, decoder_mlp_width=32, iou_head_width=16, decoder_layers=1),
    "aligner": toy_parts.MeanAlignerConfig(max_text=16),
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    build_phantoms(folder, 12, seed=5, progress=False)
    return folder


def config_of(section: str, phantoms: Path, folder: Path) -> Config:
    config = quick_config()
    setattr(config.model, section, KINDS[section])
    config.data.sources = {"phantom": SourceConfig(path=str(phantoms))}
    config.train.steps, config.train.checkpoint_every, config.train.keep_last = 2, 1, 2
    if section == "llm":
        config.tokenizer, config.data.chat_template = handmade.byte_level_tokenizer(folder).path, "chatml"
    config.validate()
    return config


@pytest.fixture(scope="module", params=KINDS)
def run(request, phantoms, tmp_path_factory):
    """(section, a run that stopped after its first step and was resumed)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(request.param, phantoms, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.PreemptionGuard, "should_stop_after", lambda self, step: step == 1)
        assert loop.train(config, folder / "run") == EXIT_TEMPFAIL
    assert loop.train(config, folder / "run") == 0
    return request.param, folder / "run"


def flat(run: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(loading.load_params(run)).items()}


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)


def answer(run: Path):
    return Mimo.load(run).open(picture()).ask("What is this?", max_new_tokens=6)


def test_it_trains_saves_and_resumes(run):
    section, path = run
    assert Checkpoints(path).latest() == 2
    before, after = flat(path / "steps" / "1"), flat(path / "steps" / "2")
    root = {"vision": "vision/", "llm": "llm/", "sam": "sam_decoder/", "aligner": "aligner/"}[section]
    moved = [name for name in after if name.startswith(root) and not np.array_equal(before[name], after[name])]
    assert bool(moved) == (section != "vision")  # the tower is frozen in this config
    losses = [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_it_answers_alone_in_a_chat_and_in_a_batch(run):
    _, path = run
    model = Mimo.load(path)
    chat = model.open(picture())
    first = chat.ask("What is this?", max_new_tokens=6)
    second = chat.ask("And where?", max_new_tokens=6)
    again = model.open(picture())
    assert [again.ask(question, max_new_tokens=6).text for question in ("What is this?", "And where?")] == [first.text, second.text]
    requests = [Request(chat.image, question, max_new_tokens=6) for question in ("What is this?", "Is there a nodule in it?")]
    alone = [model.predict([request])[0].text for request in requests]
    assert [answer.text for answer in model.predict(requests)] == alone and alone[0] == first.text


def test_it_is_exported_and_imported_to_the_bit(run, tmp_path, capsys):
    section, path = run
    export_checkpoint(path, "mimo", tmp_path / "alone")
    assert answer(tmp_path / "alone").text == answer(path).text
    export_checkpoint(path, "joint", tmp_path / "joint")
    config = tmp_path / "config.py"
    config.write_text(f"from tests.seams import test_parts\n\ndef get_config():\n    return test_parts.saved({str(path)!r})\n")
    line = ["convert", "import", "--config", str(config), "--joint", str(tmp_path / "joint"), "--out", str(tmp_path / "again")]
    assert main.main(line) == 0, capsys.readouterr().err
    there, here = flat(path), flat(tmp_path / "again")
    assert there.keys() == here.keys() and all(np.array_equal(there[name], here[name]) for name in there)


def saved(run: str) -> Config:
    config = Config.from_dict(json.loads((Path(run) / "config.json").read_text()))
    config.tokenizer = ""
    return config


def test_a_format_without_a_place_for_it_is_refused(run, tmp_path):
    section, path = run
    if section not in ("vision", "llm"):
        return export_checkpoint(path, "hf", tmp_path / "hf") and None
    assert main.main(["convert", "export", "--checkpoint", str(path), "--format", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert not (tmp_path / "hf").exists()


def test_its_floating_point_operations_are_counted(run, phantoms, tmp_path):
    section, path = run
    made = flops.step(saved(str(path)), 96)
    assert made[{"sam": "sam_encoder"}.get(section, section)] > 0


@pytest.mark.slow
def test_features_of_three_scales_train_as_pictures_do(phantoms, tmp_path):
    config = config_of("sam", phantoms, tmp_path)
    config.train.steps = 1
    assert loop.train(config, tmp_path / "run") == 0
    assert {name: len(shape) for name, shape in mimo.feature_shapes(config).items()} == {
        "x_img": 2, "sam_features_0": 3, "sam_features_1": 3, "sam_features_2": 3,
    }  # fmt: skip
    encode_checkpoint(tmp_path / "run", phantoms)
    config.data.features, config.init.path = True, str(tmp_path / "run")
    assert loop.train(config, tmp_path / "cached") == 0
    a, b = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["ce"] for name in ("run", "cached"))
    assert np.isfinite([a, b]).all()


def test_the_command_imports_the_modules_of_mimo_plugins(run, tmp_path):
    section, path = run
    if section != "vision":
        return
    ask = [sys.executable, "-m", "mimo_jax.cli", "convert", "export", "--checkpoint", str(path), "--format", "mimo", "--out"]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    without = subprocess.run([*ask, str(tmp_path / "a")], env=there, capture_output=True, text=True)
    assert without.returncode == 2
    assert (
        "config.model.vision.kind: is 'mixer'; use one of clip, sam, or name the module that registers it in MIMO_PLUGINS" in without.stderr
    )
    subprocess.run([*ask, str(tmp_path / "b")], env=there | {"MIMO_PLUGINS": "tests.seams.toy_parts"}, check=True, capture_output=True)
    wrong = subprocess.run([*ask, str(tmp_path / "c")], env=there | {"MIMO_PLUGINS": "no_such_module"}, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "mimo: error: MIMO_PLUGINS: there is no module no_such_module; add the folder that contains it to PYTHONPATH\n"


def test_a_kind_is_chosen_on_the_command_line_with_its_own_settings():
    config = load_config(
        ["--config", str(ROOT / "configs" / "tiny.py"), "--config.model.vision.kind=mixer", "--config.model.vision.cells=8"]
    )
    assert config.model.vision == toy_parts.MixerConfig(cells=8)
    assert Config.from_dict(config.to_dict()) == config


def test_kinds_that_are_taken_unknown_or_of_other_settings_are_refused():
    row = registry.VISION_TOWERS["mixer"]
    with pytest.raises(ValueError, match=r"config.model.vision.kind clip: is already registered"):
        registry.register_vision_tower("clip", row)
    for rule, message in (
        ({r"^vision/mix/kernel$": ("mlp", "embed")}, r"sharding rule '\^vision/mix/kernel\$': already has a row"),
        ({r"^vision/other/kernel$": ("rows", "embed")}, "unknown axis 'rows'; use one of batch"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.register_vision_tower("other", dataclasses.replace(row, shardings=rule))
    assert "other" not in registry.VISION_TOWERS
    config = quick_config()
    config.model.vision.kind = "mixer"
    with pytest.raises(ConfigError, match=r"vision.kind: is 'mixer', which needs settings of class MixerConfig, not ClipConfig"):
        config.validate()
    config.model.vision.kind = "unheard"
    with pytest.raises(ConfigError, match=r"config.model.vision.kind: is 'unheard'; use one of clip, sam, mixer, or name the module"):
        config.validate()
