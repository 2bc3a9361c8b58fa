"""DICOM images and the DICOM SEG objects that refer to them."""

import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from mimo_jax.data.builder.masks import _seg, read_mask
from mimo_jax.data.builder.record import Reject, make_record
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.records import DataError
from tests.data.builder.readers.trees import image, listed
from tests.data.medical_files import dicom, enhanced, saved, series

H, W = 12, 16


def segment(number, label, meaning=codes.SCT.Liver):
    algorithm = highdicom.AlgorithmIdentificationSequence("none", codes.DCM.ArtificialIntelligence, "1")
    kind = highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC
    return highdicom.seg.SegmentDescription(number, label, codes.SCT.Organ, meaning, kind, algorithm)


def write_seg(path, sources, masks, labels, segmentation_type="BINARY", **more):
    """masks: bool [F, H, W, segments]"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = highdicom.seg.Segmentation(
            source_images=sources, pixel_array=masks.astype(np.uint8), segmentation_type=segmentation_type,
            segment_descriptions=[segment(n, label) for n, label in enumerate(labels, 1)], series_instance_uid=generate_uid(),
            series_number=9, sop_instance_uid=generate_uid(), instance_number=1, manufacturer="m", manufacturer_model_name="m",
            software_versions="1", device_serial_number="1", **more,
        )  # fmt: skip
        seg.save_as(path)
    return seg


def masks_of(frames):
    rng = np.random.default_rng(1)
    masks = np.zeros((frames, H, W, 2), bool)
    for frame in range(frames):
        masks[frame, frame : frame + 3, 2 : 6 + int(rng.integers(4)), 0] = True
    masks[1:, 8:11, 9:14, 1] = True
    return masks


def test_a_series_and_its_segmentation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (4, H, W)).astype(np.uint16)
    paths = series(tmp_path / "ct", pixels)
    masks = masks_of(4)
    masks[3] = False
    write_seg(tmp_path / "liver.seg.dcm", [pydicom.dcmread(path) for path in paths], masks, ["Liver", "Segment_2"])
    image(tmp_path / "ct/notes.png")
    items, skipped = listed("dicom-seg", tmp_path, dataset="D", window="soft")
    assert len(items) == 3 and skipped == []
    by_path = {item.image: item for item in items}
    assert set(by_path) == {str(path) for path in paths[:3]}
    for frame, path in enumerate(paths[:3]):
        item = by_path[str(path)]
        assert (item.modality, item.frame, item.window, item.complete) == ("CT", None, "soft", False)
        assert [(m.class_raw, m.value) for m in item.masks] == [("Liver", 1), ("Liver", 2)][: 1 + (frame > 0)]  # the second by its code
        picture = open_image(path)
        for mask in item.masks:
            assert (read_mask(mask, picture) == masks[frame, :, :, mask.value - 1]).all()
    assert len({item.group for item in items}) == 1
    secrets = [str(pydicom.dcmread(paths[0])[name].value) for name in ("PatientID", "PatientName", "SOPInstanceUID", "StudyInstanceUID")]
    assert not any(secret in text for secret in secrets for item in items for text in (item.id, item.group, item.source, item.dataset))


def test_frames_of_one_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (3, H, W)).astype(np.uint16)
    path = saved(enhanced(pixels), tmp_path / "mr.dcm")
    masks = masks_of(3)
    write_seg(tmp_path / "seg.dcm", [pydicom.dcmread(path)], masks, ["Left kidney", "Tumor"])
    items, skipped = listed("dicom-seg", tmp_path)
    assert [(item.frame, item.modality, [m.class_raw for m in item.masks]) for item in items] == [
        (0, "MR", ["Left kidney"]), (1, "MR", ["Left kidney", "Tumor"]), (2, "MR", ["Left kidney", "Tumor"])
    ]  # fmt: skip
    for item in items:
        for mask in item.masks:
            wanted = masks[item.frame, :, :, mask.value - 1]
            assert (read_mask(mask, open_image(item.image, frame=item.frame)) == wanted).all()


def test_a_single_segment_is_named_once_for_all_frames(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (3, H, W)).astype(np.uint16)
    paths, masks = series(tmp_path / "ct", pixels), masks_of(3)[..., :1]
    seg = write_seg(tmp_path / "seg.dcm", [pydicom.dcmread(path) for path in paths], masks, ["Liver"])
    assert "SegmentIdentificationSequence" in seg.SharedFunctionalGroupsSequence[0]
    items, skipped = listed("dicom-seg", tmp_path)
    assert len(items) == 3 and skipped == []
    for frame, path in enumerate(paths):
        (mask,) = next(item for item in items if item.image == str(path)).masks
        assert (read_mask(mask, open_image(path)) == masks[frame, :, :, 0]).all()


def test_a_label_map_with_a_segment_that_it_does_not_describe_is_rejected(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (3, H, W)).astype(np.uint16)
    paths, masks = series(tmp_path / "ct", pixels), masks_of(3)
    write_seg(tmp_path / "seg.dcm", [pydicom.dcmread(path) for path in paths], masks, ["Liver", "Spleen"], segmentation_type="LABELMAP")
    items, _ = listed("dicom-seg", tmp_path)
    made = make_record(items[-1])
    assert {mask.entity for mask in made.record.masks} <= {"liver", "spleen"} and made.record.masks
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    labels = seg.pixel_array.copy()
    labels[labels == 2] = 7
    seg.PixelData = labels.tobytes()
    seg.save_as(tmp_path / "seg.dcm")
    _seg.cache_clear()
    reasons = [made.reason for item in items if isinstance(made := make_record(item), Reject)]
    assert reasons and all("seg.dcm: has labels that its table does not name: 7;" in reason for reason in reasons)


def test_skipped_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (3, H, W)).astype(np.uint16)
    paths = series(tmp_path / "ct", pixels)
    sources = [pydicom.dcmread(path) for path in paths]
    write_seg(tmp_path / "seg.dcm", sources, masks_of(3), ["Liver", "Spleen"])
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "seg.dcm").read_bytes()[:900])
    paths[2].unlink()
    odd = dicom(pixels[0], Modality="PT")
    saved(odd, tmp_path / "pet.dcm")
    write_seg(tmp_path / "pet.seg.dcm", [odd], masks_of(2)[1:], ["Liver", "Spleen"])
    (tmp_path / "copy.dcm").write_bytes(paths[0].read_bytes())
    items, skipped = listed("dicom-seg", tmp_path)
    assert len(items) == 2
    reasons = {what.rsplit("/", 1)[1]: why for what, why in skipped}
    assert "has 2 frames whose image is missing" in reasons["seg.dcm"]
    assert reasons["pet.dcm"] == "its modality is not one of records" and "damaged" in reasons["cut.dcm"]
    assert "same image as another file" in [why for _, why in skipped]


def test_studies_of_one_patient_are_one_group(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (2, H, W)).astype(np.uint16)
    for name, patient in (("a", "1"), ("b", "1"), ("c", "2"), ("d", ""), ("e", "")):
        paths = series(tmp_path / name, pixels, PatientID=patient)
        write_seg(tmp_path / f"{name}.dcm", [pydicom.dcmread(path) for path in paths], masks_of(2), ["Liver", "Spleen"])
    items, _ = listed("dicom-seg", tmp_path)
    groups = {item.image.split("/")[-2]: item.group for item in items}
    assert len(items) == 10 and groups["a"] == groups["b"] and len(set(groups.values())) == 4


def test_a_folder_without_segmentations(tmp_path):
    series(tmp_path / "ct", np.ones((2, H, W), np.uint16))
    with pytest.raises(DataError, match="is not a dicom-seg source; expected DICOM images and DICOM SEG objects"):
        listed("dicom-seg", tmp_path)
