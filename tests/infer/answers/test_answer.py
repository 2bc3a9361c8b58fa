import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.infer.answers.answer import Entity, canonical_name
from mimo_jax.infer.answers.calibration import Calibration, ConfidenceFeatures


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


SURE = ConfidenceFeatures(0.9, 0.9, 0.9, 0.9)


def test_an_empty_mask_has_no_box_and_is_uncertain():
    entity = Entity.of(0, "cyst", np.zeros((4, 5), bool), SURE)
    assert entity.box_xyxy is None and entity.area_px == 0 and entity.uncertain and entity.score == pytest.approx(0.81)
    one = np.zeros((4, 5), bool)
    one[2, 3] = True
    assert Entity.of(0, "cyst", one, SURE).box_xyxy == [3, 2, 4, 3]
    assert entity.area_mm2 is None and "area_mm2" not in entity.to_json()
    measured = Entity.of(0, "cyst", one, SURE, spacing_mm=(0.7, 1.1111))
    assert measured.area_mm2 == pytest.approx(0.77777) and measured.to_json()["area_mm2"] == 0.78


def test_a_score_is_that_of_the_calibration_and_uncertain_below_its_bound():
    mask = np.ones((2, 2), bool)
    assert not Entity.of(0, "cyst", mask, SURE).uncertain and Entity.of(0, "cyst", mask, ConfidenceFeatures(0.9, 0.5, 0.9, 0.9)).uncertain
    fitted = Calibration((0.0, 0.0, 0.0, 1.0), (-3.0, 3.0), (0.2, 0.8), uncertain_below=0.6)
    half, most = (Entity.of(0, "cyst", mask, ConfidenceFeatures(0.9, 0.9, 0.9, p), fitted) for p in (0.5, 0.99))
    assert half.score == pytest.approx(0.5) and half.uncertain and half.iou == 0.9
    assert most.score == 0.8 and not most.uncertain
