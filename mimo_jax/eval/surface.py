"""Distances between the boundaries of two masks: normalised surface Dice (NSD) and the 95th percentile of the Hausdorff distance (HD95).

Axis letters: H, W height and width of the original image.

Boundary pixels are those of the mask with a 4-neighbour outside it or outside the image. They count alike, as in MONAI; DeepMind's
surface-distance weighs them by the length of their boundary element.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

TOLERANCE = 2.0  # of NSD, in pixels or mm


def nsd_and_hd95(a: np.ndarray, b: np.ndarray, spacing: Sequence[float] = (1.0, 1.0)) -> tuple[float, float] | None:
    """(NSD at TOLERANCE, HD95) of two bool masks [H, W]; None if either is empty. spacing: between rows and between columns, such as in mm.

    NSD: the share of the pixels of both boundaries that are no farther than TOLERANCE from the other boundary. HD95: the greater of the
    95th percentiles of the distances from a to b and from b to a."""
    if not a.any() or not b.any():
        return None
    edges = [np.argwhere(_boundary(mask)) * np.asarray(spacing, float) for mask in (a, b)]
    from_a, from_b = (cKDTree(other).query(edge)[0] for edge, other in (edges, edges[::-1]))
    near = np.count_nonzero(from_a <= TOLERANCE) + np.count_nonzero(from_b <= TOLERANCE)
    return near / (len(from_a) + len(from_b)), float(max(np.percentile(from_a, 95), np.percentile(from_b, 95)))


def _boundary(mask: np.ndarray) -> np.ndarray:
    return mask & ~binary_erosion(mask)
