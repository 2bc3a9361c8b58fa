"""Spatial relations between the structures of one image, read from their masks.

They are computed from COCO RLE where possible; pixels are decoded only if two boxes are close to each other. Boxes are half-open
[x0, y0, x1, y1). Left and right are the patient's, and are reported only if the image itself determines its orientation.
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

COVERED = 0.9  # share of its area within another from which a structure is contained
SAME_PLACE_IOU = 0.8  # IoU from which two masks show one place
MIN_AREA_RATIO, MAX_AREA_RATIO = (
    1.4,
    4.0,
)  # ratio of areas between which sizes are compared: below, the difference is unclear; above, obvious
GAP = 0.005  # share of the longer side: structures this close touch
MIN_PIECE = 0.2  # share of the larger piece from which the second largest is the other one of a pair
FAR = 0.05  # share of the longer side: structures farther apart do not touch
APART = 0.02  # share of the width: if boxes overlap along x by more, neither is left or right of the other


def unsure_sides(record: Record) -> bool:
    """Whether the source of an image doubts that its left and right are where they are usually displayed: one of its flags says something
    of the orientation other than that it was corrected."""
    return any(flag.startswith("orientation:") and flag != "orientation:corrected" for flag in record.flags)


class Layout:
    """The masks of one image, merged per entity."""

    def __init__(self, record: Record, masks: Mapping[str, list[Mask]]):
        self.record, self.masks = record, masks
        self.names = list(masks)
        self.index = {name: i for i, name in enumerate(self.names)}
        self._pixels: dict[str, np.ndarray] = {}

    @cached_property
    def rles(self) -> list[dict]:
        """[E], the union of each entity's masks."""
        merged = []
        for masks in self.masks.values():
            rles = [mask.rle for mask in masks]
            merged.append(rles[0] if len(rles) == 1 else coco.merge(rles))
        return merged

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
        """float [E, E]: the share of the first entity's area that is within the second."""
        return coco.iou(self.rles, self.rles, [1] * len(self.rles))

    def share_within(self, mask: Mask, entity: str) -> float:
        """The share of one mask's area that is within a single mask of `entity`."""
        others = [other.rle for other in self.masks[entity]]
        return float(coco.iou([mask.rle], others, [1] * len(others)).max())

    def within(self, a: str, b: str) -> bool:
        """Whether b contains a and is clearly larger."""
        i, j = self.index[a], self.index[b]
        return self.covered[i, j] >= COVERED and self.areas[j] >= MIN_AREA_RATIO * self.areas[i]

    def covers(self, a: str, b: str) -> bool:
        """Whether one of the two lies mostly within the other."""
        i, j = self.index[a], self.index[b]
        return max(self.covered[i, j], self.covered[j, i]) > 0.5

    def has_near_copy(self, entity: str) -> bool:
        """Whether another entity is marked in nearly the same place."""
        i = self.index[entity]
        shared = self.covered[i] * self.areas[i]
        iou = shared / (self.areas[i] + self.areas - shared)
        return bool((np.delete(iou, i) > SAME_PLACE_IOU).any())

    def ratio(self, a: str, b: str) -> float:
        """Area of a divided by area of b."""
        return float(self.areas[self.index[a]] / self.areas[self.index[b]])

    def comparable(self, a: str, b: str) -> bool:
        """Whether the image is both sufficient and necessary to tell which is larger."""
        return MIN_AREA_RATIO <= max(self.ratio(a, b), self.ratio(b, a)) <= MAX_AREA_RATIO

    def touches(self, a: str, b: str) -> bool:
        """Whether two entities that do not contain each other are as close as the labels of neighbours are."""
        reach = max(1, round(GAP * max(self.record.height, self.record.width)))
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = self.boxes[self.index[a]], self.boxes[self.index[b]]
        x0, x1 = max(ax0, bx0 - reach), min(ax1, bx1 + reach)
        y0, y1 = max(ay0, by0 - reach), min(ay1, by1 + reach)
        if x0 >= x1 or y0 >= y1 or self.covers(a, b):
            return False
        x0, x1, y0, y1 = max(0, x0 - reach), x1 + reach, max(0, y0 - reach), y1 + reach
        grown = ndimage.binary_dilation(self.pixels(a)[y0:y1, x0:x1], np.ones((3, 3), bool), iterations=reach)
        return bool((grown & self.pixels(b)[y0:y1, x0:x1]).any())

    def in_two(self, entity: str) -> bool:
        """Whether an entity's only mask is in two large pieces, such as both kidneys."""
        if len(self.masks[entity]) > 1:
            return False
        pieces = ndimage.label(self.pixels(entity), np.ones((3, 3), int))[0]
        sizes = np.sort(np.bincount(pieces.ravel())[1:])[::-1]
        return len(sizes) > 1 and sizes[1] >= MIN_PIECE * sizes[0]

    def far(self, a: str, b: str) -> bool:
        """Whether two entities are so far apart that they certainly do not touch."""
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = self.boxes[self.index[a]], self.boxes[self.index[b]]
        return max(ax0 - bx1, bx0 - ax1, ay0 - by1, by0 - ay1) > FAR * max(self.record.height, self.record.width)

    def pixels(self, entity: str) -> np.ndarray:
        """bool [H, W]."""
        if entity not in self._pixels:
            self._pixels[entity] = coco.decode(self.rles[self.index[entity]]).astype(bool)
        return self._pixels[entity]

    @cached_property
    def patients_left(self) -> int:
        """+1 if the patient's left is on the image's right, -1 if it is on the image's left, 0 if unknown. All pairs of a left and a right
        structure that lie clearly next to each other must agree, and so must the record's orientation; a source that doubts the
        orientation has the last word."""
        if unsure_sides(self.record):
            return 0
        signs = {1} if self.record.orientation == "radiological" else set()
        for name in self.names:
            twin = "right " + name.removeprefix("left ")
            paired = name not in KNOWLEDGE or KNOWLEDGE[name].twin  # the chambers of the heart are not a pair: they lie obliquely
            if name.startswith("left ") and twin in self.index and paired and self._apart(name, twin):
                dx, dy = self._centre(name) - self._centre(twin)
                if abs(dx) > 2 * abs(dy):
                    signs.add(int(np.sign(dx)))
        return signs.pop() if len(signs) == 1 else 0

    def side(self, a: str, b: str) -> str:
        """ "left" or "right": the side of b on which a lies for the patient; "" if unknown or if they do not lie clearly next to each
        other."""
        if not self.patients_left or not self._apart(a, b):
            return ""
        to_the_right = self._centre(a)[0] > self._centre(b)[0]
        return "left" if to_the_right == (self.patients_left > 0) else "right"

    def _centre(self, entity: str) -> np.ndarray:
        box = self.boxes[self.index[entity]]
        return (box[:2] + box[2:]) / 2

    def _apart(self, a: str, b: str) -> bool:
        (ax0, _, ax1, _), (bx0, _, bx1, _) = self.boxes[self.index[a]], self.boxes[self.index[b]]
        return min(ax1, bx1) - max(ax0, bx0) <= APART * self.record.width

    def countable(self, entity: str) -> bool:
        """Whether each mask is one connected piece, so that the masks can be counted."""
        return all(ndimage.label(mask.decode(), np.ones((3, 3), int))[1] == 1 for mask in self.masks.get(entity, ()))
