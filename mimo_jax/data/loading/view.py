"""Renders records for viewing: the image, its masks, the questions and answers, and prompts sampled as in training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mimo_jax.data.loading.collate import sample_prompts
from mimo_jax.data.overlay import draw_overlay
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.schema import Record, Sample
from mimo_jax.data.transforms import decode_image
from mimo_jax.model_config import PromptConfig

_TILE, _GAP, _COLUMNS = 400, 8, 5  # of a contact sheet: width of a tile and gap in pixels, number of columns
_SAMPLES_PER_TILE = 2  # samples shown per tile of a contact sheet
_BACKGROUND = (18, 18, 20)


def draw_record(record: Record, max_samples: int | None = None) -> Image.Image:
    """An image of one record with all its masks, and below it the text of every sample, or of at most `max_samples` samples of different
    perspectives. The prompts of the first sample that has any are drawn and listed before its question."""
    samples = record.samples if max_samples is None else _varied(record.samples, max_samples)
    prompted_sample = next((sample for sample in samples if sample.turns[0].prompted), None)
    lines = [f"{record.id}: {record.modality}, {record.dataset}, {record.group}, {record.width}x{record.height}"]
    for sample in samples:
        for turn in sample.turns:
            prompted = ", ".join(record.mask(mask_id).entity for mask_id in turn.prompted)
            mark = f"[{'drawn' if sample is prompted_sample else 'marks'}: {prompted}] " if prompted else ""
            lines.append(f"{f'{sample.perspective}: ' if turn.role == 'user' else '   - '}{mark}{turn.text}")
    masks: dict[str, np.ndarray] = {}
    for mask in record.masks:
        masks[mask.entity] = masks.get(mask.entity, False) | mask.decode()
    prompts = _prompts(record, prompted_sample) if prompted_sample else None
    return draw_overlay(decode_image(record.image, name=f"record {record.id}"), list(masks.items()), prompts, "\n".join(lines))


def contact_sheet(records: Sequence[Record]) -> Image.Image:
    """An image with one tile per record, in rows from left to right."""
    tiles = []
    for record in records:
        tile = draw_record(record, _SAMPLES_PER_TILE)
        tiles.append(tile.resize((_TILE, max(1, round(tile.height * _TILE / tile.width))), Image.Resampling.LANCZOS))
    rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (min(len(tiles), _COLUMNS) * (_TILE + _GAP), sum(heights)), _BACKGROUND)
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * (_TILE + _GAP), sum(heights[:number])))
    return sheet


def _varied(samples: Sequence[Sample], max_samples: int) -> list[Sample]:
    """The first sample of each perspective, prompted ones before the others."""
    first = {sample.perspective: sample for sample in reversed(samples)}
    return sorted(first.values(), key=lambda sample: not sample.turns[0].prompted)[:max_samples]


def _prompts(record: Record, sample: Sample) -> Prompts:
    masks = [record.mask(mask_id).decode() for mask_id in sample.turns[0].prompted]
    rng = np.random.default_rng([zlib.crc32(sample.sample_id.encode()), 0])  # as in evaluation
    return sample_prompts(masks, rng, PromptConfig(), f"sample {sample.sample_id}")
