"""A user's own pairs of images and masks."""

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.builder.record import make_record
from mimo_jax.data.records import DataError
from mimo_jax.data.transforms import STRETCHED, decode_image
from tests.data.builder.readers.trees import image, listed, write_json


def test_a_folder_for_each_entity(tmp_path):
    root = tmp_path / "mine"
    for name in ("images/a.jpg", "images/b.png", "images/patient1/c.png", "images/patient1/d.png", "images/.hidden.png",
                 "masks/liver/a.png", "masks/spleen/a.png", "masks/liver/patient1/c.png", "masks/liver/lost.png"):  # fmt: skip
        image(root / name)
    items, skipped = listed("folders", root, modality="ultrasound", dataset="D", licence="mine")
    assert {i.id: (i.group, [m.class_raw for m in i.masks]) for i in items} == {
        "a": ("D/a", ["liver", "spleen"]), "b": ("D/b", []), "patient1/c": ("D/patient1", ["liver"]), "patient1/d": ("D/patient1", []),
    }  # fmt: skip
    assert items[0].image.endswith("images/a.jpg") and items[0].modality == "ultrasound" and items[0].licence == "mine"
    assert skipped == [("masks/liver/lost.png", "belongs to no image")]


def test_masks_without_a_name(tmp_path):
    for name in ("images/a.png", "masks/a.png"):
        image(tmp_path / name)
    with pytest.raises(DataError, match="masks: does not say what its masks show; .*give entity=NAME or labels=TABLE"):
        listed("folders", tmp_path, modality="CT")
    with pytest.raises(DataError, match="give --modality"):
        listed("folders", tmp_path)
    (item,), _ = listed("folders", tmp_path, modality="CT", entity="polyp")
    assert [(m.class_raw, m.value) for m in item.masks] == [("polyp", None)]
    table = write_json(tmp_path / "labels.json", {"background": 0, "liver": 1, "spleen": 7})
    (item,), _ = listed("folders", tmp_path, modality="CT", labels=str(table))
    assert [(m.class_raw, m.value) for m in item.masks] == [("liver", 1), ("spleen", 7)]
    with pytest.raises(DataError, match="entity or labels, not both"):
        listed("folders", tmp_path, modality="CT", labels=str(table), entity="polyp")


def test_labels_outside_the_table_are_rejected(tmp_path):
    image(tmp_path / "images/a.png")
    image(tmp_path / "masks/a.png", 2)
    table = write_json(tmp_path / "labels.json", {"1": "liver"})
    (item,), _ = listed("folders", tmp_path, modality="CT", labels=str(table))
    assert "a.png: has labels that its table does not name: 2;" in make_record(item).reason
    table = write_json(tmp_path / "labels.json", {"1": "liver", "2": None})
    (item,), _ = listed("folders", tmp_path, modality="CT", labels=str(table))
    assert [mask.class_raw for mask in item.masks] == ["liver"] and not make_record(item).record.masks


def test_ids_and_a_threshold(tmp_path):
    image(tmp_path / "images/a.png", size=(40, 40))
    ids = np.kron(np.arange(100, dtype=np.uint8).reshape(10, 10), np.ones((4, 4), np.uint8))
    (tmp_path / "masks/nucleus").mkdir(parents=True)
    Image.fromarray(ids).save(tmp_path / "masks/nucleus/a.png")
    for threshold, area in ((None, 99 * 16), (1, 99 * 16), ("50", 50 * 16)):
        (item,), _ = listed("folders", tmp_path, modality="pathology", mask_threshold=threshold)
        assert make_record(item).record.masks[0].area_px == area


def test_values_of_more_than_eight_bits_are_stretched_with_a_warning_or_take_a_window(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks/liver").mkdir(parents=True)
    Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 20).save(tmp_path / "images/a.png")
    (item,), _ = listed("folders", tmp_path, modality="CT")
    built = make_record(item)
    assert built.warnings == (STRETCHED,) and built.record.window is None
    (item,), _ = listed("folders", tmp_path, modality="CT", window="0,4000")
    built = make_record(item)
    assert built.warnings == () and built.record.window == [0, 4000]
    assert decode_image(built.record.image).max() == round(191 * 20 / 4000 * 255)
    (item,), _ = listed("folders", tmp_path, modality="CT", window="lung")
    assert "window lung is in Hounsfield units" in make_record(item).reason


@pytest.mark.parametrize("table, message", [
    ({"a": 1, "b": 1}, "names the label 1 twice"), ({"1": None}, "names no label except the background"),
    ([], "is not a table of labels"), ({"0": "background"}, "names no label except the background"),
    ({"one": "liver"}, "is not a label with its name"),
    ({"1": 2}, "is not a label with its name"), ({"-1": "liver"}, "is not a label with its name"),
])  # fmt: skip
def test_invalid_tables(tmp_path, table, message):
    for name in ("images/a.png", "masks/a.png"):
        image(tmp_path / name)
    with pytest.raises(DataError, match=f"labels.json: .*{message}"):
        listed("folders", tmp_path, modality="CT", labels=str(write_json(tmp_path / "labels.json", table)))
