import numpy as np
import pytest

from mimo_jax.data.transforms import mask_from_logits, mask_to_frame
from mimo_jax.geometry import sam_frame
from mimo_jax.infer.engine.zoom import crop_around

SIDE, CELLS = 1024, 256  # of SAM


def disc(height, width, x, y, radius):
    return np.hypot(np.arange(width)[None] - x, np.arange(height)[:, None] - y) <= radius


def perfect(mask):
    """(logits, frame) of a decoder that is right in every cell."""
    frame = sam_frame(*mask.shape, SIDE)
    return mask_to_frame(mask, frame, CELLS) * 2.0 - 1.0, frame


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("x, y", [(2000, 1500), (8, 7), (3994, 2993), (1237, 811)])
def test_a_small_disc_in_a_large_image_is_resolved(x, y):
    truth = disc(3000, 4000, x, y, 6)
    logits, frame = perfect(truth)
    first = mask_from_logits(logits, frame, *truth.shape)
    rows, cols = crop_around(logits, frame)
    assert (rows.stop - rows.start) * 16 < 3000 and truth[rows, cols].sum() == truth.sum()
    again, inner = perfect(truth[rows, cols])
    zoomed = np.zeros_like(truth)
    zoomed[rows, cols] = mask_from_logits(again, inner, *truth[rows, cols].shape)
    assert iou(first, truth) < 0.6 and iou(zoomed, truth) > 0.95


def test_a_mask_without_a_positive_cell_is_looked_for_where_it_is_likeliest():
    logits, frame = np.full((CELLS, CELLS), -3.0), sam_frame(3000, 4000, SIDE)
    logits[100, 50] = -0.5
    logits[255, 0] = 5.0  # in the padding
    rows, cols = crop_around(logits, frame)
    cell = 4000 / CELLS
    assert rows.start < 100.5 * cell < rows.stop and cols.start < 50.5 * cell < cols.stop


def test_a_large_mask_is_left_alone_and_a_crop_stays_inside_a_narrow_image():
    assert crop_around(*perfect(disc(600, 800, 400, 300, 60))) is None
    logits, frame = perfect(disc(40, 4000, 3990, 20, 8))
    rows, cols = crop_around(logits, frame)
    assert (rows.start, rows.stop) == (0, 40) and 0 <= cols.start < cols.stop == 4000
