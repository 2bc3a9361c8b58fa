"""Sources of questions and answers: LLaVA-Med, VQA-RAD, SLAKE, PathVQA."""

import pickle

import pytest

from mimo_jax.data.builder.readers.conversations import modality_of, question
from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import image, listed, write_json, write_lines


def talk(*values, spelt="conversations", **more):
    return {spelt: [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)], **more}


def asked(item):
    return [(s["turns"][0]["text"], s["turns"][1]["text"], s["answer_type"]) for s in item.samples]


def test_llava_med(tmp_path):
    (tmp_path / "images").mkdir()
    entries = [
        {"id": "1", "image": "a.jpg", **talk("<image>\nWhat is  shown?", "A chest film."), "domain": {"chest_xray": True, "mri": False}},
        {"id": "2", "image": "a.jpg", **talk("Is it normal?\n<image>", "No", spelt="conversatons"), "answer_type": "CLOSED"},
        {"id": "3", "image": "b.jpg", **talk("What is this?", "A liver on CT.", "Which side?", "Right.")},
        {"id": "4", "image": "c.jpg", **talk("What is this?", "A picture.")},
        {"id": "5", **talk("Hello?", "Hello.")},
        {"id": "6", "image": "b.jpg", **talk("<image>", "Hello.")},
    ]
    items, skipped = listed("llava-med", write_json(tmp_path / "train.json", entries))
    assert [(i.id, i.modality, i.split, i.group, i.complete) for i in items] == [
        ("a.jpg", "X-ray", "train", f"{tmp_path.name}/a", False), ("b.jpg", "CT", "train", f"{tmp_path.name}/b", False),
    ]  # fmt: skip
    assert items[0].image == str(tmp_path / "images/a.jpg")
    assert asked(items[0]) == [("What is shown?", "A chest film.", "open"), ("Is it normal?", "No", "closed")]
    assert items[0].samples[1]["references"] == ["No"] and items[0].samples[1]["perspective"] == "vqa"
    assert [t["role"] for t in items[1].samples[0]["turns"]] == ["user", "assistant"] * 2 and "answer_type" not in items[1].samples[0]
    assert skipped[:2] == [("train.json, entry 5", "has no image"), ("b.jpg", "an empty question or answer")]
    assert skipped[2:] == [("c.jpg", "the modality is unknown; --modality sets it for all such images")]
    lined = write_lines(tmp_path / "lines/train.jsonl", entries)
    assert [i.id for i in listed("llava-med", lined, modality="MR")[0]] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("entry, message", [
    ({"image": "a"}, "has no conversations"), ({"image": "a", "conversations": [{"from": "human"}]}, "has no conversations"),
    ({"image": "a", **talk("one")}, "does not alternate between human and gpt"),
    ({"image": "a", "conversations": []}, "does not alternate between human and gpt"),
    ({"image": ["a"], **talk("q", "a")}, "image is missing or not a text"),
])  # fmt: skip
def test_damaged_conversations(tmp_path, entry, message):
    path = write_json(tmp_path / "train.json", [{"image": "b", **talk("q", "a")}, entry])
    with pytest.raises(DataError, match=f"train.json, entry 2: .*{message}"):
        listed("llava-med", path, modality="CT")


def rad(image_name, ask, answer, phrase, organ="HEAD", **more):
    return {"image_name": image_name, "question": ask, "answer": answer, "phrase_type": phrase, "image_organ": organ, **more}


def test_vqa_rad(tmp_path):
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    write_json(tmp_path / "VQA_RAD Dataset Public.json", [
        rad("s1.jpg", "Are regions infarcted?", "Yes", "freeform", answer_type="CLOSED ", question_type="PRES"),
        rad("s1.jpg", "What is this?", "an MRI", "para", answer_type="OPEN"),
        rad("s2.jpg", "How many nodules?", 3, "freeform", "CHEST", answer_type="OPEN"),
        rad("s2.jpg", "Is it a nodule?", "No", "test_freeform", "CHEST", answer_type="CLOSED"),
        rad("s3.jpg", "Is the liver enlarged?", "normal", "test_para", "ABD"),
        rad("s4.jpg", "Is this a CT?", "no", "freeform"),
    ])  # fmt: skip
    items, skipped = listed("vqa-rad", tmp_path)
    assert [(i.id, i.modality, i.split) for i in items] == [
        ("s1.jpg", "MR", "train"),
        ("s2.jpg", "X-ray", "test"),
        ("s3.jpg", "CT", "test"),
    ]
    assert asked(items[0]) == [("Are regions infarcted?", "Yes", "closed"), ("What is this?", "an MRI", "open")]
    assert items[0].samples[0]["kind"] == "pres" and "kind" not in items[0].samples[1]
    assert asked(items[1]) == [("Is it a nodule?", "No", "closed")] and asked(items[2])[0][2] == "open"
    assert [what for what, _ in skipped] == ["s2.jpg", "s4.jpg"] and skipped[0][1] == "a question of train whose image is also in test"
    assert items[0].image == str(tmp_path / "VQA_RAD Image Folder/s1.jpg")
    (tmp_path / "VQA_RAD Dataset Public.json").rename(tmp_path / "trainset.json")
    assert {i.split for i in listed("vqa-rad", tmp_path)[0]} == {"train"}


def slake(name, ask, answer, lang="en", **more):
    return {"img_name": name, "question": ask, "answer": answer, "q_lang": lang, "modality": "MRI", "answer_type": "OPEN", **more}


def test_slake(tmp_path):
    (tmp_path / "imgs").mkdir()
    write_json(
        tmp_path / "train.json",
        [slake("xmlab1/source.jpg", "Which organ?", "Liver", content_type="Organ"), slake("xmlab1/source.jpg", "图", "肝", "zh")],
    )
    write_json(tmp_path / "validate.json", [slake("xmlab2/source.jpg", "Is it?", "Yes", answer_type="CLOSED")])
    write_json(tmp_path / "test.json", [slake("xmlab3/source.jpg", "Left or right?", "Left", answer_type="CLOSED", modality="X-Ray")])
    items, skipped = listed("slake", tmp_path, dataset="slake")
    assert [(i.id, i.modality, i.split, i.group) for i in items] == [
        ("xmlab3/source.jpg", "X-ray", "test", "slake/xmlab3"), ("xmlab1/source.jpg", "MR", "train", "slake/xmlab1"),
        ("xmlab2/source.jpg", "MR", "val", "slake/xmlab2"),
    ]  # fmt: skip
    assert asked(items[0]) == [("Left or right?", "Left", "closed")] and items[1].samples[0]["kind"] == "organ"
    assert skipped == [("train.json, entry 2", "the question is not in English")]
    write_json(tmp_path / "test.json", [{"img_name": "a", "question": "q", "q_lang": "en"}])
    with pytest.raises(DataError, match="test.json, entry 1: answer is missing or not a text"):
        listed("slake", tmp_path)


def test_pathvqa(tmp_path):
    for split in ("train", "test"):
        image(tmp_path / f"images/{split}/{split}_0001.jpg")
        entries = [{"image": f"{split}_0001", "question": "where is it?", "answer": "in the canals"},
                   {"image": f"{split}_0001", "question": "is it benign?", "answer": "yes"}]  # fmt: skip
        path = tmp_path / f"qas/{split}/{split}_qa.pkl"
        path.parent.mkdir(parents=True)
        path.write_bytes(pickle.dumps(entries))
    items, _ = listed("pathvqa", tmp_path)
    assert [(i.id, i.modality, i.split, len(i.samples)) for i in items] == [
        ("train_0001.jpg", "pathology", "train", 2), ("test_0001.jpg", "pathology", "test", 2)
    ]  # fmt: skip
    assert items[0].image == str(tmp_path / "images/train/train_0001.jpg")
    assert [s["answer_type"] for s in items[0].samples] == ["open", "closed"]
    assert listed("pathvqa", tmp_path / "qas/test/test_qa.pkl", dataset=tmp_path.name)[0] == items[1:]
    path.write_bytes(pickle.dumps({"image": "x"}))
    with pytest.raises(DataError, match="test_qa.pkl: is not a list"):
        listed("pathvqa", tmp_path)
    write_json(tmp_path / "val.json", [{"image": "a.png", "question": "q?", "answer": "No."}])
    (item,), _ = listed("pathvqa", tmp_path / "val.json")
    assert (item.split, item.image, item.samples[0]["answer_type"]) == ("val", str(tmp_path / "images/a.png"), "closed")


@pytest.mark.parametrize("texts, modality", [
    ([("What is this?", "A CT of the chest")], "CT"), ([("Is this an MRI?", "No, it is not")], ""), ([("Is this an MRI?", "Yes")], "MR"),
    ([("What plane?", "axial"), ("T2 weighted?", "yes")], "MR"), ([("A CT?", "yes"), ("An MRI?", "yes")], ""),
    ([("Normal x-ray?", "nodule")], "X-ray"),
    ([("Which pathology?", "activity")], ""), ([("H&E?", "yes")], "pathology"),
    ([("What does the fundus image show?", "a disc")], "fundus"),
])  # fmt: skip
def test_modality_that_words_tell(texts, modality):
    assert modality_of([question(*pair) for pair in texts]) == modality
