"""Relations of a body whose truth is known, whichever way the picture is turned."""

import numpy as np
import pytest

from mimo_jax.data.builder.relations import Layout
from tests.data.builder.bodies import HEIGHT, SLICE, WIDTH, slice_record

TURNS = {"as scanned": lambda p: p, "mirrored": lambda p: p[:, ::-1], "head down": lambda p: p[::-1, ::-1], "upside": lambda p: p[::-1]}


def layout_of(record) -> Layout:
    masks = {}
    for mask in record.masks:
        masks.setdefault(mask.entity, []).append(mask)
    return Layout(record, masks)


@pytest.mark.parametrize("turn", TURNS)
def test_left_and_right_are_the_patients(turn):
    layout = layout_of(slice_record(turn=TURNS[turn]))
    assert layout.side("liver", "spleen") == "right" and layout.side("spleen", "liver") == "left"
    assert layout.side("aorta", "liver") == "left"
    assert layout.side("left kidney", "spleen") in ("right", "")
    assert layout.side("liver", "right kidney") == "" == layout.side("liver", "liver cyst")  # neither is next to the other


def test_sides_are_not_guessed():
    lone = {name: box for name, box in SLICE.items() if "kidney" not in name}
    assert layout_of(slice_record(lone)).side("liver", "spleen") == ""
    assert layout_of(slice_record(lone, slice_axis="axial")).side("liver", "spleen") == ""
    assert layout_of(slice_record(lone, orientation="radiological")).side("liver", "spleen") == "right"
    mirrored = slice_record(turn=TURNS["mirrored"], orientation="radiological")  # the record contradicts its own labels
    assert layout_of(mirrored).side("liver", "spleen") == ""
    odd = SLICE | {"left rib 9": (0, 60, 4, 64), "right rib 9": (156, 60, 160, 64)}  # as do two pairs of labels
    assert layout_of(slice_record(odd)).side("liver", "spleen") == ""
    one_above_the_other = lone | {"left kidney": (70, 0, 90, 20), "right kidney": (74, 90, 94, 110)}
    assert layout_of(slice_record(one_above_the_other)).patients_left == 0
    chambers = lone | {"left heart ventricle": (10, 0, 30, 20), "right heart ventricle": (60, 0, 80, 20)}
    assert layout_of(slice_record(chambers)).patients_left == 0


@pytest.mark.parametrize("turn", TURNS)
def test_contact_containment_and_size(turn):
    layout = layout_of(slice_record(turn=TURNS[turn]))
    assert layout.touches("stomach", "spleen") and layout.touches("spleen", "stomach")
    assert not layout.touches("liver", "spleen") and layout.far("liver", "spleen") and not layout.far("stomach", "spleen")
    assert layout.within("liver cyst", "liver") and not layout.within("liver", "liver cyst") and not layout.touches("liver cyst", "liver")
    assert layout.covers("liver", "liver cyst") and not layout.covers("stomach", "spleen")
    assert layout.ratio("liver", "aorta") == 29 and not layout.comparable("liver", "aorta")
    assert not layout.comparable("stomach", "spleen") and layout.comparable("stomach", "left kidney") is (
        layout.ratio("stomach", "left kidney") > 1.4
    )


def test_no_pair_both_touches_and_is_far():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = rng.integers(0, WIDTH - 30, 2), rng.integers(0, HEIGHT - 30, 2)
        boxes = {
            name: (int(x[i]), int(y[i]), int(x[i] + rng.integers(2, 30)), int(y[i] + rng.integers(2, 30))) for i, name in enumerate("ab")
        }
        layout = layout_of(slice_record(boxes))
        a, b = (layout.pixels(name) for name in "ab")
        ys, xs = np.nonzero(a)
        v, u = np.nonzero(b)
        gap = max(0, min(u) - max(xs), min(xs) - max(u)), max(0, min(v) - max(ys), min(ys) - max(v))
        assert layout.touches("a", "b") == layout.touches("b", "a")
        if not layout.covers("a", "b"):
            assert layout.touches("a", "b") == (max(gap) <= 1)
        assert not (layout.touches("a", "b") and layout.far("a", "b"))


def test_the_masks_of_an_entity_are_taken_together():
    record = slice_record({"liver": (0, 0, 10, 10)})
    record.masks.append(slice_record({"liver": (20, 0, 30, 10)}).masks[0])
    record.masks[1].mask_id = "m1"
    record.masks.append(slice_record({"spleen": (12, 0, 18, 5)}).masks[0])
    layout = layout_of(record)
    assert layout.areas.tolist() == [200, 30] and layout.boxes.tolist() == [[0, 0, 30, 10], [12, 0, 18, 5]]
    assert layout.side("liver", "spleen") == "" and layout.countable("liver")
    record.masks[0].rle = slice_record({"liver": (0, 0, 10, 10)}, turn=lambda p: p | p[:, ::-1]).masks[0].rle
    assert not layout_of(record).countable("liver")  # one mask of two pieces
