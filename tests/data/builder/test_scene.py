"""Spans, and what a mark can mean."""

import numpy as np
import pytest

from mimo_jax.data.builder.label_stats import LabelStats
from mimo_jax.data.builder.scene import Scene, grounded, names_pattern
from mimo_jax.data.builder.templates import FULL
from tests.data.builder.bodies import SLICE, plain_record, slice_record


def scene_of(record, *others) -> Scene:
    return Scene(record, np.random.default_rng(0), LabelStats.from_records([record, *others]), None, FULL)


def test_grounded_places_spans():
    text, targets = grounded("The {} and the {} are outlined.", [("liver", ["a"]), ("liver cyst", ["b", "c"])])
    assert text == "The liver and the liver cyst are outlined."
    assert [text[t.span[0] : t.span[1]] for t in targets] == ["liver", "liver cyst"]
    with pytest.raises(ValueError):
        grounded("The {}.", [("liver", ["a"]), ("spleen", ["b"])])


def test_what_a_sentence_names_of_the_image_is_grounded_too():
    scene = scene_of(plain_record(["left lung", "lung", "stomach", "spleen"]))
    text, targets = scene.ground_names("The {} lies behind the stomach, by the left lung, the spleen and the liver.", [("spleen", ["m3"])])
    assert text == "The spleen lies behind the stomach, by the left lung, the spleen and the liver."
    assert [(text[t.span[0] : t.span[1]], t.mask_ids) for t in targets] == [("spleen", ["m3"]), ("stomach", ["m2"]), ("left lung", ["m0"])]


def test_names_are_whole_words_and_the_longest():
    found = names_pattern(("lung", "left lung", "rib 1")).findall("left lung, lungs, lung, lung-like, rib 11, rib 1")
    assert found == ["left lung", "lung", "rib 1"]


def test_pointable_excludes_wholes_with_shown_parts_and_equal_places():
    assert scene_of(plain_record(["lung", "left lung", "liver"])).pointable == ["left lung", "liver"]
    twice = slice_record({"liver": SLICE["liver"], "tumor": SLICE["liver"], "spleen": SLICE["spleen"], "liver cyst": SLICE["liver cyst"]})
    assert scene_of(twice).pointable == ["spleen", "liver cyst"]


def test_separate_allows_an_organ_and_its_lesion_but_not_a_whole_and_its_part():
    scene = scene_of(slice_record(SLICE | {"lung": (0, 0, 5, 5), "left lung": (0, 0, 4, 4), "gizzard": (14, 32, 20, 40)}))
    assert scene.separate("liver", "liver cyst") and scene.separate("spleen", "stomach")
    assert not scene.separate("lung", "left lung") and not scene.separate("gizzard", "liver")
