"""Manifests, their splits, and what is refused."""

import json
import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimo_jax.config import SourceConfig
from mimo_jax.data.loading.sources import SPLIT_FRACTIONS, Manifest, open_source, open_sources
from mimo_jax.data.records import DataError, RecordFolder, write_records
from tests.data import handmade
from tests.tiny_config import tiny_config


def write_manifest(folder: Path, count: int = 20, **changes) -> Path:
    """`count` images of as many groups, with a liver and a spleen each; changes: line number as "line3" -> dict to lay over it."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    lines = []
    for number in range(count):
        record = handmade.record(number)
        (folder / f"images/{record.id}.png").write_bytes(record.image)
        masks = []
        for mask in record.masks:
            name = f"masks/{record.id}_{mask.entity}.png"
            (folder / name).write_bytes(handmade.png(mask.decode().astype(np.uint8) * 255))
            masks.append({"file": name, "entity": mask.entity, "annotation": "manual"})
        line = {"id": record.id, "image": f"images/{record.id}.png", "masks": masks, "modality": "CT", "group": record.group,
                "licence": "CC0-1.0", "pixel_spacing_mm": [0.5, 0.5]}  # fmt: skip
        lines.append(line | changes.get(f"line{number}", {}))
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def everything(path, **options):
    return {split: open_source(path, split, **options) for split in SPLIT_FRACTIONS}


def test_records_of_a_manifest(tmp_path):
    path = write_manifest(tmp_path / "m")
    splits = everything(path)
    assert sorted(r.id for s in splits.values() for r in s) == [f"image{i:03d}" for i in range(20)]
    for split, source in splits.items():
        assert not source.bad
        for i, record in enumerate(source):
            wanted = handmade.record(int(record.id[-3:]))
            record.check()
            assert (record.image, record.height, record.width, record.split) == (wanted.image, wanted.height, wanted.width, split)
            assert [(m.entity, m.rle) for m in record.masks] == [(m.entity, m.rle) for m in wanted.masks]
            assert record.masks[0].annotation == "manual" and record.pixel_spacing_mm == [0.5, 0.5]
            assert source.samples(i) == record.samples and record.samples
            assert source.index.ids[i].decode() == record.id
        assert len(source.index.perspective) == sum(len(r.samples) for r in source)


def test_splits_that_lines_name_are_kept(tmp_path):
    """The other groups are divided; lines of one group cannot be in two splits."""
    named = {f"line{n}": {"split": split} for n, split in enumerate(["test", "train", "validation", "test", "val"])}
    splits = everything(write_manifest(tmp_path / "m", 8, **named))
    ids = {split: {record.id for record in source} for split, source in splits.items()}
    assert ids["test"] >= {"image000", "image003"} and "image001" in ids["train"] and ids["val"] >= {"image002", "image004"}
    assert sum(map(len, ids.values())) == 8
    named["line3"] |= {"group": handmade.record(1).group}
    path = write_manifest(tmp_path / "leak", 8, **named)
    with pytest.raises(DataError, match=r"leak/manifest.jsonl: group \S+ is in splits train and test; give its lines one split"):
        open_source(path, "train")


def test_how_images_are_displayed_is_said_once(tmp_path):
    path = write_manifest(tmp_path / "m")
    for file in sorted((tmp_path / "m/images").iterdir()):
        grey = np.asarray(Image.open(file).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 100).save(file)
    with pytest.warns(UserWarning, match="train: 14 images: values of more than 8 bits are stretched; mimo data build") as told:
        open_source(path, "train")
    assert len(told) == 1


def test_folder_of_a_manifest_and_the_same_again(tmp_path):
    path = write_manifest(tmp_path / "m")
    a, b = open_source(path, "train"), open_source(tmp_path / "m", "train")
    assert isinstance(b, Manifest) and list(a) == list(b) == list(pickle.loads(pickle.dumps(a)))
    assert [r.id for r in open_source(path, "train", seed=1)] != [r.id for r in a]


def test_record_folder_is_recognised(tmp_path):
    write_records(tmp_path / "set", [handmade.record(i) for i in range(3)], {})
    source = open_source(tmp_path / "set", "train")
    assert isinstance(source, RecordFolder) and len(source) == 3


def test_unusable_records_are_listed_and_left_out(tmp_path):
    masks = {n: [{"file": f"masks/image{n:03d}_liver.png", "entity": "liver"}] for n in range(4)}
    path = write_manifest(tmp_path / "m", **{f"line{n}": {"masks": masks[n], "group": "bad"} for n in range(4)})
    (tmp_path / "m/images/image000.png").unlink()
    (tmp_path / "m/images/image001.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    (tmp_path / "m" / masks[2][0]["file"]).write_bytes(handmade.png(np.ones((5, 6), np.uint8)))
    (tmp_path / "m" / masks[3][0]["file"]).write_bytes(handmade.png(np.zeros((40, 56), np.uint8)))
    splits = everything(path, max_bad=1.0)
    bad = {name: reason for source in splits.values() for name, reason in source.bad.items()}
    assert sorted(bad) == ["image000", "image001", "image002", "image003"]
    assert "no such file" in bad["image000"] and "image001.png" in bad["image001"]
    assert "is 6x5, the image is 56x40" in bad["image002"] and "is empty" in bad["image003"]
    assert sum(len(source) for source in splits.values()) == 16
    split = next(split for split, source in splits.items() if source.bad)
    with pytest.raises(DataError, match=r"4 of \d+ records of .* are unusable \(image000: .*max_bad_samples"):
        open_source(path, split, max_bad=0.1)


def test_absence_is_asked_only_where_the_manifest_vouches_for_it(tmp_path):
    liver = {n: {"masks": [{"file": f"masks/image{n:03d}_liver.png", "entity": "liver"}]} for n in range(0, 20, 2)}
    silent = everything(write_manifest(tmp_path / "silent", **{f"line{n}": line for n, line in liver.items()}))
    vouched = {n: line | {"absent_entities": ["spleen"]} for n, line in liver.items()}
    said = everything(write_manifest(tmp_path / "said", **{f"line{n}": line for n, line in vouched.items()}))

    def absent(splits):
        return [t.entity for source in splits.values() for r in source for s in r.samples for t in s.targets if t.absent]

    assert absent(silent) == []
    assert set(absent(said)) == {"spleen"}


@pytest.mark.parametrize("line, said", [
    ("{", "line 1: is not JSON"), ("[]", "line 1: is not a JSON object"), ('{"id": "a"}', "lacks image, masks, modality, group"),
    ('{"id": "a", "image": "a", "masks": [{}], "modality": "CT", "group": "g"}', "lacks file or entity of a mask"),
    ('{"id": "a", "image": "a", "masks": [], "modality": "ct", "group": "g"}', "modality 'ct'; use one of CT, MR"), ("", "has no record"),
])  # fmt: skip
def test_lines_that_cannot_be_read(tmp_path, line, said):
    path = tmp_path / "manifest.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=said) as error:
        open_source(path, "train")
    assert str(path) in str(error.value)


def test_paths_that_are_no_source(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "none", "train")
    with pytest.raises(DataError, match="is neither"):
        open_source(tmp_path, "train")
    path = write_manifest(tmp_path / "m", 1)
    with pytest.raises(DataError, match="has no split 'dev'; it has train, val, test"):
        open_source(path, "dev")
    config = tiny_config()
    config.data.sources = {"mine": SourceConfig(path=str(tmp_path / "none"))}
    with pytest.raises(DataError, match="config.data.sources.mine: .*no such file"):
        open_sources(config, "train")
    config.data.sources["mine"].weight = 0.0
    with pytest.raises(DataError, match="has no source with a weight"):
        open_sources(config, "train")


def test_real_data():
    path = os.environ.get("MIMO_REAL_DATA")
    if not path:
        pytest.skip("MIMO_REAL_DATA names no folder with real images")
    splits = everything(path)
    assert not any(source.bad for source in splits.values())
    groups, seen = defaultdict(set), defaultdict(set)
    for split, source in splits.items():
        for record in source:
            record.check()
            for mask in record.masks:
                groups[mask.entity].add(record.group)
                seen[mask.entity].add(split)
    assert all(seen[e] >= {"train", "test"} for e, of in groups.items() if len(of) > 1)
    assert splits["train"].not_evaluable == sorted(e for e, of in groups.items() if len(of) == 1)
    assert splits["train"].index.counts().keys() == {"vqa", "I", "II", "III", "IV"}
