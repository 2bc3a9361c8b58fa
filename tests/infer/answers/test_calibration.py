"""Scores fitted on made-up evidence, held against truths that were not fitted on; and what is written of them."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.eval import metrics
from mimo_jax.geometry import sam_frame
from mimo_jax.infer.answers.calibration import MIN_ENTITIES, UNCALIBRATED, Calibration, CalibrationError, ConfidenceFeatures


def made_up(count: int, seed: int) -> list[tuple[ConfidenceFeatures, float]]:
    """Masks whose IoU the decoder overestimates and the pixels half know, a tenth of them where nothing is."""
    rng = np.random.default_rng(seed)
    painted = []
    for _ in range(count):
        good = rng.beta(4, 2)
        there = rng.random() > 0.1
        word = rng.uniform(0.7, 1.0) if there else rng.uniform(0.4, 0.9)
        pixel = float(np.clip(good + rng.normal(0, 0.1), 0.01, 1))
        evidence = ConfidenceFeatures(min(1.0, 0.3 + good + rng.normal(0, 0.2)) if rng.random() > 0.1 else 0.9, 0.99, word, pixel)
        painted.append((evidence, good * there))
    return painted


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return Calibration.fit(made_up(800, 0), {"split": "val"})


def quality(calibration: Calibration, painted) -> tuple[float, float, float]:
    scores, ious = calibration.scores([e for e, _ in painted]), np.array([iou for _, iou in painted])
    return metrics.expected_calibration_error(scores, ious), metrics.spearman(scores, ious), metrics.auroc(-scores, ious < 0.5)


@pytest.mark.parametrize("count", [MIN_ENTITIES, 800])
def test_scores_are_expected_ious_of_masks_that_were_not_fitted_on(count):
    held_out = made_up(4000, 1)
    error, rank, area = quality(Calibration.fit(made_up(count, 0), {}), held_out)
    error_before, rank_before, area_before = quality(UNCALIBRATED, held_out)
    assert error < (0.03 if count == 800 else 0.06) and error < error_before / 2
    assert rank > rank_before and area > area_before + 0.05


def test_the_bound_tells_bad_masks_apart(fitted):
    held_out = made_up(4000, 1)
    marked = fitted.scores([e for e, _ in held_out]) < fitted.uncertain_below
    bad = np.array([iou < 0.5 for _, iou in held_out])
    assert marked[bad].mean() - marked[~bad].mean() == pytest.approx(fitted.fitted["j"], abs=0.08)
    assert marked[bad].mean() > 0.6 and fitted.fitted["entities"] == 800 and fitted.fitted["split"] == "val"


parts = st.floats(0, 1)


@settings(max_examples=200)
@given(st.tuples(parts, parts, parts, parts), st.sampled_from(["iou", "seg_prob", "word_prob", "pixel_iou"]), parts)
def test_more_evidence_never_lowers_a_score(fitted, values, part, other):
    one = ConfidenceFeatures(*values)
    two = dataclasses.replace(one, **{part: max(other, getattr(one, part))})
    low, high = fitted.scores([one, two])
    assert 0 <= low <= high + 1e-12 <= 1 + 1e-12


def test_without_a_fit_it_is_iou_times_seg_prob():
    assert not UNCALIBRATED and UNCALIBRATED.uncertain_below == 0.5
    assert UNCALIBRATED.scores([ConfidenceFeatures(0.8, 0.5, 0.1, 0.2)]) == pytest.approx([0.4])
    assert len(UNCALIBRATED.scores([])) == 0


def test_too_little_is_refused_and_one_sided_data_keep_the_usual_bound():
    with pytest.raises(CalibrationError, match=f"99 segmented .* {MIN_ENTITIES}"):
        Calibration.fit(made_up(99, 0), {})
    same = Calibration.fit([(ConfidenceFeatures(0.9, 0.9, 0.9, 0.9), 0.8)] * MIN_ENTITIES, {})
    assert same and same.uncertain_below == 0.5 and same.fitted["j"] is None
    assert same.scores([ConfidenceFeatures(0.1, 0.1, 0.1, 0.1), ConfidenceFeatures(0.9, 0.9, 0.9, 0.9)]) == pytest.approx([0.8, 0.8])


def test_evidence_is_of_the_image_alone_and_of_the_words_since_the_mask_before():
    logits = np.full((8, 8), 30.0)  # an image twice as wide as high: rows 4 … 7 are padding
    logits[:4] = -30
    logits[1, 2:6] = math.log(3)  # four pixels of 0.75
    logits[2, 2] = -math.log(3)  # one of 0.25
    evidence = ConfidenceFeatures.of(logits, sam_frame(20, 40, 64), 1.3, np.array([0.9, 0.6, 0.8]))
    assert evidence == ConfidenceFeatures(1.0, 0.8, 0.6, pytest.approx(3 / 4.25))
    assert ConfidenceFeatures.of(np.full((8, 8), -30.0), sam_frame(20, 40, 64), -0.1, np.array([0.8])) == ConfidenceFeatures(
        0.0, 0.8, 0.8, 0.0
    )


def test_what_is_written_is_read_back(fitted, tmp_path):
    path = tmp_path / "calibration.json"
    assert Calibration.read(path) is UNCALIBRATED
    fitted.write(path)
    assert Calibration.read(path) == fitted and [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"uncertain_below": 0.', '"uncertain_below": 0.1'), "does not match its SHA-256"),
        (lambda text: json.dumps(json.loads(text) | {"version": 2}), "has version 2, not 1"),
    ],
)
def test_a_damaged_file_is_an_error_with_a_remedy(fitted, tmp_path, harm, message):
    path = tmp_path / "calibration.json"
    fitted.write(path)
    path.write_text(harm(path.read_text()))
    with pytest.raises(CalibrationError, match=f"calibration.json: .*{message}.*--calibrate"):
        Calibration.read(path)
