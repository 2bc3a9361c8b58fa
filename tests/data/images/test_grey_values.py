"""Black and white of a scan are the same wherever a slice of it is opened: alone, in a volume, a series, a file of frames, a dataset."""

import tracemalloc
import warnings

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.data.builder.record import ALONE, BuiltRecord, make_record
from mimo_jax.data.images import grey_values
from mimo_jax.data.images.grey_values import ValueCounts
from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.images.volume import open_scan, open_volume
from mimo_jax.data.transforms import decode_image
from mimo_jax.infer.answers.write_masks import write_seg
from tests.data.builder.readers.trees import listed, write_json
from tests.data.medical_files import dicom, enhanced, nifti, saved, series

SLOPES = (0.5, 3.0, 1.25, 9.0, 2.0)  # PET: every slice has its own


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def stored(count=5, shape=(14, 18)):
    return np.random.default_rng(0).integers(0, 900, (count, *shape)).astype(np.uint16)


def linear(values, low, high):
    return np.clip(np.rint((values.astype(float) - low) / (high - low) * 255), 0, 255)


def near(picture, expected):
    grey = picture.pixels[..., 0].astype(int)
    assert (picture.pixels == picture.pixels[..., :1]).all() and np.abs(grey - expected).max() <= 1


def pet(folder, pixels):
    """A series without a window, slice k with SLOPES[k]; (paths in the order of the slices, rescaled values)."""
    paths = series(folder, pixels, Modality="PT", RescaleIntercept=0)
    for path, slope in zip(paths, SLOPES, strict=True):
        ds = pydicom.dcmread(path)
        ds.RescaleSlope = slope
        saved(ds, path)
    return paths, pixels * np.array(SLOPES)[:, None, None]


# --- counting


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, ">i2", np.int32, np.float32, np.float64, bool]),
    st.sampled_from([(1.0, 0.0), (-2.5, 7.0), (1e-3, -1024.0)]),
)
def test_limits_are_the_percentiles_of_all_parts_together(seed, dtype, scaling):
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(0, 60, rng.integers(1, 40, 2)) % 100).astype(dtype) for _ in range(rng.integers(1, 5))]
    counts = ValueCounts()
    for part in parts:
        counts.add(part, lambda values: values * scaling[0] + scaling[1])
    everything = np.concatenate([part.ravel() for part in parts]).astype(np.float64) * scaling[0] + scaling[1]
    low, high = np.percentile(everything, (0.5, 99.5))
    if low < high:
        np.testing.assert_allclose(counts.limits(), (low, high), rtol=1e-5, atol=1e-5)
    else:
        assert counts.limits()[0] == everything.min() and counts.limits()[1] > counts.limits()[0]


def test_many_distinct_values_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(grey_values, "_CHUNK", 2**16)
    rng, counts, parts = np.random.default_rng(0), ValueCounts(), []
    for scale in (1, 3, 50, 2):
        parts.append(rng.standard_cauchy(2**18).astype(np.float32) * scale)
        counts.add(parts[-1], lambda values: -values)
    assert sum(len(levels) for levels, _ in [(counts._levels, 0), *counts._pending]) <= grey_values._MAX_LEVELS + grey_values._MAX_PENDING
    everything = -np.concatenate(parts).astype(np.float64)
    below = [(everything <= limit).mean() * 100 for limit in counts.limits()]
    np.testing.assert_allclose(below, (0.5, 99.5), atol=0.01)


def test_values_that_are_not_finite_do_not_count():
    counts = ValueCounts()
    counts.add(np.array([np.nan, np.inf]), lambda values: values)
    assert counts.limits() is None
    counts.add(np.array([3.0, 5.0, -np.inf]), lambda values: values)
    np.testing.assert_allclose(counts.limits(), np.percentile([3.0, 5.0], (0.5, 99.5)))


# --- one scan on every path


def test_a_slice_has_the_same_grey_values_on_every_path(tmp_path):
    pixels = stored()
    (tmp_path / "dataset").mkdir()
    paths, values = pet(tmp_path / "dataset" / "s", pixels)
    expected = linear(values, *np.percentile(values, (0.5, 99.5)))
    assert np.abs(expected - np.stack([linear(v, *np.percentile(v, (0.5, 99.5))) for v in values])).mean() > 10  # slices by themselves

    volume = open_volume(tmp_path / "dataset" / "s")
    for k, path in enumerate(paths):
        near(open_image(path), expected[k])
        near(volume[k], expected[k])
        near(open_scan(tmp_path / "dataset" / "s", slice=str(k)), expected[k])

    frames = enhanced(pixels)
    for group, slope in zip(frames.PerFrameFunctionalGroupsSequence, SLOPES, strict=True):
        group.PixelValueTransformationSequence[0].RescaleSlope = slope
    cine = saved(frames, tmp_path / "enhanced.dcm")
    for k, shown in enumerate(open_volume(cine)):
        near(shown, expected[k])
        near(open_image(cine, frame=k), expected[k])

    affine = np.diag([-0.25, -0.5, 2, 1])
    for name, kind in (("plain.nii", np.float32), ("packed.nii.gz", np.float32), ("double.nii", np.float64)):
        path = nifti(tmp_path / name, values.T.astype(kind), affine)
        for k, shown in enumerate(open_volume(path)):
            near(shown, expected[k])
            near(open_image(path, slice=f"axial:{k}"), expected[k])

    # Built datasets: of the NIfTI file, and of the series with a SEG.
    labels = nifti(tmp_path / "labels.nii.gz", np.ones(values.T.shape, np.uint8), affine)
    table = write_json(tmp_path / "labels.json", {"liver": 1})
    items, _ = listed("nifti", tmp_path / "packed.nii.gz", label=str(labels), labels=str(table), modality="CT", min_area=1)
    assert len(items) == 5
    for item in items:
        near_record(item, expected[item.slice_index])
    with open(tmp_path / "dataset" / "seg.dcm", "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_seg(tmp_path / "seg.dcm", file, [("liver", np.ones(values.shape, bool))], volume.grids, False)
    items, _ = listed("dicom-seg", tmp_path / "dataset", modality="MR")
    assert len(items) == 5
    for item in items:
        near_record(item, expected[[str(path) for path in paths].index(item.image)])


def near_record(item, expected):
    built = make_record(item)
    assert isinstance(built, BuiltRecord), built
    assert ALONE not in built.warnings
    assert np.abs(decode_image(built.record.image)[..., 0].astype(int) - expected).max() <= 1


def test_slices_keep_the_windows_in_their_headers(tmp_path):
    pixels = stored(4)
    paths = series(tmp_path / "s", pixels)
    low, high = np.percentile(pixels, (0.5, 99.5))
    for path, center in zip(paths[:2], (300, 600), strict=True):
        ds = pydicom.dcmread(path)
        ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, 200, "LINEAR_EXACT"
        saved(ds, path)
    expected = [linear(pixels[0], 200, 400), linear(pixels[1], 500, 700), linear(pixels[2], low, high), linear(pixels[3], low, high)]
    for shown, path, wanted in zip(open_volume(tmp_path / "s"), paths, expected, strict=True):
        near(shown, wanted)
        near(open_image(path), wanted)
    near(open_image(paths[0], window=(0, 900)), linear(pixels[0], 0, 900))


def test_only_files_of_the_series_count(tmp_path):
    pixels, uid = stored(4), pydicom.uid.generate_uid()
    paths = series(tmp_path / "s", pixels, SeriesInstanceUID=uid)
    expected = linear(pixels[1], *np.percentile(pixels, (0.5, 99.5)))
    near(open_image(paths[1]), expected)
    for other in (
        series(tmp_path / "other", stored(2) * 9),  # another series
        series(tmp_path / "localizer", stored(1) * 9, SeriesInstanceUID=uid, directions=(1, 0, 0, 0, 0, -1)),
        series(tmp_path / "size", stored(1, (6, 6)) * 9, SeriesInstanceUID=uid),
    ):
        for path in other:
            path.rename(tmp_path / "s" / f"{path.parent.name}{path.name}")
    (tmp_path / "s" / "notes.txt").write_text("not DICOM")
    near(open_image(paths[1]), expected)
    # A file that is damaged does not count, as it is skipped in the volume; nor one that has gone.
    paths[3].write_bytes(paths[3].read_bytes()[:-9])
    near(open_image(paths[1]), linear(pixels[1], *np.percentile(pixels[:3], (0.5, 99.5))))
    paths[3].unlink()
    near(open_image(paths[1]), linear(pixels[1], *np.percentile(pixels[:3], (0.5, 99.5))))


def test_a_slice_without_its_series_is_warned_of(tmp_path):
    pixels = stored(1)[0]
    path = saved(dicom(pixels), tmp_path / "a")
    with pytest.warns(UserWarning, match=f"^{ALONE}; give --window, or put the other files of its series into its folder$"):
        near(open_image(path), linear(pixels, *np.percentile(pixels, (0.5, 99.5))))
    open_image(path, window=(0, 900))
    open_image(saved(dicom(pixels, WindowCenter=5, WindowWidth=9), tmp_path / "b"))
    gone = ("ImageOrientationPatient", "ImagePositionPatient")
    open_image(saved(dicom(pixels, without=gone, Modality="DX"), tmp_path / "film"))  # a radiograph is all there is
    open_image(saved(enhanced(stored(2)), tmp_path / "frames"), frame=1)


def test_a_file_that_changes_is_counted_again(tmp_path):
    values = stored()
    for factor in (1, 7):
        path = nifti(tmp_path / "a.nii", (values * factor).T.astype(np.int32), np.diag([-1.0, -1, 1, 1]))
        near(open_image(path, slice="k:2"), linear(values[2], *np.percentile(values, (0.5, 99.5))))
        frames = saved(enhanced(values * factor), tmp_path / "b")
        near(open_image(frames, frame=2), linear(values[2], *np.percentile(values, (0.5, 99.5))))


def test_the_memory_for_one_slice_does_not_grow_with_its_scan(tmp_path):
    peaks = []
    for count in (4, 40):
        pixels = stored(count, (256, 256))
        (path, *_) = series(tmp_path / str(count), pixels)
        packed = nifti(tmp_path / f"{count}.nii.gz", pixels.T.astype(np.int16), np.diag([-1.0, -1, 1, 1]))
        for opened in (lambda path=path: open_image(path), lambda packed=packed: open_image(packed, slice="k:1")):
            opened()  # what is loaded once
            (path.parent / "more").write_text("")  # the folder is read again
            packed.touch()
            tracemalloc.start()
            opened()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    few_dicom, few_nifti, many_dicom, many_nifti = peaks
    assert many_dicom < few_dicom + 2**21
    assert many_nifti < few_nifti + 20 * 2**20  # one part of the file, 2^20 voxels


# --- padding, spacing


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("kind, padding", [(np.int16, -2000), (np.uint16, 4095), (np.int16, 2**16 - 2000)])
def test_padding_does_not_count_and_is_black(tmp_path, photometric, kind, padding):
    values = stored(1)[0].astype(kind)
    outside = np.zeros(values.shape, bool)
    outside[:, :6] = True
    values[outside] = padding if padding < 2**15 else padding - 2**16
    gone = ("ImageOrientationPatient", "ImagePositionPatient")
    ds = dicom(values, photometric=photometric, without=gone, Modality="DX")
    ds.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    path = saved(ds, tmp_path / "a")
    expected = linear(values, *np.percentile(values[~outside], (0.5, 99.5)))
    expected = np.where(outside, 0, 255 - expected if photometric == "MONOCHROME1" else expected)
    near(open_image(path), expected)
    assert not open_image(path, window=(-3000, -1000)).pixels[outside].any()


def test_a_range_of_padding(tmp_path):
    values = stored(1)[0]
    values[:3] = np.arange(18) % 4 + 4000
    ds = dicom(values, Modality="MG", without=("ImageOrientationPatient", "ImagePositionPatient"))
    ds.add_new("PixelPaddingValue", "US", 4003)
    ds.add_new("PixelPaddingRangeLimit", "US", 4000)
    shown = open_image(saved(ds, tmp_path / "a"))
    near(shown, np.where(values >= 4000, 0, linear(values, *np.percentile(values[values < 4000], (0.5, 99.5)))))


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"ImagerPixelSpacing": [0.2, 0.1]}, None),
        ({"ImagerPixelSpacing": [0.2, 0.1], "EstimatedRadiographicMagnificationFactor": 1.25}, (0.16, 0.08)),
        ({"ImagerPixelSpacing": [0.2, 0.1], "PixelSpacing": [0.2, 0.1]}, None),
        ({"ImagerPixelSpacing": [0.2, 0.1], "PixelSpacing": [0.15, 0.07]}, (0.15, 0.07)),
    ],
)
def test_spacing_at_the_detector_is_not_that_of_the_patient(tmp_path, fields, expected):
    film = dicom(stored(1)[0], without=("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"), Modality="DX")
    for name, value in fields.items():
        setattr(film, name, value)
    spacing = open_image(saved(film, tmp_path / "a")).spacing_mm
    assert spacing == (expected and pytest.approx(expected))
