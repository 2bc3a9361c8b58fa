"""How the structures of one image lie to one another, read from their masks.

All is told from COCO RLE where that will do; pixels are decoded only where two boxes come near each other. Boxes are half-open
[x0, y0, x1, y1). Left and right are the patient's, and are told only where the image itself says which way it was turned.
Axis letters: E entities, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from pycocotools import mask as coco
from scipy import ndimage

from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.schema import Mask, Record

COVERED = 0.9  # of its area within another: contained
DOUBLE = 0.8  # IoU from which two masks are one place
LARGER, MOST_LARGER = 1.4, 4.0  # areas nearer than the first are not compared, those beyond the second need no looking
GAP = 0.005  # of the longer side: structures that near touch
FAR = 0.05  # of the longer side: structures farther apart surely do not
APART = 0.02  # of the width: structures whose boxes overlap along x by more are neither left nor right of each other


class Layout:
    """The masks of one image, an entity's taken together."""

    def __init__(self, record: Record, masks: Mapping[str, list[Mask]]):
        self.record, self.masks = record, masks
        self.names = list(masks)
        self.place = {name: i for i, name in enumerate(self.names)}
        self._pixels: dict[str, np.ndarray] = {}

    @cached_property
    def rles(self) -> list[dict]:
        """[E], the union of each entity's masks."""
        united = []
        for masks in self.masks.values():
            rles = [mask.rle for mask in masks]
            united.append(rles[0] if len(rles) == 1 else coco.merge(rles))
        return united

    @cached_property
    def areas(self) -> np.ndarray:
        """int64 [E]."""
        return coco.area(self.rles).astype(np.int64)

    @cached_property
    def boxes(self) -> np.ndarray:
        """int64 [E, 4]."""
        corners = [np.array([mask.box_xyxy for mask in masks]) for masks in self.masks.values()]
        return np.array([[*c[:, :2].min(0), *c[:, 2:].max(0)] for c in corners])

    @cached_property
    def covered(self) -> np.ndarray:
        """float [E, E]: the share of the first's area that lies in the second."""
        return coco.iou(self.rles, self.rles, [1] * len(self.rles))

    def share_within(self, mask: Mask, entity: str) -> float:
        """The share of one mask's area that lies in a single mask of `entity`."""
        others = [other.rle for other in self.masks[entity]]
        return float(coco.iou([mask.rle], others, [1] * len(others)).max())

    def within(self, a: str, b: str) -> bool:
        """Whether b contains a, and is clearly more than it."""
        i, j = self.place[a], self.place[b]
        return self.covered[i, j] >= COVERED and self.areas[j] >= LARGER * self.areas[i]

    def covers(self, a: str, b: str) -> bool:
        """Whether one of the two lies mostly in the other."""
        i, j = self.place[a], self.place[b]
        return max(self.covered[i, j], self.covered[j, i]) > 0.5

    def has_double(self, entity: str) -> bool:
        """Whether another entity is marked in nearly the same place."""
        i = self.place[entity]
        shared = self.covered[i] * self.areas[i]
        iou = shared / (self.areas[i] + self.areas - shared)
        return bool((np.delete(iou, i) > DOUBLE).any())

    def ratio(self, a: str, b: str) -> float:
        """Area of a by area of b."""
        return float(self.areas[self.place[a]] / self.areas[self.place[b]])

    def comparable(self, a: str, b: str) -> bool:
        """Whether which is larger can be seen, and has to be."""
        return LARGER <= max(self.ratio(a, b), self.ratio(b, a)) <= MOST_LARGER

    def touches(self, a: str, b: str) -> bool:
        """Whether two that do not contain each other come as near as labels of neighbours do."""
        reach = max(1, round(GAP * max(self.record.height, self.record.width)))
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = self.boxes[self.place[a]], self.boxes[self.place[b]]
        x0, x1 = max(ax0, bx0 - reach), min(ax1, bx1 + reach)
        y0, y1 = max(ay0, by0 - reach), min(ay1, by1 + reach)
        if x0 >= x1 or y0 >= y1 or self.covers(a, b):
            return False
        x0, x1, y0, y1 = max(0, x0 - reach), x1 + reach, max(0, y0 - reach), y1 + reach
        grown = ndimage.binary_dilation(self.pixels(a)[y0:y1, x0:x1], np.ones((3, 3), bool), iterations=reach)
        return bool((grown & self.pixels(b)[y0:y1, x0:x1]).any())

    def far(self, a: str, b: str) -> bool:
        """Whether two are so far apart that nobody could say they touch."""
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = self.boxes[self.place[a]], self.boxes[self.place[b]]
        return max(ax0 - bx1, bx0 - ax1, ay0 - by1, by0 - ay1) > FAR * max(self.record.height, self.record.width)

    def pixels(self, entity: str) -> np.ndarray:
        """bool [H, W]."""
        if entity not in self._pixels:
            self._pixels[entity] = coco.decode(self.rles[self.place[entity]]).astype(bool)
        return self._pixels[entity]

    @cached_property
    def patients_left(self) -> int:
        """+1 where the patient's left is on the image's right, -1 where on its left, 0 where that is not known: all the pairs of a
        left and a right structure that lie clearly beside each other must say the same, and so must a radiological record."""
        signs = {1} if self.record.orientation == "radiological" else set()
        for name in self.names:
            twin = "right " + name.removeprefix("left ")
            paired = name not in KNOWLEDGE or KNOWLEDGE[name].twin  # chambers of the heart are no pair: they lie askew
            if name.startswith("left ") and twin in self.place and paired and self._apart(name, twin):
                dx, dy = self._centre(name) - self._centre(twin)
                if abs(dx) > 2 * abs(dy):
                    signs.add(int(np.sign(dx)))
        return signs.pop() if len(signs) == 1 else 0

    def side(self, a: str, b: str) -> str:
        """ "left" or "right": where a lies of b for the patient; "" where that is not known, or they are not clearly beside each other."""
        if not self.patients_left or not self._apart(a, b):
            return ""
        further = self._centre(a)[0] > self._centre(b)[0]
        return "left" if further == (self.patients_left > 0) else "right"

    def _centre(self, entity: str) -> np.ndarray:
        box = self.boxes[self.place[entity]]
        return (box[:2] + box[2:]) / 2

    def _apart(self, a: str, b: str) -> bool:
        (ax0, _, ax1, _), (bx0, _, bx1, _) = self.boxes[self.place[a]], self.boxes[self.place[b]]
        return min(ax1, bx1) - max(ax0, bx0) <= APART * self.record.width

    def countable(self, entity: str) -> bool:
        """Whether each mask is one instance: one piece, so that the masks can be counted."""
        return all(ndimage.label(mask.decode(), np.ones((3, 3), int))[1] == 1 for mask in self.masks.get(entity, ()))
