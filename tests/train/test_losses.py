"""Losses against PyTorch's own and against hand-computed cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimo_jax.config import LossConfig
from mimo_jax.train import losses


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


def test_mask_losses_match_torch():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 8, 8)).astype(np.float32) * 3
    target = (rng.random((2, 3, 8, 8)) > 0.6).astype(np.uint8)
    weight = np.asarray([[1, 0, 1], [0.5, 0, 0]], np.float32)
    got = losses.mask_losses(jnp.asarray(logits), jnp.zeros((2, 3)), jnp.asarray(target), jnp.asarray(weight))
    x, y = torch.tensor(logits), torch.tensor(target).float()
    bce = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean((-1, -2))
    p = x.sigmoid()
    dice = 1 - (2 * (p * y).sum((-1, -2)) + 1) / (p.sum((-1, -2)) + y.sum((-1, -2)) + 1)
    hard = x > 0
    iou = (hard & (y > 0)).sum((-1, -2)) / (hard | (y > 0)).sum((-1, -2))
    for name, value in {"bce": bce, "dice": dice, "true_iou": iou, "iou": iou**2}.items():
        np.testing.assert_allclose(got[name], (value * torch.tensor(weight)).sum().item(), rtol=1e-5)


def test_a_perfect_mask_costs_next_to_nothing_and_a_wrong_one_much():
    target = np.zeros((1, 1, 8, 8), np.uint8)
    target[..., 2:5, 2:6] = 1
    good = losses.mask_losses(jnp.where(target > 0, 20.0, -20.0), jnp.ones((1, 1)), jnp.asarray(target), jnp.ones((1, 1)))
    bad = losses.mask_losses(jnp.where(target > 0, -20.0, 20.0), jnp.ones((1, 1)), jnp.asarray(target), jnp.ones((1, 1)))
    assert good["bce"] < 1e-6 and good["dice"] < 1e-6 and good["iou"] < 1e-6
    assert bad["bce"] > 10 and bad["dice"] > 0.9 and bad["iou"] == pytest.approx(1.0)


def test_masks_are_compared_at_the_side_of_the_target():
    """As SAM enlarges its masks: bilinear between the centres of pixels."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(1, 2, 8, 8)).astype(np.float32)
    large = F.interpolate(torch.tensor(logits), size=(20, 20), mode="bilinear", align_corners=False).numpy()
    target = jnp.asarray(rng.random((1, 2, 20, 20)) > 0.5)
    got, want = (losses.mask_losses(jnp.asarray(x), jnp.zeros((1, 2)), target, jnp.ones((1, 2))) for x in (logits, large))
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
