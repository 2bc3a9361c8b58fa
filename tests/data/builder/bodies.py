"""Synthetic records with named structures at known places, for tests of questions."""

from __future__ import annotations

import numpy as np

from mimo_jax.data.schema import Record, encode_mask

# An axial slice in the radiological convention: (x0, y0, x1, y1), the patient's right on the image's left.
SLICE = {
    "liver": (12, 30, 70, 80),
    "liver cyst": (30, 44, 40, 54),
    "stomach": (95, 24, 122, 54),
    "spleen": (122, 40, 148, 66),  # touches the stomach
    "left kidney": (100, 72, 122, 96),
    "right kidney": (34, 84, 62, 104),
    "aorta": (78, 62, 88, 72),
}
HEIGHT, WIDTH = 120, 160


def plain_record(entities, dataset="ward", modality="CT", name="r", **fields) -> Record:
    """Squares next to each other, one mask for each of `entities`."""
    masks = []
    for number, entity in enumerate(entities):
        pixels = np.zeros((20, 8 * len(entities) + 20), bool)
        pixels[2:8, 8 * number + 1 : 8 * number + 7] = True
        masks.append(encode_mask(pixels, f"m{number}", entity))
    return Record(name, b"", "png", 20, 8 * len(entities) + 20, modality, dataset, "train", name, masks, **fields)


def slice_record(boxes=None, turn=lambda pixels: pixels, name="s", **fields) -> Record:
    """`boxes` (by default SLICE), drawn and then turned."""
    masks = []
    for entity, (x0, y0, x1, y1) in (SLICE if boxes is None else boxes).items():
        pixels = np.zeros((HEIGHT, WIDTH), bool)
        pixels[y0:y1, x0:x1] = True
        masks.append(encode_mask(np.ascontiguousarray(turn(pixels)), f"m{len(masks)}", entity))
    return Record(name, b"", "png", HEIGHT, WIDTH, "CT", "ward", "train", name, masks, **fields)
