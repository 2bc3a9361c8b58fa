import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from checkpoints_convert import rows
from mimo_jax import pathtree
from mimo_jax.config import ConfigError
from mimo_jax.model_config import ClipConfig, ModelConfig
from mimo_jax.models import clip_vit, scan
from mimo_jax.models.scan import ScanConfig
from tests.models import oracles
from tests.tiny_config import tiny_config

TINY = ClipConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4, mlp_width=96, class_token=True)


def torch_model(cfg: ClipConfig) -> torch.nn.Module:
    config = CLIPVisionConfig(
        hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        image_size=cfg.image_size, patch_size=cfg.patch_size, hidden_act=cfg.activation, layer_norm_eps=cfg.eps,
    )  # fmt: skip
    return oracles.randomised(CLIPVisionModel(config))


def pixels(cfg: ClipConfig, n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, cfg.image_size, cfg.image_size, 3)).astype(np.float32)


def here(cfg: ClipConfig, oracle: torch.nn.Module, **kwargs):
    make = lambda rngs: clip_vit.ClipVit(cfg, rngs=rngs, **kwargs)  # noqa: E731
    return oracles.brought_here(oracle, make, "vision", rows.CLIP, ModelConfig(vision=cfg))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_every_hidden_state_is_transformers(activation):
    cfg = dataclasses.replace(TINY, activation=activation)
    oracle, x = torch_model(cfg), pixels(cfg)
    with torch.no_grad():
        states = oracle(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    assert len(states) == cfg.layers + 1
    for layer in (0, 1, -2, -1):
        graphdef, params = here(dataclasses.replace(cfg, feature_layer=layer), oracle)
        found = jax.jit(lambda p, x, graphdef=graphdef: scan.bind(graphdef, p)(x))(params, x)
        assert oracles.relative_l2(found, states[layer]) <= 1e-5, layer


def test_class_token_is_dropped_on_demand():
    oracle, x = torch_model(TINY), pixels(TINY)
    kept, dropped = (scan.bind(*here(dataclasses.replace(TINY, class_token=token), oracle))(x) for token in (True, False))
    assert dropped.shape == (2, 16, 48)
    np.testing.assert_array_equal(kept[:, 1:], dropped)


def test_bfloat16_is_near_float32():
    oracle, x = torch_model(TINY), pixels(TINY)
    exact, found = (
        jax.jit(lambda p, x, graphdef=graphdef: scan.bind(graphdef, p)(x))(params, x)
        for graphdef, params in (here(TINY, oracle), here(TINY, oracle, dtype=jnp.bfloat16))
    )
    assert found.dtype == jnp.bfloat16
    assert oracles.relative_l2(found.astype(jnp.float32), exact) < 0.03


def test_gradient_passes_the_layers_that_run_and_no_others():
    x = pixels(TINY)
    graphdef, params = here(dataclasses.replace(TINY, feature_layer=-2), torch_model(TINY), scan=ScanConfig(remat="full"))
    weights = np.random.default_rng(1).standard_normal((2, 17, 48))
    grads = pathtree.flatten(jax.jit(jax.grad(lambda p: jnp.sum(weights * scan.bind(graphdef, p)(x))))(params))
    kernel = np.asarray(grads["layers/block/up/kernel"])
    assert np.isfinite(kernel).all()
    assert (np.linalg.norm(kernel, axis=(1, 2)) > 0).tolist() == [True, True, False]
    assert np.linalg.norm(grads["patch/kernel"]) > 0


def test_huge_has_its_published_size():
    _, params = scan.abstract(lambda rngs: clip_vit.ClipVit(ClipConfig(), rngs=rngs))
    count = sum(leaf.size for leaf in pathtree.flatten(params).values())
    assert round(count / 1e6, 1) == 630.8


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"vision\.feature_layer: is 4; use -4 to 3"):
        tiny_config(vision=dataclasses.replace(TINY, feature_layer=4)).validate()
