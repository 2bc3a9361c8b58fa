"""The figures of a dataset, counted by hand."""

import dataclasses

import pytest
from PIL import Image

from mimo_jax.data.builder.stats import TITLES, describe, plot, statistics
from mimo_jax.data.records import write_records
from tests.data import handmade


@pytest.fixture
def stats(tmp_path):
    records = [dataclasses.replace(handmade.record(i, "train" if i < 5 else "val"), modality="MR" if i == 6 else "CT") for i in range(7)]
    write_records(tmp_path / "set", records, {"name": "handmade", "seed": 7})
    return statistics(tmp_path / "set", progress=False)


def test_counts(stats):
    assert stats["splits"]["train"] == {"images": 5, "groups": 5, "masks": 10, "samples": 45, "no_target": 0}
    assert stats["all"] == {"images": 7, "groups": 7, "masks": 14, "samples": 63, "no_target": 0}
    assert stats["perspective"] == {"I": 28, "II": 14, "III": 7, "IV": 7, "vqa": 7}
    assert stats["modality"] == {"CT": 6, "MR": 1} and stats["perspective_by_modality"]["MR"]["I"] == 4
    assert stats["entity"] == {"liver": 7, "spleen": 7} and stats["licences"] == {"CC0-1.0": 7}
    # "What is this?" has 3 words, "Segment the liver." too, "Which organ makes bile?" and "Is there a liver?" 4, "What does it do?" 4
    assert {key: n for key, n in stats["words"].items() if n} == {"0 to below 4": 42, "4 to below 6": 21}
    # liver: 20 x 16 of 40 x 56 pixels, 14 %; spleen: 10 x 8, 3.6 %
    assert {key: n for key, n in stats["area"].items() if n} == {"1 % to below 5 %": 7, "10 % to below 25 %": 7}
    assert stats["seed"] == 7


def test_tables_and_plots(stats, tmp_path):
    text = describe(stats)
    assert "samples by perspective" in text and "liver" in text and "50.0%" in text
    paths = plot(stats, tmp_path / "plots")
    assert [path.stem for path in paths] == [key for key in TITLES if stats[key]]
    with Image.open(paths[0]) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        assert sum(count for count, colour in colours if colour == (60, 120, 190)) > 1000
