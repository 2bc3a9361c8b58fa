"""The whole model: shapes, what depends on what, and its size at full width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert import rows
from mimo_jax import pathtree
from mimo_jax.model_config import PIXEL_NORMS
from mimo_jax.models import mimo, scan
from mimo_jax.train import losses
from tests.models import oracles, test_sam_decoder
from tests.tiny_config import random_batch, random_params, tiny_config


def build(config):
    graphdef, _ = mimo.abstract(config)
    params = mimo.init_params(config, jax.random.key(0))
    return params, lambda p, batch: scan.bind(graphdef, p)(batch)


@pytest.mark.parametrize(("kind", "seg_state", "seg_position"), [
    ("cross_attention", "token", "inside"), ("none", "token", "inside"), ("linear", "predict", "bare"), ("mlp", "token", "after"),
])  # fmt: skip
def test_forward_and_backward_of_every_kind(kind, seg_state, seg_position):
    config = tiny_config(seg_state=seg_state, seg_position=seg_position)
    config.model.aligner = dataclasses.replace(config.model.aligner, kind=kind)
    graphdef, _ = mimo.abstract(config)
    params = mimo.init_params(config, jax.random.key(0))
    batch = random_batch(config, length=80)

    def loss(p):
        return losses.combine(losses.batch_sums(scan.bind(graphdef, p), batch, 256), config.train.loss, losses.normalizers(batch))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    dead = [p for p, g in pathtree.flatten(grads).items() if not np.isfinite(g).all()]
    assert not dead
    roots = {p.split("/")[0] for p, g in pathtree.flatten(grads).items() if np.abs(g).max() > 0}
    wanted = {"vision", "aligner", "embedding", "llm", "lm_head", "seg_projection", "sam_encoder", "sam_decoder"}
    assert wanted <= roots and ("prompt" in params) == ("prompt" in roots) == (kind in ("cross_attention", "none"))
    rows = {"inside": 3, "after": 3, "bare": 1}[seg_position]
    assert params["embedding"]["grounding"].shape == (rows, 16) and params["lm_head"]["grounding"].shape == (16, rows)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_turns_of_the_kinds_that_read_the_image_alone_differ_by_image_only(kind):
    config = tiny_config(max_turns=2)
    config.model.aligner.kind = kind
    model = scan.bind(mimo.abstract(config)[0], mimo.init_params(config, jax.random.key(0)))
    batch = random_batch(config, length=80)
    image = model.encode_vision(batch["vision_image"], batch["vision_size"])
    x_q, attention_map = model.align_with_attention(
        image, *(batch[key] for key in ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind"))
    )
    assert attention_map is None and x_q.shape == (4, 2, config.model.query_tokens(), 16)
    for b in range(4):  # two samples of two turns to an image
        np.testing.assert_array_equal(x_q[b, 0], x_q[b, 1])
        np.testing.assert_allclose(x_q[b, 0], model.aligner.project_image(image[b // 2][None])[0], atol=1e-5)
    assert np.abs(x_q[0] - x_q[2]).max() > 1e-3


@pytest.fixture(scope="module")
def forward():
    config = tiny_config()
    params, run = build(config)
    return config, params, jax.jit(run)


@pytest.mark.parametrize("name", ["instruction_ids", "prompt_xy", "vision_image"])
def test_question_prompt_and_image_change_the_hidden_states(forward, name):
    config, params, run = forward
    batch, other = random_batch(config), random_batch(config, seed=1)
    assert np.abs(run(params, batch)["hidden"] - run(params, batch | {name: other[name]})["hidden"]).max() > 1e-5


def test_prompts_change_x_q_and_not_its_length(forward):
    config, params, _ = forward
    graphdef, _ = mimo.abstract(config)
    model = scan.bind(graphdef, params)
    batch, other = random_batch(config), random_batch(config, seed=1)
    image = model.encode_vision(batch["vision_image"], batch["vision_size"])

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
    apart = batch | {name: np.repeat(batch[name], 2, axis=0) for name in ("vision_image", "vision_size", "sam_image", "sam_size")}
    graphdef, _ = mimo.abstract(config)
    one, two = run(params, batch), scan.bind(graphdef, params)(apart)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_what_lies_outside_the_content_is_not_seen(forward):
    config, params, run = forward
    batch = random_batch(config)
    batch["sam_size"][:] = (40, 64)
    batch["vision_size"][:] = (20, 32)
    noisy = {k: v.copy() for k, v in batch.items()}
    noisy["sam_image"][:, 40:], noisy["vision_image"][:, 20:] = 255, 255
    for a, b in zip(jax.tree.leaves(run(params, batch)), jax.tree.leaves(run(params, noisy)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("values", [(0, 256), (30, 180), (77, 78)])
def test_sams_pixels_are_normalised_as_their_trainers_do(values):
    """Against the code of SAM (`Sam.preprocess`), of MedSAM (its (x - min) / clip(max - min, 1e-8) of a resized image, in float64), and
    the plain fraction of 255, for a film that fills a third of the frame; the padding, whose bytes are extreme, does not count."""
    rng = np.random.default_rng(0)
    frames, size = rng.choice(np.array([0, 255], np.uint8), (2, 64, 64, 3)), np.array([[64, 20], [9, 64]], np.int32)
    contents = [rng.integers(*values, (*hw, 3)).astype(np.uint8) for hw in size]
    sam = oracles.segment_anything().Sam
    for frame, content, (height, width) in zip(frames, contents, size, strict=True):
        frame[:height, :width] = content

    def wanted(content: np.ndarray, pixel_norm: str) -> np.ndarray:
        height, width = content.shape[:2]
        if pixel_norm == "imagenet":
            model = sam(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity())
            model.image_encoder.img_size = 64
            return model.preprocess(torch.tensor(content).permute(2, 0, 1).float()).permute(1, 2, 0).numpy()
        scaled = content / 255 if pixel_norm == "none" else (content - content.min()) / np.clip(content.max() - content.min(), 1e-8, None)
        return np.pad(scaled, ((0, 64 - height), (0, 64 - width), (0, 0)))

    config = tiny_config()
    for config.model.sam.pixel_norm in PIXEL_NORMS:
        model = scan.bind(mimo.abstract(config)[0], random_params(config))
        model.sam_encoder = lambda pixels: pixels  # what the encoder is given
        found = np.asarray(model.encode_sam(jnp.asarray(frames), jnp.asarray(size))["sam_features"])
        for i, content in enumerate(contents):
            np.testing.assert_allclose(found[i], wanted(content, config.model.sam.pixel_norm), atol=2e-6, rtol=2e-6)


def test_turns_have_their_own_x_q():
    """Two turns: changing the prompt of the second leaves the X_q of the first."""
    config = tiny_config(max_turns=2)
    params = mimo.init_params(config, jax.random.key(0))
    model = scan.bind(mimo.abstract(config)[0], params)
    batch = random_batch(config)
    image = model.encode_vision(batch["vision_image"], batch["vision_size"])
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
        model = scan.bind(mimo.abstract(config)[0], mimo.init_params(config, jax.random.key(0)))
        got = model.seg_hidden(hidden, index)
        np.testing.assert_array_equal(got[0], hidden[0, np.asarray([2, 5]) - shift])


UNUSED = -2


@pytest.fixture(scope="module")
def with_sam():
    """A model whose SAM parts are segment-anything's, those parts, and the features and `<SEG>` states of two images."""
    config = tiny_config()
    sam = config.model.sam
    prompt, decoder = test_sam_decoder.torch_prompt(sam), test_sam_decoder.torch_decoder(sam)
    graphdef, _ = mimo.abstract(config)
    params = random_params(config)
    params["sam_decoder"] = test_sam_decoder.decoder_here(sam, decoder)[1]
    table = tuple(row for row in rows.SAM if row.path.startswith("sam_prompt/"))
    make = lambda rngs: mimo.SamPromptEncoder(sam, rngs=rngs)  # noqa: E731
    params["sam_prompt"] = oracles.brought_here(prompt, make, "sam_prompt", table, config.model, prefix="prompt_encoder.")[1]
    model = scan.bind(graphdef, jax.tree.map(jnp.asarray, params))
    draw = np.random.default_rng(0).standard_normal
    return model, prompt, decoder, draw((2, 8, 8, 32)).astype(np.float32), draw((2, 3, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", ["points", "box", "points and box", "masks", "points and box and masks"])
def test_segment_with_prompts_is_what_segment_anything_makes_of_them_and_the_text(with_sam, kind):
    """As LISA's copy of SAM does: the text's embedding stands after those of points and boxes."""
    model, prompt, decoder, features, states = with_sam
    rng = np.random.default_rng(1)
    xy, labels = rng.uniform(0, 63, (2, 3, 2)).astype(np.float32), np.array([[1, 0, 1], [0, 1, -1]])
    boxes = np.array([[4, 6, 40, 50], [10, 10, 20, 30]], np.float32)
    masks = rng.standard_normal((2, 3, 32, 32)).astype(np.float32) * 4 if "masks" in kind else None
    parts = [(xy, labels)] * ("points" in kind) + [(boxes.reshape(2, 2, 2), np.array([[2, 3]] * 2))] * ("box" in kind)
    if kind == "points":  # segment-anything ends points without a box by "not a point"
        parts.append((np.zeros((2, 1, 2), np.float32), np.full((2, 1), -1)))
    parts.append((np.full((2, 2, 2), 7, np.float32), np.full((2, 2), UNUSED)))
    points = tuple(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)) if kind != "masks" else None
    found = jax.jit(model.segment)(features, states, points, masks)
    text = np.array(model.seg_projection(states))
    for b in range(2):
        repeated = lambda x: torch.from_numpy(np.repeat(x[b][None], 3, axis=0))  # noqa: B023, E731
        with torch.no_grad():
            sparse, dense = prompt(
                (repeated(xy), repeated(labels)) if "points" in kind else None,
                repeated(boxes) if "box" in kind else None,
                None if masks is None else torch.from_numpy(masks[b])[:, None],
            )
            if not sparse.numel():  # for masks alone, segment-anything makes a batch of one
                sparse, dense = sparse.new_zeros(3, 0, 32), dense.expand(3, -1, -1, -1)
            sparse = torch.cat([sparse, torch.from_numpy(text[b])[:, None]], dim=1)
            image = torch.from_numpy(features[b]).movedim(-1, 0)[None]
            logits, iou = decoder(image, prompt.get_dense_pe(), sparse, dense, False)
        assert oracles.relative_l2(found[0][b], logits[:, 0]) <= 1e-5
        assert oracles.relative_l2(found[1][b], iou[:, 0]) <= 1e-5


def test_a_turn_without_prompts_is_painted_as_if_there_were_no_slots_for_them(with_sam):
    model, _, _, features, states = with_sam
    xy, labels = np.full((2, 4, 2), 9, np.float32), np.array([[UNUSED] * 4, [1, UNUSED, UNUSED, UNUSED]])
    plain, slots = jax.jit(model.segment)(features, states), jax.jit(model.segment)(features, states, (xy, labels))
    assert oracles.relative_l2(slots[0][0], plain[0][0]) <= 1e-6
    assert np.abs(slots[0][1] - plain[0][1]).max() > 1e-3
