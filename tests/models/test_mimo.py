"""The whole model: shapes, what depends on what, and its size at full width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import pathtree
from mimo_jax.models import mimo, stack
from mimo_jax.train import losses
from tests.tiny_config import random_batch, tiny_config


def build(config):
    graphdef, _ = mimo.abstract(config)
    params = mimo.initial(config, jax.random.key(0))
    return params, lambda p, batch: stack.bind(graphdef, p)(batch)


@pytest.mark.parametrize(("kind", "seg_state", "seg_place"), [
    ("cross_attention", "token", "inside"), ("none", "token", "inside"), ("linear", "predict", "bare"), ("mlp", "token", "after"),
])  # fmt: skip
def test_forward_and_backward_of_every_kind(kind, seg_state, seg_place):
    config = tiny_config(seg_state=seg_state, seg_place=seg_place)
    config.model.aligner = dataclasses.replace(config.model.aligner, kind=kind)
    graphdef, _ = mimo.abstract(config)
    params = mimo.initial(config, jax.random.key(0))
    batch = random_batch(config, length=80)

    def loss(p):
        return losses.total(losses.batch_sums(stack.bind(graphdef, p), batch), config.train.loss, losses.weights_of(batch))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    dead = [p for p, g in pathtree.flatten(grads).items() if not np.isfinite(g).all()]
    assert not dead
    roots = {p.split("/")[0] for p, g in pathtree.flatten(grads).items() if np.abs(g).max() > 0}
    wanted = {"clip", "aligner", "embedding", "llm", "lm_head", "seg_projection", "sam_encoder", "sam_decoder"}
    assert wanted <= roots and ("prompt" in params) == ("prompt" in roots) == (kind in ("cross_attention", "none"))
    rows = {"inside": 3, "after": 3, "bare": 1}[seg_place]
    assert params["embedding"]["grounding"].shape == (rows, 16) and params["lm_head"]["grounding"].shape == (16, rows)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_turns_of_the_kinds_that_read_the_image_alone_differ_by_image_only(kind):
    config = tiny_config(turns_max=2)
    config.model.aligner.kind = kind
    model = stack.bind(mimo.abstract(config)[0], mimo.initial(config, jax.random.key(0)))
    batch = random_batch(config, length=80)
    image = model.encode_clip(batch["clip_image"], batch["clip_size"])
    x_q, look = model.align_and_look(image, *(batch[key] for key in ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind")))
    assert look is None and x_q.shape == (4, 2, config.model.query_tokens(), 16)
    for b in range(4):  # two samples of two turns to an image
        np.testing.assert_array_equal(x_q[b, 0], x_q[b, 1])
        np.testing.assert_allclose(x_q[b, 0], model.aligner.of_image(image[b // 2][None])[0], atol=1e-5)
    assert np.abs(x_q[0] - x_q[2]).max() > 1e-3


@pytest.fixture(scope="module")
def forward():
    config = tiny_config()
    params, run = build(config)
    return config, params, jax.jit(run)


@pytest.mark.parametrize("name", ["instruction_ids", "prompt_xy", "clip_image"])
def test_question_prompt_and_image_change_the_hidden_states(forward, name):
    config, params, run = forward
    batch, other = random_batch(config), random_batch(config, seed=1)
    assert np.abs(run(params, batch)["hidden"] - run(params, batch | {name: other[name]})["hidden"]).max() > 1e-5


def test_prompts_change_x_q_and_not_its_length(forward):
    config, params, _ = forward
    graphdef, _ = mimo.abstract(config)
    model = stack.bind(graphdef, params)
    batch, other = random_batch(config), random_batch(config, seed=1)
    image = model.encode_clip(batch["clip_image"], batch["clip_size"])

    def align(b):
        return np.asarray(model.align(image, b["instruction_ids"], b["instruction_mask"], b["prompt_xy"], b["prompt_kind"]))

    first, prompted, asked = (
        align(batch),
        align(batch | {"prompt_xy": other["prompt_xy"]}),
        align(batch | {"instruction_ids": other["instruction_ids"]}),
    )
    assert first.shape == prompted.shape == asked.shape == (4, 1, 4, 16)
    assert np.abs(first - prompted).max() > 1e-5 and np.abs(first - asked).max() > 1e-5


def test_samples_that_share_an_image_equal_samples_apart(forward):
    """K samples of one image against the same samples, each with its own copy of the image."""
    config, params, run = forward
    batch = random_batch(config)
    apart = batch | {name: np.repeat(batch[name], 2, axis=0) for name in ("clip_image", "clip_size", "sam_image", "sam_size")}
    graphdef, _ = mimo.abstract(config)
    one, two = run(params, batch), stack.bind(graphdef, params)(apart)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_what_lies_outside_the_content_is_not_seen(forward):
    config, params, run = forward
    batch = random_batch(config)
    batch["sam_size"][:] = (40, 64)
    batch["clip_size"][:] = (20, 32)
    noisy = {k: v.copy() for k, v in batch.items()}
    noisy["sam_image"][:, 40:], noisy["clip_image"][:, 20:] = 255, 255
    for a, b in zip(jax.tree.leaves(run(params, batch)), jax.tree.leaves(run(params, noisy)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_turns_have_their_own_x_q():
    """Two turns: changing the prompt of the second leaves the X_q of the first."""
    config = tiny_config(turns_max=2)
    params = mimo.initial(config, jax.random.key(0))
    model = stack.bind(mimo.abstract(config)[0], params)
    batch = random_batch(config)
    image = model.encode_clip(batch["clip_image"], batch["clip_size"])
    rest = batch["instruction_ids"], batch["instruction_mask"]
    moved = batch["prompt_xy"].copy()
    moved[:, 1] += 5
    one = model.align(image, *rest, batch["prompt_xy"], batch["prompt_kind"])
    two = model.align(image, *rest, moved, batch["prompt_kind"])
    np.testing.assert_array_equal(one[:, 0], two[:, 0])
    assert np.abs(one[:, 1] - two[:, 1]).max() > 1e-5


def test_seg_states_are_those_of_the_token_or_of_the_one_before():
    hidden = jnp.arange(2 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 3)
    index = jnp.asarray([[2, 5], [1, 0]])
    for mode, shift in (("token", 0), ("predict", 1)):
        config = tiny_config(seg_state=mode)
        model = stack.bind(mimo.abstract(config)[0], mimo.initial(config, jax.random.key(0)))
        got = model.seg_states(hidden, index)
        np.testing.assert_array_equal(got[0], hidden[0, np.asarray([2, 5]) - shift])
