"""The aligner's contract: what it reads changes X_q, what is masked does not, and its length never changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mimo_jax.model_config import KINDS, AlignerConfig, ClipConfig, LlamaConfig, ModelConfig, PromptConfig
from mimo_jax.models import registry, scan, standard_parts  # noqa: F401
from mimo_jax.models.aligner import AlignerBlock

READERS = ("cross_attention", "none")  # of text and prompts
IMAGE_ONLY = ("linear", "mlp")


def config(kind: str) -> ModelConfig:
    return ModelConfig(
        vision=ClipConfig(image_size=32, patch_size=8, width=24, layers=2, heads=2),
        prompt=PromptConfig(width=16, max_tokens=6),
        aligner=AlignerConfig(kind=kind, queries=5, blocks=2, width=32, heads=4, max_text=7),
        llm=LlamaConfig(vocab_size=40, width=20, layers=1, heads=2, kv_heads=2),
    )


def inputs(cfg: ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "image": draw(2, 16, 24),
        "image_code": draw(16, 16),
        "text": draw(2, 7, 20),
        "text_mask": jnp.arange(7)[None] < jnp.asarray([[4], [7]]),
        "visual": draw(2, 6, 16),
        "visual_mask": jnp.arange(6)[None] < jnp.asarray([[2], [6]]),
    }


def build(kind):
    cfg = config(kind)
    graphdef, _ = scan.abstract(lambda rngs: registry.part(cfg, "aligner").build(cfg, rngs=rngs))
    params = scan.init_params(lambda rngs: registry.part(cfg, "aligner").build(cfg, rngs=rngs), jax.random.key(0))
    return cfg, lambda given: np.asarray(scan.bind(graphdef, params)(**given)[0])


def test_kinds_are_told_apart_by_what_they_read():
    ours = [kind for kind, settings in KINDS["aligner"].items() if settings.__module__.startswith("mimo_jax.")]  # other tests add kinds
    assert READERS + IMAGE_ONLY == tuple(ours)
    assert tuple(kind for kind in ours if config(kind).aligner.image_only()) == IMAGE_ONLY


@pytest.mark.parametrize("kind", READERS)
def test_length_is_that_of_the_config_whatever_is_given(kind):
    cfg, run = build(kind)
    given = inputs(cfg)
    for changed in ({}, {"text_mask": jnp.zeros((2, 7), bool)}, {"visual_mask": jnp.zeros((2, 6), bool)}):
        assert run(given | changed).shape == (2, cfg.query_tokens(), cfg.llm.width)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", ["image", "text", "visual"])
def test_everything_that_is_read_changes_x_q(kind, name):
    cfg, run = build(kind)
    given, other = inputs(cfg), inputs(cfg, seed=1)
    assert np.abs(run(given) - run(given | {name: other[name]})).max() > 1e-3


@pytest.mark.parametrize("kind", READERS)
def test_masked_text_and_prompts_change_nothing(kind):
    cfg, run = build(kind)
    given = inputs(cfg)
    text = jnp.where(given["text_mask"][..., None], given["text"], 9.0)
    visual = jnp.where(given["visual_mask"][..., None], given["visual"], 9.0)
    np.testing.assert_allclose(run(given), run(given | {"text": text, "visual": visual}), atol=1e-5)


def test_no_prompt_differs_from_any_prompt():
    cfg, run = build("cross_attention")
    given = inputs(cfg)
    assert np.abs(run(given) - run(given | {"visual_mask": jnp.zeros((2, 6), bool)})).max() > 1e-4


def test_image_only_kinds_project_every_patch():
    image = inputs(config("linear"))["image"]
    linear, mlp = (registry.ALIGNERS[kind].build(config(kind), rngs=nnx.Rngs(0)) for kind in IMAGE_ONLY)
    np.testing.assert_allclose(linear.project_image(image), image @ linear.project.kernel[...] + linear.project.bias[...], atol=1e-5)
    hidden = torch.nn.functional.gelu(torch.tensor(np.asarray(mlp.project(image))))
    np.testing.assert_allclose(mlp.project_image(image), mlp.project_out(jnp.asarray(hidden.numpy())), atol=1e-5)
    assert linear.project_image(image).shape == mlp.project_image(image).shape == (2, config("linear").query_tokens(), 20)


def test_word_order_reaches_the_queries():
    cfg, run = build("cross_attention")
    given = inputs(cfg)
    assert np.abs(run(given) - run(given | {"text": given["text"].at[:, :2].set(given["text"][:, 1::-1])})).max() > 1e-4


@pytest.mark.parametrize("kind", READERS)
def test_turns_that_share_an_image_are_those_of_the_image_repeated(kind):
    cfg, run = build(kind)
    turns, images = inputs(cfg), inputs(cfg, seed=1)["image"][:1]
    np.testing.assert_allclose(run(turns | {"image": images}), run(turns | {"image": jnp.repeat(images, 2, axis=0)}), atol=2e-5)


def test_the_attention_map_is_the_mean_logits_of_the_last_block_toward_the_image():
    cfg = config("cross_attention")
    aligner = registry.part(cfg, "aligner").build(cfg, rngs=nnx.Rngs(0))
    given = inputs(cfg)
    _, attention_map = aligner(**given)
    assert attention_map.shape == (2, 16)
    attention = AlignerBlock(32, 4, dtype=jnp.float32, rngs=nnx.Rngs(1)).cross_attention
    x, keys = (jnp.asarray(np.random.default_rng(s).normal(size=(4 if s else 2, 5, 32)), jnp.float32) for s in (1, 0))
    q = np.asarray(attention.q(x)).reshape(4, 5, 4, 8)
    k = np.repeat(np.asarray(attention.k(keys)).reshape(2, 5, 4, 8), 2, axis=0)
    by_hand = np.einsum("bqhd,bjhd->bhqj", q, k).mean(2).sum(1) * 8**-0.5
    np.testing.assert_allclose(np.asarray(attention.scores(x, keys)), by_hand, atol=1e-4)


def test_without_queries_there_is_no_attention_map():
    cfg = config("none")
    assert registry.part(cfg, "aligner").build(cfg, rngs=nnx.Rngs(0))(**inputs(cfg))[1] is None
