"""Grounded captions as GLaMM writes them."""

import numpy as np
import pytest
from pycocotools import mask as coco

from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import listed, write_json


def rle(top):
    mask = np.zeros((12, 16), np.uint8)
    mask[top : top + 3, 2:9] = 1
    found = coco.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


def uncompressed(top):
    mask = np.zeros((12, 16), np.uint8)
    mask[top : top + 3, 2:9] = 1
    runs, last = [0], 0
    for value in mask.ravel(order="F"):
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return {"size": [12, 16], "counts": runs}


def entry(file, caption, **groundings):
    return {"file_name": file, "caption": caption, "groundings": {key.replace("_", " "): value for key, value in groundings.items()}}


def test_captions(tmp_path):
    write_json(tmp_path / "train.json", [
        entry("a.png", '"The Left Lung is clear, a nodule lies in the right lung."', **{
            "left_lung": {"token_positives": [4, 13], "rle_masks": [rle(0), uncompressed(4)]},
            "right_lung": {"token_positives": [[0, 3]], "rle_masks": [rle(6)]},
            "lung": {"token_positives": [9, 13], "rle_masks": [rle(6)]}, "liver": {"token_positives": [1, 2], "rle_masks": [rle(6)]},
        }),
        entry("b.png", "Nothing to see."),
    ])  # fmt: skip
    (item,), skipped = listed("gcg", tmp_path, modality="X-ray", dataset="D")
    assert (item.id, item.split, item.group, [m.class_raw for m in item.masks]) == (
        "a.png",
        "train",
        "D/a",
        ["left lung", "left lung", "right lung"],
    )
    assert item.masks[1].rle == rle(4) and (item.masks[0].instance, item.masks[1].instance) == (0, 1)
    (sample,) = item.samples
    text = sample["turns"][1]["text"]
    assert text == "The Left Lung is clear, a nodule lies in the right lung." and sample["perspective"] == "III"
    assert [(text[slice(*t["span"])], t["entity"], t["mask"]) for t in sample["targets"]] == [
        ("Left Lung", "left lung", [0, 1]), ("right lung", "right lung", [2])
    ]  # fmt: skip
    assert [why for _, why in skipped] == [
        "a grounded phrase that overlaps another one", "a grounded phrase that is not in its caption",
        "its caption has no grounded phrase"
    ]  # fmt: skip
    with pytest.raises(DataError, match="give --modality"):
        listed("gcg", tmp_path)


@pytest.mark.parametrize("grounding", [{}, [], {"token_positives": [1, 2]}, {"token_positives": [1, 2], "rle_masks": [{"size": [1, 1]}]},
                                       {"token_positives": ["a", "b"], "rle_masks": []}])  # fmt: skip
def test_damaged_groundings(tmp_path, grounding):
    write_json(tmp_path / "train.json", [entry("a.png", "A lung.", lung=grounding)])
    with pytest.raises(DataError, match="train.json, entry 1, 'lung': has no token_positives"):
        listed("gcg", tmp_path, modality="CT")
