"""Volumes in NIfTI with labels, cut into slices."""

import os

import nibabel
import numpy as np
import pytest

from mimo_jax.data.builder.build_plan import Options
from mimo_jax.data.builder.items import Item
from mimo_jax.data.builder.masks import read_mask
from mimo_jax.data.builder.pipeline import build
from mimo_jax.data.builder.readers import open_reader
from mimo_jax.data.builder.readers.label_tables import TOTALSEGMENTATOR, label_table
from mimo_jax.data.builder.record import Reject, make_record
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.orientation import PLANES
from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import listed, write_json
from tests.data.medical_files import affine_of, nifti

SHAPE = (10, 12, 8)


def labels(seed=0):
    """Label 1 in slices 2 to 5 of k, growing: 4, 9, 16, 25 pixels; label 2 in slices 4 and 5, 12 pixels."""
    volume = np.zeros(SHAPE, np.uint8)
    for k, side in zip(range(2, 6), range(2, 6), strict=True):
        volume[:side, :side, k] = 1
    volume[6:9, 6:10, 4:6] = 2
    return volume


def save(path, volume, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    return nifti(path, volume, np.diag([-1.0, -1, 2, 1]) if affine is None else affine)


def shown(items: list[Item]):
    return {item.slice: [(mask.class_raw, mask.value) for mask in item.masks] for item in items}


def test_one_volume(tmp_path):
    ct, seg = save(tmp_path / "ct.nii.gz", np.zeros(SHAPE, np.int16)), save(tmp_path / "seg.nii.gz", labels())
    table = write_json(tmp_path / "labels.json", {"0": "background", "1": "liver", "2": "spleen", "3": "aorta"})
    told = {"label": str(seg), "labels": str(table), "modality": "CT", "dataset": "D"}
    items, skipped = listed("nifti", ct, min_area="9", **told)
    both = [("liver", 1), ("spleen", 2)]
    assert shown(items) == {"axial:3": [("liver", 1)], "axial:4": both, "axial:5": both} and skipped == []
    first = items[0]
    assert (first.id, first.group, first.window, first.slice_axis, first.slice_index) == ("ct/axial_0003", "D/ct", None, "axial", 3)
    assert all(item.complete for item in items) and first.masks[0].file == str(seg)
    items, _ = listed("nifti", ct, min_area=13, window="-100,300", every=2, **told)
    assert shown(items) == {"axial:4": [("liver", 1)]} and items[0].window == (-100, 300)
    assert not items[0].complete  # the spleen is there, too small to be labelled
    assert set(shown(listed("nifti", ct, axis="coronal", min_area=5, **told)[0])) == {f"coronal:{j}" for j in (0, 1, 2, 3, 4, 6, 7, 8, 9)}
    assert set(shown(listed("nifti", ct, axis="i", min_area=8, **told)[0])) == {f"i:{i}" for i in (0, 1, 2, 3, 6, 7, 8)}
    for missing in ({"label": ""}, {"labels": ""}, {"label": str(tmp_path / "none")}):
        with pytest.raises(DataError, match="give label=VOLUME, its labels, and labels=NAMES"):
            listed("nifti", ct, **told | missing)
    with pytest.raises(DataError, match="is a folder; the option label"):
        listed("nifti", tmp_path, **told)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal", "j"])
def test_areas_are_those_of_the_masks(tmp_path, axis):
    rng = np.random.default_rng(3)
    volume = (rng.random(SHAPE) < 0.3).astype(np.uint8) * rng.integers(1, 4, SHAPE, np.uint8)
    affine = affine_of(rng, 0.2)
    ct, seg = save(tmp_path / "ct.nii.gz", volume.astype(np.int16), affine), save(tmp_path / "seg.nii.gz", volume, affine)
    table = write_json(tmp_path / "labels.json", {"a": 1, "b": 2, "c": 3})
    items, _ = listed("nifti", ct, label=str(seg), labels=str(table), modality="MR", axis=axis, min_area=8)
    seen = 0
    for item in items:
        picture = open_image(item.image, slice=item.slice)
        for mask in item.masks:
            area = int(read_mask(mask, picture).sum())
            seen += area
            assert area >= 8 and item.window is None
    nearest = [int(world) for world in nibabel.io_orientation(affine)[:, 0]]
    planes = np.moveaxis(volume, nearest.index(PLANES[axis]) if axis in PLANES else "ijk".index(axis), 0)
    kept = [int((plane == value).sum()) for plane in planes for value in (1, 2, 3)]
    assert seen == sum(area for area in kept if area >= 8) > 0


def test_total_segmentator(tmp_path):
    for case in ("s0001", "s0002"):
        save(tmp_path / case / "ct.nii.gz", np.zeros(SHAPE, np.int16))
        save(tmp_path / case / "segmentations/kidney_left.nii.gz", (labels() == 1).astype(np.uint8))
        save(tmp_path / case / "segmentations/aorta.nii.gz", (labels() == 2).astype(np.uint8))
    save(tmp_path / "s0003/segmentations/liver.nii.gz", labels())
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns0001;50;train\ns0002;60;test\n")
    items, skipped = listed("nifti", tmp_path, min_area=16)
    assert [(i.id, i.split, i.modality) for i in items] == [
        ("s0001/axial_0004", "train", "CT"), ("s0001/axial_0005", "train", "CT"), ("s0002/axial_0004", "test", "CT"),
        ("s0002/axial_0005", "test", "CT"),
    ]  # fmt: skip
    assert [(m.class_raw, m.value) for m in items[0].masks] == [("kidney_left", None)]
    assert items[0].masks[0].file == str(tmp_path / "s0001/segmentations/kidney_left.nii.gz") and not items[0].complete
    assert [what for what, _ in skipped] == ["s0003"]
    assert len(listed("nifti", tmp_path / "s0001", min_area=16)[0]) == 2


@pytest.mark.parametrize("message", [
    {"labels": {"0": "background", "1": "liver", "2": "cancer"}, "modality": {"0": "CT"}},
    {"labels": {"background": 0, "whole": [1, 2], "liver": 1, "cancer": 2}, "channel_names": {"0": "CT"}},
])  # fmt: skip
def test_decathlon_and_nnunet(tmp_path, message):
    channel = "_0000" if "channel_names" in message else ""
    write_json(tmp_path / "dataset.json", message)
    for part, case in (("Tr", "liver_1"), ("Tr", "liver_2"), ("Ts", "liver_3")):
        save(tmp_path / f"images{part}" / f"{case}{channel}.nii.gz", np.zeros(SHAPE, np.int16))
        save(tmp_path / f"labels{part}" / f"{case}.nii.gz", labels())
    save(tmp_path / "labelsTr/lost.nii.gz", labels())
    items, skipped = listed("nifti", tmp_path, min_area=12, dataset="MSD_Liver")
    assert {i.group: i.split for i in items} == {f"MSD_Liver/liver_{n}": split for n, split in ((1, "train"), (2, "train"), (3, "test"))}
    assert [m.class_raw for m in items[0].masks] == ["liver", "cancer"] and items[0].modality == "CT"
    assert skipped == [("labelsTr/lost.nii.gz", "has no image of the same name")]


def test_unusable_volumes_are_skipped(tmp_path):
    for case, image, label in (
        ("moved", np.zeros(SHAPE, np.int16), labels()), ("four", np.zeros((*SHAPE, 2), np.int16), labels()),
        ("size", np.zeros(SHAPE, np.int16), labels()[:-1]), ("good", np.zeros(SHAPE, np.int16), labels()),
    ):  # fmt: skip
        save(tmp_path / f"images/{case}.nii.gz", image)
        save(tmp_path / f"labels/{case}.nii.gz", label, np.eye(4) if case == "moved" else None)
    cut = tmp_path / "labels/cut.nii.gz"
    cut.write_bytes((tmp_path / "labels/good.nii.gz").read_bytes()[:-30])
    save(tmp_path / "images/cut.nii.gz", np.zeros(SHAPE, np.int16))
    table = write_json(tmp_path / "table.json", {"1": "liver", "2": None})
    items, skipped = listed("nifti", tmp_path, labels=str(table), modality="CT", min_area=4)
    assert {item.group.split("/")[1] for item in items} == {"good"}
    reasons = dict(skipped)
    assert "save one volume" in reasons["four"] and "damaged or truncated" in reasons["cut"] and len(skipped) == 4
    assert all("is not on the grid" in reasons[case] for case in ("moved", "size"))
    with pytest.raises(DataError, match="give labels=NAMES"):
        listed("nifti", tmp_path, modality="CT")


def kidneys(tmp_path, values, table):
    """A reader of one volume with these values of labels, and a table."""
    volume = np.zeros(SHAPE, np.float32)
    volume[:3, :4, 2:6], volume[5:9, :4, 2:6] = values
    ct, seg = save(tmp_path / "ct.nii.gz", np.zeros(SHAPE, np.int16)), save(tmp_path / "seg.nii.gz", volume)
    names = write_json(tmp_path / "names.json", table)
    return open_reader("nifti", ct, label=str(seg), labels=str(names), modality="CT", min_area=4)


@pytest.mark.parametrize("values, message", [
    ((1.5, 3.0), "has values that are no whole numbers: 1.5;"), ((1.98, 3.0), "has values that are no whole numbers: 1.98;"),
    ((2.0, 3.0), "has labels that its table does not name: 3;"), ((-1.0, 2.0), "has values below 0: -1;"),
])  # fmt: skip
def test_volumes_whose_values_are_no_labels_are_rejected(tmp_path, values, message):
    """1.5 used to become 2, so that every left kidney was called a right one."""
    reader = kidneys(tmp_path, values, {"left kidney": 1, "right kidney": 2})
    (item,) = reader.items()
    reject = make_record(item)
    assert isinstance(reject, Reject) and f"seg.nii.gz: {message}" in reject.reason
    with pytest.raises(DataError, match=f"1 of 1 items have no record, .*{message}"):
        build(reader, tmp_path / "out", Options(), progress=False)


def test_labels_within_a_hundredth_are_rounded_and_null_leaves_one_out(tmp_path):
    items = list(kidneys(tmp_path, (1.995, 3.0), {"1": "left kidney", "2": "right kidney", "3": None}).items())
    assert [(mask.class_raw, mask.value) for mask in items[0].masks] == [("right kidney", 2)] and len(items) == 4
    mask = read_mask(items[0].masks[0], open_image(items[0].image, slice=items[0].slice))
    assert mask.sum() == 12


def test_masks_of_one_structure_may_be_probabilities_if_a_threshold_is_given(tmp_path):
    save(tmp_path / "s1/ct.nii.gz", np.zeros(SHAPE, np.int16))
    save(tmp_path / "s1/segmentations/liver.nii.gz", labels().astype(np.float32) * 0.4)
    (item,) = open_reader("nifti", tmp_path, min_area=4).items()
    assert "no whole numbers: 0.4, 0.8;" in make_record(item).reason
    items, _ = listed("nifti", tmp_path, min_area=4, mask_threshold=0.5)
    assert {item.slice for item in items} == {"axial:4", "axial:5"}
    assert read_mask(items[0].masks[0], open_image(items[0].image, slice="axial:4")).sum() == 12


def test_labels_of_nnunet_that_only_unions_contain_are_left_out(tmp_path):
    regions = {"background": 0, "whole tumor": [1, 2, 3], "enhancing tumor": 2, "ignore": 3}
    write_json(tmp_path / "dataset.json", {"labels": regions, "channel_names": {"0": "T1"}})
    save(tmp_path / "imagesTr/a_0000.nii.gz", np.zeros(SHAPE, np.int16))
    save(tmp_path / "labelsTr/a.nii.gz", labels())
    items, skipped = listed("nifti", tmp_path, min_area=4)
    assert {mask.class_raw for item in items for mask in item.masks} == {"enhancing tumor"} and skipped == []


def test_table_of_totalsegmentator():
    table = label_table("TotalSegmentator")
    assert len(table) == len(set(TOTALSEGMENTATOR)) == 117
    known = {1: "spleen", 5: "liver", 26: "vertebrae_S1", 52: "aorta", 79: "spinal_cord", 92: "rib_left_1", 104: "rib_right_1"}
    assert {value: table[value] for value in known} == known and table[117] == "costal_cartilages"


def test_real_volume():
    root = os.environ.get("MIMO_REAL_DATA")
    if not root:
        pytest.skip("MIMO_REAL_DATA names no folder with real images")
    seg = f"{root}/raw/example_seg.nii.gz"
    items, skipped = listed("nifti", f"{root}/raw/example_ct_sm.nii.gz", label=seg, labels="totalsegmentator", modality="CT", min_area=50)
    volume = np.asarray(nibabel.load(seg).dataobj)
    kept = {(k, int(v)) for k in range(volume.shape[2]) for v in np.unique(volume[:, :, k]) if v and (volume[:, :, k] == v).sum() >= 50}
    assert {(item.slice_index, mask.value) for item in items for mask in item.masks} == kept and skipped == [] and len(items) == 30
    assert {"liver", "spleen", "kidney_left", "vertebrae_L1"} <= {mask.class_raw for item in items for mask in item.masks}
