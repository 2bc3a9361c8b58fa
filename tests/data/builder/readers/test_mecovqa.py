"""MeCoVQA: painted answers and pointed questions about images of SA-Med2D-20M."""

import pytest

from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import listed, write_json

STEM = "ct_00--AMOS--case_1--z_0040"
MASK = {"liver": f"masks/{STEM}--0000_000.png", "left kidney": f"masks/{STEM}--0001_000.png", "bad": f"masks/{STEM}--0009_000.png"}


def entry(*values, stem=STEM, **more):
    talk = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"image": f"images/{stem}.png", "conversations": talk, **more}


def tree(root, *entries):
    write_json(root / "SAMed2Dv1/SAMed2D_v1_class_mapping_id.json", {"AMOS": {"liver": 0, "kidney_left": 1}, "brain-growth": {"brain": 0}})
    write_json(root / "MeCoVQA_train.json", list(entries))
    return root


def samples(tmp_path, *entries):
    (item,), skipped = listed("mecovqa", tree(tmp_path, *entries))
    for sample in item.samples:
        for target in sample.get("targets", ()):
            start, end = target["span"]
            assert sample["turns"][target["turn"]]["text"][start:end].casefold() == target["entity"]
        assert not any(mark in turn["text"] for turn in sample["turns"] for mark in ("<", ">", "  ", ".png"))
    return item, skipped


def test_kinds_of_questions(tmp_path):
    liver, kidney = MASK["liver"], MASK["left kidney"]
    item, skipped = samples(
        tmp_path,
        entry("<image>\nSegment the liver.", f"Sure, the liver is <SEG>.<mask>{liver}</mask>"),
        entry("Where is it?", f"It is <SEG>. <mask>{kidney}</mask>"),
        entry(f"What is the function of <region>{liver}</region>?", "It makes bile.", answer_type="open"),
        entry(f"Is the region <region>{kidney}</region> paired?", "Yes"),
        entry(f"What is <region>{liver}</region>?", f"This is <SEG>.<mask>{liver}</mask>"),
        entry("Which plane is shown?", "Axial"),
        entry("Outline it.", f"Here is the liver: <SEG><mask>{liver}</mask>."),
        entry("Segment both.", f"Here <SEG><mask>{liver}</mask> and <SEG><mask>{kidney}</mask>."),
    )
    assert (item.id, item.modality, item.dataset, item.group, item.split) == (STEM, "CT", "AMOS", "AMOS/case_1", "train")
    assert (item.slice_axis, item.slice_index, item.image) == ("z", 40, str(tmp_path / f"SAMed2Dv1/images/{STEM}.png"))
    assert [(m.class_raw, m.file) for m in item.masks] == [
        ("liver", str(tmp_path / "SAMed2Dv1" / liver)),
        ("kidney_left", str(tmp_path / "SAMed2Dv1" / kidney)),
    ]
    assert not skipped and not item.complete
    one, two, role, paired, name, plane, here, both = item.samples
    assert (one["perspective"], one["turns"][1]["text"]) == ("I", "Sure, the liver is outlined.")
    assert one["targets"] == [{"turn": 1, "entity": "liver", "span": [10, 15], "mask": [0]}]
    assert (two["turns"][1]["text"], two["targets"][0]["mask"]) == ("It is the left kidney.", [1])
    assert role["turns"][0] == {"role": "user", "text": "What is the function of the marked region?", "prompted": [0]}
    assert (role["perspective"], role["answer_type"], role["references"]) == ("vqa", "open", ["It makes bile."])
    assert (
        paired["turns"][0]["text"] == "Is the region paired?"
        and paired["answer_type"] == "closed"
        and paired["turns"][0]["prompted"] == [1]
    )
    assert (name["perspective"], name["turns"][1]["text"], name["turns"][0]["prompted"]) == ("II", "This is the liver.", [0])
    assert plane["perspective"] == "vqa" and "prompted" not in plane["turns"][0]
    assert here["turns"][1]["text"] == "Here is the liver."
    assert both["turns"][1]["text"] == "Here the liver and the left kidney." and [t["mask"] for t in both["targets"]] == [[0], [1]]


def test_what_is_left_out(tmp_path):
    bad = "mr_t1--brain-growth--c--x_0001"
    items, skipped = listed("mecovqa", tree(
        tmp_path, entry("What?", f"<SEG><mask>{MASK['bad']}</mask>"), entry("What?", "It is <SEG>."), entry("q", "a", stem=bad),
        entry("q?", "a"),
    ))  # fmt: skip
    assert len(items) == 1 and len(items[0].samples) == 1
    assert [what for what, _ in skipped] == ["AMOS, class 0009", f"images/{STEM}.png", "brain-growth"]


def test_a_mask_outside_an_answer(tmp_path):
    tree(tmp_path, entry(f"Look: <SEG> <mask>{MASK['liver']}</mask>", "a"))
    with pytest.raises(DataError, match="MeCoVQA_train.json, entry 1: a <mask> is allowed only in an answer with <SEG>"):
        listed("mecovqa", tmp_path)
