"""SA-Med2D-20M by its names, and the layout of the SAM-Med2D demo."""

import json
from dataclasses import replace

import pytest

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder.readers.sa_med2d import MODALITY, Name
from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import image, listed, write_json

CLASSES = {"AMOS": {"liver": 0, "spleen": 1, "union_lung": 2}, "WORD": {"spleen": "0000", "liver": "0001"},
"ichallenge_adam_task2": {"optic_disk": 0},
           "brain-growth": {"brain": 0}, "odd--name": {"x": 0}, "crass": {"left": 3}, "other": {"left": 3, "class4": 4,
           "zebra": 5},
           "unions": {"liver": 0, "union_lung": 1, "union_liver_and_zebra": 2}}  # fmt: skip
INDEX = {
    "ct_00--AMOS--case_1--z_0040": ["0000_000", "0001_000", "0001_001", "0002_000"],
    "mr_t1ce--AMOS--case_1--x_0007": ["0000_000"],
    "ct_00--WORD--a--b--y_0001": ["0000_000", "0009_000"],
    "fundus_photography--ichallenge_adam_task2--N1--2d_none": ["0000_000"],
    "mr_t1--brain-growth--c--x_0001": ["0000_000"],
    "pet_00--AMOS--c--x_0001": ["0000_000"],
    "x_ray--crass--c--2d_none": ["0003_000"],
    "x_ray--other--c--2d_none": ["0003_000", "0004_000", "0005_000"],
    "ct_00--unions--c--2d_none": ["0000_000", "0001_000", "0002_000"],
    "gamma_ray--AMOS--c--2d_none": [],
    "ct_00_AMOS_c": [],
}


def tree(root, index=INDEX, classes=CLASSES):
    names = {f"images/{stem}.png": [f"masks/{stem}--{label}.png" for label in labels] for stem, labels in index.items()}
    write_json(root / "SAMed2D_v1.json", names)
    write_json(root / "SAMed2D_v1_class_mapping_id.json", classes)
    return root


def test_full_data_set(tmp_path):
    root = tree(tmp_path / "SAMed2Dv1")
    items, skipped = listed("sa-med2d", root, licence="CC BY-NC")
    assert listed("sa-med2d", tmp_path)[0] == [replace(item, licence="") for item in items]
    by_name = {item.id: item for item in items}
    assert len(items) == 7 and len(by_name["ct_00--AMOS--case_1--z_0040"].masks) == 4
    first = items[0]
    assert (first.modality, first.dataset, first.group, first.slice_axis, first.slice_index) == ("CT", "AMOS", "AMOS/case_1", "z", 40)
    assert [(m.class_raw, m.instance) for m in first.masks] == [("liver", 0), ("spleen", 0), ("spleen", 1), ("union_lung", 0)]
    assert first.masks[2].file == str(root / "masks/ct_00--AMOS--case_1--z_0040--0001_001.png")
    assert (first.licence, first.complete, first.split, first.image) == ("CC BY-NC", True, "", str(root / "images" / f"{first.id}.png"))
    assert items[1].group == first.group and items[1].modality == "MR"  # two sequences of one patient
    word = by_name["ct_00--WORD--a--b--y_0001"]
    assert (word.group, [m.class_raw for m in word.masks], word.complete) == ("WORD/a--b", ["spleen"], False)
    eye = by_name["fundus_photography--ichallenge_adam_task2--N1--2d_none"]
    assert eye.masks[0].inverted and (eye.slice_axis, eye.slice_index) == ("", -1)
    assert by_name["x_ray--crass--c--2d_none"].modality == "X-ray" and by_name["x_ray--crass--c--2d_none"].masks[0].class_raw == "left"
    assert [m.class_raw for m in by_name["x_ray--other--c--2d_none"].masks] == ["zebra"]
    reasons = dict(skipped)
    assert len(skipped) == 8 and reasons["brain-growth"] == "the images of this data set are masks"
    assert reasons["AMOS, modality pet_00"] == "is not a modality of records" and reasons["AMOS, modality gamma_ray"] == "is unknown"
    assert "its name is not" in reasons["ct_00_AMOS_c"] and "has no name in" in reasons["WORD, class 0009"]
    unions = by_name["ct_00--unions--c--2d_none"]
    assert [m.class_raw for m in unions.masks] == ["liver", "union_lung"] and unions.complete
    assert reasons["unions, class union_liver_and_zebra"].startswith("is a union of classes")
    assert not by_name["x_ray--other--c--2d_none"].complete
    assert {"other, class left", "other, class class4"} <= set(reasons)


def test_every_token_of_the_data_set_has_a_modality():
    assert len(MODALITY) == 34 and set(MODALITY.values()) == {"", *MODALITIES} - {"pathology"}
    for token, modality in MODALITY.items():
        name = Name.parse(f"{token}--D--c--z_0003")
        assert name == Name(modality, "D", "c", "z", 3) if modality else name == (f"D, modality {token}", "is not a modality of records")


def test_skipped_entries_are_counted(tmp_path):
    items, skipped = listed("sa-med2d", tree(tmp_path, {f"mr_t1--Brain_PTM--c{i}--x_0001": ["0000_000"] for i in range(500)}))
    assert items == [] and skipped == [("Brain_PTM", "the images of this data set are masks (500 times)")]


@pytest.mark.parametrize("text, message", [
    ("", "is not a JSON object"), ("[]", "is not a JSON object"), ('{"a": ["b"]', "damaged or cut off"),
    ('{"a": ["b"', "damaged or cut off"),
    ('{"a" ["b"]}', "damaged or cut off near character 5"), ('{"a": ["b"]} x', "damaged"),
    ('{"images/ct_00--A--c--z_1.png": 3}', "no list of masks"),
    ('{"images/ct_00--A--c--z_1.png": [3]}', "no list of masks"), ("\x00", "is not a JSON object"),
])  # fmt: skip
def test_damaged_indices(tmp_path, text, message):
    tree(tmp_path)
    (tmp_path / "SAMed2D_v1.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        listed("sa-med2d", tmp_path)
    assert str(tmp_path / "SAMed2D_v1.json") in str(error.value) and "\n" not in str(error.value)


def test_an_index_cut_off_anywhere_is_one_error(tmp_path):
    whole = (tree(tmp_path) / "SAMed2D_v1.json").read_text()
    for end in range(0, len(whole) - 1, 37):
        (tmp_path / "SAMed2D_v1.json").write_text(whole[:end])
        with pytest.raises(DataError):
            listed("sa-med2d", tmp_path)


@pytest.mark.parametrize("classes", [[], {"AMOS": ["liver"]}, {"AMOS": {"liver": "one"}}, {"AMOS": {"liver": None}}])
def test_damaged_classes(tmp_path, classes):
    tree(tmp_path, classes=classes)
    with pytest.raises(DataError, match="class_mapping_id.json: is not {dataset: {class: id}}"):
        listed("sa-med2d", tmp_path)
    (tmp_path / "SAMed2D_v1_class_mapping_id.json").unlink()
    with pytest.raises(DataError, match="no such file; it maps class ids to names"):
        listed("sa-med2d", tmp_path)


def demo(root):
    write_json(root / "image2label_train.json", {
        "data_demo/images/amos_0006_90.png": ["data_demo/masks/amos_0006_90_liver_000.png",
        "data_demo/masks/amos_0006_90_hip_left_001.png"],
        "data_demo/images/s0114_111.png": ["data_demo/masks/s0114_111_vertebrae_T9_000.png"],
    })  # fmt: skip
    write_json(root / "label2image_test.json", {
        "data_demo/masks/s0619_32_colon_000.png": "data_demo/images/s0619_32.png",
        "data_demo/masks/s0619_32_inferior_vena_cava_000.png": "data_demo/images/s0619_32.png",
        "data_demo/masks/s0619_33_aorta_000.png": "data_demo/images/s0619_32.png",
        "data_demo/masks/s0114_111_aorta_000.png": "data_demo/images/s0114_111.png",
    })  # fmt: skip
    return root


def test_demo(tmp_path):
    root = demo(tmp_path / "data_demo")
    image(root / "images/s0619_32.png")
    items, skipped = listed("sa-med2d", root, modality="CT")
    assert [(i.id, i.split, i.group, i.complete) for i in items] == [
        ("amos_0006_90", "train", "data_demo/amos_0006", False), ("s0114_111", "train", "data_demo/s0114", False),
        ("s0619_32", "test", "data_demo/s0619", False),
    ]  # fmt: skip
    assert [(m.class_raw, m.instance) for i in items for m in i.masks] == [
        ("liver", 0), ("hip_left", 1), ("vertebrae_T9", 0), ("colon", 0), ("inferior_vena_cava", 0)
    ]  # fmt: skip
    assert items[2].image == str(root / "images/s0619_32.png") and items[0].modality == "CT"
    assert skipped == [
        ("data_demo/masks/s0619_33_aorta_000.png", "its name is not IMAGE_CLASS_INSTANCE"),
        ("data_demo/images/s0114_111.png", "is also in image2label_train.json"),
    ]
    assert [item.id for item in listed("sa-med2d", root / "label2image_test.json", modality="CT")[0]] == ["s0619_32", "s0114_111"]
    with pytest.raises(DataError, match="give --modality, one of CT"):
        listed("sa-med2d", root)
    (root / "image2label_train.json").write_text(json.dumps({"a.png": 3}))
    with pytest.raises(DataError, match="image2label_train.json: a.png names neither"):
        listed("sa-med2d", root, modality="CT")
