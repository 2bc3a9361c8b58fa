"""Masks back on the input's grid, read with nibabel, pydicom and highdicom and held to places computed from the input alone."""

import os
import sys
import warnings
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.data.images.image import DicomGrid, MedicalImage
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.prompts import Prompts
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Answer, Entity, check_outputs
from mimo_jax.infer.answers.calibration import ConfidenceFeatures
from tests.data.medical_files import affine_of, dicom, enhanced, nifti, saved

REAL = os.environ.get("MIMO_REAL_DATA", "")
needs_real = pytest.mark.skipif(not REAL, reason="set MIMO_REAL_DATA to the folder of real images")


def stored(shape=(4, 6)):
    return np.arange(np.prod(shape)).reshape(shape).astype(np.uint16)


def answered(picture, *named, prompts=None):
    """What the model would have said of a picture: (phrase, mask) of each entity."""
    entities = [
        Entity.of(n, phrase, mask, ConfidenceFeatures(0.9, 0.9, 0.9, 0.9), spacing_mm=picture.spacing_mm)
        for n, (phrase, mask) in enumerate(named)
    ]
    return Answer("Here.", [{"text": "Here."}], entities, False, "Segment it.", picture.pixels, prompts or Prompts(), picture.grid)


def masks_on(picture, count, seed=0):
    return np.random.default_rng(seed).random((count, *picture.pixels.shape[:2])) < 0.4


# --- NIfTI


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4]), st.sampled_from(["axial", "coronal", "sagittal", "i", "j", "k"]), st.booleans()
)
def test_a_mask_lands_on_the_voxels_that_were_shown(tmp_path_factory, seed, oblique, axis, packed):
    """The volume holds each voxel's own number; the mask is drawn on the picture by what the pixels show."""
    folder, rng = tmp_path_factory.mktemp("n"), np.random.default_rng(seed)
    affine, shape = affine_of(rng, oblique), rng.integers(2, 6, 3)
    volume = rng.permutation(np.prod(shape)).reshape(shape).astype(np.int16)
    path = nifti(folder / "a.nii", volume, affine)
    which = int(rng.integers(2))
    picture = open_image(path, slice=f"{axis}:{which}", window=(0, 255))
    chosen = rng.permutation(picture.pixels[..., 0].ravel())[: rng.integers(0, 6)]
    mask = np.isin(picture.pixels[..., 0], chosen)
    out = folder / ("b.nii.gz" if packed else "b.nii")
    answered(picture, ("liver", mask)).save(out)
    image = nibabel.load(out)
    labels = np.asanyarray(image.dataobj)
    assert image.get_data_dtype() == np.uint8 and image.shape == volume.shape
    np.testing.assert_allclose(image.affine, nibabel.load(path).affine, atol=1e-6)
    assert sorted(volume[labels > 0]) == sorted(chosen) and set(np.unique(labels)) <= {0, 1}

    # The same in the world: both files through nibabel's canonical copies, voxel by voxel.
    ras, ras_labels = (nibabel.as_closest_canonical(nibabel.load(p)) for p in (path, out))
    np.testing.assert_allclose(ras.affine, ras_labels.affine, atol=1e-4)
    assert sorted(ras.get_fdata()[ras_labels.get_fdata() > 0]) == sorted(chosen)


def test_later_entities_lie_on_top_and_keep_their_number(tmp_path):
    picture = open_image(nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), np.diag([-2.0, -2, 2, 1])), slice="k:3")
    first, second, third = np.zeros((3, 5, 4), bool)
    first[1:4], third[2, 1:3] = True, True
    answer = answered(picture, ("a", first), ("b", second), ("c", third))
    answer.save(tmp_path / "b.nii")
    labels = np.asanyarray(nibabel.load(tmp_path / "b.nii").dataobj)
    expected = np.zeros((4, 5, 6))
    expected[:, 1:4, 3] = 1
    expected[1:3, 2, 3] = 3
    np.testing.assert_array_equal(labels, expected)
    assert [e.area_mm2 for e in answer.entities] == [12 * 4, 0, 2 * 4]
    answered(picture).save(tmp_path / "none.nii.gz")
    assert not np.asanyarray(nibabel.load(tmp_path / "none.nii.gz").dataobj).any()
    for count, dtype in ((255, np.uint8), (256, np.uint16)):
        answered(picture, *[("a", first)] * count).save(tmp_path / "many.nii")
        many = nibabel.load(tmp_path / "many.nii")
        assert many.get_data_dtype() == dtype and np.asanyarray(many.dataobj).max() == count


def test_the_header_says_where_and_nothing_of_the_patient(tmp_path):
    affine = affine_of(np.random.default_rng(0), 0.3)
    image = nibabel.Nifti2Image(np.zeros((4, 5, 6), np.int16), affine)
    image.set_qform(affine, "scanner")
    image.set_sform(affine, "mni")
    image.header.set_xyzt_units("micron")
    image.header["descrip"] = b"SECRET"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"SECRET"))
    nibabel.save(image, tmp_path / "a.nii")
    picture = open_image(tmp_path / "a.nii", slice="i:1")
    answered(picture, ("a", np.ones(picture.pixels.shape[:2], bool))).save(tmp_path / "b.nii")
    made = nibabel.load(tmp_path / "b.nii")
    assert isinstance(made, nibabel.Nifti2Image) and b"SECRET" not in (tmp_path / "b.nii").read_bytes()
    assert (made.header["qform_code"], made.header["sform_code"]) == (1, 4) and made.header.get_xyzt_units()[0] == "micron"
    np.testing.assert_allclose(made.get_qform(), image.get_qform(), atol=1e-4)
    np.testing.assert_allclose(made.get_sform(), affine, atol=1e-5)


@pytest.mark.parametrize("damage", ["none", "quaternion"])
def test_headers_without_orientation_codes_or_with_a_bad_quaternion(tmp_path, damage):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([2.0, 3, 4, 1]))
    image.set_qform(np.diag([2.0, 3, 4, 1]), 0 if damage == "none" else 1)
    image.set_sform(np.diag([2.0, 3, 4, 1]), 0 if damage == "none" else 1)
    data = bytearray(image.to_bytes())
    if damage == "quaternion":
        data[256:260] = np.float32(5).tobytes()  # quatern_b
    (tmp_path / "a.nii").write_bytes(data)
    picture = open_image(tmp_path / "a.nii", slice="k:2")
    answered(picture, ("a", np.ones((5, 4), bool))).save(tmp_path / "b.nii")
    np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii").affine, nibabel.load(tmp_path / "a.nii").affine)


def test_a_dicom_becomes_one_slice_in_its_place(tmp_path):
    oblique = [0.8, 0.6, 0, -0.6, 0.8, 0]
    path = saved(dicom(stored(), ImageOrientationPatient=oblique, ImagePositionPatient=[5, -7, 11]), tmp_path / "a.dcm")
    picture = open_image(path)
    mask = masks_on(picture, 1)[0]
    answered(picture, ("liver", mask)).save(tmp_path / "b.nii.gz")
    image = nibabel.load(tmp_path / "b.nii.gz")
    assert image.shape == (6, 4, 1) and nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    # PS3.3 C.7.6.2.1.1, by highdicom: (column, row) to LPS.
    places = highdicom.spatial.PixelToReferenceTransformer([5, -7, 11], oblique, [0.5, 0.25])
    rows, cols = np.nonzero(mask)
    expected = places(np.stack([cols, rows], 1)) * [-1, -1, 1]
    found = nibabel.affines.apply_affine(image.affine, np.argwhere(np.asanyarray(image.dataobj)))
    np.testing.assert_allclose(sorted(found.tolist()), sorted(expected.tolist()), atol=1e-4)


# --- DICOM SEG


def read_seg(path):
    """(segments as pydicom reads them, [n, H, W] of each segment's only frame by highdicom)."""
    seg = highdicom.seg.segread(path)
    (uid,) = {uid for _, _, uid in seg.get_source_image_uids()}
    pixels = seg.get_pixels_by_source_instance([uid], segment_numbers=list(seg.segment_numbers))
    return pydicom.dcmread(path), np.moveaxis(pixels[0], -1, 0).astype(bool)


def test_a_seg_holds_each_mask_that_is_not_empty(tmp_path):
    path = saved(dicom(stored((9, 7))), tmp_path / "a.dcm")
    picture = open_image(path)
    masks = masks_on(picture, 4)
    masks[2] = False
    named = zip(("liver", "Größe \\ of\nthe " + "x" * 90, "empty", ""), masks, strict=True)
    answered(picture, *named).save(tmp_path / "b.dcm", tmp_path / "b.json")
    ds, pixels = read_seg(tmp_path / "b.dcm")
    np.testing.assert_array_equal(pixels, masks[[0, 1, 3]])
    labels = [str(item.SegmentLabel) for item in ds.SegmentSequence]
    assert labels == ["liver", ("Größe / of the " + "x" * 90)[:64], "structure 4"]
    assert ds.SegmentationType == "BINARY" and {item.SegmentAlgorithmType for item in ds.SegmentSequence} == {"AUTOMATIC"}
    assert ds.PatientName == "Müller^Jörg" and ds.StudyInstanceUID == pydicom.dcmread(path).StudyInstanceUID
    assert ds.SeriesInstanceUID != pydicom.dcmread(path).SeriesInstanceUID
    # And by pydicom alone: one bit a pixel, frame after frame.
    assert ds.BitsAllocated == 1
    np.testing.assert_array_equal(ds.pixel_array.astype(bool), masks[[0, 1, 3]])


def test_a_question_with_prompts_is_semiautomatic(tmp_path):
    picture = open_image(saved(dicom(stored()), tmp_path / "a.dcm"))
    answered(picture, ("x", masks_on(picture, 1)[0]), prompts=Prompts(points=np.array([[1.0, 1, 1]]))).save(tmp_path / "b.dcm")
    assert pydicom.dcmread(tmp_path / "b.dcm").SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"


def test_a_seg_points_at_its_frame(tmp_path):
    path = saved(enhanced(np.stack([stored(), stored() + 9, stored() + 20])), tmp_path / "a.dcm")
    picture = open_image(path, frame=1)
    masks = masks_on(picture, 2)
    answered(picture, ("a", masks[0]), ("b", masks[1])).save(tmp_path / "b.dcm", tmp_path / "b.nii")
    seg = highdicom.seg.segread(tmp_path / "b.dcm")
    uid = pydicom.dcmread(path).SOPInstanceUID
    pixels = seg.get_pixels_by_source_frame(uid, [2], segment_numbers=[1, 2])  # highdicom counts frames from 1
    np.testing.assert_array_equal(np.moveaxis(pixels[0], -1, 0).astype(bool), masks)
    assert seg.NumberOfFrames == 2
    assert seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient == [0, 0, 3]
    np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii").affine[:3, 3], [0, 0, 3])


def test_a_film_without_a_frame_of_reference_still_gets_a_seg(tmp_path):
    gone = ("FrameOfReferenceUID", "ImageOrientationPatient", "ImagePositionPatient")
    film = dicom(stored(), without=gone, SOPClassUID=pydicom.uid.DigitalXRayImageStorageForPresentation, Modality="DX")
    picture = open_image(saved(film, tmp_path / "a.dcm"))
    mask = masks_on(picture, 1)[0]
    answered(picture, ("lung", mask)).save(tmp_path / "b.dcm")
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "b.dcm").pixel_array.astype(bool), mask)
    with pytest.raises(UserError, match="does not say where in the patient its image lies; use .dcm, .npy or .json"):
        check_outputs(tmp_path / "b.nii", grid=picture.grid)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    plain = MedicalImage(np.zeros((4, 6, 3), np.uint8))
    one = open_image(saved(dicom(stored()), tmp_path / "a.dcm"))
    volume = open_image(nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), np.eye(4)), slice="k:0")
    mask = np.ones((4, 6), bool)
    for picture, out, error in (
        (plain, "b.nii", "the image has no geometry; only NIfTI and DICOM input"),
        (plain, "b.NII.GZ", "the image has no geometry"),
        (plain, "b.dcm", "only DICOM input can be saved as DICOM SEG; use .json"),
        (volume, "b.dcm", "only DICOM input can be saved as DICOM SEG; use .nii.gz"),
        (one, "b.gz", "has an unknown ending; use one of .png, .json, .npy, .nii, .nii.gz, .dcm"),
    ):
        with pytest.raises(UserError, match=error):
            answered(picture, ("a", mask)).save(tmp_path / "first.json", tmp_path / out)
    for entities in ([], [("a", ~mask), ("b", ~mask)]):
        with pytest.raises(UserError, match="b.dcm: the answer segments nothing"):
            answered(one, *entities).save(tmp_path / "first.json", tmp_path / "b.dcm")
    assert not (tmp_path / "first.json").exists() and not (tmp_path / "b.dcm").exists()


def test_all_outputs_are_written_or_none(tmp_path):
    """A SEG that fails leaves the files that were there, and nothing half-written beside them."""
    picture = open_image(saved(dicom(stored(), without=["Modality"]), tmp_path / "a.dcm"))
    answer = answered(picture, ("a", np.ones((4, 6), bool)))
    answer.save(tmp_path / "b.json", tmp_path / "b.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    answer.entities[0].phrase = "another"
    for after in (tmp_path / "b.dcm", tmp_path / "gone" / ".." / "c.npy"):
        with pytest.raises(UserError, match="lacks attributes that a SEG must copy|there is no folder"):
            answer.save(tmp_path / "b.json", tmp_path / "b.nii.gz", tmp_path / "b.png", after)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match="c.json: is a folder"):
        answer.save(tmp_path / "b.npy", tmp_path / "c.json")
    assert not (tmp_path / "b.npy").exists()


@pytest.mark.parametrize("out, missing", [("b.dcm", "highdicom"), ("b.nii", "nibabel")])
def test_a_missing_library_is_said_before_anything_runs(tmp_path, monkeypatch, out, missing):
    picture = open_image(saved(dicom(stored()), tmp_path / "a.dcm"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=f"{missing} is not installed"):
        check_outputs(tmp_path / out, grid=picture.grid)


def test_many_frames_without_a_frame_of_reference_get_another_format_offered(tmp_path):
    ds = enhanced(np.stack([stored(), stored()]))
    del ds.FrameOfReferenceUID
    cine = dicom(np.stack([stored(), stored()]), frames=2, without=["FrameOfReferenceUID"])
    for name, made, instead in (("a.dcm", ds, "use .nii.gz"), ("c.dcm", cine, "use .npy or .json")):
        picture = open_image(saved(made, tmp_path / name), frame=1)
        with pytest.raises(UserError, match=f"multi-frame file without FrameOfReferenceUID; {instead}"):
            check_outputs(tmp_path / "b.dcm", grid=picture.grid)


def test_a_dicom_that_lacks_what_a_seg_repeats_is_one_line(tmp_path):
    nameless = open_image(saved(dicom(stored(), without=["StudyInstanceUID"], SeriesInstanceUID=""), tmp_path / "n.dcm"))
    with pytest.raises(UserError, match="this one lacks StudyInstanceUID, SeriesInstanceUID; use .nii.gz"):
        check_outputs(tmp_path / "b.dcm", grid=nameless.grid)
    picture = open_image(saved(dicom(stored(), without=["Modality"]), tmp_path / "a.dcm"))
    assert isinstance(picture.grid, DicomGrid)
    with pytest.raises(UserError, match="b.dcm: this DICOM lacks attributes that a SEG must copy") as raised:
        answered(picture, ("a", np.ones((4, 6), bool))).save(tmp_path / "b.dcm")
    assert "\n" not in str(raised.value) and not (tmp_path / "b.dcm").exists()
    # What an anonymised file has lost is left empty.
    gone = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")
    picture = open_image(saved(dicom(stored(), without=gone), tmp_path / "c.dcm"))
    answered(picture, ("a", np.ones((4, 6), bool))).save(tmp_path / "b.dcm")
    assert pydicom.dcmread(tmp_path / "b.dcm").PatientID == "" and "PatientID" not in picture.grid.dataset


@needs_real
def test_real_files_there_and_back(tmp_path):
    raw = Path(REAL) / "raw"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        picture = open_image(sorted(raw.glob("CT*"))[0])
    masks = masks_on(picture, 2)
    answer = answered(picture, ("liver", masks[0]), ("spleen", masks[1]))
    answer.save(tmp_path / "b.nii.gz")
    with pytest.raises(UserError, match="lacks SOPClassUID, SOPInstanceUID, StudyInstanceUID, SeriesInstanceUID; use .nii.gz"):
        answer.save(tmp_path / "b.dcm")  # these files are anonymised to the last identifier
    for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(picture.grid.dataset, name, pydicom.uid.generate_uid())
    picture.grid.dataset.SOPClassUID = pydicom.uid.CTImageStorage
    answer.save(tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_seg(tmp_path / "b.dcm")[1], masks)
    labels = nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(labels.dataobj)[..., 0].T, np.where(masks[1], 2, masks[0]))
    np.testing.assert_allclose(labels.affine[:3, 3], [249.51171875, 437.51171875, -766.5])
    assert answer.entities[0].area_mm2 == pytest.approx(masks[0].sum() * 0.9765625**2)

    source = nibabel.load(raw / "t2.nii.gz")
    picture = open_image(raw / "t2.nii.gz", slice="axial:20")
    bright = picture.pixels[..., 0] == 255
    answered(picture, ("cord", bright)).save(tmp_path / "t2.nii.gz")
    made = nibabel.load(tmp_path / "t2.nii.gz")
    np.testing.assert_array_equal(made.affine, source.affine)
    values, labels = np.asanyarray(source.dataobj), np.asanyarray(made.dataobj) > 0
    high = np.percentile(values, 99.5)
    assert not labels[:, :20].any() and not labels[:, 21:].any() and labels.any()
    assert values[labels].min() >= high - (high / 255) and values[:, 20][~labels[:, 20]].max() < high
