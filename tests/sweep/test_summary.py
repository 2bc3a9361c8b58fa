"""Means, spreads and differences by hand; the table and the picture of them."""

import json

import pytest
from PIL import Image

from mimo_jax.sweep.summary import COLUMNS, summarize, write_summary

GROUPS = {"aligner": {"cross_attention": ["a0", "a1"], "none": ["b0", "b1"]}, "data": {"100": ["a0", "a1"], "25": ["c0", "c1"]}}


def report(value, **others):
    return {"miou": dict.fromkeys(("I", "II", "III", "IV"), value) | others, "vqa_closed_accuracy": value}


REPORTS = {"a0": report(0.6), "a1": report(0.8), "b0": report(0.5, II=0.1), "b1": report(0.6), "c1": report(0.9, IV=None)}


def test_seeds_are_compared_with_the_same_seeds_of_the_baseline():
    found = summarize(GROUPS, REPORTS)
    assert found["aligner"]["cross_attention"]["I"] == {
        "values": [0.6, 0.8],
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(0.02**0.5),
        "difference": None,
    }
    assert found["aligner"]["none"]["II"]["mean"] == pytest.approx(0.35)
    assert found["aligner"]["none"]["II"]["difference"] == pytest.approx((-0.5 - 0.2) / 2)
    fewer = found["data"]["25"]
    assert fewer["missing"] == ["c0"] and fewer["vqa"]["sd"] is None
    assert fewer["vqa"]["difference"] == pytest.approx(0.1)  # to the baseline of that seed, not to the mean of both
    assert fewer["IV"] == {"values": [None, None], "mean": None, "sd": None, "difference": None}


def test_a_baseline_that_failed_leaves_the_others_their_means():
    found = summarize(GROUPS, {"b0": report(0.5)})
    assert found["aligner"]["none"]["I"] == {"values": [0.5, None], "mean": 0.5, "sd": None, "difference": None}


def test_what_is_written(tmp_path):
    text = write_summary(tmp_path, "tiny, 2 seeds.", GROUPS, REPORTS)
    assert (tmp_path / "summary.md").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "tiny, 2 seeds." and f"| aligner | seeds | {' | '.join(COLUMNS)} |" in lines
    assert "| cross_attention | 2 | 0.700 ± 0.141 | 0.700 ± 0.141 | 0.700 ± 0.141 | 0.700 ± 0.141 | 0.700 ± 0.141 |" in lines
    assert "| 25 | 1 | 0.900 (+0.100) | 0.900 (+0.100) | 0.900 (+0.100) | - | 0.900 (+0.100) |" in lines
    assert "not finished: c0" in lines
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["about"] == "tiny, 2 seeds." and found["groups"] == summarize(GROUPS, REPORTS)
    with Image.open(tmp_path / "summary.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 100
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20  # drawn on
    assert sorted(p.name for p in tmp_path.iterdir()) == ["summary.json", "summary.md", "summary.png"]


def test_no_picture_of_nothing(tmp_path):
    write_summary(tmp_path, "tiny.", GROUPS, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["summary.json", "summary.md"]
