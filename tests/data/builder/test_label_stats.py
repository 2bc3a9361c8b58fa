"""What a missing mask says, and how often what is asked."""

from collections import Counter

import pytest

from mimo_jax.data.builder.label_stats import LabelCounts, LabelStats, overlapping
from tests.data.builder.bodies import plain_record


def test_a_whole_and_its_part_overlap_and_a_lesion_does_not():
    assert overlapping("lung", "left lung") and overlapping("left lung upper lobe", "lung") and overlapping("liver", "liver")
    assert not overlapping("left lung", "right lung") and not overlapping("liver", "liver cyst") and not overlapping("gizzard", "liver")


def test_what_is_always_there_is_not_asked_about():
    label_stats = LabelStats.from_records([plain_record(["liver"], name="a"), plain_record(["liver"], name="b")])
    assert label_stats.asking_rates == {"liver": (0.0, 0.0, 0.0)}


def test_foreign_entities_need_elsewhere():
    records = [plain_record(["liver"], name="a"), plain_record(["keel"], modality="MR", name="b")]
    assert (
        LabelStats.from_records(records, elsewhere=True).foreign(records[0]) == ["keel"]
        and LabelStats.from_records(records).foreign(records[0]) == []
    )


def test_neither_wholes_nor_parts_of_shown_entities_are_absent():
    records = [plain_record(names, name=str(i)) for i, names in enumerate((["lung"], ["left lung"], ["liver"], ["left lung", "liver"]))]
    label_stats = LabelStats.from_records(records)
    assert [set(label_stats.known_absent(record)) for record in records] == [{"liver"}, {"liver"}, {"left lung", "lung"}, set()]
    assert label_stats.absence["ward", "CT"] == {"left lung": 0.25, "liver": 0.5, "lung": 0.25}


def test_labels_that_are_not_complete_say_nothing():
    counts = LabelCounts()
    for number in range(10):
        counts.add("ward", "CT", ["liver", "spleen"] if number % 2 else ["liver"], complete=False)
    label_stats = LabelStats.from_counts(counts)
    record = plain_record(["liver"])
    # No complete image has a spleen.
    assert label_stats.known_absent(record, complete=False) == [] == label_stats.known_absent(record)
    assert label_stats.known_absent(record, absent=["spleen", "liver"], complete=False) == ["spleen"]
    assert all(rates == (0.0, 0.0, 0.0) for rates in label_stats.asking_rates.values())


def test_one_image_of_incomplete_labels_vouches_for_nothing():
    """A structure that only such images show is not known to be absent in complete ones."""
    counts = LabelCounts()
    counts.add("ward", "CT", ["liver", "rumen"], complete=False)
    counts.add("ward", "CT", ["liver", "spleen"])
    counts.add("ward", "CT", ["liver"], times=2)
    label_stats = LabelStats.from_counts(counts)
    assert label_stats.known_absent(plain_record(["liver"])) == ["spleen"]
    assert label_stats.absence["ward", "CT"] == {"liver": 0.0, "rumen": 0.0, "spleen": 0.5}


def test_tallies_add_up():
    kinds = [(["liver"], (), True), (["lung", "liver"], (), True), (["spleen"], ("liver",), False), (["liver"], ("polyp",), True)]
    whole, parts = LabelCounts(), [LabelCounts(), LabelCounts()]
    for number, (entities, absent, complete) in enumerate(kinds * 3):
        whole.add("ward", "CT", entities, absent, complete)
        parts[number % 2].add("ward", "CT", entities, absent, complete)
    parts[0] += parts[1]
    assert parts[0] == whole
    many = LabelCounts()
    for entities, absent, complete in kinds:
        many.add("ward", "CT", entities, absent, complete, times=3)
    assert many == whole and LabelStats.from_counts(many) == LabelStats.from_counts(whole)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_rates_balance_yes_and_no(elsewhere):
    counts = LabelCounts()
    for number in range(24):
        shown = [name for name, every in (("liver", 2), ("spleen", 3), ("aorta", 4), ("left lung", 6), ("lung", 5)) if number % every == 0]
        counts.add("ward", "CT", shown, absent=["polyp"] if number % 8 == 1 else [], complete=number % 3 != 2)
        counts.add("yard", "MR", ["brain"] if number % 5 else [])
    label_stats = LabelStats.from_counts(counts, elsewhere)
    sums = Counter()
    for entity, (yes, lacks, foreign) in label_stats.asking_rates.items():
        assert max(yes, lacks, foreign) <= 1 + 1e-9
        for key, share in label_stats.share.items():
            sums[entity, "yes"] += share * yes * label_stats.presence[key].get(entity, 0)
            sums[entity, "no"] += share * lacks * label_stats.absence[key].get(entity, 0)
            sums[entity, "no"] += share * foreign * (entity not in label_stats.presence[key])
    for entity in label_stats.entities:
        assert sums[entity, "yes"] == pytest.approx(sums[entity, "no"]), entity
    assert sums["liver", "yes"] > 0
