"""Losses against PyTorch's own and against hand-computed cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimo_jax.config import LossConfig
from mimo_jax.models import mimo, scan
from mimo_jax.train import losses
from tests.tiny_config import quick_config, random_batch, random_params, tiny_config


@pytest.mark.parametrize("chunk", [6, 4, 3, 1])
def test_token_loss_is_torch_cross_entropy_of_the_next_token(chunk):
    """Whatever the number of tokens at a time, also one that does not divide them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 11)).astype(np.float32)
    ids = rng.integers(0, 11, (3, 7))
    mask = rng.integers(0, 2, (3, 7)).astype(np.float32)
    ce, weight, right = losses.token_loss(lambda x: x, jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(mask), chunk)
    labels = np.where(mask > 0, ids, -100)[:, 1:]
    want = F.cross_entropy(torch.tensor(logits[:, :-1]).reshape(-1, 11), torch.tensor(labels).reshape(-1), ignore_index=-100)
    np.testing.assert_allclose(ce / weight, want.item(), rtol=1e-6)
    assert weight == mask[:, 1:].sum()
    assert right == ((logits[:, :-1].argmax(-1) == ids[:, 1:]) * mask[:, 1:]).sum()


def test_a_tie_for_the_largest_logit_is_not_correct():
    logits = jnp.asarray([[[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]])
    assert losses.token_loss(lambda x: x, logits, jnp.asarray([[0, 1]]), jnp.ones((1, 2)), 8)[2] == 0


def test_the_head_is_applied_only_to_chunks_with_tokens_that_train():
    """Loss and gradient are those of all tokens at once."""
    rng, calls = np.random.default_rng(0), []
    hidden, head = jnp.asarray(rng.normal(size=(3, 41, 5)), jnp.float32), jnp.asarray(rng.normal(size=(5, 13)), jnp.float32)
    ids, mask = jnp.asarray(rng.integers(0, 13, (3, 41))), np.zeros((3, 41), np.float32)
    mask[0, 30:37], mask[1, [3, 4, 5, 20, 21, 22, 40]], mask[2, 9] = 1.0, 0.5, 2.0  # at most 7 of a sample: two chunks of 4

    def logits(hidden):
        jax.debug.callback(lambda: calls.append(None))
        return hidden @ head

    @functools.partial(jax.jit, static_argnums=2)
    def evaluated(hidden, mask, chunk):
        sums = lambda x: losses.token_loss(logits, x, ids, mask, chunk)  # noqa: E731
        (_, parts), gradient = jax.value_and_grad(lambda x: (sums(x)[0], sums(x)), has_aux=True)(hidden)
        return parts, gradient

    wanted, found = (evaluated(hidden, jnp.asarray(mask), chunk) for chunk in (64, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    jax.effects_barrier()
    calls.clear()
    jax.block_until_ready(jax.jit(lambda x: losses.token_loss(logits, x, ids, jnp.asarray(mask), 4))(hidden))
    jax.effects_barrier()
    assert len(calls) == 2


def test_logits_never_exist_whole():
    """Neither in the forward pass nor in the backward pass, whose gradient is that of all at once."""
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(2, 65, 3)), jnp.float32), jnp.asarray(rng.normal(size=(3, 97)), jnp.float32)
    ids, weight = jnp.asarray(rng.integers(0, 97, (2, 65))), jnp.asarray(rng.random((2, 65)), jnp.float32)

    def gradient(chunk):
        return jax.grad(lambda x: losses.token_loss(lambda h: h @ head, x, ids, weight, chunk)[0])

    np.testing.assert_allclose(gradient(16)(hidden), gradient(64)(hidden), rtol=1e-5, atol=1e-6)
    shapes = {chunk: str(jax.make_jaxpr(gradient(chunk))(hidden)) for chunk in (16, 64)}
    assert "[2,64,97]" in shapes[64] and "[2,64,97]" not in shapes[16] and "[4,2,16,97]" not in shapes[16]


def lisa_losses(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, h, w] -> (BCE, Dice) of each mask by LISA's sigmoid_ce_loss and dice_loss, before the sum over masks."""
    scale, eps = 1000, 1e-6
    p, target = logits.sigmoid().flatten(1), target.flatten(1)
    numerator = 2 * (p / scale * target).sum(-1)
    denominator = (p / scale).sum(-1) + (target / scale).sum(-1)
    bce = F.binary_cross_entropy_with_logits(logits.flatten(1), target, reduction="none").mean(1)
    return bce, 1 - (numerator + eps) / (denominator + eps)


def check_against_lisa(sums, logits, iou, target, weight, sizes, frame_side):
    """sums: those of the losses; sizes: of the content of each sample in its frame, pixels."""
    side, want = target.shape[-1], dict.fromkeys(("bce", "dice", "iou", "true_iou"), 0.0)
    for b, (height, width) in enumerate(sizes):
        rows, cols = -(-height * side // frame_side), -(-width * side // frame_side)
        x, y = (torch.tensor(np.asarray(array[b, :, :rows, :cols], np.float64)) for array in (logits, target))
        bce, dice = lisa_losses(x, y)
        hard = x > 0
        true = (hard & (y > 0)).sum((-1, -2)) / (hard | (y > 0)).sum((-1, -2)).clamp(min=1)
        error = (torch.tensor(np.asarray(iou[b], np.float64)) - true) ** 2
        for name, value in {"bce": bce, "dice": dice, "iou": error, "true_iou": true}.items():
            want[name] += (value * torch.tensor(np.asarray(weight[b], np.float64))).sum().item()
    for name, value in want.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("sizes", [[(32, 32), (32, 32)], [(8, 32), (32, 13)], [(1, 32), (30, 32)]])
def test_mask_losses_are_those_of_lisa_on_the_content_of_frames(sizes):
    """What a model paints on the padding beside an image costs nothing, and the IoU is the one that the user gets."""
    rng = np.random.default_rng(1)
    content = np.asarray(losses.content_cells(jnp.asarray(sizes), 32, 8))
    logits = rng.normal(size=(2, 3, 8, 8)).astype(np.float32) * 3
    logits = np.where(content[:, None], logits, 9.0)
    target = ((rng.random((2, 3, 8, 8)) > 0.6) & content[:, None]).astype(np.uint8)
    iou, weight = rng.random((2, 3)).astype(np.float32), np.asarray([[1, 0, 1], [0.5, 0, 1]], np.float32)
    sums = losses.mask_losses(*map(jnp.asarray, (logits, iou, target, content, weight)))
    check_against_lisa(sums, logits, iou, target, weight, sizes, 32)


def sums_and_output(config, batch) -> tuple[dict, dict]:
    """Of a whole model, compiled once."""
    graphdef, _ = mimo.abstract(config)

    def run(params, batch):
        model = scan.bind(graphdef, params)
        return losses.batch_sums(model, batch, 256), model(batch)

    return jax.jit(run)(random_params(config), batch)


def test_the_losses_of_a_batch_are_those_of_lisa_on_images_that_are_not_square():
    """With two samples for each image, the output of a whole model, and its gradient with respect to the masks."""
    config = quick_config()
    config.model.sam.decoder_layers, config.data.samples_per_image = 1, 2
    batch = random_batch(config)
    side, frame_side, vision = config.model.mask_side(), config.model.sam.image_size, config.model.vision
    batch["sam_size"][0::2], batch["sam_size"][1::2] = (frame_side // 4, frame_side), (frame_side, frame_side // 2 + 1)
    batch["vision_size"][0::2], batch["vision_size"][1::2] = (vision.image_size // 4, vision.image_size), (vision.image_size,) * 2
    sizes = np.repeat(batch["sam_size"], 2, axis=0)
    batch["masks"] &= np.repeat(np.asarray(losses.content_cells(batch["sam_size"], frame_side, side)), 2, axis=0)[:, None]
    sums, out = sums_and_output(config, batch)
    weight = batch["seg_mask"].astype(np.float32)
    check_against_lisa(sums, out["masks"], out["iou"], batch["masks"], weight, sizes, frame_side)

    content = jnp.repeat(losses.content_cells(batch["sam_size"], frame_side, side), 2, axis=0)
    gradient = jax.grad(lambda logits: losses.mask_losses(logits, out["iou"], batch["masks"], content, weight)["bce"])(out["masks"])
    assert not np.asarray(gradient)[np.broadcast_to(~content[:, None], gradient.shape)].any()


def test_the_attention_map_counts_on_the_image_alone():
    config = tiny_config()
    batch = random_batch(config)
    grid, image_size = config.model.vision.grid(), config.model.vision.image_size
    batch["vision_size"][:] = (image_size // 2, image_size)
    batch["attention_target"][..., -(-grid // 2) :, :] = 0
    sums, out = sums_and_output(config, batch)
    logits = np.asarray(out["attention_map"])[..., : -(-grid // 2), :]
    target = torch.tensor(batch["attention_target"][..., : -(-grid // 2), :]).double()
    bce, dice = lisa_losses(torch.tensor(logits).double().flatten(0, 1), target.flatten(0, 1))
    np.testing.assert_allclose(sums["attention_map"], (bce + dice).sum().item(), rtol=1e-5)


def test_a_structure_of_one_cell_that_is_missed_costs_a_dice_of_one():
    target = np.zeros((1, 1, 8, 8), np.uint8)
    target[..., 3, 3] = 1
    everywhere = jnp.ones((1, 8, 8), bool)
    sums = losses.mask_losses(jnp.full((1, 1, 8, 8), -20.0), jnp.zeros((1, 1)), jnp.asarray(target), everywhere, jnp.ones((1, 1)))
    assert sums["dice"] == pytest.approx(1.0, abs=2e-3)


def test_a_perfect_mask_costs_next_to_nothing_and_a_wrong_one_much():
    target = np.zeros((1, 1, 8, 8), np.uint8)
    target[..., 2:5, 2:6] = 1
    rest = jnp.asarray(target), jnp.ones((1, 8, 8), bool), jnp.ones((1, 1))
    good = losses.mask_losses(jnp.where(target > 0, 20.0, -20.0), jnp.ones((1, 1)), *rest)
    bad = losses.mask_losses(jnp.where(target > 0, -20.0, 20.0), jnp.ones((1, 1)), *rest)
    assert good["bce"] < 1e-6 and good["dice"] < 1e-6 and good["iou"] < 1e-6
    assert bad["bce"] > 10 and bad["dice"] > 0.9 and bad["iou"] == pytest.approx(1.0)


def test_masks_are_compared_at_the_side_of_the_target():
    """As SAM enlarges its masks: bilinear between the centres of pixels."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(1, 2, 8, 8)).astype(np.float32)
    large = F.interpolate(torch.tensor(logits), size=(20, 20), mode="bilinear", align_corners=False).numpy()
    target = jnp.asarray(rng.random((1, 2, 20, 20)) > 0.5)
    got, want = (
        losses.mask_losses(jnp.asarray(x), jnp.zeros((1, 2)), target, jnp.ones((1, 20, 20), bool), jnp.ones((1, 2)))
        for x in (logits, large)
    )
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_a_sample_of_weight_zero_counts_nowhere():
    batch = {
        "loss_mask": jnp.ones((2, 4)),
        "sample_weight": jnp.asarray([1.0, 0.0]),
        "seg_mask": jnp.ones((2, 3), bool),
        "attention_target_mask": jnp.asarray([[True, False], [True, True]]),
    }
    assert losses.normalizers(batch) == {"tokens": 3, "segs": 3, "attention_maps": 1}


def test_total_weighs_the_parts_as_configured():
    sums = {name: jnp.asarray(value) for name, value in {"ce": 6.0, "bce": 2.0, "dice": 4.0, "iou": 8.0, "attention_map": 10.0}.items()}
    weights = {"tokens": jnp.asarray(3.0), "segs": jnp.asarray(2.0), "attention_maps": jnp.asarray(5.0)}
    got = losses.combine(sums, LossConfig(ce=1.0, bce=2.0, dice=0.5, iou=0.25, attention_map=0.5), weights)
    assert got == pytest.approx(6 / 3 + (2 * 2 + 0.5 * 4 + 0.25 * 8) / 2 + 0.5 * 10 / 5)
