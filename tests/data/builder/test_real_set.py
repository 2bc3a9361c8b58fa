"""A dataset of several kinds of images from one manifest: absences that are certain, flags, licences, instances, squares."""

import os
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.builder.body_regions import cannot_show
from mimo_jax.data.builder.build_plan import Options
from mimo_jax.data.builder.label_stats import overlapping
from mimo_jax.data.builder.pipeline import build
from mimo_jax.data.builder.readers import open_reader
from mimo_jax.data.builder.stats import describe, statistics
from mimo_jax.data.records import DataError, open_records, read_info
from tests.data.builder.readers.trees import write_lines

SIDE_WORDS = re.compile(r"\b(left|right)\b", re.IGNORECASE)
KINDS = {  # data set: modality, boxes (x0, y0, x1, y1) of entities, further fields
    "films": ("X-ray", {"right lung": (4, 8, 22, 50), "left lung": (40, 8, 52, 50)}, {}),
    "bellies": ("CT", {"liver": (6, 10, 40, 40)}, {"flags": ["licence:nc"]}),
    "kidneys": ("CT", {"left kidney": (44, 20, 54, 30), "right kidney": (6, 20, 22, 36)}, {"flags": ["orientation:unverified"]}),
    "eyes": ("fundus", {"optic disc": (30, 20, 44, 34)}, {}),
    "hearts": ("MR", {"left ventricle": (8, 8, 20, 20), "right ventricle": (30, 8, 52, 24)}, {"flags": ["aspect_changed"]}),
    "bowels": ("endoscopy", {"polyp": (4, 4, 20, 20)}, {}),
    "breasts": ("ultrasound", {"breast tumor": (10, 10, 30, 30)}, {}),
}
IMAGES = 6  # of each kind


def write_manifest(folder):
    """A manifest of KINDS, of breasts without a tumor, and of cells with numbered nuclei."""
    rng, lines = np.random.default_rng(0), []

    def line(name, dataset, modality, size=(60, 60), masks=(), **fields):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(30, 255, size, np.uint8)).save(folder / f"images/{name}.png")
        split = ("train", "val", "test")[len(lines) % 3]
        return {"id": name, "image": f"images/{name}.png", "modality": modality, "dataset": dataset, "group": name, "split": split,
                "masks": list(masks), "licence": f"licence of {dataset}", **fields}  # fmt: skip

    def mask(file, entity, pixels):
        Image.fromarray(pixels).save(folder / file)
        return {"file": file, "entity": entity}

    for dataset, (modality, boxes, fields) in KINDS.items():
        for n in range(IMAGES):
            name, masks = f"{dataset}{n}", []
            lines.append(line(name, dataset, modality, **fields))
            for i, (entity, (x0, y0, x1, y1)) in enumerate(boxes.items()):
                pixels = np.zeros((60, 60), np.uint8)
                pixels[y0 + n : y1 + n, x0:x1] = 255
                masks.append(mask(f"images/{name}_{i}.png", entity, pixels))
            lines[-1]["masks"] = masks
    for n in range(IMAGES):
        lines.append(line(f"normal{n}", "breasts", "ultrasound", size=(40, 80), absent_entities=["breast tumor"]))
        numbers = np.zeros((60, 60), np.uint8)
        for k in range(8):
            numbers[4 + 12 * (k % 4) : 10 + 12 * (k % 4), 5 + 20 * (k // 4) : 12 + 20 * (k // 4)] = k + 1
        cells = mask(f"images/cells{n}.whole.png", "cell nucleus", np.uint8(numbers > 0) * 255)
        Image.fromarray(numbers).save(folder / f"images/cells{n}.numbers.png")
        cells |= {"instances": f"images/cells{n}.numbers.png", "n_instances": 8}
        lines.append(line(f"cells{n}", "cells", "pathology", masks=[cells]))
    return write_lines(folder / "manifest.jsonl", lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path of the manifest, record folder, its records)."""
    folder = tmp_path_factory.mktemp("real")
    path = write_manifest(folder / "in")
    build(open_reader("manifest", path, square="breasts:48"), folder / "out", Options(), 1, progress=False)
    return path, folder / "out", records_of(folder / "out")


def records_of(out):
    return [record for split in read_info(out)["splits"] for record in open_records(out, split)]


def samples_of(records, *datasets):
    return [(record, sample) for record in records for sample in record.samples if record.dataset in datasets]


def test_the_manifest_decides_split_group_and_licence(made):
    _, out, records = made
    assert len(records) == (len(KINDS) + 2) * IMAGES and read_info(out)["split_by_source"]
    for record in records:
        assert record.group.startswith(f"{record.dataset}/") and record.licence == f"licence of {record.dataset}"
    counts = Counter(record.split for record in records)
    assert set(counts.values()) == {len(records) // 3}
    assert {"licence:nc"} == {flag for record in records if record.dataset == "bellies" for flag in record.flags}


def test_absence_is_claimed_only_where_it_is_certain(made):
    _, _, records = made
    entities = {
        dataset: {mask.entity for record in records if record.dataset == dataset for mask in record.masks} for dataset in [*KINDS, "cells"]
    }
    foreign = Counter()
    for record, sample in samples_of(records, *entities):
        for target in sample.targets:
            if target.absent:
                normal = record.dataset == "breasts" and not record.masks and target.entity == "breast tumor"
                assert normal or cannot_show(record.modality, entities[record.dataset], target.entity), sample
                assert not any(overlapping(target.entity, mask.entity) for mask in record.masks)
                if not normal:
                    foreign.update([record.dataset, sample.perspective])
    assert {"eyes", "films", "bellies", "bowels", "hearts", "cells", "I", "III", "vqa"} <= set(foreign)
    asked = {target.entity for _, sample in samples_of(records, "bellies") for target in sample.targets if target.absent}
    assert asked and not asked & {"left kidney", "right kidney", "polyp", "breast tumor"}


def test_images_that_show_nothing_are_asked_for_what_they_lack(made):
    normals = [record for record in made[2] if record.dataset == "breasts" and not record.masks]
    asked = [any(target.entity == "breast tumor" for sample in record.samples for target in sample.targets) for record in normals]
    assert len(normals) == IMAGES and sum(asked) >= IMAGES - 1
    assert not any(sample.perspective in ("II", "IV") for record in normals for sample in record.samples)


def test_a_doubted_orientation_gives_no_word_of_a_side(made):
    _, _, records = made
    assert not [s for _, s in samples_of(records, "kidneys") if any(SIDE_WORDS.search(turn.text) for turn in s.turns)]
    films = [sample for _, sample in samples_of(records, "films")]
    assert any(sample.kind == "twin" for sample in films) and any(sample.kind in ("side", "larger", "compare") for sample in films)


def test_a_changed_aspect_gives_no_comparison_of_sizes(made):
    _, _, records = made
    assert not [s for _, s in samples_of(records, "hearts") if s.kind in ("larger", "compare")]
    assert [s for _, s in samples_of(records, "hearts") if "left heart ventricle" in s.turns[1].text]


def test_numbered_instances_are_one_phrase_and_many_masks(made):
    cells = [record for record in made[2] if record.dataset == "cells"]
    kinds = Counter()
    for record in cells:
        assert [mask.instance for mask in record.masks] == list(range(8)) and {mask.area_px for mask in record.masks} == {42}
        for sample in record.samples:
            kinds[sample.perspective, sample.kind] += 1
            if (sample.perspective, sample.kind) == ("I", "one"):
                assert "the cell nuclei" in sample.turns[0].text.casefold() and len(sample.targets[0].mask_ids) == 8
                assert sample.turns[1].text[slice(*sample.targets[0].span)] == "cell nuclei" and " is " not in sample.turns[1].text
            if sample.kind == "name":
                assert sample.turns[1].text == "This is a cell nucleus." and len(sample.targets[0].mask_ids) == 1
            if sample.kind == "count":
                assert sample.references[0] == "6 to 15" and sample.choices == ["6 to 15", "16 to 40", "More than 40"]
    assert kinds["I", "one"] and kinds["II", "name"] and kinds["vqa", "count"]


def test_squared_images_do_not_tell_by_size_what_they_show(made):
    breasts = [record for record in made[2] if record.dataset == "breasts"]
    assert {(record.height, record.width) for record in breasts} == {(48, 48)}
    assert all("aspect_changed" in record.flags and record.pixel_spacing_mm is None for record in breasts)


def test_black_borders_are_left_out_of_a_square(tmp_path):
    pixels = np.zeros((60, 100), np.uint8)
    pixels[10:50, 20:100] = 180
    mask = np.zeros((60, 100), np.uint8)
    mask[10:30, 20:60] = 255  # a quarter of what is not black
    for name, values in (("image", pixels), ("mask", mask)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    line = {"id": "a", "image": "image.png", "masks": [{"file": "mask.png", "entity": "breast tumor"}], "modality": "ultrasound",
            "group": "a", "dataset": "busi"}  # fmt: skip
    path = write_lines(tmp_path / "manifest.jsonl", [line])
    build(open_reader("manifest", path, square="busi:32"), tmp_path / "out", Options(), 1, progress=False)
    record = records_of(tmp_path / "out")[0]
    assert (record.height, record.width) == (32, 32) and record.masks[0].box_xyxy == [0, 0, 16, 16] and record.masks[0].area_px == 256


def test_lines_are_left_out_by_flag(made, tmp_path):
    path = made[0]
    kept = list(open_reader("manifest", path, exclude_flags="licence:nc, aspect_changed").items())
    assert {item.dataset for item in kept} == {*KINDS, "cells"} - {"bellies", "hearts"}
    with pytest.raises(DataError, match="exclude-flags: no line of .* has licence:nd; they have aspect_changed, licence:nc, orientation"):
        open_reader("manifest", path, exclude_flags="licence:nd")
    with pytest.raises(DataError, match="option square: no line of .* has busi; they have bellies"):
        open_reader("manifest", path, square="busi:256")
    for wrong in ("256", "busi:4", "busi:x"):
        with pytest.raises(DataError, match="is not DATASET:SIDE"):
            open_reader("manifest", path, square=wrong)


def test_statistics_count_what_is_not_there(made):
    _, out, records = made
    stats = statistics(out, progress=False)
    absent = [s for r in records for s in r.samples if s.perspective != "vqa" and any(target.absent for target in s.targets)]
    assert stats["all"]["no_target"] == len(absent) == sum(stats["absent"].values()) > 20
    assert stats["structure"]["polyp"] > stats["absent"].get("polyp", 0)
    assert re.search(r"no target: \d+\.\d% of the samples of I to IV", describe(stats))


def test_complete_labels_of_a_manifest_vouch_for_what_they_leave_out(made, tmp_path):
    line = {"id": "a", "image": "a.png", "masks": [], "modality": "CT", "group": "a", "complete": True}
    assert next(open_reader("manifest", write_lines(tmp_path / "manifest.jsonl", [line])).items()).complete
    with pytest.raises(DataError, match="complete is neither true nor false"):
        list(open_reader("manifest", write_lines(tmp_path / "manifest.jsonl", [line | {"complete": "yes"}])).items())
    with pytest.raises(DataError, match="flags is not a list of texts"):
        list(open_reader("manifest", write_lines(tmp_path / "manifest.jsonl", [line | {"flags": "licence:nc"}])).items())
    numbered = line | {"masks": [{"file": "m.png", "entity": "cell nucleus", "instances": "n.png"}]}
    with pytest.raises(DataError, match="n_instances its largest number"):
        list(open_reader("manifest", write_lines(tmp_path / "manifest.jsonl", [numbered])).items())
    numbered["masks"][0]["n_instances"] = 3
    with pytest.warns(UserWarning, match="1 pictures of instances are missing; their masks are taken whole"):
        items = list(open_reader("manifest", write_lines(tmp_path / "manifest.jsonl", [numbered])).items())
    assert [(mask.file, mask.value) for mask in items[0].masks] == [(str(tmp_path / "m.png"), None)]


@pytest.mark.slow
def test_real_images(tmp_path):
    path = os.environ.get("MIMO_REAL_DATA")
    if not path:
        pytest.skip("MIMO_REAL_DATA names no folder with real images")
    build(open_reader("manifest", path), tmp_path / "out", Options(duplicates="drop"), 1, progress=False)
    records, shown = records_of(tmp_path / "out"), {}
    for record in records:
        shown.setdefault((record.dataset, record.modality), set()).update(mask.entity for mask in record.masks)
    listed = {item.source or item.id: set(item.absent) for item in open_reader("manifest", path).items()}
    perspectives = Counter()
    for record in records:
        for sample in record.samples:
            perspectives[sample.perspective] += 1
            for target in sample.targets:
                known = target.entity in listed[record.source]
                assert not target.absent or known or cannot_show(record.modality, shown[record.dataset, record.modality], target.entity)
    assert set(perspectives) == {"vqa", "I", "II", "III", "IV"}
    assert not [mask.entity for record in records for mask in record.masks if not mask.decode().any()]
