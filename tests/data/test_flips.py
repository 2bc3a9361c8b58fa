"""Only what has no sides is flipped, with its masks, and never under words of a side."""

import numpy as np
import pytest

from mimo_jax.data.flips import BOTH, MIRRORED, flip, free_flips

NEITHER = (False, False)


@pytest.mark.parametrize("modality, entities, texts, allowed", [
    ("pathology", ["cell nucleus"], ["Segment the cell nuclei."], BOTH), ("dermoscopy", ["skin lesion"], [], BOTH),
    ("endoscopy", ["polyp"], ["Where is the polyp?"], BOTH), ("ultrasound", ["breast tumor"], [], MIRRORED),
    ("ultrasound", ["fetal head"], [], NEITHER), ("ultrasound", ["breast tumor", "left kidney"], [], NEITHER),
    ("ultrasound", [], [], NEITHER),
    ("X-ray", ["left lung"], [], NEITHER), ("CT", ["liver"], [], NEITHER), ("MR", ["brain tumor"], [], NEITHER),
    ("fundus", ["optic disc"], [], NEITHER), ("endoscopy", ["polyp"], ["Is the polyp in the left or the right half?", "Left."], NEITHER),
    ("endoscopy", ["polyp"], ["In which half of the image is the polyp, upper or lower?"], NEITHER),
    ("pathology", ["cell nucleus"], ["What lies level with the top of the hip bones?"], NEITHER),
])  # fmt: skip
def test_what_may_be_flipped(modality, entities, texts, allowed):
    assert free_flips(modality, entities, texts) == allowed


def test_masks_follow_the_image():
    mask = np.zeros((6, 9), bool)
    mask[1, 2] = True
    image = np.repeat(mask[..., None], 3, 2).astype(np.uint8)
    seen = set()
    for seed in range(40):
        turned, (moved,) = flip(image, [mask], BOTH, np.random.default_rng(seed))
        assert np.array_equal(turned[..., 0] > 0, moved) and turned.shape == image.shape
        seen.add(tuple(np.argwhere(moved)[0].tolist()))
        mirrored = np.argwhere(flip(image, [mask], MIRRORED, np.random.default_rng(seed))[1][0])[0]
        assert mirrored[0] == 1
    assert seen == {(1, 2), (1, 6), (4, 2), (4, 6)}


def test_where_nothing_is_free_nothing_is_drawn():
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    image = np.arange(54, dtype=np.uint8).reshape(3, 6, 3)
    assert np.array_equal(flip(image, [], NEITHER, rng)[0], image) and rng.random() == same.random()
