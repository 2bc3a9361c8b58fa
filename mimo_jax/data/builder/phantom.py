"""Phantoms: medical-looking images with masks and questions, generated from a seed alone.

`make_phantom(seed, index)` is a pure function: the same arguments give the same record in any order and any process.
Phantoms contain no patient data; no result measured on phantoms says anything about medicine.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mimo_jax.data.builder.label_stats import LabelStats
from mimo_jax.data.builder.phantom_scenes import ANATOMY, PAINTERS
from mimo_jax.data.builder.phantom_shapes import NoRoom, PhantomScene, smooth_field
from mimo_jax.data.builder.questions import ask
from mimo_jax.data.schema import Mask, Record, encode_mask
from mimo_jax.errors import UserError

DATASET = "phantoms"
ASPECT = 0.78  # the shorter side is at least this share of the longer one
MODALITY_SHARES = {modality: anatomy.share for modality, anatomy in ANATOMY.items()}
PHANTOM_LABEL_STATS = LabelStats(
    share={(DATASET, modality): anatomy.share for modality, anatomy in ANATOMY.items()},
    presence={(DATASET, modality): anatomy.presence() for modality, anatomy in ANATOMY.items()},
    elsewhere=True,
)


def phantom_name(seed: int, index: int) -> str:
    """The id of a phantom, which is also the name of its case."""
    return f"phantom_{seed}_{index:06d}"


def make_phantom(seed: int, index: int, size: tuple[int, int] = (96, 160)) -> Record:
    """Phantom number `index` of the series `seed`, each side of the image within `size` pixels (inclusive).

    The record's split is "train" until a data set assigns another.
    """
    if not 48 <= size[0] <= size[1]:
        raise UserError(f"phantom size {size}: give (smallest, largest) side in pixels, 48 or more")
    rng = np.random.default_rng([seed, index])
    modality = str(rng.choice(list(MODALITY_SHARES), p=list(MODALITY_SHARES.values())))
    counts = ANATOMY[modality].plan(rng)
    while True:  # a layout without room for everything is drawn again, so that the planned structures are all shown
        height, width = _size(rng, size)
        try:
            scene = PAINTERS[modality](rng, height, width, counts)
            scene.check()
            break
        except NoRoom:
            continue
    pixels = _expose(scene, modality)
    name = phantom_name(seed, index)
    record = Record(
        id=name,
        image=_png(pixels),
        format="png",
        height=height,
        width=width,
        modality=modality,
        dataset=DATASET,
        split="train",
        group=name,
        masks=_masks(scene),
        channels=1 if pixels.ndim == 2 else 3,
        orientation="radiological" if modality in ("CT", "MR", "X-ray") else "",
        pixel_spacing_mm=[round(170 / scene.unit, 3)] * 2 if modality in ("CT", "MR") else None,
        licence="CC0-1.0",
        source=f"mimo_jax phantom, seed {seed}, index {index}",
    )
    record.samples = ask(record, rng, PHANTOM_LABEL_STATS)
    return record


def _size(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width); they may be odd and differ from each other."""
    long_side = int(rng.integers(min(size[1], int(size[0] * 1.1)), size[1] + 1))
    short_side = int(rng.integers(max(size[0], int(np.ceil(ASPECT * long_side))), long_side + 1))
    return (short_side, long_side) if rng.random() < 0.5 else (long_side, short_side)


def _expose(scene: PhantomScene, modality: str) -> np.ndarray:
    """uint8 pixels with the noise of the modality, a bias field, and a gain and an offset that differ between images."""
    rng, image = scene.rng, scene.image
    height, width = image.shape[:2]
    bias = 1 + np.float32(0.10) * smooth_field(rng, height, width, 2)
    noise = rng.standard_normal(image.shape[:2], dtype=np.float32)
    if modality == "ultrasound":  # speckle: multiplicative, smeared along a row
        grain = np.hypot(noise, rng.standard_normal(image.shape[:2], dtype=np.float32))
        grain[:, 1:] = 0.6 * grain[:, 1:] + 0.4 * grain[:, :-1]
        image = image * (0.35 + 0.52 * grain)
    elif modality == "fundus":
        image, bias = image + 0.012 * noise[..., None], bias[..., None]
    else:
        image = image + np.float32({"CT": 0.03, "MR": 0.025, "X-ray": 0.015}[modality]) * noise
    gain, offset = rng.uniform(0.62, 1.0), rng.uniform(0.0, 0.16) if modality != "fundus" else 0.0
    return np.clip((image * bias * gain + offset) * 255, 0, 255).astype(np.uint8)


def _masks(scene: PhantomScene) -> list[Mask]:
    names: dict[int, str] = {}
    masks, last_instance = [], {}
    for structure in scene.structures:
        instance = last_instance[structure.entity] = last_instance.get(structure.entity, -1) + 1
        mask_id = names[id(structure)] = f"{structure.entity.replace(' ', '_')}_{instance}"
        parent = names[id(structure.parent)] if structure.parent is not None else ""
        extra = {"instance": instance, "annotation": "synthetic", "parent_mask_id": parent}
        masks.append(encode_mask(structure.mask, mask_id, structure.entity, **extra))
    return masks


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
