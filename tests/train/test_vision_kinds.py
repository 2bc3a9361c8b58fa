"""What the language model sees without a CLIP: SAM's features, its stages too, or a small tower that trains beside it. Each trains from
stored features as from pictures, resumes, answers, and is exported without a second copy of weights."""

import json

import numpy as np
import pytest

from checkpoints_convert.export import export_checkpoint
from mimo_jax import pathtree
from mimo_jax.checkpoints import loading
from mimo_jax.config import SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading.encode_features import encode_checkpoint
from mimo_jax.errors import EXIT_TEMPFAIL
from mimo_jax.infer.predictor import Mimo
from mimo_jax.model_config import SamFeaturesConfig
from mimo_jax.train import loop
from tests.tiny_config import quick_config

SEEN = {
    "sam": SamFeaturesConfig(image_size=64, width=32, cells=4),
    "stages": SamFeaturesConfig(image_size=64, width=48, cells=4, stages="0"),
    "tower": quick_config().model.vision,
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    build_phantoms(folder, 12, seed=5, progress=False)
    return folder


def config_of(kind: str, phantoms):
    config = quick_config()
    config.model.vision = SEEN[kind]
    config.freeze = "^sam_encoder/"
    config.data.sources = {"phantom": SourceConfig(path=str(phantoms))}
    config.train.steps, config.train.checkpoint_every, config.train.keep_last = 2, 1, 2
    config.validate()
    return config


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def flat(run) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(loading.load_params(run)).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEN)
def test_it_trains_from_stored_features_resumes_answers_and_is_exported(kind, phantoms, tmp_path):
    config, run = config_of(kind, phantoms), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.PreemptionGuard, "should_stop_after", lambda self, step: step == 1)
        assert loop.train(config, run) == EXIT_TEMPFAIL
    assert loop.train(config, run) == 0
    before, after = flat(run / "steps" / "1"), flat(run / "steps" / "2")
    moved = {path.split("/")[0] for path in after if not np.array_equal(before[path], after[path])}
    assert "sam_encoder" not in moved and {"aligner", "sam_decoder"} <= moved
    assert ("vision" in moved) == (kind == "tower") == any(path.startswith("vision/") for path in after)

    # from the same weights, with pictures and with features: bar 2e-3 relative, features being bf16
    runs = [tmp_path / "pictures", tmp_path / "stored"]
    config.init.path, config.train.steps = str(run), 1
    assert loop.train(config, runs[0]) == 0
    assert encode_checkpoint(run, phantoms).written > 0
    config.data.features = True
    assert loop.train(config, runs[1]) == 0
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=2e-3)

    model = Mimo.load(runs[1])
    chat = model.open(np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8))
    text = chat.ask("What is this?", max_new_tokens=6).text
    chat.ask("And where?", max_new_tokens=6)
    assert model.engine.counts["images"] == 1
    export_checkpoint(runs[1], "mimo", tmp_path / "alone")
    assert Mimo.load(tmp_path / "alone").open(chat.image.picture).ask("What is this?", max_new_tokens=6).text == text
    export_checkpoint(runs[1], "hf", tmp_path / "hf")
    assert (tmp_path / "hf" / "vision").is_dir() == (kind == "tower")
    export_checkpoint(runs[1], "joint", tmp_path / "joint")
