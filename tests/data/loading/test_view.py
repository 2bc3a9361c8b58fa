"""Records as pictures."""

import numpy as np

from mimo_jax.data.loading.view import contact_sheet, draw_record
from tests.data import handmade


def test_masks_and_prompts_are_painted():
    record = handmade.record(0)
    picture = np.asarray(draw_record(record))
    bare = handmade.record(0)
    bare.masks, bare.samples = [], []
    plain = np.asarray(draw_record(bare))
    factor = 10  # 56 pixels wide, enlarged by a whole factor to at least 512
    part = (slice(0, 40 * factor), slice(0, 56 * factor))
    changed = (picture[part] != plain[part]).any(2)[factor // 2 :: factor, factor // 2 :: factor]
    masks = record.masks[0].decode() | record.masks[1].decode()
    assert changed[masks].mean() > 0.95 and changed[~masks].mean() < 0.2
    assert picture.shape[0] > plain.shape[0]  # questions and answers
    np.testing.assert_array_equal(picture, np.asarray(draw_record(handmade.record(0))))


def test_a_sheet_has_a_tile_for_each():
    one, seven = (contact_sheet([handmade.record(i) for i in range(n)]) for n in (1, 7))
    assert seven.width == 5 * one.width and 1.9 * one.height <= seven.height <= 2.1 * one.height
