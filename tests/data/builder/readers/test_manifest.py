"""The JSON-lines manifest."""

import os
from collections import Counter

import pytest

from mimo_jax.data.builder.entities import canonical
from mimo_jax.data.builder.readers.manifest import manifest_lines
from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import listed, write_lines

LINE = {"id": "a", "image": "images/a.png", "masks": [{"file": "masks/a.png", "entity": "liver"}], "modality": "CT", "group": "case1"}


def test_items(tmp_path):
    more = {"dataset": "D", "split": "validation", "licence": "CC0", "source_path": "x/a.png", "pixel_spacing_mm": [0.5, 0.7],
            "masks": [{"file": "m1.png", "entity": "rib", "annotation": "manual"}, {"file": "m2.png", "entity": "rib"}],
            "absent_entities": ["spleen"], "id": "b"}  # fmt: skip
    path = write_lines(tmp_path / "mine/manifest.jsonl", [LINE, {**LINE, **more}])
    items, skipped = listed("manifest", path, licence="mine")
    assert items == listed("manifest", path.parent, licence="mine")[0] and skipped == []
    a, b = items
    assert (a.id, a.dataset, a.group, a.split, a.licence, a.complete, a.absent) == ("a", "mine", "mine/case1", "", "mine", False, ())
    assert (a.image, a.masks[0].file) == (f"{path.parent}/images/a.png", f"{path.parent}/masks/a.png")
    assert (b.dataset, b.group, b.split, b.licence, b.source, b.pixel_spacing_mm) == ("D", "D/case1", "val", "CC0", "x/a.png", (0.5, 0.7))
    assert [(m.class_raw, m.instance, m.annotation) for m in b.masks] == [("rib", 0, "manual"), ("rib", 1, "")] and b.absent == ("spleen",)


@pytest.mark.parametrize("line, message", [
    ([], "is not a JSON object"), ({"id": "a"}, "lacks image, masks, modality, group"),
    (LINE | {"masks": [{}]}, "lacks file or entity of a mask"),
    (LINE | {"masks": "none"}, "lacks file or entity of a mask"), (LINE | {"id": 3}, "must be texts"),
    (LINE | {"group": ""}, "must be texts"),
    (LINE | {"modality": "ct"}, "modality 'ct'; use one of CT"), (LINE | {"split": "dev"}, "split 'dev'; use train"),
    (LINE | {"licence": 3}, "licence is not a text"),
    (LINE | {"masks": [LINE["masks"][0] | {"annotation": []}]}, "annotation is not a text"),
    (LINE | {"absent_entities": "liver"}, "absent_entities is not a list"), (LINE | {"pixel_spacing_mm": [0.5]}, "pixel_spacing_mm is not"),
    (LINE | {"pixel_spacing_mm": [0.5, 0]}, "pixel_spacing_mm is not"),
    (LINE, "id a is also in line 1"),
])  # fmt: skip
def test_lines_that_are_wrong(tmp_path, line, message):
    path = write_lines(tmp_path / "manifest.jsonl", [LINE, line])
    with pytest.raises(DataError, match=message) as error:
        listed("manifest", path)
    assert str(error.value).startswith(f"{path}, line 2: ")


def test_an_empty_manifest(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no record"):
        list(manifest_lines(tmp_path / "manifest.jsonl"))


def test_real_data():
    path = os.environ.get("MIMO_REAL_DATA")
    if not path:
        pytest.skip("MIMO_REAL_DATA names no folder with real images")
    items, skipped = listed("manifest", path)
    assert len(items) == 131 and skipped == [] and sum(len(item.masks) for item in items) == 392
    assert all(os.path.isfile(file) for item in items for file in [item.image, *(mask.file for mask in item.masks)])
    assert Counter(item.modality for item in items)["pathology"] == 26 and sum(bool(item.absent) for item in items) == 5
    unknown = {mask.class_raw for item in items for mask in item.masks if not canonical(mask.class_raw, item.dataset, item.modality).known}
    assert unknown == set()
