"""Mirrored images for training, where neither the image nor what is said of it has sides.

A flip is wrong where left and right are anatomy: it would turn a right lung into a left one. It is right for tissue under the microscope,
for skin and for the inside of the bowel, which are seen from any direction; a breast on ultrasound may be mirrored, but not turned upside
down, since depth runs downwards. Axis letters: H, W height and width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

BOTH, MIRRORED = (True, True), (True, False)  # (left and right, up and down) may change places
FREE = {"pathology": BOTH, "dermoscopy": BOTH, "endoscopy": BOTH}  # modality -> what may change, whatever is shown
FREE_STRUCTURES = {  # modality -> structures, and what may change in images that show no others
    "ultrasound": (frozenset(("breast lesion", "breast tumor", "benign breast tumor", "malignant breast tumor")), MIRRORED),
}
_SIDED = re.compile(r"\b(left|right|upper|lower|top|bottom|above|below)\w*", re.IGNORECASE)


def free_flips(modality: str, entities: Iterable[str], texts: Iterable[str]) -> tuple[bool, bool]:
    """(whether left and right, whether up and down may change places) in an image that shows `entities`. texts: all that is asked and
    answered about it; a word of a side or a height in one of them forbids both."""
    shown = frozenset(entities)
    structures, axes = FREE_STRUCTURES.get(modality, (frozenset(), (False, False)))
    allowed = FREE.get(modality, axes if shown and shown <= structures else (False, False))
    return (False, False) if any(_SIDED.search(text) for text in (*shown, *texts)) else allowed


def flip(
    image: np.ndarray, masks: Sequence[np.ndarray], allowed: tuple[bool, bool], rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """uint8 RGB [H, W, 3] and its bool masks [H, W], each allowed axis flipped with probability one half. Draws nothing from `rng` if
    no axis is allowed."""
    drawn = rng.random(2) < 0.5 if any(allowed) else (False, False)
    step_x, step_y = (-1 if may and wanted else 1 for may, wanted in zip(allowed, drawn, strict=True))
    turned = [np.ascontiguousarray(pixels[::step_y, ::step_x]) for pixels in (image, *masks)]
    return turned[0], turned[1:]
