import numpy as np
import pytest

from mimo_jax.data.prompts import Prompts
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import Calibration, ConfidenceFeatures

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


def test_structures_that_were_asked_for_and_are_left_out_are_named():
    mask, image = np.ones((4, 4), bool), np.zeros((4, 4, 3), np.uint8)
    entities = [Entity.of(0, "spleen", mask, SURE), Entity.of(1, "left kidney", mask, SURE)]
    question, text = "Segment the liver, the spleen and the left kidney.", "The spleen and the left kidney are outlined."
    answer = Answer(text, [], entities, False, question, image, Prompts(), max_segs=2)
    assert answer.unanswered == answer.to_json()["unanswered"] == ["liver"]
    assert "(not answered: liver; this model marks 2 structures in one answer at most (max_segs)" in answer.describe()
    two = Answer(text, [], entities[:1], False, "Segment the liver and the spleen.", image, Prompts(), max_segs=2)
    assert two.unanswered == ["liver"] and "(not answered: liver)" in two.describe()
    assert not Answer(text, [], entities, False, "Segment the spleen.", image, Prompts()).unanswered


def test_warnings_are_those_of_the_image_and_the_lines_on_the_screen():
    entities = [Entity.of(0, "spleen", np.ones((4, 4), bool), SURE)]
    question, image = "Segment the liver and the spleen.", np.zeros((4, 4, 3), np.uint8)
    answer = Answer("The spleen is outlined.", [], entities, True, question, image, Prompts(), image_warnings=("transparent pixels: …",))
    assert answer.warnings == ("transparent pixels: …", "(not answered: liver)", "(cut off at the token limit)")
    assert answer.to_json()["warnings"] == list(answer.warnings) and answer.notes() == list(answer.warnings[1:])
    assert Answer("No.", [], [], False, "Is it?", image, Prompts()).warnings == ()
