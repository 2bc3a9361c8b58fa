"""Whole scans: the slices that one picture at a time would show, in the order of the patient, and every way a folder can be wrong."""

import gzip
import os
import shutil
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.data.images import image as pictures
from mimo_jax.data.images.image import MedicalImage, Volume
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.series import ALONE
from mimo_jax.data.images.volume import open_scan, open_volume
from mimo_jax.errors import UserError
from tests.data.medical_files import affine_of, dicom, enhanced, nifti, saved, series

REAL = os.environ.get("MIMO_REAL_DATA", "")
needs_real = pytest.mark.skipif(not REAL, reason="set MIMO_REAL_DATA to the folder of real images")
SECRETS = ("Müller", "SECRET", "1.2.826")  # of every file that medical_files makes


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=ALONE)
        yield


def fails(match, path, opener=open_volume, lines=1, **chosen):
    with pytest.raises(UserError, match=match) as raised:
        opener(path, **chosen)
    assert str(raised.value).count("\n") == lines - 1 and not any(secret in str(raised.value) for secret in SECRETS)
    return str(raised.value)


def same(a, b):
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert a.spacing_mm == b.spacing_mm


def stored(count=5, shape=(4, 6)):
    return (np.arange(count * np.prod(shape)).reshape(count, *shape) * 7).astype(np.uint16)


# --- NIfTI


@pytest.mark.parametrize("seed, oblique", [(0, 0.0), (1, 0.4), (2, 0.4)])
@pytest.mark.parametrize("axis", [None, "axial", "coronal", "sagittal", "i", "j", "k"])
def test_every_slice_of_a_nifti_is_the_picture_of_that_slice(tmp_path, seed, oblique, axis):
    rng = np.random.default_rng(seed)
    shape, window = tuple(rng.integers(3, 7, 3)), (20, 90)
    values = rng.integers(0, 99, shape).astype([np.int16, np.float32, np.uint8][seed])
    path = nifti(tmp_path / ("a.nii" if seed else "a.nii.gz"), values, affine_of(rng, oblique))
    image = nibabel.load(path)
    if seed == 0:  # a scaling in the header
        image.header.set_slope_inter(2.5, -7)
        nibabel.save(image, path)
    volume = open_volume(path, axis=axis, window=window)
    for k, shown in enumerate(volume):
        one = open_image(path, slice=f"{axis or 'axial'}:{k}", window=window)
        same(shown, one)
        assert (shown.grid.axis, shown.grid.index) == (one.grid.axis, k) == (volume.grids[k].axis, volume.grids[k].index)
    assert len(volume) == shape[volume.grids[0].axis] and volume.size == shown.pixels.shape[:2] and volume.files == [path]
    assert volume.voxel_mm3 == pytest.approx(abs(np.linalg.det(image.affine[:3, :3])), rel=1e-4)
    assert volume.spacing_mm[1:] == shown.spacing_mm
    assert np.prod(volume.spacing_mm) == pytest.approx(np.prod(np.linalg.norm(image.affine[:3, :3], axis=0)), rel=1e-4)
    same(volume[-1], volume[len(volume) - 1])
    with pytest.raises(IndexError):
        volume[len(volume)]


@pytest.mark.parametrize("kind, slope", [(np.int16, 1), (np.int16, -2), (np.float32, 1), (np.float32, 3)])
def test_all_slices_share_the_window_of_the_volume(tmp_path, kind, slope):
    values = np.random.default_rng(0).normal(100, 40, (12, 10, 8)).astype(kind)
    if kind is np.float32:
        values[:, :, 0] = np.nan  # a slice outside the field of view
        values[3, 3, 3] = np.inf
    image = nibabel.Nifti1Image(values, np.diag([-2.0, -2, 3, 1]))
    image.header.set_slope_inter(slope, 5)
    nibabel.save(image, tmp_path / "a.nii")
    read = np.asanyarray(nibabel.load(tmp_path / "a.nii").dataobj)  # what nibabel says is in it
    limits = tuple(np.percentile(read[np.isfinite(read)].astype(float), (0.5, 99.5)))
    volume = open_volume(tmp_path / "a.nii")
    for k in range(kind is np.float32, 8):
        expected = open_image(tmp_path / "a.nii", slice=f"k:{k}", window=limits).pixels
        assert np.abs(volume[k].pixels.astype(int) - expected).max() <= (kind is np.float32)  # percentiles are of the stored floats
    if kind is np.float32:
        assert not volume[0].pixels.any()


def test_a_constant_volume_is_black_and_one_without_values_is_refused(tmp_path):
    volume = open_volume(nifti(tmp_path / "a.nii", np.full((3, 4, 5), 7, np.int16), np.eye(4)))
    assert not any(shown.pixels.any() for shown in volume)
    spots = np.zeros((20, 20, 20), np.int16)
    spots[4, 5, 6] = 9  # fewer than the percentiles would see
    assert open_volume(nifti(tmp_path / "b.nii", spots, np.eye(4)))[6].pixels.max() == 255
    fails("c.nii: has no finite value", nifti(tmp_path / "c.nii", np.full((3, 4, 5), np.nan, np.float32), np.eye(4)))


def test_units_of_a_nifti_count(tmp_path):
    image = nibabel.Nifti1Image(stored(), np.diag([1e-3, 2e-3, 3e-3, 1]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    assert volume.voxel_mm3 == pytest.approx(6) and volume.spacing_mm == pytest.approx((3, 2, 1))


def test_a_packed_file_is_unpacked_once(tmp_path, monkeypatch):
    path = nifti(tmp_path / "a.nii.gz", stored().astype(np.int16), np.eye(4))
    volume = open_volume(path)
    monkeypatch.setattr(gzip, "open", lambda *_: pytest.fail("unpacked again"))
    assert len([shown for shown in volume]) == 6
    path.unlink()
    assert volume[0].pixels.shape == (4, 5, 3)


def test_a_nifti_beyond_the_limits_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    header = bytearray(image.to_bytes())[:352]
    for shape, reason in (
        ((1024, 1024, 1024), "1024 slices of 1024x1024"),
        ((2, 2, 5000), "5000 slices of 2x2"),
        ((9999, 9999, 3), "a slice of"),
    ):
        header[42:48] = np.array(shape, "<i2").tobytes()
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(header)))
        fails(f"a.nii.gz: {reason}.*limit", tmp_path / "a.nii.gz")
    nifti(tmp_path / "b.nii.gz", stored(), np.eye(4))
    data = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[: len(data) - 30])
    fails("cut.nii.gz: a damaged or truncated", tmp_path / "cut.nii.gz")


# --- a series of DICOM files


OBLIQUE = (0.8, 0.6, 0, -0.36, 0.48, 0.8)


@pytest.mark.parametrize("directions", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), OBLIQUE])
def test_a_series_is_in_the_order_of_the_patient(tmp_path, directions):
    slices = stored()
    paths = series(tmp_path / "s", slices, directions=directions)
    assert [p.name for p in paths] != sorted(p.name for p in paths)
    volume = open_volume(tmp_path / "s", window=(0, 900))
    assert len(volume) == 5 and volume.size == (4, 6) and volume.num_skipped == 0 and sorted(volume.files) == sorted(paths)
    for k, path in enumerate(paths):
        same(volume[k], open_image(path, window=(0, 900)))
        assert volume.grids[k].dataset.InstanceNumber == pydicom.dcmread(path).InstanceNumber and "PixelData" not in volume.grids[k].dataset
    assert volume.spacing_mm == pytest.approx((2, 0.5, 0.25)) and volume.voxel_mm3 == pytest.approx(0.25)
    plane = {(1, 0, 0, 0, 0, -1): "coronal", (0, 1, 0, 0, 0, -1): "sagittal", OBLIQUE: "coronal"}.get(directions, "axial")
    for chosen in ("3", f"{plane}:3"):
        same(open_scan(tmp_path / "s", slice=chosen, window=(0, 900)), volume[3])
    assert isinstance(open_scan(tmp_path / "s", slice=f"{plane}:ALL"), Volume) and len(open_scan(tmp_path / "s")) == 5


def test_each_file_of_a_series_has_its_own_window(tmp_path):
    paths = series(tmp_path / "s", stored(2))
    for path, center in zip(paths, (80, 250), strict=True):
        ds = pydicom.dcmread(path)
        ds.PhotometricInterpretation, ds.WindowCenter, ds.WindowWidth = "MONOCHROME1", center, 50
        saved(ds, path)
    for shown, path in zip(open_volume(tmp_path / "s"), paths, strict=True):
        same(shown, open_image(path))
        assert shown.pixels[0, 0, 0] == 255 and shown.pixels[-1, -1, 0] == 0  # small values are bright


def test_files_without_an_image_are_skipped(tmp_path):
    folder = tmp_path / "s"
    series(folder, stored(3))
    (folder / "notes.txt").write_text("SECRET")
    (folder / "more").mkdir()
    report = dicom(stored(1)[0], SOPClassUID=pydicom.uid.BasicTextSRStorage, Modality="SR")
    for name in ("PixelData", "Rows", "Columns"):
        delattr(report, name)
    saved(report, folder / "report")
    saved(dicom(stored(1)[0], Modality="SEG"), folder / "mask")
    directory = dicom(stored(1)[0])
    for name in ("PixelData", "Rows", "Columns"):
        delattr(directory, name)
    directory.file_meta.MediaStorageSOPClassUID = directory.SOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    saved(directory, folder / "DICOMDIR")
    volume = open_volume(folder)
    assert len(volume) == 3 and volume.num_skipped == 4


@pytest.mark.parametrize("damage", ["header", "pixels", "stream"])
def test_a_damaged_file_among_good_ones_is_skipped_with_a_warning(tmp_path, damage):
    paths = series(tmp_path / "s", stored(4, (16, 16)))
    broken = paths[3]
    data = broken.read_bytes()
    if damage == "stream":
        ds = pydicom.dcmread(broken)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        ds.PixelData = pydicom.encaps.encapsulate([b"SECRET no code stream"])
        saved(ds, broken)
    else:
        broken.write_bytes(data[: 140 if damage == "header" else len(data) - 9])
    with pytest.warns(UserWarning, match="^skipped damaged or unreadable files: 1; slices may be missing$"):
        volume, one = open_volume(tmp_path / "s"), open_scan(tmp_path / "s", slice="0")
    assert len(volume) == 3 and volume.num_skipped == 1 and volume.warnings == one.warnings
    assert volume.warnings[-1] == "skipped damaged or unreadable files: 1; slices may be missing"
    for path in paths[:3]:
        path.write_bytes(path.read_bytes()[:-9])
    fails(f"s: all {3 if damage == 'header' else 4} images are damaged or truncated", tmp_path / "s")


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    fails("has no DICOM image that can be read .no file at all.; give the folder of one series", tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL")
    (tmp_path / "c").write_bytes(b"\x1f\x8b\x08")
    fails("1 not DICOM, 2 damaged or unreadable", tmp_path)


def test_of_several_series_one_is_chosen(tmp_path):
    folder = tmp_path / "s"
    series(folder, stored(3))
    for path in series(tmp_path / "t", stored(4, (8, 10)), SeriesNumber=2, Modality="MR", seed=3):
        shutil.move(path, folder / f"t{path.name}")
    saved(enhanced(stored(2), SeriesNumber=9), folder / "e")
    saved(enhanced(stored(2), SeriesNumber=9), folder / "f")
    error = fails(r"s: has 4 series, sizes or directions; choose one with series=N \(--series N\)", folder, lines=5)
    assert [line.strip() for line in error.split("\n")[1:]] == [
        "1: 4 images, MR, 10x8", "2: 3 images, CT, 6x4", "3: 2 images, MR, 6x4", "4: 2 images, MR, 6x4",
    ]  # fmt: skip
    assert [len(open_volume(folder, series=n)) for n in (1, 2, 3, 4)] == [4, 3, 2, 2]
    same(open_scan(folder, series=1, slice="3"), open_image(next(iter(open_volume(folder, series=1).files[3:]))))
    for wrong in (0, 5):
        fails(f"series {wrong} does not exist; it has 4, counted from 1", folder, series=wrong)


@pytest.mark.parametrize("shape, directions", [((4, 6), (1, 0, 0, 0, 0, -1)), ((8, 6), (1, 0, 0, 0, 1, 0))])
def test_a_localizer_in_the_same_series_is_separated(tmp_path, shape, directions):
    uid = pydicom.uid.generate_uid()
    series(tmp_path / "s", stored(3), SeriesInstanceUID=uid)
    (extra,) = series(tmp_path / "t", stored(1, shape), SeriesInstanceUID=uid, directions=directions)
    shutil.move(extra, tmp_path / "s" / "zzz")
    error = fails("has 2 series, sizes or directions", tmp_path / "s", lines=3)
    assert "1: 3 images" in error and "2: 1 image," in error
    assert [len(open_volume(tmp_path / "s", series=n)) for n in (1, 2)] == [3, 1]


@pytest.mark.parametrize(
    "at, message",
    [
        ([0, 1, 1, 2, 3], r"slices with the same position as another one: 1 \(several phases or echoes\?\); mm³ are unknown"),
        ([0, 1, 2, 4, 5], r"distances other than the usual 2 mm: 1 of 4 \(slices missing\?\); mm³ are unknown, and .nii cannot"),
        ([0, 0, 1, 1, 3], "with the same position as another one: 2 .*; distances other than the usual"),
    ],
)
def test_gaps_and_equal_positions_cause_a_warning(tmp_path, at, message):
    paths = series(tmp_path / "s", stored(), at=at)
    with pytest.warns(UserWarning, match=message):
        volume = open_volume(tmp_path / "s")
    assert len(volume) == 5 and volume.voxel_mm3 is None and volume.spacing_mm is None
    same(volume[4], open_image(paths[4]))


def test_small_errors_of_position_and_a_tilted_gantry_are_no_gaps(tmp_path):
    series(tmp_path / "s", stored(), at=[0, 1.004, 1.997, 3.001, 4])
    assert open_volume(tmp_path / "s").spacing_mm == pytest.approx((2, 0.5, 0.25))
    for k, path in enumerate(series(tmp_path / "t", stored())):
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [10, 20 + 0.8 * k, 30 + 2 * k]
        saved(ds, path)
    assert open_volume(tmp_path / "t").voxel_mm3 == pytest.approx(0.25)  # a leaning box holds as much as a straight one


@pytest.mark.parametrize("known", ["InstanceNumber", "file name"])
def test_without_positions_the_instance_number_counts(tmp_path, known):
    gone = ("ImagePositionPatient", "ImageOrientationPatient") + (("InstanceNumber",) if known == "file name" else ())
    paths = series(tmp_path / "s", stored(4), without=gone, InstanceNumber=None)
    numbers = [7, 30, 4, 100]
    for path, number in zip(paths, numbers, strict=True):
        if known == "InstanceNumber":
            ds = pydicom.dcmread(path)
            ds.InstanceNumber = number
            saved(ds, path)
    with pytest.warns(UserWarning, match=f"do not give the positions of their slices; they are sorted by {known}"):
        volume = open_volume(tmp_path / "s", window=(0, 900))
    order = np.argsort(numbers) if known == "InstanceNumber" else np.argsort([p.name for p in paths])
    for k, n in enumerate(order):
        same(volume[k], open_image(paths[n], window=(0, 900)))
    assert volume.voxel_mm3 is None
    with pytest.warns(UserWarning), pytest.raises(UserError, match="its slices have no known plane.*write slice 1"):
        open_scan(tmp_path / "s", slice="axial:1")


def test_burned_in_text_is_warned_of_once(tmp_path):
    series(tmp_path / "s", stored(3), BurnedInAnnotation="YES")
    with pytest.warns(UserWarning, match="the slices may contain burned-in text") as told:
        len([shown for shown in open_volume(tmp_path / "s")])
    assert len(told) == 1


def test_limits_of_a_series_come_before_its_pixels(tmp_path, monkeypatch):
    series(tmp_path / "s", stored(3))
    monkeypatch.setattr(pictures, "MAX_SLICES", 2)
    monkeypatch.setattr("mimo_jax.data.images.dicom.DicomFile.image", lambda *_: pytest.fail("decoded"))
    fails("s: 3 slices of 6x4; the limits are 2 slices", tmp_path / "s")
    fails("a: 3 slices of 6x4; the limits are 2 slices", saved(dicom(stored(3), frames=3), tmp_path / "a"))


# --- a DICOM of several frames


def test_all_frames_of_a_file(tmp_path):
    path = saved(enhanced(stored(4)), tmp_path / "a")
    volume = open_volume(path, window=(0, 700))
    assert len(volume) == 4 and volume.spacing_mm == (3, 2, 4) and volume.voxel_mm3 == pytest.approx(24)
    for k, shown in enumerate(volume):
        one = open_image(path, frame=k, window=(0, 700))
        same(shown, one)
        np.testing.assert_array_equal(volume.grids[k].affine, one.grid.affine)
    assert len(open_scan(path, frame="all")) == 4 and isinstance(open_scan(path, frame=2), MedicalImage)
    cine = open_volume(saved(dicom(stored(3), frames=3), tmp_path / "b"))
    assert len(cine) == 3 and cine.voxel_mm3 is None and cine.spacing_mm is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["folder", "enhanced", "frames", "nifti", "packed"]))
def test_damaged_bytes_give_slices_or_one_line(tmp_path_factory, seed, kind):
    folder, rng = tmp_path_factory.mktemp("d"), np.random.default_rng(seed)
    if kind == "folder":
        path = series(folder / "s", stored(3))[1]
    elif kind in ("nifti", "packed"):
        path = nifti(folder / ("a.nii.gz" if kind == "packed" else "a.nii"), stored().astype(np.int16), affine_of(rng, 0.3))
    else:
        path = saved(enhanced(stored(3), [3, 4, 5]) if kind == "enhanced" else dicom(stored(3), frames=3), folder / "a")
    data = bytearray(path.read_bytes())
    for at in rng.integers(len(data), size=rng.integers(1, 6)):
        data[at] = rng.integers(256)
    path.write_bytes(data[: rng.integers(len(data)) if rng.random() < 0.2 else None])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = open_volume(folder / "s" if kind == "folder" else path)
            assert all(shown.pixels.shape == (*volume.size, 3) for shown in volume)
    except UserError as error:
        assert error.listing or "\n" not in str(error)


# --- what is chosen of a path


def test_what_does_not_fit_a_path_is_one_line(tmp_path):
    volume = nifti(tmp_path / "a.nii", stored().astype(np.int16), np.eye(4))
    film = saved(dicom(stored(1)[0]), tmp_path / "b")
    (tmp_path / "c.txt").write_text("x")
    series(tmp_path / "s", stored(3))
    fails("a.nii: is not a folder; omit series 1", volume, series=1)
    fails("axis up: give i, j, k, axial, coronal, sagittal", volume, axis="up")
    fails("b: is not a NIfTI volume; omit axis axial", film, axis="axial")
    fails("c.txt: is one image, not a volume", tmp_path / "c.txt")
    fails("gone: No such file", tmp_path / "gone")
    fails("window liver: is unknown", volume, window="liver")
    fails("window lung is in Hounsfield units", saved(dicom(stored(1)[0], Modality="MR"), tmp_path / "m"), window="lung")
    scans = {
        "a.nii: is a volume; choose a slice.*i .near sagittal. has 5, j .near coronal. has 4, k .near axial. has 6": (volume, {}),
        "a.nii: is not a DICOM file; omit frame all": (volume, {"frame": "all"}),
        "a.nii: is not a folder; omit series 2": (volume, {"slice": "k:1", "series": 2}),
        "axis z: give i, j, k": (volume, {"slice": "z:all"}),
        "choose a frame or a slice, not both": (volume, {"slice": "k:all", "frame": "all"}),
        "s: is a folder; omit frame 1": (tmp_path / "s", {"frame": 1}),
        "slice k:1: for a folder, write INDEX or PLANE:INDEX, such as 30 or axial:30": (tmp_path / "s", {"slice": "k:1"}),
        "s: slice 3 does not exist; it has 3, counted from 0": (tmp_path / "s", {"slice": "3"}),
        "s: its slices are axial, and DICOM slices stay in the plane of their acquisition; write": (tmp_path / "s", {"slice": "coronal:1"}),
    }
    for error, (path, chosen) in scans.items():
        fails(error, path, open_scan, **chosen)
    assert isinstance(open_scan(volume, slice="K:all"), Volume) and isinstance(open_scan(volume, slice="k:1"), MedicalImage)


def test_a_missing_library_is_not_reported_as_damage(tmp_path, monkeypatch):
    series(tmp_path / "s", stored(2))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    fails("pydicom is not installed", tmp_path / "s")


@needs_real
def test_real_scans(tmp_path):
    raw = Path(REAL) / "raw"
    (tmp_path / "s").mkdir()
    for n, path in enumerate(sorted(raw.glob("CT*"))):
        shutil.copy(path, tmp_path / "s" / f"{(n * 2) % 3}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        volume = open_volume(tmp_path / "s")
        assert [float(g.dataset.ImagePositionPatient[2]) for g in volume.grids] == [-770.5, -768.5, -766.5]
        for shown, path in zip(volume, sorted(raw.glob("CT*"))[::-1], strict=True):
            same(shown, open_image(path))
    assert volume.spacing_mm == (2, 0.9765625, 0.9765625)
    for name in ("example_ct_sm.nii.gz", "t2.nii.gz"):
        values = np.asanyarray(nibabel.load(raw / name).dataobj)
        limits = tuple(np.percentile(values, (0.5, 99.5)))
        volume = open_volume(raw / name, axis="coronal")
        for k in (0, 20, len(volume) - 1):
            same(volume[k], open_image(raw / name, slice=f"coronal:{k}", window=limits))
