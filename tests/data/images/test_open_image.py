"""DICOM and NIfTI to pictures: grey levels by hand, orientation against nibabel, every way in which a file can be wrong."""

import gzip
import io
import os
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from mimo_jax.data.images.image import WINDOWS
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.orientation import PLANES
from mimo_jax.data.images.series import ALONE
from mimo_jax.errors import UserError
from tests.data.medical_files import affine_of, dicom, enhanced, lut, nifti, saved

REAL = os.environ.get("MIMO_REAL_DATA", "")
needs_real = pytest.mark.skipif(not REAL, reason="set MIMO_REAL_DATA to the folder of real images")
SECRETS = ("Müller", "SECRET", "1.2.826")  # of every file that medical_files makes


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=ALONE)  # most files here are one slice; test_grey_values.py holds the warning
        yield


def grey(picture):
    assert picture.pixels.dtype == np.uint8 and picture.pixels.shape[2] == 3
    assert (picture.pixels == picture.pixels[..., :1]).all()
    return picture.pixels[..., 0]


def fails(path, match, **chosen):
    with pytest.raises(UserError, match=match) as raised:
        open_image(path, **chosen)
    assert "\n" not in str(raised.value) and not any(secret in str(raised.value) for secret in SECRETS)


def ramp(dtype=np.uint16, start=0, step=1, shape=(4, 6)):
    return (start + step * np.arange(np.prod(shape))).reshape(shape).astype(dtype)


def linear(values, low, high):
    return np.clip(np.rint((values - low) / (high - low) * 255), 0, 255)


# --- DICOM


def test_windows_of_a_ct_are_in_hounsfield_units(tmp_path):
    stored = ramp(np.int16, -500, 100)
    path = saved(dicom(stored, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[40, 300], WindowWidth=[400, 1500]), tmp_path / "a")
    hu = stored * 2.0 - 1024
    # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) * range
    np.testing.assert_array_equal(grey(open_image(path)), np.clip(np.rint(((hu - 39.5) / 399 + 0.5) * 255), 0, 255))
    np.testing.assert_array_equal(grey(open_image(path, window=(-300, 900))), linear(hu, -300, 900))
    for name, limits in WINDOWS.items():
        np.testing.assert_array_equal(grey(open_image(path, window=name.upper())), linear(hu, *limits))
    picture = open_image(path, frame=0)
    assert picture.spacing_mm == (0.5, 0.25)
    np.testing.assert_array_equal(picture.grid.affine @ [0, 0, 0, 1], [-10, -20, 30, 1])
    np.testing.assert_array_equal(picture.grid.affine @ [4, 2, 1, 1], [-11, -21, 32, 1])  # columns of 0.25, rows of 0.5 mm


@pytest.mark.parametrize("rule", ["LINEAR_EXACT", "SIGMOID"])
def test_other_rules_of_a_window(tmp_path, rule):
    path = saved(dicom(ramp(), WindowCenter=9, WindowWidth=10, VOILUTFunction=rule), tmp_path / "a")
    x = ramp().astype(float)
    expected = linear(x, 4, 14) if rule == "LINEAR_EXACT" else np.rint(255 / (1 + np.exp(-4 * (x - 9) / 10)))
    np.testing.assert_array_equal(grey(open_image(path)), expected)


@pytest.mark.parametrize("window", [{}, {"WindowWidth": 0, "WindowCenter": 5}, {"WindowWidth": None, "WindowCenter": None}])
def test_without_a_usable_window_percentiles_count(tmp_path, window):
    values = ramp(shape=(20, 30))
    low, high = np.percentile(values, (0.5, 99.5))
    np.testing.assert_array_equal(grey(open_image(saved(dicom(values, **window), tmp_path / "a"))), linear(values, low, high))


def test_a_width_of_one_is_a_threshold(tmp_path):
    path = saved(dicom(ramp(), WindowCenter=10, WindowWidth=1), tmp_path / "a")
    np.testing.assert_array_equal(grey(open_image(path)), np.where(ramp() > 9.5, 255, 0))


def test_monochrome1_is_inverted_whatever_the_window(tmp_path):
    for name, attributes in {"a": {}, "b": {"WindowCenter": 9, "WindowWidth": 11}}.items():
        one = saved(dicom(ramp(), photometric="MONOCHROME1", **attributes), tmp_path / f"{name}1")
        two = saved(dicom(ramp(), **attributes), tmp_path / f"{name}2")
        for window in (None, (3, 20)):
            np.testing.assert_array_equal(grey(open_image(one, window=window)), 255 - grey(open_image(two, window=window)))


def test_look_up_tables_hold_their_ends(tmp_path):
    values = ramp(np.uint16, 0, 40)  # 0 … 920: an 8-bit table must not wrap
    table = np.arange(0, 200, 2)
    path = saved(dicom(values, VOILUTSequence=lut(100, table, 8)), tmp_path / "voi")
    np.testing.assert_array_equal(grey(open_image(path)), table[np.clip(values.astype(int) - 100, 0, 99)])
    path = saved(dicom(values, VOILUTSequence=lut(100, table, 8), WindowCenter=400, WindowWidth=401), tmp_path / "both")
    np.testing.assert_array_equal(grey(open_image(path)), linear(values.astype(float), 199.5, 599.5))
    path = saved(dicom(ramp(np.int16, -12), ModalityLUTSequence=lut(-5, np.arange(7000, 0, -700), 16)), tmp_path / "modality")
    expected = linear(np.arange(7000, 0, -700)[np.clip(ramp(np.int16, -12) + 5, 0, 9)], 0, 7000)
    np.testing.assert_array_equal(grey(open_image(path, window=(0, 7000))), expected)


def test_colour_comes_as_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(open_image(saved(dicom(rgb, photometric="RGB"), tmp_path / "rgb")).pixels, rgb)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    path = saved(dicom(ybr.copy(), photometric="YBR_FULL"), tmp_path / "ybr")
    assert np.abs(open_image(path).pixels.astype(int) - rgb).max() <= 3
    planes = dicom(np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(4, 6, 3), photometric="RGB", PlanarConfiguration=1)
    np.testing.assert_array_equal(open_image(saved(planes, tmp_path / "planes")).pixels, rgb)
    deep = dicom(rgb.astype(np.uint16) << 8, photometric="RGB")
    np.testing.assert_array_equal(open_image(saved(deep, tmp_path / "deep")).pixels, rgb)
    fails(tmp_path / "rgb", "a colour image has no window", window=(0, 9))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_resolved(tmp_path, bits):
    index = ramp(np.uint8)
    table = np.random.default_rng(1).integers(0, 256, (3, 24)).astype(np.uint8)
    attributes = {}
    for name, entries in zip(("Red", "Green", "Blue"), table, strict=True):
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [24, 0, bits]
        attributes[f"{name}PaletteColorLookupTableData"] = (entries.astype("<u2") << 8 if bits == 16 else entries).tobytes()
    path = saved(dicom(index, photometric="PALETTE COLOR", **attributes), tmp_path / "a")
    np.testing.assert_array_equal(open_image(path).pixels, table[:, index].transpose(1, 2, 0))


def test_of_several_frames_one_is_chosen(tmp_path):
    frames = np.stack([ramp(start=100 * n) for n in range(3)])
    path = saved(dicom(frames, frames=3), tmp_path / "a")
    for n in range(3):
        picture = open_image(path, frame=n, window=(0, 300))
        np.testing.assert_array_equal(grey(picture), linear(frames[n].astype(float), 0, 300))
        assert picture.grid.frame == n and picture.grid.affine is None  # one position for all: that of none but the first
    fails(path, "has 3 frames; choose one, frame 0 to 2")
    for wrong in (3, -1):
        fails(path, f"frame {wrong} does not exist; it has 3, counted from 0", frame=wrong)
    fails(saved(dicom(ramp()), tmp_path / "b"), "frame 1 does not exist; it has 1", frame=1)


def test_functional_groups_count_frame_by_frame(tmp_path):
    frames = np.stack([ramp(), ramp(start=50)])
    path = saved(enhanced(frames, centers=[10, 60]), tmp_path / "a")
    for n, center in enumerate((10, 60)):
        picture = open_image(path, frame=n)
        np.testing.assert_array_equal(grey(picture), linear(frames[n].astype(float), center - 5, center + 5))
        assert picture.spacing_mm == (2, 4)
        np.testing.assert_array_equal(picture.grid.affine @ [1, 1, 0, 1], [-4, -2, 3 * n, 1])


def test_compressed_and_bare_files_are_the_same_picture(tmp_path):
    values = ramp(shape=(40, 48), step=9)
    plain = grey(open_image(saved(dicom(values), tmp_path / "plain")))
    for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian):
        packed = dicom(values)
        if syntax.is_encapsulated:
            packed.compress(syntax)
        packed.file_meta.TransferSyntaxUID = syntax
        np.testing.assert_array_equal(grey(open_image(saved(packed, tmp_path / "packed"))), plain)
    assert get_decoder(JPEGLosslessSV1).is_available
    bare = dicom(values)
    body = pydicom.filebase.DicomBytesIO()
    body.is_little_endian, body.is_implicit_VR = True, True
    pydicom.filewriter.write_dataset(body, pydicom.Dataset({e.tag: e for e in bare}))
    (tmp_path / "bare.png").write_bytes(body.getvalue())
    np.testing.assert_array_equal(grey(open_image(tmp_path / "bare.png")), plain)
    smooth = np.stack([np.add.outer(np.arange(40), np.arange(48)) * 2, np.full((40, 48), 90), np.full((40, 48), 30)], -1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, "JPEG", quality=95, subsampling=0)
    jpeg = dicom(smooth, photometric="YBR_FULL_422")
    jpeg.file_meta.TransferSyntaxUID, jpeg.PixelData = JPEGBaseline8Bit, encapsulate([stream.getvalue()])
    assert np.abs(open_image(saved(jpeg, tmp_path / "jpeg")).pixels.astype(int) - smooth).max() <= 6


def test_spacing_and_place_may_be_missing(tmp_path):
    places = ("ImageOrientationPatient", "ImagePositionPatient")
    film = saved(dicom(ramp(), without=("PixelSpacing", *places)), tmp_path / "film")
    assert open_image(film).spacing_mm is None and open_image(film).grid.affine is None
    for name, attributes in {"none": {"without": ["PixelSpacing"]}, "zero": {"PixelSpacing": [0, 1]}}.items():
        picture = open_image(saved(dicom(ramp(), **attributes), tmp_path / name))
        assert picture.spacing_mm is None and picture.grid.affine is None


def test_a_stretched_picture_is_warned_of(tmp_path):
    Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10) * 40).save(tmp_path / "deep.png")
    with pytest.warns(UserWarning, match="^values of more than 8 bits are stretched: 19.8 is shown as black and 3940.2 as white; give"):
        assert len(open_image(tmp_path / "deep.png").warnings) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "deep.png", window=(0, 4000)).warnings == ()


def test_burned_in_text_is_warned_of_unless_it_is_ruled_out(tmp_path):
    for name, attributes in {"yes": {"BurnedInAnnotation": "YES"}, "unsaid": {"without": ["BurnedInAnnotation"]}}.items():
        with pytest.warns(UserWarning, match="^the image may contain burned-in text"):
            image = open_image(saved(dicom(ramp(), **attributes), tmp_path / name))
        assert image.warnings[-1] == "the image may contain burned-in text, such as a patient's name"


def test_a_dicom_that_cannot_be_used_is_one_line(tmp_path):
    path = saved(dicom(ramp(shape=(16, 16))), tmp_path / "whole")
    data = path.read_bytes()
    for size in (140, 300, len(data) - 600, len(data) - 9):
        (tmp_path / "cut").write_bytes(data[:size])
        fails(tmp_path / "cut", "cut: a d(amaged or truncated DICOM file|ICOM file without an image)|cut: a DICOM file without")
    report = dicom(ramp())
    del report.PixelData
    fails(saved(report, tmp_path / "report"), "report: a DICOM file without an image")
    damaged = dicom(ramp())
    damaged.file_meta.TransferSyntaxUID = JPEG2000Lossless
    damaged.PixelData = encapsulate([b"SECRET no code stream"])
    fails(saved(damaged, tmp_path / "noise"), "noise: a damaged or truncated DICOM file")
    video = dicom(ramp())
    video.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    video.PixelData = encapsulate([b"1234"])
    fails(saved(video, tmp_path / "video"), "video: no decoder for its compression")
    fails(saved(dicom(ramp(), Rows=40000, Columns=40000), tmp_path / "bomb"), "40000x40000 pixels; the limit is")
    fails(saved(dicom(ramp(), Modality="MR"), tmp_path / "mr"), "window lung is in Hounsfield units, which only CT has", window="lung")
    fails(path, "is not a NIfTI volume; omit slice k:3 and give a frame", slice="k:3")


# --- NIfTI


def picture_by_nibabel(volume, affine, plane, index):
    """The slice as a radiologist sees it, by nibabel's canonical (RAS) copy: index counts along the file's axis."""
    marked = np.zeros(volume.shape)
    ornt = nibabel.io_orientation(affine)
    world = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    axis = int(np.flatnonzero(ornt[:, 0] == world)[0])
    np.moveaxis(marked, axis, 0)[index] = 1
    ras = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume, affine)).get_fdata()
    at = int(np.flatnonzero(nibabel.apply_orientation(marked, ornt).any(tuple(n for n in range(3) if n != world)))[0])
    return np.take(ras, at, axis=world)[::-1, ::-1].T


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4]), st.sampled_from(["axial", "coronal", "sagittal"]))
def test_a_slice_is_shown_as_a_radiologist_sees_it(tmp_path_factory, seed, oblique, plane):
    rng = np.random.default_rng(seed)
    affine, shape = affine_of(rng, oblique), rng.integers(2, 6, 3)
    volume = rng.permutation(np.prod(shape)).reshape(shape).astype(np.int16)
    path = nifti(tmp_path_factory.mktemp("n") / "a.nii", volume, affine)
    axis = int(np.flatnonzero(nibabel.io_orientation(affine)[:, 0] == PLANES[plane])[0])
    index = int(rng.integers(shape[axis]))
    picture = open_image(path, slice=f"{plane}:{index}", window=(0, 255))
    np.testing.assert_array_equal(grey(picture), np.clip(picture_by_nibabel(volume, affine, plane, index), 0, 255))
    same = open_image(path, slice=f"{'ijk'[axis]}:{index}", window=(0, 255))
    np.testing.assert_array_equal(picture.pixels, same.pixels)

    # From the picture back to the world: every pixel's voxel centre, by the affine alone.
    place = np.empty((*shape, 3))
    for ijk in np.ndindex(*shape):
        place[ijk] = nibabel.affines.apply_affine(affine, ijk)
    worlds = np.stack([picture.grid.display_view(np.ascontiguousarray(place[..., n])) for n in range(3)], axis=-1)  # [H, W, 3]
    right, down = worlds[0, -1] - worlds[0, 0], worlds[-1, 0] - worlds[0, 0]
    across, falls = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    assert right[across] < 0 and down[falls] < 0
    np.testing.assert_allclose(picture.spacing_mm[0] * (worlds.shape[0] - 1), np.linalg.norm(down), rtol=1e-4)
    np.testing.assert_allclose(picture.spacing_mm[1] * (worlds.shape[1] - 1), np.linalg.norm(right), rtol=1e-4)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_copies_of_a_volume_in_any_orientation_are_one_picture(tmp_path, plane):
    rng = np.random.default_rng(3)
    image = nibabel.Nifti1Image(rng.integers(0, 999, (4, 5, 6)).astype(np.int16), np.diag([2.0, 3, 4, 1]))
    shown = []
    for codes in ("RAS", "LAS", "PIR", "ASL", "LPS"):
        ornt = nibabel.orientations.axcodes2ornt(codes)
        turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), ornt))
        nibabel.save(turned, tmp_path / f"{codes}.nii.gz")
        world = PLANES[plane]
        axis = next(n for n in range(3) if ornt[n, 0] == world)
        index = 1 if ornt[axis, 1] > 0 else turned.shape[axis] - 2
        shown.append(open_image(tmp_path / f"{codes}.nii.gz", slice=f"{plane}:{index}"))
    for other in shown[1:]:
        np.testing.assert_array_equal(other.pixels, shown[0].pixels)
        assert other.spacing_mm == shown[0].spacing_mm == {"axial": (3, 2), "coronal": (4, 2), "sagittal": (4, 3)}[plane]


def test_slope_units_and_second_version_of_nifti(tmp_path):
    volume = ramp(np.int16, shape=(3, 4, 2))
    image = nibabel.Nifti1Image(volume, np.diag([-1e-3, -2e-3, 1e-3, 1]))
    image.header.set_xyzt_units("meter")
    image.header.set_slope_inter(2, -10)
    nibabel.save(image, tmp_path / "a.nii")
    picture = open_image(tmp_path / "a.nii", slice="k:1", window=(-10, 40))
    values = np.asanyarray(nibabel.load(tmp_path / "a.nii").dataobj)  # what nibabel says is in it
    np.testing.assert_array_equal(grey(picture), linear(values[..., 1].T, -10, 40))
    np.testing.assert_allclose(picture.spacing_mm, (2, 1), rtol=1e-5)
    second = nifti(tmp_path / "b.nii", volume, np.diag([-1.0, -2, 1, 1]), nibabel.Nifti2Image)
    np.testing.assert_array_equal(grey(open_image(second, slice="axial:1", window=(0, 23))), linear(volume[..., 1].T, 0, 23))


def test_content_tells_the_format_not_the_name(tmp_path):
    volume = ramp(np.int16, shape=(3, 4, 2))
    packed = nifti(tmp_path / "a.nii.gz", volume, np.eye(4))
    (tmp_path / "scan.png").write_bytes(packed.read_bytes())
    (tmp_path / "scan.dcm").write_bytes(gzip.decompress(packed.read_bytes()))
    one = open_image(tmp_path / "scan.png", slice="k:0").pixels
    np.testing.assert_array_equal(one, open_image(tmp_path / "scan.dcm", slice="k:0").pixels)
    Image.fromarray(np.full((3, 5), 7, np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "b.nii").write_bytes((tmp_path / "b.png").read_bytes())
    picture = open_image(tmp_path / "b.nii")
    assert (picture.pixels == 7).all() and picture.grid is None and picture.spacing_mm is None


def test_one_slice_needs_no_choice(tmp_path):
    plane = ramp(np.int16, shape=(3, 4))
    for name, volume in {"2-D": plane, "3-D": plane[:, :, None], "4-D": plane[:, :, None, None]}.items():
        picture = open_image(nifti(tmp_path / f"{name}.nii", volume, np.diag([-1.0, -1, 1, 1])), window=(0, 11))
        np.testing.assert_array_equal(grey(picture), linear(plane.T, 0, 11))
        out = np.zeros(volume.shape, np.uint8)
        picture.grid.display_view(out)[0, 2] = 5
        assert out.reshape(3, 4)[2, 0] == 5 and out.sum() == 5
    row = open_image(tmp_path / "2-D.nii", slice="i:2")
    assert row.pixels.shape == (1, 4, 3)
    across = open_image(nifti(tmp_path / "across.nii", plane[None], np.diag([-1.0, -1, -1, 1])), window=(0, 11))
    np.testing.assert_array_equal(grey(across), linear(plane.T, 0, 11))  # sagittal: rows are k


def test_a_nifti_that_cannot_be_used_is_one_line(tmp_path):
    volume, affine = ramp(np.int16, shape=(5, 6, 7)), np.diag([1.0, 2, 3, 1])
    path = nifti(tmp_path / "a.nii.gz", volume, affine)
    counts = r"i \(near sagittal\) has 5, j \(near coronal\) has 6, k \(near axial\) has 7"
    fails(path, rf"a.nii.gz: is a volume; choose a slice, such as slice k:3: {counts}")
    fails(path, rf"slice axial:7 does not exist, counted from 0: {counts}", slice="axial:7")
    for wrong in ("7", "k", "k:", "k:-1", "x:3", "k:1.5", "axial 3"):
        fails(path, "write AXIS:INDEX, AXIS one of i, j, k, axial, coronal, sagittal, such as axial:30", slice=wrong)
    fails(path, "is not a DICOM file; omit frame 3 and give a slice", frame=3)
    fails(nifti(tmp_path / "b.nii", np.zeros((2, 3, 4, 5), np.int16), affine), r"is 4-D \[2, 3, 4, 5\]; save one volume", slice="k:1")
    fails(nifti(tmp_path / "c.nii", np.zeros((2, 3, 4), np.complex64), affine), "has complex numbers", slice="k:1")
    colours = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    fails(nifti(tmp_path / "d.nii", colours, affine), "has colours", slice="k:1")
    fails(nifti(tmp_path / "e.nii", np.full((2, 3, 4), np.nan, np.float32), affine), "has no finite value", slice="k:1")
    data = path.read_bytes()
    for size in (8, 40, len(data) // 2):
        (tmp_path / "cut.nii.gz").write_bytes(data[:size])
        fails(tmp_path / "cut.nii.gz", "damaged or truncated", slice="k:6")
    (tmp_path / "cut.nii").write_bytes(gzip.decompress(data)[:400])
    fails(tmp_path / "cut.nii", "damaged or truncated NIfTI file", slice="k:6")
    nibabel.save(nibabel.Nifti1Pair(volume, affine), tmp_path / "pair.img")
    fails(tmp_path / "pair.hdr", "the header of a .hdr/.img pair; save both as one .nii.gz")
    flat = bytearray(gzip.decompress(data))
    flat[280:328] = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], "<f4").tobytes()  # srow_x, srow_y, srow_z
    (tmp_path / "flat.nii").write_bytes(flat)
    fails(tmp_path / "flat.nii", "its affine maps all voxels into one plane", slice="k:0")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["plain", "rle", "enhanced", "nifti", "packed"]))
@example(4_102_175_892, "enhanced")  # an unknown value representation in a frame that was not asked for
def test_damaged_bytes_give_a_picture_or_one_line(tmp_path_factory, seed, kind):
    folder, rng, values = tmp_path_factory.mktemp("d"), np.random.default_rng(seed), ramp(shape=(8, 9))
    ds = enhanced(np.stack([values, values]), [3, 4]) if kind == "enhanced" else dicom(values, VOILUTSequence=lut(0, range(20), 8))
    if kind == "rle":
        ds.compress(RLELossless)
    if kind in ("nifti", "packed"):
        suffix = {"nifti": ".nii", "packed": ".nii.gz"}[kind]
        path = nifti(folder / f"a{suffix}", values[:, :, None].repeat(3, 2).astype(np.int16), affine_of(rng, 0.3))
    else:
        path = saved(ds, folder / "a")
    data = bytearray(path.read_bytes())
    for at in rng.integers(len(data), size=rng.integers(1, 6)):
        data[at] = rng.integers(256)
    path.write_bytes(data[: rng.integers(len(data)) if rng.random() < 0.2 else None])
    chosen = {"frame": 1} if kind == "enhanced" else {"slice": "k:1"} if kind in ("nifti", "packed") else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert open_image(path, **chosen).pixels.dtype == np.uint8
    except UserError as error:
        assert "\n" not in str(error)


# --- other files, libraries


def test_other_files_take_a_window_of_numbers_only(tmp_path):
    Image.fromarray(ramp(np.uint16, step=100)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(grey(open_image(tmp_path / "a.png", window=(0, 2300))), linear(ramp(step=100), 0, 2300))
    fails(tmp_path / "a.png", "Hounsfield units, which only DICOM and NIfTI files have; give LOW,HIGH", window="lung")
    fails(tmp_path / "a.png", "a.png: is not a DICOM file; omit frame 0$", frame=0)
    fails(tmp_path / "a.png", "a.png: is not a NIfTI volume; omit slice k:1$", slice="k:1")
    fails(tmp_path / "gone.dcm", "gone.dcm: No such file")
    fails(tmp_path, "Is a directory")
    (tmp_path / "empty.dcm").write_bytes(b"")
    fails(tmp_path / "empty.dcm", "empty.dcm: not an image of a supported format")
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08")
    fails(tmp_path / "cut.gz", "cut.gz: a damaged or truncated gzip file")
    for wrong in ((3, 3), (5, 2), (float("nan"), 3), (1,)):
        fails(tmp_path / "a.png", "give two numbers LOW,HIGH with LOW < HIGH", window=wrong)
    fails(tmp_path / "a.png", "window liver: is unknown; give LOW,HIGH or one of lung, bone, soft", window="liver")


@pytest.mark.parametrize("library", ["pydicom", "nibabel"])
def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch, library):
    paths = {"pydicom": saved(dicom(ramp()), tmp_path / "a"), "nibabel": nifti(tmp_path / "b.nii", ramp(np.int16), np.eye(4))}
    monkeypatch.setitem(sys.modules, library, None)
    fails(paths[library], rf'{library} is not installed, which medical files need: pip install "mimo_jax\[medical\]"')


@needs_real
def test_real_files():
    raw = Path(REAL) / "raw"
    for path in sorted(raw.glob("CT*")):
        with pytest.warns(UserWarning, match="burned-in"):
            picture = open_image(path)
        ds = pydicom.dcmread(path)
        expected = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(ds.pixel_array, ds), ds)  # over the stored range
        expected = np.rint((expected + 1024) / 4095 * 255)
        assert np.abs(grey(picture) - expected).max() <= 1
        assert picture.spacing_mm == (0.9765625, 0.9765625)
    volume = nibabel.load(raw / "example_ct_sm.nii.gz")
    for plane in ("axial", "coronal", "sagittal"):
        for name in ("example_ct_sm.nii.gz", "t2.nii.gz"):
            volume = nibabel.load(raw / name)
            by_nibabel = picture_by_nibabel(np.asanyarray(volume.dataobj), volume.affine, plane, 20)
            low, high = np.percentile(np.asanyarray(volume.dataobj), (0.5, 99.5))
            np.testing.assert_allclose(grey(open_image(raw / name, slice=f"{plane}:20")), linear(by_nibabel, low, high), atol=1)
