"""A patient is displayed the same way whatever the position in the scanner, the plane, the format and the order of storage."""

import warnings

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.orientation import PLANES, Display, display_of, display_of_letters
from mimo_jax.data.images.volume import open_scan, open_volume
from mimo_jax.data.prompts import Prompts
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import ConfidenceFeatures
from mimo_jax.infer.volume import ask_volume
from tests.data.medical_files import dicom, enhanced, saved, series
from tests.infer.test_volume import Painter

ROWS, COLUMNS, SLICES = 9, 12, 5
SPACING, STEP = (0.5, 0.25), 2.0  # mm, of `series`
ORIGIN = (10.0, 20.0, 30.0)
# Directions of a row and of a column (LPS), as scanners write them for the position of the patient in ImagePositionPatient's
# axial images, and for other planes.
DIRECTIONS = {
    "HFS": (1, 0, 0, 0, 1, 0),
    "HFP": (-1, 0, 0, 0, -1, 0),
    "FFS": (-1, 0, 0, 0, 1, 0),
    "FFP": (1, 0, 0, 0, -1, 0),
    "HFDR": (0, 1, 0, -1, 0, 0),
    "HFDL": (0, -1, 0, 1, 0, 0),
    "FFDR": (0, -1, 0, -1, 0, 0),
    "FFDL": (0, 1, 0, 1, 0, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "coronal, head down": (1, 0, 0, 0, 0, 1),
    "coronal, mirrored": (-1, 0, 0, 0, 0, -1),
    "coronal, transposed": (0, 0, -1, 1, 0, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "sagittal, mirrored": (0, -1, 0, 0, 0, -1),
    "sagittal, transposed": (0, 0, 1, 0, 1, 0),
    "oblique axial": (0.96, 0.28, 0, -0.28 * 0.8, 0.96 * 0.8, 0.6),
    "oblique coronal": (0.8, 0.6, 0, -0.36, 0.48, 0.8),
    "oblique prone": (-0.96, 0.28, 0, -0.28 * 0.8, -0.96 * 0.8, 0.6),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stored(seed=0):
    return np.random.default_rng(seed).integers(0, 900, (SLICES, ROWS, COLUMNS)).astype(np.uint16)


def affine_of_series(directions):
    """(column, row, slice) of `series` to RAS mm, by PS3.3 C.7.6.2.1.1."""
    along_row, along_column = np.array(directions[:3], float), np.array(directions[3:], float)
    lps = np.eye(4)
    normal = np.cross(along_row, along_column)
    lps[:3] = np.stack([along_row * SPACING[1], along_column * SPACING[0], normal * STEP, np.array(ORIGIN)], axis=1)
    return np.diag([-1.0, -1, 1, 1]) @ lps


def as_nifti(path, pixels, directions, codes):
    """The same voxels as NIfTI, stored along the axes `codes`."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(pixels.T).astype(np.int16), affine_of_series(directions))
    wanted = nibabel.orientations.axcodes2ornt(codes)
    nibabel.save(image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), wanted)), path)
    return path


def plane_of(directions):
    worlds = nibabel.io_orientation(affine_of_series(directions))[:, 0]
    return next(name for name, world in PLANES.items() if world == worlds[2])


def places(affine, shape):
    return nibabel.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))


# --- one picture of one patient


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_dicom_and_nifti_of_one_scan_are_one_picture(tmp_path, directions, codes):
    pixels = stored()
    paths = series(tmp_path / "s", pixels, directions=directions, origin=ORIGIN, step=STEP)
    volume = open_volume(tmp_path / "s")
    other = open_volume(as_nifti(tmp_path / "a.nii.gz", pixels, directions, codes), axis=plane_of(directions))
    assert volume.size == other.size and len(volume) == len(other)
    assert volume.spacing_mm == pytest.approx(other.spacing_mm) and volume.voxel_mm3 == pytest.approx(other.voxel_mm3)
    # The order of slices is that of each file: they are matched by what they show.
    shown = [picture.pixels.astype(int) for picture in other]
    for picture, path in zip(volume, paths, strict=True):
        assert min(np.abs(picture.pixels - one).max() for one in shown) <= 1
        np.testing.assert_array_equal(picture.pixels, open_image(path).pixels)
        assert picture.spacing_mm == pytest.approx(other[0].spacing_mm)
        assert picture.grid.display.plane == plane_of(directions)


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_left_front_and_head_are_where_a_radiologist_sees_them(tmp_path, directions):
    """By the positions that highdicom computes for the stored pixels, without the display's own code."""
    paths = series(tmp_path / "s", stored(), directions=directions, origin=ORIGIN, step=STEP)
    picture = open_image(paths[0], window=(0, 900))
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    to_lps = highdicom.spatial.PixelToReferenceTransformer(list(ORIGIN), [float(v) for v in directions], list(SPACING))
    lps = to_lps(np.stack([columns.ravel(), rows.ravel()], 1)).reshape(ROWS, COLUMNS, 3)
    shown = picture.grid.display.turn(lps)
    assert shown.shape[:2] == picture.pixels.shape[:2]
    right, down = shown[0, -1] - shown[0, 0], shown[-1, 0] - shown[0, 0]
    plane = picture.grid.display.plane
    across, falls = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    assert right[across] > 0  # to the patient's left, or back
    assert down[falls] * (-1 if falls == 2 else 1) > 0  # to the back, or feet
    values = np.clip(np.rint(stored()[0] / 900 * 255), 0, 255)
    np.testing.assert_array_equal(picture.pixels[..., 0], picture.grid.display.turn(values))
    assert picture.spacing_mm == pytest.approx((np.linalg.norm(down) / (len(shown) - 1), np.linalg.norm(right) / (shown.shape[1] - 1)))


@pytest.mark.parametrize("position", ["HFS", "FFP", "HFDL", "sagittal, transposed", "oblique prone"])
def test_frames_of_one_file_are_turned_as_its_series(tmp_path, position):
    directions, pixels = DIRECTIONS[position], stored()
    series(tmp_path / "s", pixels, directions=directions, origin=ORIGIN, step=STEP)
    frames = enhanced(pixels)
    frames.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [float(v) for v in directions]
    path = saved(frames, tmp_path / "a.dcm")
    for k, (one, picture) in enumerate(zip(open_volume(path), open_volume(tmp_path / "s"), strict=True)):
        np.testing.assert_array_equal(one.pixels, picture.pixels)
        np.testing.assert_array_equal(open_image(path, frame=k).pixels, one.pixels)


def test_frames_of_several_directions_are_asked_one_by_one(tmp_path):
    frames = enhanced(stored()[:2])
    del frames.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    for group, directions in zip(frames.PerFrameFunctionalGroupsSequence, ("HFS", "HFDL"), strict=True):
        item = pydicom.Dataset()
        item.ImageOrientationPatient = [float(v) for v in DIRECTIONS[directions]]
        group.PlaneOrientationSequence = [item]
    path = saved(frames, tmp_path / "a.dcm")
    with pytest.raises(UserError, match="its frames have several directions, and sizes once they are turned; choose one, such as frame 0"):
        open_volume(path)
    assert [open_image(path, frame=k).pixels.shape[:2] for k in (0, 1)] == [(ROWS, COLUMNS), (COLUMNS, ROWS)]


def test_slices_between_two_planes_are_turned_alike(tmp_path):
    """At 45 degrees, where the last digit of a header would decide."""
    pixels, half = stored(), 0.5**0.5
    paths = series(tmp_path / "s", pixels, directions=(1, 0, 0, 0, half, -half))
    for path, noise in zip(paths, (0, 1e-5, -1e-5, 2e-4, -2e-4), strict=True):
        ds = pydicom.dcmread(path)
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(half + noise, 6), round(-half + noise, 6)]
        saved(ds, path)
    volume = open_volume(tmp_path / "s")
    assert len({(picture.grid.display, grid.display) for picture, grid in zip(volume, volume.grids, strict=True)}) == 1


def test_a_slice_of_a_folder_is_chosen_by_its_plane(tmp_path):
    series(tmp_path / "s", stored(), directions=DIRECTIONS["sagittal, mirrored"])
    np.testing.assert_array_equal(open_scan(tmp_path / "s", slice="sagittal:2").pixels, open_volume(tmp_path / "s")[2].pixels)


# --- images without a position


def test_without_orientation_a_frame_is_displayed_as_it_is_stored(tmp_path):
    pixels = stored()[0]
    gone = ("ImageOrientationPatient", "ImagePositionPatient")
    for name, attributes in {"ultrasound": {"Modality": "US"}, "film": {"Modality": "DX"}, "breast": {"Modality": "MG"}}.items():
        path = saved(dicom(pixels, without=gone, PatientOrientation=["R", "F"] * (name != "film"), **attributes), tmp_path / name)
        picture = open_image(path, window=(0, 255))
        np.testing.assert_array_equal(picture.pixels[..., 0], np.minimum(pixels, 255))
        assert picture.grid.display == Display()


@pytest.mark.parametrize(
    "letters, turned",
    [
        (["L", "F"], lambda p: p),
        (["R", "F"], lambda p: p[:, ::-1]),
        (["L", "H"], lambda p: p[::-1]),
        (["RA", "FP"], lambda p: p[:, ::-1]),  # the first letter counts most
        (["F", "L"], lambda p: p.T),
        (["H", "L"], lambda p: p.T[::-1]),
        (["A", "F"], lambda p: p),  # lateral
        (["P", "H"], lambda p: p),
        (["A", "R"], lambda p: p),
        (["R", "L"], lambda p: p),
        (["R"], lambda p: p),
        ("", lambda p: p),
    ],
)
def test_a_frontal_radiograph_has_the_patients_left_on_the_right(tmp_path, letters, turned):
    pixels = stored()[0]
    gone = ("ImageOrientationPatient", "ImagePositionPatient")
    path = saved(dicom(pixels, without=gone, Modality="DX", PatientOrientation=letters, PixelSpacing=[0.5, 0.25]), tmp_path / "a")
    picture = open_image(path, window=(0, 255))
    np.testing.assert_array_equal(picture.pixels[..., 0], turned(np.minimum(pixels, 255)))
    assert picture.spacing_mm == ((0.25, 0.5) if picture.pixels.shape[0] == COLUMNS else (0.5, 0.25))


# --- masks back in the file


def answered(picture, mask):
    entity = Entity.of(0, "liver", mask, ConfidenceFeatures(0.9, 0.9, 0.9, 0.9), spacing_mm=picture.spacing_mm)
    return Answer("Here.", [], [entity], False, "Segment it.", picture.pixels, Prompts(), picture.grid)


def itk_places(path):
    """LPS of the voxels of a label map that are not 0, as SimpleITK places them."""
    image = SimpleITK.ReadImage(str(path))
    labels = SimpleITK.GetArrayFromImage(image)  # [k, j, i]
    return np.array([image.TransformIndexToPhysicalPoint([int(v) for v in index[::-1]]) for index in np.argwhere(labels)])


def nibabel_places(path):
    image = nibabel.load(path)
    return nibabel.affines.apply_affine(image.affine, np.argwhere(np.asanyarray(image.dataobj))) * [-1, -1, 1]


def seg_places(path):
    """LPS of the pixels of a SEG, by pydicom and highdicom."""
    ds, found = pydicom.dcmread(path), []
    shared = ds.SharedFunctionalGroupsSequence[0]
    frames = ds.pixel_array.reshape(-1, int(ds.Rows), int(ds.Columns))
    for frame, group in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        to_lps = highdicom.spatial.PixelToReferenceTransformer(
            [float(v) for v in (group.get("PlanePositionSequence") or shared.PlanePositionSequence)[0].ImagePositionPatient],
            [float(v) for v in (shared.get("PlaneOrientationSequence") or group.PlaneOrientationSequence)[0].ImageOrientationPatient],
            [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing],
        )
        rows, columns = np.nonzero(frame)
        found.append(to_lps(np.stack([columns, rows], 1)))
    return np.concatenate(found)


def same_places(found, expected):
    distance, partner = cKDTree(expected).query(found)
    assert sorted(partner) == list(range(len(expected))) and len(expected) > 0
    assert distance.max() < 0.01  # mm


def bright(grey):
    return {"liver": (grey > 200, 0.9)} if (grey > 200).any() else {}


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_masks_of_a_series_land_on_the_voxels_that_were_displayed(tmp_path, directions):
    pixels = stored()
    paths = series(tmp_path / "s", pixels, directions=directions, origin=ORIGIN, step=STEP)
    truth = np.clip(np.rint(pixels / 900 * 255), 0, 255) > 200
    lps = places(affine_of_series(directions), (COLUMNS, ROWS, SLICES))[truth.T] * [-1, -1, 1]

    answer = ask_volume(Painter(bright), open_volume(tmp_path / "s", window=(0, 900)), "Segment it.", progress=False)
    answer.save(tmp_path / "all.nii.gz", tmp_path / "all.dcm", tmp_path / "all.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), truth[None])
    for found in (nibabel_places(tmp_path / "all.nii.gz"), itk_places(tmp_path / "all.nii.gz"), seg_places(tmp_path / "all.dcm")):
        same_places(found, lps)
    seg = highdicom.seg.segread(tmp_path / "all.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    again = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(again[..., 0].astype(bool), truth)

    picture = open_image(paths[2], window=(0, 900))
    answered(picture, picture.pixels[..., 0] > 200).save(tmp_path / "one.nii.gz", tmp_path / "one.dcm")
    lps = places(affine_of_series(directions), (COLUMNS, ROWS, SLICES))[:, :, 2][truth[2].T] * [-1, -1, 1]
    for found in (nibabel_places(tmp_path / "one.nii.gz"), itk_places(tmp_path / "one.nii.gz"), seg_places(tmp_path / "one.dcm")):
        same_places(found, lps)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_masks_land_where_they_belong_for_any_direction(tmp_path_factory, seed, mirrored):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("d")
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    directions = [float(v) for v in np.round(np.concatenate([turn[0], turn[1] * (-1 if mirrored else 1)]), 6)]
    pixels = stored(seed)
    series(folder / "s", pixels, directions=directions, origin=ORIGIN, step=STEP)
    truth = np.clip(np.rint(pixels / 900 * 255), 0, 255) > 200
    lps = places(affine_of_series(directions), (COLUMNS, ROWS, SLICES))[truth.T] * [-1, -1, 1]
    volume = open_volume(folder / "s", window=(0, 900))
    answer = ask_volume(Painter(bright), volume, "Segment it.", progress=False)
    answer.save(folder / "b.nii", folder / "b.dcm")
    for found in (nibabel_places(folder / "b.nii"), itk_places(folder / "b.nii"), seg_places(folder / "b.dcm")):
        same_places(found, lps)
    other = open_volume(as_nifti(folder / "a.nii", pixels, directions, "RAS"), axis=plane_of(directions), window=(0, 900))
    shown = {picture.pixels.tobytes() for picture in other}
    assert volume.size == other.size and {picture.pixels.tobytes() for picture in volume} == shown


def test_letters_and_axes_are_one_convention():
    """The usual frontal radiograph and the coronal slice of a scan from front to back are displayed as they are stored."""
    assert display_of_letters("L", "F") == Display("coronal")
    assert display_of(np.array([[0, -1], [2, -1], [1, -1]]), 1, 0) == Display("coronal")
