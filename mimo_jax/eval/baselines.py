"""Trivial baselines that a report compares the model with: the mean training mask of an entity, and the best single brightness
threshold for it. Both are fitted to maximize their mean IoU on the training images.

Masks are float or bool [height, width]; the *unit square* is the full image, stretched.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from PIL import Image

from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.schema import Record

GRID = 64  # cells along each side of the unit square
MAX_STORED_MASKS = 400  # maximum number of training masks per entity on which the level of the mean mask is chosen


def brightness(image: np.ndarray) -> np.ndarray:
    """The mean over the channels, uint8 [height, width], of an image uint8 [height, width] or [height, width, channels]."""
    return image if image.ndim == 2 else image[..., :3].mean(-1).astype(np.uint8)


def entity_masks(record: Record) -> dict[str, np.ndarray]:
    """Entity → the union of its instances, bool [height, width]."""
    merged: dict[str, np.ndarray] = {}
    for mask in record.masks:
        pixels = mask.decode()
        merged[mask.entity] = merged[mask.entity] | pixels if mask.entity in merged else pixels
    return merged


class MeanMask:
    """Predicts the mean training mask of an entity, thresholded at the level that scored best on the training masks."""

    def __init__(self):
        self.sums: dict[str, np.ndarray] = {}
        self.counts: Counter[str] = Counter()
        self.stored: dict[str, list[np.ndarray]] = defaultdict(list)
        self.levels: dict[str, float] = {}

    def fit(self, records: Iterable[Record]) -> MeanMask:
        for record in records:
            self.add(entity_masks(record))
        return self.finish()

    def add(self, masks: dict[str, np.ndarray]) -> None:
        for entity, mask in masks.items():
            cells = _resize(mask.astype(np.float32), GRID, GRID)
            self.sums[entity] = self.sums.get(entity, 0) + cells
            self.counts[entity] += 1
            if len(self.stored[entity]) < MAX_STORED_MASKS:
                self.stored[entity].append(cells >= 0.5)

    def finish(self) -> MeanMask:
        for entity, total in self.sums.items():
            mean, truths = total / self.counts[entity], np.stack(self.stored[entity])
            levels = mean.max() * np.linspace(0.02, 0.98, 49)
            scores = []
            for level in levels:
                guess = (mean >= level)[None]
                scores.append(np.mean((guess & truths).sum((1, 2)) / np.maximum((guess | truths).sum((1, 2)), 1)))
            best = np.flatnonzero(np.array(scores) >= max(scores) - 1e-9)
            self.levels[entity] = float(levels[best[len(best) // 2]])
        return self

    def predict(self, entity: str, height: int, width: int, image: np.ndarray | None = None) -> np.ndarray:
        """bool [height, width]; empty for an entity that does not occur in the training data."""
        if entity not in self.levels:
            return np.zeros((height, width), bool)
        return _resize(self.sums[entity] / self.counts[entity], height, width) >= self.levels[entity]


class BestThreshold:
    """Predicts all pixels brighter (or all darker) than one value, the best one for the entity on the training images."""

    def __init__(self):
        self.scores: dict[str, np.ndarray] = {}  # [2, 256]: summed IoU of brightness >= t, and of brightness < t
        self.best: dict[str, tuple[int, int]] = {}

    def fit(self, records: Iterable[Record]) -> BestThreshold:
        for record in records:
            self.add(record_image(record), entity_masks(record))
        return self.finish()

    def add(self, image: np.ndarray, masks: dict[str, np.ndarray]) -> None:
        grey = brightness(image)
        everywhere = np.bincount(grey.ravel(), minlength=256)
        below_all = np.cumsum(everywhere) - everywhere  # number of pixels darker than t
        for entity, mask in masks.items():
            inside = np.bincount(grey[mask], minlength=256)
            below = np.cumsum(inside) - inside
            area = inside.sum()
            above, above_all = area - below, grey.size - below_all
            score = np.stack([above / (area + above_all - above), below / (area + below_all - below)])
            self.scores[entity] = self.scores.get(entity, 0) + score

    def finish(self) -> BestThreshold:
        for entity, scores in self.scores.items():
            side, value = np.unravel_index(int(np.argmax(scores)), scores.shape)
            self.best[entity] = (int(side), int(value))
        return self

    def predict(self, entity: str, height: int, width: int, image: np.ndarray) -> np.ndarray:
        """bool [height, width]; empty for an entity that does not occur in the training data."""
        if entity not in self.best:
            return np.zeros((height, width), bool)
        side, value = self.best[entity]
        grey = brightness(image)
        return grey < value if side else grey >= value


def fit_baselines(records: Iterable[Record]) -> dict[str, MeanMask | BestThreshold]:
    """Fit both baselines in one pass over the training records."""
    mean, threshold = MeanMask(), BestThreshold()
    for record in records:
        masks = entity_masks(record)
        mean.add(masks)
        threshold.add(record_image(record), masks)
    return {"mean_mask": mean.finish(), "threshold": threshold.finish()}


def _resize(field: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.asarray(field, np.float32)).resize((width, height), Image.Resampling.BILINEAR))
