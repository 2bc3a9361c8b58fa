"""X_img from SAM's image encoder: its values, its settings, one run of the encoder for both uses, and what is stored of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import pathtree
from mimo_jax.analysis import flops
from mimo_jax.config import ConfigError
from mimo_jax.data.transforms import preprocess
from mimo_jax.model_config import ClipConfig, SamFeaturesConfig, SamVitConfig
from mimo_jax.models import mimo, sam_encoder, scan
from tests.tiny_config import frozen_config, random_batch, random_params

SAM = {"image_size": 64, "patch_size": 8, "width": 16, "layers": 4, "heads": 2, "window": 4, "global_every": 2}
# Without stages the same code is run, less of it.
SETTINGS = [pytest.param("", marks=pytest.mark.slow), "1,0"]
DECODER = {"decoder_width": 32, "decoder_heads": 2, "decoder_mlp_width": 32, "iou_head_width": 16}


def config_of(stages: str = ""):
    config = frozen_config(sam=SamVitConfig(**SAM, **DECODER))
    config.model.vision = SamFeaturesConfig(image_size=64, width=32 + 16 * len(stages.replace(",", "")), cells=4, stages=stages)
    config.validate()
    return config


def build(config):
    params = jax.tree.map(jnp.asarray, random_params(config))
    return params, lambda params: scan.bind(mimo.abstract(config)[0], params)


def images(config, count: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    made = [preprocess(rng.integers(0, 256, (64, 40, 3)).astype(np.uint8), config.model) for _ in range(count)]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


@pytest.mark.parametrize("stages", SETTINGS)
def test_it_is_the_average_over_cells_and_every_stage_is_normalised(stages):
    config = config_of(stages)
    params, model_of = build(config)
    views = images(config)
    assert views.keys() == {"sam_image", "sam_size", "vision_size"} and np.array_equal(views["sam_size"], views["vision_size"])

    @jax.jit
    def run(params, views):
        model = model_of(params)
        pixels = mimo.normalize(views["sam_image"], views["sam_size"], sam_encoder.MEAN, sam_encoder.STD, jnp.float32)
        return model.encode(views), model.sam_encoder.feature_maps(pixels), model.sam_encoder(pixels)

    (x_img, features), (*outputs, again), alone = run(params, views)
    np.testing.assert_allclose(features, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, again, rtol=1e-5, atol=1e-5)
    wanted = []
    for number in [-1, *(int(n) for n in stages.split(",") if n)]:
        x = np.asarray(again if number < 0 else outputs[number], np.float64)
        cells = np.stack([x[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2)) for r in range(4) for c in range(4)], axis=1)
        if number >= 0:
            cells = (cells - cells.mean(-1, keepdims=True)) / np.sqrt(cells.var(-1, keepdims=True) + 1e-6)
        wanted.append(cells)
    assert x_img.shape == (2, 16, config.model.vision.width)
    np.testing.assert_allclose(x_img, np.concatenate(wanted, axis=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", ["", "1,0"])
def test_the_encoder_runs_once_for_the_words_and_the_masks(stages):
    config = config_of(stages)
    params, model_of = build(config)
    views = images(config)

    def cost(function) -> float:
        return jax.jit(function).lower(params, views).compile().cost_analysis()["flops"]

    both = cost(lambda params, views: model_of(params).encode(views))
    masks = cost(lambda params, views: model_of(params).sam_encoder(views["sam_image"].astype(jnp.float32)))
    assert masks < both < 1.15 * masks, "averages and the normalisation of pixels, and no second encoder"


@pytest.mark.parametrize("stages", SETTINGS)
def test_a_batch_of_stored_features_is_that_of_pictures(stages):
    """Bar: 1e-2 in features of size 1, which are stored in bfloat16; what is stored has SAM's features once."""
    config = config_of(stages)
    params, model_of = build(config)
    views = images(config)
    made = jax.jit(lambda params, views: model_of(params).image_features(views))(params, views)
    shapes = mimo.feature_shapes(config)
    assert shapes == {"sam_features": (8, 8, 32)} | ({"sam_stages": (16, 32)} if stages else {})
    assert {name: array.shape[1:] for name, array in made.items()} == shapes
    stored = {name: jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16) for name, array in made.items()}
    batch = {name: array for name, array in random_batch(config).items() if not name.endswith("_image")}
    run = jax.jit(lambda params, views: (model_of(params).encode(views), model_of(params)({**batch, **views})))
    (encoded, *outputs), (again, *more) = run(params, views), run(params, stored)
    for one, two in zip(again, encoded, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-2, atol=2e-2)
    outputs += more
    assert outputs[0]["attention_map"].shape == (4, 1, 4, 4)
    for name in outputs[0]:
        scale = float(jnp.abs(outputs[0][name]).max())
        np.testing.assert_allclose(outputs[1][name], outputs[0][name], atol=0.05 * scale, err_msg=name)


def test_a_tower_that_trains_is_not_stored():
    config = frozen_config()
    assert set(mimo.feature_shapes(config)) == {"x_img", "sam_features"}
    config.freeze = "^sam_encoder/"
    assert set(mimo.feature_shapes(config)) == {"sam_features"}


def test_gradients_reach_the_encoder_through_x_img_only_if_it_trains():
    config = config_of("1")
    params, model_of = build(config)
    views = images(config)
    made = jax.jit(jax.grad(lambda params: jnp.square(model_of(params).encode(views)[0]).sum()))(params)
    moved = {path.split("/")[0] for path, leaf in pathtree.flatten(made).items() if np.abs(leaf).max() > 0}
    assert moved == {"sam_encoder"}
    frozen = flops.step(config, 96)
    assert frozen["sam_encoder"] == flops.forward(config, 96)["sam_encoder"] > 0 == frozen["vision"]
    config.freeze = ""
    assert flops.step(config, 96)["sam_encoder"] > 2 * frozen["sam_encoder"]
    assert flops.step(config, 96)["aligner"] > frozen["aligner"]  # a gradient with respect to X_img
    config.freeze, config.data.features = "^sam_encoder/", True
    assert flops.step(config, 96)["sam_encoder"] == 0
    config.model.vision = ClipConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32, feature_layer=-1)
    assert flops.step(config, 96)["sam_encoder"] == 0 < flops.step(config, 96)["vision"]  # the tower trains, and reads pictures


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("image_size", 32, "image_size: is 32; set it to SAM's, 64"),
        ("image_fit", "stretch", "image_fit: is 'stretch'; set it to SAM's, 'pad'"),
        ("resample", "bicubic", "resample: must be bilinear"),
        ("width", 33, "width: is 33; set it to 32, the channels of features and stages"),
        ("cells", 3, "cells: is 3; set it to a divisor of 8"),
        ("cells", 0, "cells: must be at least 1"),
        ("stages", "2", "stages: is '2'; SAM's encoder of kind vit has 2 stages, name numbers below that, each once"),
        ("stages", "0,0", "stages: is '0,0'; SAM's encoder of kind vit has 2 stages"),
        ("stages", "last", "stages: is 'last'; give numbers such as 1,2,3, or none"),
    ],
)
def test_settings_that_do_not_fit_sam_are_refused(setting, value, message):
    config = config_of()
    setattr(config.model.vision, setting, value)
    with pytest.raises(ConfigError, match=f"config.model.vision.{message}"):
        config.validate()
