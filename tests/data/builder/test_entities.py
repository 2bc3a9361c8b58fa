"""Raw class names to canonical structures."""

import csv
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder import entities
from mimo_jax.data.builder.entities import ENTITIES, ancestors, canonical, is_nameless, is_union, mentions
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.readers.label_tables import TOTALSEGMENTATOR

DATASETS = [
    "",
    "AMOS2022",
    "BraTS2021",
    "crass",
    "sz_cxr",
    "ISLES_SISS",
    "isic2018_task1",
    "KiTS2021",
    "MSD_Lung",
    "kvasir_seg",
    "Brain_PTM",
]
words = st.sampled_from(
    ["left", "right", "L", "r", "Left", "union", "lung", "Kidney", "rib", "9", "T9", "vertebrae", "lobe", "upper", "tumour", "lesion",
    "lesions",
     "the", "class7", "non-enhancing", "optic", "disk", "x", "Ünïcode", "ß", "İ", "-", "+", "", "ventricle"]
)  # fmt: skip
names = st.one_of(
    st.text(max_size=20),
    st.lists(words, max_size=6).flatmap(lambda parts: st.sampled_from(["_", " ", "__", " - "]).map(lambda gap: gap.join(parts))),
    st.sampled_from(sorted(ENTITIES)),
)


@settings(max_examples=600)
@given(name=names, dataset=st.sampled_from(DATASETS), modality=st.sampled_from(["", *MODALITIES]))
def test_every_name_is_one_structure_and_its_own_name_is_too(name, dataset, modality):
    entity = canonical(name, dataset, modality)
    assert entity == canonical.__wrapped__(name, dataset, modality) == canonical(entity.name, dataset, modality)
    assert entity == canonical(name.upper() if name.isascii() else name, dataset, modality)
    assert entity.known == (entity.name in ENTITIES) and (not entity.known or entity == ENTITIES[entity.name])
    assert entity.name == " ".join(entity.name.split()) and "_" not in entity.name
    assert entity.laterality in ("", "left", "right") and entity.laterality != "left" or "right" not in entity.name.split()


@settings(max_examples=300)
@given(name=names, dataset=st.sampled_from(DATASETS))
def test_left_and_right_are_kept_apart(name, dataset):
    sides = [canonical(f"{side} {name}", dataset) for side in ("left", "right")]
    assert sides[0].name != sides[1].name
    if not {*entities._SIDES, "union", "the"} & set(entities._words(name)):
        assert [side.laterality for side in sides] == ["left", "right"]
        assert sides == [canonical(f"{name}_{side}", dataset) for side in ("left", "right")]


@pytest.mark.parametrize("raw", ["Zebra_Stripe", "class12", "left", "frobnicator left", "T9x"])
def test_unknown_names_pass_through(raw):
    entity = canonical(raw)
    assert not entity.known and sorted(entity.name.split()) == sorted(raw.casefold().replace("_", " ").split()) and not entity.kind


@pytest.mark.parametrize("raw, name", {
    "kidney_left": "left kidney", "Kidney_R": "right kidney", "left_kidney": "left kidney", "lung_upper_lobe_left": "left lung upper lobe",
    "vertebrae_T9": "vertebra T9", "VERTEBRAE_L5": "vertebra L5", "rib_left_9": "left rib 9", "rib_right_12": "right rib 12",
    "heart_atrium_left": "left heart atrium", "left_ventricle": "left heart ventricle", "left ventricle cavity": "left heart ventricle",
    "iliac_vena_left": "left iliac vein", "clavicula_right": "right clavicle", "autochthon_left": "left autochthonous back muscle",
    "costal_cartilages": "costal cartilage", "atrial_appendage_left": "left atrial appendage", "hip_left": "left hip", "Lungs": "lung",
    "union_lung": "lung", "union_union_liver": "liver", "the left lung": "left lung", "liver tumour": "liver tumor",
    "oesophagus": "esophagus",
    "optic_disk": "optic disc", "haemorrhages": "hemorrhage", "polyps": "polyp", "nuclei": "cell nucleus", "gall_bladder": "gallbladder",
    "COVID_lesion": "covid-19 lesion", "kidney_cyst_right": "right kidney cyst", "inferior_vena_cava": "inferior vena cava",
    "portal_vein_and_splenic_vein": "portal vein and splenic vein", "non_enhancing_tumor": "non-enhancing tumor",
    "small intestine": "small bowel",
}.items())  # fmt: skip
def test_names_of_many_sources(raw, name):
    assert canonical(raw).name == name and canonical(raw).known


@pytest.mark.parametrize("raw, dataset, modality, name", [
    ("left", "crass", "X-ray", "left clavicle"), ("right", "sz_cxr", "X-ray", "right lung"),
    ("lesion", "isic2016_task1", "dermoscopy", "skin lesion"),
    ("lesion", "ISLES2022", "MR", "ischemic stroke lesion"), ("tumor", "BraTS2021", "MR", "brain tumor"),
    ("cancer", "MSD_Lung", "CT", "lung tumor"),
    ("tumor", "KiTS2021", "CT", "kidney tumor"), ("edema", "BraTS2018", "MR", "peritumoral edema"), ("edema", "other", "MR", "edema"),
    ("tumor", "other", "CT", "tumor"), ("LV", "ACDC", "MR", "left heart ventricle"), ("disc", "gamma", "fundus", "optic disc"),
    ("vessel", "x", "fundus", "retinal vessel"), ("vessel", "x", "CT", "blood vessel"), ("head", "HC18", "ultrasound", "fetal head"),
])  # fmt: skip
def test_what_a_source_means(raw, dataset, modality, name):
    assert canonical(raw, dataset, modality).name == name


def test_all_classes_of_totalsegmentator_are_known_and_apart():
    assert len({canonical(name).name for name in TOTALSEGMENTATOR}) == 117 and all(canonical(name).known for name in TOTALSEGMENTATOR)
    for name in TOTALSEGMENTATOR:
        side = next((side for side in ("left", "right") if f"_{side}" in name), "")
        assert canonical(name).laterality == side == next((word for word in canonical(name).name.split() if word in ("left", "right")), "")


def test_parts_sites_and_unions():
    assert (
        ancestors("left lung upper lobe") == ("left lung", "lung")
        and ancestors("left kidney") == ("kidney",)
        and ancestors("nothing") == ()
    )
    assert ancestors("enhancing tumor") == ("tumor core", "brain tumor", "brain lesion") and ancestors("optic cup") == (
        "optic disc",
        "retina",
        "eye",
    )
    assert (ENTITIES["liver cyst"].site, ENTITIES["left kidney cyst"].site, ENTITIES["melanoma"].site) == ("liver", "left kidney", "skin")
    assert "liver" not in ancestors("liver cyst") and ENTITIES["liver"].site == ""
    assert is_union("union_lung") and is_union("Union lung") and not is_union("lung") and not is_union("reunion")


@pytest.mark.parametrize("raw, dataset, nameless", [
    ("left", "", True), ("left", "crass", False), ("class3", "", True), ("Label_12", "", True), ("right class2", "", True), ("7", "", True),
    ("foreground", "", True), ("", "", True), ("liver", "", False), ("zebra", "", False), ("classroom", "", False),
    ("left zebra", "", False),
])  # fmt: skip
def test_classes_that_name_nothing(raw, dataset, nameless):
    assert is_nameless(raw, dataset) == nameless


def test_table_is_complete():
    """Every parent and site is there, no structure is its own ancestor, kinds and CUIs are well formed and CUIs stand once."""
    for name, entity in ENTITIES.items():
        assert entity.name == name and {entity.parent, entity.site} <= {"", *ENTITIES}
        assert name not in ancestors(name) and len(ancestors(name)) < 6
        assert entity.kind in ("organ", "part", "bone", "muscle", "vessel", "tissue", "lesion", "cell", "device")
        assert not entity.cui or (entity.cui[0] == "C" and len(entity.cui) == 8 and entity.cui[1:].isdecimal())
        assert entity.site == "" or (entity.kind == "lesion" and ENTITIES[entity.site].kind != "lesion")
        assert canonical(name) == entity
    cuis = [entity.cui for entity in ENTITIES.values() if entity.cui]
    assert len(cuis) == len(set(cuis)) > 50 and len(ENTITIES) > 500
    for entity in ENTITIES.values():
        for synonym in entity.synonyms:
            assert canonical(synonym) == entity, (entity.name, synonym)


def test_what_is_known_of_structures_is_of_structures_here():
    assert set(KNOWLEDGE) <= set(ENTITIES)


def test_an_alias_of_two_structures_is_refused():
    with pytest.raises(ValueError, match="'Gut' is an alias of both colon and small bowel"):
        entities._index({"colon": ["colon", "gut"], "small bowel": ["small bowel", "Gut"]})
    assert entities._index({"a": ["a", "x@m"], "b": ["b", "x@n"]})[1] == {"m": {"x": "a"}, "n": {"x": "b"}}


def test_table_travels_with_the_package():
    setup = (Path(__file__).resolve().parents[3] / "setup.py").read_text()
    assert '"mimo_jax.data.builder": ["*.csv"' in setup and entities.TABLE.endswith(".csv")
    lines = resources.files("mimo_jax.data.builder").joinpath(entities.TABLE).read_text().splitlines()
    rows = list(csv.reader(line for line in lines if not line.startswith("#")))
    assert {len(row) for row in rows} == {6} and len({row[0] for row in rows}) == len(rows)


def test_mentions_of_structures_in_a_text():
    def named(text):
        return [(text[m.start : m.end], m.entity.name) for m in mentions(text)]

    assert named("Where are the LUNGS, and a brain tumour?") == [("LUNGS", "lung"), ("brain tumour", "brain tumor")]
    assert named("the left lung upper lobe") == [("left lung upper lobe", "left lung upper lobe")]
    assert named("Is it on the left, heart?") == [("heart", "heart")]
    assert named("What is this?") == named("") == named("请分割肝脏") == []
