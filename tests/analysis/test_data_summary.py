"""What is said of the data before the first step: shares against those that the records were made with."""

import dataclasses

import numpy as np
import pytest

from mimo_jax.analysis.data_summary import data_lines
from mimo_jax.config import SourceConfig
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import write_records
from mimo_jax.data.schema import Sample, Target, Turn, encode_mask
from tests.data import handmade
from tests.tiny_config import tiny_config


def lines_of(folder, records, max_turns: int = 1, **more) -> dict[str, str]:
    """The lines for a dataset of these records, and for others by name."""
    config = tiny_config(max_turns=max_turns)
    for name, given in {"s": records, **more}.items():
        write_records(folder / name, given, {})
        config.data.sources[name] = SourceConfig(str(folder / name))
    return data_lines(config, open_sources(config, "train"))


def absent(number: int, name: str = "a"):
    samples = [Sample("s", "I", [Turn("user", "Segment it."), Turn("assistant", "None.")], [Target(1, "liver", absent=True)])] * 9
    return dataclasses.replace(handmade.record(number), id=f"{name}{number}", group=f"{name}{number}", samples=samples)


def test_objects_narrower_than_cells_are_counted(tmp_path):
    """SAM frame 64 of a 56 pixels wide image, target 32: a cell is 1.75 pixels."""
    records = []
    for number, side in enumerate([1, 1, 3, 3, 3, 4, 8, 16, 16, 16]):
        mask = np.zeros((handmade.HEIGHT, handmade.WIDTH), bool)
        mask[5:30, 7 : 7 + side] = True
        records.append(dataclasses.replace(handmade.record(number), masks=[encode_mask(mask, "l", "liver")], samples=[]))
        records[-1].samples = [s for s in handmade.record(number).samples if s.perspective == "vqa"]
    text = lines_of(tmp_path, records)["objects"]
    assert text.startswith("20.0% of 10 masks are narrower than a cell of the 32² target, 50.0% than two; these are hardly learnt: crop")
    assert (
        lines_of(tmp_path / "more", records[6:])["objects"] == "0.0% of 4 masks are narrower than a cell of the 32² target, 0.0% than two"
    )


def test_the_share_without_a_target_is_that_of_the_draws(tmp_path):
    plain = [handmade.record(i) for i in range(4)]
    assert lines_of(tmp_path / "a", plain)["targets"] == "0.0% of the samples of I to IV segment nothing"
    mixed = lines_of(tmp_path / "b", plain, other=[absent(i) for i in range(2)])["targets"]
    weights = tiny_config().data.weights
    share = weights["I"] / 2 / sum(weights[p] for p in ("I", "II", "III", "IV"))  # half of I is of the other source
    assert mixed == f"{share:.1%} of the samples of I to IV segment nothing"
    alone = lines_of(tmp_path / "c", [absent(i) for i in range(3)])["targets"]
    assert alone.startswith("100.0% of the samples of I to IV segment nothing; ") and "earlier data" in alone


@pytest.mark.parametrize("max_turns, told", [
    (1, "3 conversations have more user turns than config.model.max_turns (1) and are split into 9 samples; 4 would keep all whole"),
    (2, "2 conversations have more user turns than config.model.max_turns (2) and are split into 4 samples; "
        "1 shorter ones are whole; 4 would keep all whole"),
    (4, "3 conversations of several turns, all whole"),
])  # fmt: skip
def test_what_becomes_of_conversations_is_said(tmp_path, max_turns, told):
    records = []
    for number, turns in enumerate([1, 2, 3, 4]):
        texts = [Turn(role, "What is this") for _ in range(turns) for role in ("user", "assistant")]
        records.append(dataclasses.replace(handmade.record(number), samples=[Sample(f"t{number}", "vqa", texts)]))
    assert lines_of(tmp_path, records, max_turns)["turns"] == told


def test_damaged_records_and_missing_masks_are_left_out(tmp_path):
    records = [dataclasses.replace(handmade.record(i), masks=[], samples=handmade.record(i).samples[8:]) for i in range(3)]
    assert lines_of(tmp_path, records) == {}
