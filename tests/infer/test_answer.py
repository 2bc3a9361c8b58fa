import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.infer.answer import Entity, canonical_name


@pytest.mark.parametrize(
    "phrase, name",
    [("The Liver.", "liver"), (" the  left \n lung ", "left lung"), ("(cyst),", "cyst"), ("a", "a"), ("", ""), ("A the", "the")],
)
def test_canonical_name(phrase, name):
    assert canonical_name(phrase) == name


@given(st.one_of(st.text(max_size=20), st.text("aAthe .,()'", max_size=12)))
def test_canonical_name_is_idempotent(text):
    once = canonical_name(text)
    assert canonical_name(once) == once


def test_an_empty_mask_has_no_box_and_is_uncertain():
    entity = Entity.of(0, "cyst", np.zeros((4, 5), bool), iou=1.7, seg_prob=1.0)
    assert entity.box_xyxy is None and entity.area_px == 0 and entity.uncertain
    assert entity.iou == entity.score == 1.0  # the IoU head is not bounded; its value is clipped
    one = np.zeros((4, 5), bool)
    one[2, 3] = True
    assert Entity.of(0, "cyst", one, 0.9, 0.9).box_xyxy == [3, 2, 4, 3]
    assert entity.area_mm2 is None and "area_mm2" not in entity.to_json()
    measured = Entity.of(0, "cyst", one, 0.9, 0.9, spacing_mm=(0.7, 1.1111))
    assert measured.area_mm2 == pytest.approx(0.77777) and measured.to_json()["area_mm2"] == 0.78
    assert not Entity.of(0, "cyst", one, 0.9, 0.9).uncertain and Entity.of(0, "cyst", one, 0.9, 0.5).uncertain
