"""A second decode of small masks on a crop of the image (`config.generate.zoom`): the decoder's grid has few cells for a small structure.

Axis letters: M side of the mask decoder's output.
"""

from __future__ import annotations

import math

import numpy as np

from mimo_jax.geometry import Frame

_SMALL = 16  # a mask is small if its longest side is at most M / _SMALL cells
_CONTEXT = 8  # side of the crop, in longest sides of the mask


def crop_around(logits: np.ndarray, frame: Frame) -> tuple[slice, slice] | None:
    """The (rows, columns) of the image around a small mask, as slices of its pixels; None if the mask is not small. Of a mask without any
    positive cell, the largest logit says where it is. logits float [M, M] over the SAM frame of the image."""
    side = logits.shape[0]
    height, width = (math.ceil(side * size / frame.side) for size in frame.size)
    content = logits[:height, :width]  # without the padding
    ys, xs = np.nonzero(content > 0) if (content > 0).any() else np.nonzero(content == content.max())
    longest = max(np.ptp(ys), np.ptp(xs)) + 1
    if longest > side / _SMALL:
        return None
    centre = (np.array([xs.min() + xs.max() + 1, ys.min() + ys.max() + 1]) / 2) * frame.side / side - 0.5
    x, y = frame.from_frame(centre)
    half = _CONTEXT * longest / 2 * frame.side / side / min(frame.scale_x, frame.scale_y)
    return _span(y, half, frame.height), _span(x, half, frame.width)


def _span(centre: float, half: float, size: int) -> slice:
    """The pixels within `half` of the centre, moved to lie inside 0 … size - 1."""
    count = min(size, max(1, round(2 * half)))
    start = min(max(0, round(centre + 0.5 - half)), size - count)
    return slice(start, start + count)
