"""The training loss: l1·CE + l2·BCE + l3·Dice + l4·(predicted IoU − true IoU)² + l5·(BCE + Dice of the attention map).

Axis letters: N images, or side of a target mask in pixels; B samples, T tokens, V vocabulary, S <SEG> slots, M side of a predicted mask
in pixels, R user turns, g side of the vision tower's grid.

The last term is an addition of this project: the attention map of the aligner's queries [B, R, g, g] against the masks that the turn's
answer is about (an empty mask where the answer says that something is absent), averaged over the turns for which these are known.

CE is the mean over unmasked tokens; BCE is the mean over the pixels of a mask and Dice is 1 − (2Σpg + ε)/(Σp + Σg + ε) with ε = 1e-3, both
summed over masks and divided by their number. Source: LISA's sigmoid_ce_loss and dice_loss, whose eps is 1e-6 on sums that are divided
by 1000. As in LISA, and as in the IoU that the user gets, only pixels of the image count, not those of a frame's padding; LISA compares
masks at the image's full resolution, here it is the resolution of the targets. Every sum is weighted by the sample's weight, so that
padding samples do not count. Sums and weights are returned separately, so that gradient accumulation divides only once.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mimo_jax.config import LossConfig

DICE_EPS = 1e-3


def token_loss(
    logits_fn: Callable[[jax.Array], jax.Array], hidden: jax.Array, input_ids: jax.Array, weight: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Next-token loss of hidden [B, T, D], of which `logits_fn` makes logits [B, T, V]. input_ids [B, T]; weight [B, T] is that of the
    predicted token. Returns (sum of CE, sum of weights, weighted number of correct predictions). Logits of only `chunk` tokens of each
    sample, [B, chunk, V], exist at a time, also in the backward pass, and none of a chunk without weight: the tokens that train are
    moved to the front, so that the rest of the sequence, most of it, costs no product with the head."""
    hidden, targets, weight = hidden[:, :-1], input_ids[:, 1:], weight[:, 1:]

    def sums(hidden, targets, weight):
        logits = logits_fn(hidden)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        correct = ((logits >= target_logits[..., None]).sum(-1) == 1).astype(jnp.float32)  # a tie is not correct
        return (ce * weight).sum(), (correct * weight).sum()

    length = hidden.shape[1]
    if length <= chunk:
        ce, num_correct = sums(hidden, targets, weight)
        return ce, weight.sum(), num_correct
    num_chunks = -(-length // chunk)
    order = jnp.argsort(weight == 0, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, weight = (jnp.take_along_axis(x, order, axis=1) for x in (targets, weight))

    def split_chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [pieces, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    start = (jnp.float32(0), jnp.float32(0))

    def body(carry, piece):
        found = jax.lax.cond((piece[-1] > 0).any(), sums, lambda *_: start, *piece)
        return jax.tree.map(jnp.add, carry, found), None

    chunks = tuple(map(split_chunks, (hidden, targets, weight)))
    (ce, num_correct), _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, chunks)
    return ce, weight.sum(), num_correct


def content_cells(size: jax.Array, frame_side: int, side: int) -> jax.Array:
    """size int [N, 2], (height, width) of an image in a frame of `frame_side` pixels -> bool [N, side, side]: of the side² cells that the
    frame is divided into, those that the image covers at least in part, as in `transforms.mask_to_frame`."""
    inside = jnp.arange(side) * frame_side < size[..., None] * side  # [N, 2, side]
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def bce_and_dice(logits: jax.Array, target: jax.Array, content: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [..., M, M], target 0/1 as float32, bool content (broadcastable), outside of which target is 0 and nothing counts
    -> (BCE, Dice loss), each [...]."""
    bce = optax.sigmoid_binary_cross_entropy(logits, target).mean((-2, -1), where=content)
    p = jnp.where(content, jax.nn.sigmoid(logits), 0.0)
    dice = 1.0 - (2.0 * (p * target).sum((-2, -1)) + DICE_EPS) / (p.sum((-2, -1)) + target.sum((-2, -1)) + DICE_EPS)
    return bce, dice


def mask_losses(logits: jax.Array, iou: jax.Array, target: jax.Array, content: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """logits [B, S, M, M], predicted iou [B, S], target 0/1 [B, S, N, N], content bool [B, N, N] (`content_cells`), weight [B, S]
    -> weighted sums over masks: bce, dice, iou (squared error of the predicted IoU), true_iou (of the mask at threshold 0). If the
    target's side N is not M (`train.loss.mask_side`), the logits are resized to it."""
    target, content = target.astype(jnp.float32), content[:, None]
    if logits.shape != target.shape:
        logits = jax.image.resize(logits, target.shape, "linear")
    bce, dice = bce_and_dice(logits, target, content)
    hard = ((logits > 0) & content).astype(jnp.float32)
    inter = (hard * target).sum((-2, -1))
    true_iou = inter / jnp.maximum(hard.sum((-2, -1)) + target.sum((-2, -1)) - inter, 1.0)
    error = jnp.square(iou - jax.lax.stop_gradient(true_iou))
    return {name: (value * weight).sum() for name, value in (("bce", bce), ("dice", dice), ("iou", error), ("true_iou", true_iou))}


def batch_sums(model, batch: dict[str, jax.Array], chunk: int) -> dict[str, jax.Array]:
    """Forward pass and all sums of one (micro-)batch, before normalisation; chunk: see `token_loss`."""
    out = model(batch)
    weight, settings = batch["sample_weight"], model.config

    def content(size: str, frame_side: int, side: int) -> jax.Array:  # [B, side, side]
        return jnp.repeat(content_cells(batch[size], frame_side, side), len(weight) // len(batch[size]), axis=0)

    token_weight = batch["loss_mask"] * weight[:, None]
    ce, tokens, num_correct = token_loss(model.logits, out["hidden"], batch["input_ids"], token_weight, chunk)
    seg_weight = batch["seg_mask"].astype(jnp.float32) * weight[:, None]
    in_image = content("sam_size", settings.sam.image_size, batch["masks"].shape[-1])
    sums = mask_losses(out["masks"], out["iou"], batch["masks"], in_image, seg_weight)
    attention_map = jnp.float32(0)
    if out["attention_map"] is not None:
        in_image = content("vision_size", settings.vision.image_size, settings.vision.grid())[:, None]
        bce, dice = bce_and_dice(out["attention_map"], batch["attention_target"].astype(jnp.float32), in_image)
        attention_map = ((bce + dice) * batch["attention_target_mask"] * weight[:, None]).sum()
    return {**sums, "attention_map": attention_map, "ce": ce, "tokens": tokens, "right": num_correct, "segs": seg_weight.sum()}


def normalizers(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The total weights of the tokens, masks and attention maps of a batch, computed from its arrays alone."""
    weight = batch["sample_weight"]
    tokens = (batch["loss_mask"][:, 1:] * weight[:, None]).sum()
    segs = (batch["seg_mask"].astype(jnp.float32) * weight[:, None]).sum()
    maps = (batch["attention_target_mask"] * weight[:, None]).sum()
    return {"tokens": jnp.maximum(tokens, 1.0), "segs": jnp.maximum(segs, 1.0), "attention_maps": jnp.maximum(maps, 1.0)}


def combine(sums: dict[str, jax.Array], cfg: LossConfig, weights: dict[str, jax.Array]) -> jax.Array:
    """The contribution of a micro-batch to the loss of the whole batch; weights: those of `normalizers` for the whole batch."""
    masks = cfg.bce * sums["bce"] + cfg.dice * sums["dice"] + cfg.iou * sums["iou"]
    return (
        cfg.ce * sums["ce"] / weights["tokens"]
        + masks / weights["segs"]
        + cfg.attention_map * sums["attention_map"] / weights["attention_maps"]
    )
