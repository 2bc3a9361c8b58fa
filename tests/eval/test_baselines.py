"""The trivial baselines do the best that they can: recover what they can express, and report it."""

import io

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.schema import Record, Sample, Target, Turn, encode_mask
from mimo_jax.eval.baselines import BestThreshold, MeanMask, brightness, entity_masks, fit_baselines
from mimo_jax.eval.metrics import iou
from tests.eval.guessing import score_baselines, score_guessing


def record(name, masks, image, samples=()) -> Record:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    height, width = image.shape[:2]
    return Record(name, stream.getvalue(), "png", height, width, "CT", "d", "train", name, masks, list(samples))


def box(height, width, rows, columns):
    mask = np.zeros((height, width), bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def test_mean_mask_finds_what_never_moves_whatever_the_size():
    records = []
    for height, width in ((64, 64), (128, 96), (40, 80)):
        mask = box(height, width, (height // 4, height // 2), (width // 4, width // 2))
        records.append(record(f"{height}", [encode_mask(mask, "m", "liver")], np.zeros((height, width), np.uint8)))
    mean = MeanMask().fit(records)
    truth = box(100, 200, (25, 50), (50, 100))
    assert iou(mean.predict("liver", 100, 200), truth) > 0.9
    assert not mean.predict("spleen", 10, 10).any()


def test_mean_mask_takes_the_level_that_scores_best():
    places = [(0, 32)] * 3 + [(0, 64)]  # mostly the upper half
    records = [
        record(str(i), [encode_mask(box(64, 64, rows, (0, 64)), "m", "liver")], np.zeros((64, 64), np.uint8))
        for i, rows in enumerate(places)
    ]
    assert iou(MeanMask().fit(records).predict("liver", 64, 64), box(64, 64, (0, 32), (0, 64))) > 0.95


@pytest.mark.parametrize("darker", [False, True])
def test_threshold_finds_what_is_brighter_or_darker(darker):
    rng = np.random.default_rng(0)
    records = []
    for name in "ab":
        mask = box(50, 70, (5, 30), (10, 60))
        image = np.where(mask ^ darker, rng.integers(150, 250, mask.shape), rng.integers(0, 140, mask.shape)).astype(np.uint8)
        records.append(record(name, [encode_mask(mask, "m", "liver")], image))
    fitted = BestThreshold().fit(records)
    guess = fitted.predict("liver", 50, 70, image)
    assert np.array_equal(guess, mask)
    assert not fitted.predict("spleen", 50, 70, image).any()


def test_threshold_is_the_best_of_all_512():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (30, 30)).astype(np.uint8)
    mask = (image > 90) & (rng.random((30, 30)) < 0.6)
    fitted = BestThreshold().fit([record("a", [encode_mask(mask, "m", "x")], image)])
    best = max(max(iou(image >= t, mask), iou(image < t, mask)) for t in range(256))
    assert iou(fitted.predict("x", 30, 30, image), mask) == pytest.approx(best)


def test_scores_are_by_perspective_and_entity_and_leave_out_the_absent():
    image = np.zeros((40, 40), np.uint8)
    one, two = box(40, 40, (0, 20), (0, 20)), box(40, 40, (20, 40), (20, 40))
    masks = [encode_mask(one, "a", "cyst"), encode_mask(two, "b", "cyst")]
    turns = [Turn("user", "?"), Turn("assistant", "cyst")]
    samples = [
        Sample("s", "I", turns, [Target(1, "cyst", [0, 4], ["a", "b"])]),
        Sample("t", "II", turns, [Target(1, "cyst", [0, 4], ["a"])]),
        Sample("u", "I", turns, [Target(1, "liver", absent=True)]),
    ]
    records = [record("r", masks, image, samples)]
    scores = score_baselines(fit_baselines(records), records)["mean_mask"]
    assert set(scores) == {"I", "II"} and set(scores["I"]) == {"mean", "cyst"}
    assert scores["I"]["cyst"] > 0.9
    assert scores["II"]["mean"] == pytest.approx(0.5, abs=0.06)
    assert np.array_equal(entity_masks(records[0])["cyst"], one | two)


def test_guessing_learns_wordings_from_train_alone():
    def asked(name, pairs):
        samples = [Sample(q, "vqa", [Turn("user", q), Turn("assistant", a)], answer_type="closed", references=[a]) for q, a in pairs]
        return record(name, [], np.zeros((4, 4), np.uint8), samples)

    train = [asked("a", [("p?", "Yes"), ("p?", "Yes"), ("q?", "No")])]
    test = [asked("b", [("p?", "Yes"), ("q?", "No"), ("new?", "Yes"), ("q?", "Yes")])]
    assert score_guessing(train, test) == {"majority": 0.75, "text_only": 0.75}
    assert score_guessing([], test) == {"majority": 0.0, "text_only": 0.0}


def test_brightness_of_colour_is_the_mean():
    assert brightness(np.array([[[30, 60, 90]]], np.uint8)) == 60
