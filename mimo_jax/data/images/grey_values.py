"""Which values of a scan are displayed as black and white: one definition for asking, evaluation and the dataset builder.

1. The window that is given.
2. Else the window or VOI LUT of the file; each slice of a series, and each frame of a file, keeps its own.
3. Else the 0.5 and 99.5 percentiles of the whole scan in rescaled values (HU, SUV, …), whichever slice is displayed: of all voxels of a
   NIfTI file, all frames of a DICOM file, or all files of a DICOM series that lie in one folder, each with its own rescale slope.

Padding of a DICOM image does not count, and is black.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mimo_jax.data.transforms import windowed

PERCENTILES = (0.5, 99.5)
Limits = tuple[float, float]
Rescale = Callable[[np.ndarray], np.ndarray]
_CHUNK = 2**20  # values counted at once
_MAX_LEVELS = 2**18  # distinct values that are counted exactly; any 16 bits are fewer
_MAX_PENDING = 2**20  # counted values that wait to be merged


class ValueCounts:
    """How often each value of a scan occurs, in bounded memory. Beyond 2^18 distinct values, neighbours are counted together, which
    moves a percentile by less than 0.01 percentage points."""

    def __init__(self):
        self._levels, self._counts = np.zeros(0), np.zeros(0, np.int64)  # sorted, distinct
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._extremes = np.inf, -np.inf

    def add(self, stored: np.ndarray, rescale: Rescale) -> None:
        """Count stored values of any shape. rescale: stored values -> rescaled ones; those that are not finite do not count."""
        flat = stored.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            levels, counts = _count(flat[start : start + _CHUNK])
            levels = np.asarray(rescale(levels), np.float64)
            finite = np.isfinite(levels)
            if not finite.any():
                continue
            levels, counts = levels[finite], counts[finite]
            self._extremes = min(self._extremes[0], float(levels.min())), max(self._extremes[1], float(levels.max()))
            self._pending.append(_coarse(levels, counts))
            if sum(len(levels) for levels, _ in self._pending) > _MAX_PENDING:
                self._merge()

    def limits(self) -> Limits | None:
        """(black, white): the percentiles, as numpy.percentile defines them, or the extremes if nearly all values are equal, so that a
        few bright voxels do not vanish; None without a finite value."""
        self._merge()
        total = self._counts.sum()
        if not total:
            return None
        at = np.array(PERCENTILES) / 100 * (total - 1)
        ends = np.cumsum(self._counts)
        below, above = (self._levels[np.searchsorted(ends, rank, side="right")] for rank in (np.floor(at), np.ceil(at)))
        low, high = (below + (above - below) * (at - np.floor(at))).tolist()
        if low >= high:
            low, high = self._extremes
        return low, max(high, float(np.nextafter(low, np.inf)))

    def _merge(self) -> None:
        parts = [(self._levels, self._counts), *self._pending]
        levels, place = np.unique(np.concatenate([levels for levels, _ in parts]), return_inverse=True)
        counts = np.zeros(len(levels), np.int64)
        np.add.at(counts, place.reshape(-1), np.concatenate([counts for _, counts in parts]))
        self._levels, self._counts = _coarse(levels, counts)
        self._pending = []


def grey_levels(values: np.ndarray, limits: Limits) -> np.ndarray:
    """float [H, W] -> uint8 [H, W], linear from black to white at `limits`; values that are not finite are black, even if all are."""
    return windowed(np.where(np.isfinite(values), values, limits[0]), limits, PERCENTILES, "")


def _count(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct values, sorted, without those that are not finite; how often each occurs)."""
    if flat.dtype.kind in "iub" and flat.dtype.itemsize <= 2:
        first = -(2 ** (8 * flat.dtype.itemsize - 1)) if flat.dtype.kind == "i" else 0
        counts = np.bincount(flat.astype(np.int64) - first)
        found = np.flatnonzero(counts)
        return found + first, counts[found]
    return np.unique(flat[np.isfinite(flat)], return_counts=True)


def _coarse(levels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted levels, neighbours joined at their mean if there are more than _MAX_LEVELS."""
    if len(levels) <= _MAX_LEVELS:
        return levels, counts
    order = np.argsort(levels, kind="stable")  # a rescaling may have reversed them
    levels, counts = levels[order], counts[order]
    starts = np.arange(0, len(levels), -(-len(levels) // _MAX_LEVELS))
    joined = np.add.reduceat(counts, starts)
    return np.add.reduceat(levels * counts, starts) / joined, joined
