"""Compares the losses of masks at the resolution of training with LISA's, which enlarges the logits to the image's own size.

    python benchmarks/loss_resolution.py --checkpoint runs/a --data my_data.jsonl --split val --samples 200

The model is run with teacher forcing, as in training, on samples with at least one mask. Printed are the means of both, and the mean
and the largest absolute difference of a mask.
"""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoints import loading
from mimo_jax.checkpoints.checkpoint import tokenizer_path
from mimo_jax.data.conversation import render
from mimo_jax.data.loading.collate import make_example, stack_batch
from mimo_jax.data.loading.sources import open_source
from mimo_jax.data.tokenizer import load_tokenizer
from mimo_jax.data.transforms import frames, logits_to_image
from mimo_jax.models import mimo, scan
from mimo_jax.train import losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    params = loading.LazyParams(args.checkpoint)
    config, weights = params.config, loading.load_params(args.checkpoint)
    tokenizer = load_tokenizer(tokenizer_path(args.checkpoint), config.model)
    forward = jax.jit(lambda batch: scan.bind(mimo.abstract(config)[0], weights)(batch)["masks"])
    settings, rows, ratio = config.model, [], []
    for record, sample in samples_with_masks(open_source(args.data, args.split), args.samples):
        example = make_example(record, sample, tokenizer, config, np.random.default_rng(0))
        batch = stack_batch([example], config.buckets()[-1])
        logits = np.asarray(forward(batch))[0]
        content = losses.content_cells(batch["sam_size"], settings.sam.image_size, config.target_side())[0]
        frame = frames(record.height, record.width, settings)[1]
        for slot, mask_ids in enumerate(render(sample, tokenizer, config).seg_targets):
            truth = np.any([record.mask(mask_id).decode() for mask_id in mask_ids], axis=0)
            full = logits_to_image(logits[slot], frame, record.height, record.width)
            trained = losses.bce_and_dice(jnp.asarray(logits[slot]), jnp.asarray(batch["masks"][0, slot], jnp.float32), content)
            lisa = losses.bce_and_dice(jnp.asarray(full), jnp.asarray(truth, jnp.float32), jnp.ones_like(full, bool))
            rows.append([*map(float, trained), *map(float, lisa)])
            ratio.append(math.sqrt(truth.size / float(content.sum())))
    values = np.array(rows)
    print(f"{len(values)} masks; an image has {np.median(ratio):.1f} pixels per cell of a mask along each axis (median)")
    for name, mine, theirs in (("BCE", 0, 2), ("Dice", 1, 3)):
        difference = np.abs(values[:, mine] - values[:, theirs])
        means = f"mean {values[:, mine].mean():.4f} at the training resolution, {values[:, theirs].mean():.4f} at the image's"
        print(f"{name}: {means}; absolute difference of a mask: mean {difference.mean():.4f}, largest {difference.max():.4f}")


def samples_with_masks(source, count: int):
    """Yield (record, sample) of the first sample with a mask in each of `count` records at most."""
    for number in range(min(count, len(source))):
        record = source[number]
        sample = next((s for s in record.samples if any(target.mask_ids for target in s.targets)), None)
        if sample is not None:
            yield record, sample


if __name__ == "__main__":
    main()
