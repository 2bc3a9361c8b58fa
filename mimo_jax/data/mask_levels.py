"""Which grey levels of a mask picture are in the mask.

A picture with more than two levels is either a map of ids, in which every level above 0 is a class or an instance, or a binary mask with
soft edges, because it was resized with a filter or compressed with loss. Axis letters: H, W height and width in pixels.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from mimo_jax.errors import UserError

_FEW_LEVELS = 8  # with at most as many levels, a lossless picture is a map of ids
_PLATEAU = 3  # pixels; side of the squares of one level that ids have and soft edges lack
_IDS_SHARE, _SOFT_SHARE = 0.5, 0.02  # share of the pixels between the extremes in such squares: at least for ids, at most for soft edges
_OFFSET = 8  # grey levels by which compression may shift black and white
_REACH = 8  # pixels; side of a JPEG block, which is wider than the filters that resize


def parse_threshold(text: str | float) -> float:
    """A mask threshold, a number above 0. Raises UserError for anything else."""
    try:
        threshold = float(text)
    except (TypeError, ValueError):
        threshold = 0.0
    if not 0 < threshold < float("inf"):
        raise UserError(f"{text} is not a number above 0, such as 128")
    return threshold


class MaskLevelsError(UserError):
    """Grey levels that may be ids or soft edges."""


def pixels_in_mask(values: np.ndarray, lossy: bool = False, threshold: float | None = None) -> np.ndarray:
    """Grey levels [H, W] of any numeric type -> bool [H, W]. lossy: the file was compressed with loss.

    threshold: the pixels of at least this value are in the mask. Without it the levels decide. Levels are soft edges if those between the
    extremes (0, and 255, 65535 or 1) form no plateaus, have at most twice as many pixels as those near the upper extreme, and lie within
    8 pixels of the mask; the mask is then what lies above half. Other levels are ids, and all but 0 are in the mask. Raises
    MaskLevelsError for levels of 8 bits that are clearly neither, and for lossy files and fractions without soft edges."""
    if threshold is not None:
        return values >= threshold
    fractions = values.dtype.kind == "f" and bool((values != np.rint(values)).any())
    top = 1 if fractions else 255 if values.dtype == np.uint8 else 65535
    num_levels = len(np.unique(values))
    exact = not (lossy or fractions)
    if exact and num_levels <= _FEW_LEVELS:
        return values != 0
    if _soft(_without_offset(values) if top == 255 else values, top):
        return _above_half(values, top)
    # More than 8 bits are rarely used for anything but ids.
    if exact and (top > 255 or _plateau_share(values, top) >= _IDS_SHARE):
        return values != 0
    raise MaskLevelsError(
        f"has {num_levels} {'values with fractions' if fractions else 'grey levels'}, which may be "
        f"{'probabilities' if fractions else 'ids that compression changed' if lossy else 'ids'} or soft edges; give mask_threshold "
        f"(--mask-threshold), the least value in the mask, such as {'0.5' if fractions else '1 for ids or 128 for soft edges'}"
    )


def _soft(values: np.ndarray, top: int) -> bool:
    """Whether the levels between the extremes are soft edges of one mask."""
    between = (values != 0) & (values != top)
    middle, high = np.count_nonzero((values > top / 8) & (values < top * 7 / 8)), np.count_nonzero(values >= top * 7 / 8)
    crowded = values.min() >= 0 and values.max() <= top and middle <= 2 * high
    if not crowded or _plateau_share(values, top) > _SOFT_SHARE:
        return False
    return bool(maximum_filter(_above_half(values, top), 2 * _REACH + 1)[between].all())


def _plateau_share(values: np.ndarray, top: int) -> float:
    """The share of the pixels between the extremes that lie in squares of one level."""
    between = (values != 0) & (values != top)
    constant = minimum_filter(values, _PLATEAU) == maximum_filter(values, _PLATEAU)
    return np.count_nonzero(maximum_filter(constant, _PLATEAU) & between) / max(1, np.count_nonzero(between))


def _above_half(values: np.ndarray, top: int) -> np.ndarray:
    return values >= (0.5 if top == 1 else top // 2 + 1)


def _without_offset(values: np.ndarray) -> np.ndarray:
    """uint8 levels with the most frequent ones near 0 and near 255 moved there: JPEG may decode a black area as 1 throughout."""
    counts = np.bincount(values.ravel(), minlength=256)
    black, white = counts[: _OFFSET + 1].argmax(), 255 - counts[: 254 - _OFFSET : -1].argmax()
    return np.where(values <= black, 0, np.where(values >= white, 255, values)).astype(np.uint8)
