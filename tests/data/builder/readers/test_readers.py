"""Opening readers, and what they share."""

import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.data.builder.readers import KINDS, index_files, open_reader
from mimo_jax.data.builder.readers.reader import case_of, split_of
from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import image, write_json


def test_kinds():
    assert list(KINDS) == ["sa-med2d", "biomedparse", "manifest", "folders", "mecovqa", "llava-med", "vqa-rad", "slake", "pathvqa", "gcg",
                           "dicom-seg", "nifti"]  # fmt: skip


@pytest.mark.parametrize(
    "kind, message", [("sa_med2d", "did you mean sa-med2d"), ("vqarad", "did you mean vqa-rad"), ("zzz", "use one of sa-med2d, ")]
)
def test_unknown_kinds(tmp_path, kind, message):
    with pytest.raises(DataError, match=f"source {kind}: is unknown; {message}"):
        open_reader(kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_paths_with_another_layout(tmp_path, kind):
    with pytest.raises(DataError, match="none: no such file or folder"):
        open_reader(kind, tmp_path / "none")
    with pytest.raises(DataError, match=f"is not a {kind} source; expected ") as error:
        open_reader(kind, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    image(tmp_path / "picture.png")
    with pytest.raises(DataError):
        list(open_reader(kind, tmp_path / "picture.png").items())


@pytest.mark.parametrize("options, message", [
    ({"labls": "x"}, "source folders has no option labls; its options are dataset, entity, labels, licence, mask_threshold, modality"),
    ({"modality": "ct"}, "modality 'ct': use one of CT, MR"),
])  # fmt: skip
def test_options(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_reader("folders", tmp_path, **options)


@pytest.mark.parametrize("options, message", [
    ({"every": "two"}, "option every=two: is not a number"), ({"every": "0"}, "must be 1 or more"),
    ({"min_area": "-3"}, "must be 1 or more"),
    ({"window": "blue"}, "option window=blue: window blue: is unknown"), ({"window": "5,x"}, "is not a number"),
    ({"mask_threshold": "0"}, "option mask_threshold=0: 0 is not a number above 0"), ({"every": 1.5}, "every=1.5: is not a number"),
    ({"window": "5,1"}, "LOW < HIGH"), ({"axis": "top"}, "axis top: give i, j, k, axial"),
])  # fmt: skip
def test_options_as_texts(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_reader("nifti", tmp_path, **options)


def test_cases_of_names():
    names = {"amos_0004_75": "amos_0004", "s0114_111": "s0114", "img_0001": "img_0001", "scan": "scan", "p1_left_3": "p1_left"}
    assert {name: case_of(name) for name in names} == names


def test_splits_of_names():
    names = {"train.json": "train", "image2label_train.json": "train", "validate.json": "val", "MeCoVQA_Complex_VQA_test.json": "test",
             "testset.json": "test", "valid": "val", "data.json": "", "latest.json": ""}  # fmt: skip
    assert {name: split_of(name) for name in names} == names


values = st.recursive(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda v: st.lists(v, max_size=4), max_leaves=8)


@settings(max_examples=60)
@given(content=st.dictionaries(st.text(), values), chunk=st.integers(1, 9), indent=st.sampled_from([None, 1]))
def test_pairs_are_what_json_reads(tmp_path_factory, content, chunk, indent):
    import json

    path = tmp_path_factory.mktemp("pairs") / "index.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    before, index_files._CHUNK = index_files._CHUNK, chunk
    try:
        pairs = index_files.pairs(path)
        assert isinstance(pairs, Iterator) and list(pairs) == list(content.items())
        path.write_text(json.dumps([{"a": value} for value in content.values()], indent=indent), encoding="utf-8")
        assert list(index_files.entries(path)) == [{"a": value} for value in content.values()]
    finally:
        index_files._CHUNK = before


def test_an_index_is_read_in_chunks(tmp_path, monkeypatch):
    path = write_json(tmp_path / "index.json", {f"image{i}": ["mask"] * 3 for i in range(2000)})
    monkeypatch.setattr(index_files, "_CHUNK", 1000)
    held = []
    monkeypatch.setattr(index_files._Text, "more", lambda self, more=index_files._Text.more: (more(self), held.append(len(self.ahead)))[0])
    assert len(list(index_files.pairs(path))) == 2000 and len(held) > 50 and max(held) < 3000
    path.write_text(path.read_text().replace("]", "", 1))  # the first value has no end
    monkeypatch.setattr(index_files, "_MAX_VALUE", 5000)
    with pytest.raises(DataError, match="damaged or cut off near character"):
        list(index_files.pairs(path))
    assert max(held) < 11_000 < path.stat().st_size


def test_invalid_entries(tmp_path):
    for text, message in (("{}", "is not a JSON list"), ("[1]", "entry 1: is not a JSON object"), ('[{"a": 1} {"a": 2}]', "damaged")):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(DataError, match=message):
            list(index_files.entries(tmp_path / "list.json"))
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(DataError, match="line 3: is not JSON"):
        list(index_files.entries(tmp_path / "lines.jsonl"))
    (tmp_path / "list.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(DataError, match="cannot be read"):
        list(index_files.entries(tmp_path / "list.json"))


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/should_never_be_written", "w"))


def test_a_pickle_that_names_code_is_refused(tmp_path):
    path = tmp_path / "qa.pkl"
    path.write_bytes(pickle.dumps([{"image": "a", "n": 1.5}]))
    assert index_files.pickled(path) == [{"image": "a", "n": 1.5}]
    path.write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(DataError, match="not a pickle of plain lists and texts .*it names .*open"):
        index_files.pickled(path)
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(DataError, match="is damaged"):
        index_files.pickled(path)


STEM = "ct_00--AMOS--c--z_1"
TALK = [{"from": "human", "value": f"<image> What is <region>masks/{STEM}--0000_000.png</region>?"},
        {"from": "gpt", "value": f"It is <SEG>.<mask>masks/{STEM}--0000_000.png</mask>"}]  # fmt: skip
# Kind -> (its index, what that may hold); mecovqa's reads the classes of sa-med2d.
INDICES = {
    "llava-med": ("train.json", [{"image": "a.png", "conversations": TALK, "answer_type": "OPEN", "domain": {"mri": True}}]),
    "mecovqa": ("train.json", [{"image": f"images/{STEM}.png", "conversations": TALK, "answer_type": "open"}]),
    "vqa-rad": ("trainset.json", [{"image_name": "a.png", "question": "q?", "answer": 3, "image_organ": "ABD", "phrase_type": "para"}]),
    "slake": ("train.json", [{"img_name": "x/a.png", "question": "q?", "answer": "a", "q_lang": "en", "modality": "CT"}]),
    "pathvqa": ("train.json", [{"image": "a", "question": "q?", "answer": "no"}]),
    "gcg": ("train.json", [{"file_name": "a.png", "caption": "A lung.", "groundings": {
        "lung": {"token_positives": [2, 6], "rle_masks": [{"size": [4, 4], "counts": [3, 4, 9]}]}}}]),
    "sa-med2d": ("SAMed2D_v1.json", {f"images/{STEM}.png": [f"masks/{STEM}--0000_000.png"]}),
    "classes": ("SAMed2D_v1_class_mapping_id.json", {"AMOS": {"liver": 0, "left": 1}}),
    "manifest": ("manifest.jsonl", {
        "id": "a", "image": "a.png", "masks": [{"file": "m.png", "entity": "liver", "annotation": "manual"}], "modality": "CT",
        "group": "g", "split": "val", "absent_entities": ["lung"], "pixel_spacing_mm": [1, 1], "licence": "x", "dataset": "D",
        "source_path": "y"}),
    "nifti": ("dataset.json", {"labels": {"0": "background", "1": "liver"}, "modality": {"0": "CT"}}),
    "folders": ("labels.json", {"1": "liver", "2": "spleen"}),
}  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(allow_nan=False) | st.sampled_from(["", "a", "CT", "<SEG>", "human", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "value", "1", "counts"]), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoilt(draw, value):
    """The value with something in it replaced, or left out, or nothing."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 5)):
        keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
        chosen = draw(st.sampled_from(keys))
        made = value.copy()
        made[chosen] = draw(spoilt(value[chosen]))
        if draw(st.integers(0, 9)) == 0:
            del made[chosen]
        return made
    return draw(anything)


@settings(max_examples=400)
@given(kind=st.sampled_from(sorted(INDICES)), data=st.data())
def test_whatever_an_index_holds_is_read_or_one_error(tmp_path_factory, kind, data):
    root = tmp_path_factory.mktemp("any")
    for folder in ("images", "masks", "imgs", "labelsTr"):
        (root / folder).mkdir()
    image(root / "images/a.png")
    image(root / "masks/a.png")
    for name, content in INDICES[kind], *([INDICES["classes"]] * (kind in ("sa-med2d", "mecovqa"))):
        write_json(root / name, data.draw(spoilt(content)) if name == INDICES[kind][0] else content)
    if kind == "classes":
        kind = "sa-med2d"
        write_json(root / INDICES[kind][0], INDICES[kind][1])
    options = {"labels": str(root / "labels.json")} if kind == "folders" else {}
    try:
        items = list(open_reader(kind, root, modality="CT", **options).items())
    except DataError as error:
        assert "\n" not in str(error) and str(root) in str(error)
    else:
        for item in items:
            pickle.dumps(item)
            assert all(isinstance(text, str) for text in (item.id, item.image, item.group, item.split, item.dataset, item.licence))
            assert all(isinstance(text, str) for mask in item.masks for text in (mask.class_raw, mask.file, mask.annotation))
            assert all(isinstance(entity, str) for entity in item.absent)
