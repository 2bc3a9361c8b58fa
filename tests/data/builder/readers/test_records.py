"""What readers tell becomes records: files are where they say, masks and conversations fit."""

import io

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.builder.readers import open_reader
from mimo_jax.data.builder.record import BuiltRecord, make_record
from tests.data.builder.readers.trees import write_json, write_lines

STEM = "ct_00--AMOS--case_1--z_0040"
SIZE = (40, 56)


def png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(path, seed=0):
    png(path, np.random.default_rng(seed).integers(0, 255, SIZE, np.uint8))


def mask(path, top, value=255):
    pixels = np.zeros(SIZE, np.uint8)
    pixels[top : top + 6, 5:25] = value
    png(path, pixels)


def sa_med2d(root):
    for top, label in ((2, "0000_000"), (12, "0001_000")):
        mask(root / f"masks/{STEM}--{label}.png", top)
    noise(root / f"images/{STEM}.png")
    write_json(root / "SAMed2D_v1.json", {f"images/{STEM}.png": [f"masks/{STEM}--000{n}_000.png" for n in (0, 1)]})
    write_json(root / "SAMed2D_v1_class_mapping_id.json", {"AMOS": {"liver": 0, "left_kidney": 1}})
    return root


def mecovqa(root):
    sa_med2d(root / "SAMed2Dv1")
    liver = f"masks/{STEM}--0000_000.png"
    talks = [("Segment it.", f"It is <SEG>.<mask>{liver}</mask>"), (f"What is <region>{liver}</region>?", "An organ.")]
    entries = [
        {"image": f"images/{STEM}.png", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in talks
    ]
    write_json(root / "MeCoVQA_train.json", entries)
    return root


def demo(root):
    noise(root / "images/amos_1_2.png")
    for top, name in ((2, "liver_000"), (12, "kidney_left_000")):
        mask(root / f"masks/amos_1_2_{name}.png", top)
    names = [f"{root.name}/masks/amos_1_2_{name}_000.png" for name in ("liver", "kidney_left")]
    write_json(root / "image2label_train.json", {f"{root.name}/images/amos_1_2.png": names})
    return root


def biomedparse(root):
    noise(root / "train/a_CT_abdomen.png")
    mask(root / "train_mask/a_CT_abdomen_liver.png", 2)
    mask(root / "train_mask/a_CT_abdomen_left+kidney.png", 12)
    return root


def folders(root):
    noise(root / "images/a.png")
    pixels = np.zeros(SIZE, np.uint8)
    pixels[2:8, 5:25], pixels[12:18, 5:25] = 1, 2
    png(root / "masks/a.png", pixels)
    write_json(root / "labels.json", {"liver": 1, "kidney left": 2})
    return root


def manifest(root):
    noise(root / "a.png")
    mask(root / "l.png", 2)
    mask(root / "k.png", 12)
    masks = [{"file": "l.png", "entity": "liver"}, {"file": "k.png", "entity": "left kidney"}]
    write_lines(root / "manifest.jsonl", [{"id": "a", "image": "a.png", "masks": masks, "modality": "CT", "group": "g"}])
    return root


@pytest.mark.parametrize("kind, make, options", [
    ("sa-med2d", sa_med2d, {}), ("sa-med2d", demo, {"modality": "CT"}), ("biomedparse", biomedparse, {}), ("manifest", manifest, {}),
    ("folders", folders, {"modality": "CT", "labels": "labels.json"}), ("mecovqa", mecovqa, {}),
])  # fmt: skip
def test_records(tmp_path, kind, make, options):
    root = make(tmp_path / "source")
    if "labels" in options:
        options = options | {"labels": str(root / options["labels"])}
    (item,) = open_reader(kind, root, **options).items()
    made = make_record(item)
    assert isinstance(made, BuiltRecord), made
    record = made.record
    record.check()
    assert (record.height, record.width, record.modality, record.group) == (*SIZE, "CT", item.group)
    wanted = {"liver": [5, 2, 25, 8]} if kind == "mecovqa" else {"liver": [5, 2, 25, 8], "left kidney": [5, 12, 25, 18]}
    assert {m.entity: m.box_xyxy for m in record.masks} == wanted
    if kind == "mecovqa":
        painted, pointed = record.samples
        (target,) = painted.targets
        assert painted.turns[1].text[slice(*target.span)] == target.entity == "liver" and target.mask_ids == ["liver_0"]
        assert pointed.turns[0].prompted == ["liver_0"] and pointed.perspective == "vqa"


def test_grounded_caption(tmp_path):
    noise(tmp_path / "images/a.png")
    lung = {"size": list(SIZE), "counts": [100, 30, SIZE[0] * SIZE[1] - 130]}
    groundings = {"The lungs": {"token_positives": [0, 9], "rle_masks": [lung]}}
    write_json(tmp_path / "val.json", [{"file_name": "a.png", "caption": "The lungs are clear.", "groundings": groundings}])
    (item,) = open_reader("gcg", tmp_path, modality="X-ray").items()
    made = make_record(item)
    assert isinstance(made, BuiltRecord), made
    made.record.check()
    assert (made.record.masks[0].entity, made.record.masks[0].area_px, made.record.split) == ("lung", 30, "val")
    (target,) = made.record.samples[0].targets
    assert (target.entity, target.span, target.mask_ids) == ("lung", [0, 9], ["lung_0"])


def test_plain_questions(tmp_path):
    noise(tmp_path / "images/train/x.jpg")
    write_json(tmp_path / "qas/train/train_qa.json", [{"image": "x", "question": "is it benign?", "answer": "yes"}])
    (item,) = open_reader("pathvqa", tmp_path).items()
    record = make_record(item).record
    assert (record.samples[0].answer_type, record.samples[0].references, record.modality) == ("closed", ["yes"], "pathology")
    assert Image.open(io.BytesIO(record.image)).format == "JPEG" and record.samples[0].sample_id
