"""What cannot be in an image, and what may be in it though no label says so."""

import pytest

from mimo_jax.data.builder.body_regions import ABDOMEN, CHEST, HEAD, LEVELS, PELVIS, cannot_show, levels
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import LabelCounts, LabelStats


@pytest.mark.parametrize("modality, labelled, entity", [
    ("fundus", ["optic disc"], "kidney"), ("fundus", ["retinal vessel"], "left lung"), ("CT", ["liver"], "brain tumor"),
    ("CT", ["liver", "kidney"], "optic cup"), ("X-ray", ["left lung"], "prostate cancer"), ("MR", ["prostate cancer"], "lung"),
    ("ultrasound", ["breast tumor"], "fetal head"), ("ultrasound", ["fetal head"], "breast tumor"), ("endoscopy", ["polyp"], "skin lesion"),
    ("dermoscopy", ["skin lesion"], "liver"), ("pathology", ["cell nucleus"], "vertebra L3"), ("MR", ["brain tumor"], "cell nucleus"),
    ("ultrasound", ["brachial plexus nerve"], "liver"),
])  # fmt: skip
def test_what_cannot_be_there(modality, labelled, entity):
    assert cannot_show(modality, labelled, entity)


@pytest.mark.parametrize("modality, labelled, entity", [
    ("CT", ["liver"], "kidney"), ("CT", ["liver"], "heart"), ("CT", ["kidney tumor"], "prostate cancer"), ("X-ray", ["left lung"], "liver"),
    ("X-ray", ["left lung"], "left heart atrium"), ("ultrasound", ["fetal head"], "left lung"), ("MR", ["vertebra L5"], "kidney"),
    ("pathology", ["cell nucleus"], "liver"), ("pathology", ["cell nucleus"], "breast tumor"), ("CT", ["liver"], "skin lesion"),
    ("fundus", ["optic disc"], "retinal vessel"), ("MR", ["brain tumor"], "optic disc"), ("endoscopy", ["polyp"], "gland"),
    ("CT", ["liver", "lymph node"], "brain tumor"), ("CT", ["liver", "unheard-of"], "brain tumor"), ("CT", [], "brain tumor"),
    ("CT", ["liver"], "unheard-of"), ("CT", ["heart", "brain"], "liver"),
])  # fmt: skip
def test_what_may_be_there(modality, labelled, entity):
    assert not cannot_show(modality, labelled, entity)


def test_levels_follow_the_structure_that_holds_it():
    assert levels("liver") == levels("liver tumor") == (ABDOMEN, ABDOMEN) and levels("optic cup") == (HEAD, HEAD)
    assert levels("left lung upper lobe") == (CHEST, CHEST) and levels("prostate cancer") == (PELVIS, PELVIS)
    assert levels("lymph node") is None and levels("unheard-of") is None
    named = {fact.within for fact in KNOWLEDGE.values()}
    assert [name for name in LEVELS if name not in named] == []


def test_an_entity_that_its_kind_of_image_shows_is_never_foreign():
    counts = LabelCounts()
    counts.add("eyes", "fundus", ["optic disc"], complete=False)
    counts.add("bellies", "CT", ["liver"], complete=False, times=2)
    counts.add("bodies", "CT", ["kidney", "brain tumor"], complete=False)
    stats = LabelStats.from_counts(counts, by_region=True)
    assert stats.foreign_to["eyes", "fundus"] == {"liver", "kidney"}
    assert stats.foreign_to["bellies", "CT"] == {"optic disc", "brain tumor"} and stats.foreign_to["bodies", "CT"] == set()
    assert stats.foreign_odds("liver") == 2.0 and stats.foreign_odds("kidney") == 1.0
    assert LabelStats.from_counts(counts).foreign_to["eyes", "fundus"] == set()
