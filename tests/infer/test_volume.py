"""A question to every slice of a scan: what is put together, and the masks back on the input's grid, held to places in mm."""

import itertools
import json
import os
import shutil
import types
import warnings
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pycocotools import mask as coco

from mimo_jax.data.images.volume import open_volume
from mimo_jax.data.prompts import Prompts
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Answer, Entity, check_outputs
from mimo_jax.infer.answers.calibration import UNCALIBRATED, ConfidenceFeatures
from mimo_jax.infer.engine.requests import Request
from mimo_jax.infer.predictor import Mimo
from mimo_jax.infer.volume import ask_volume
from tests.data.handmade import tokenizer as make_tokenizer
from tests.data.medical_files import affine_of, enhanced, nifti, saved, series
from tests.tiny_config import random_params, tiny_config

REAL = os.environ.get("MIMO_REAL_DATA", "")
needs_real = pytest.mark.skipif(not REAL, reason="set MIMO_REAL_DATA to the folder of real images")
WINDOW = (0, 255)  # stored values are what a picture shows


class Painter:
    """Answers as a model does, but paints what `rule` sees: {phrase: (mask [H, W], score)} of a grey picture [H, W]."""

    def __init__(self, rule, batch_size=4):
        self.rule, self.batches, self.calibration = rule, [], UNCALIBRATED
        self.config = types.SimpleNamespace(generate=types.SimpleNamespace(batch_size=batch_size))

    def check(self, request):
        if not request.question:
            raise UserError("question: is empty")

    def predict(self, requests):
        self.batches.append(len(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request):
        picture = request.image
        seen = self.rule(picture.pixels[..., 0]).items()
        entities = [
            Entity.of(n, phrase, mask, ConfidenceFeatures(score, 1.0, 1.0, 1.0), spacing_mm=picture.spacing_mm)
            for n, (phrase, (mask, score)) in enumerate(seen)
        ]
        return Answer("Here.", [], entities, False, request.question, picture.pixels, Prompts(), picture.grid)


def bright(grey):
    return {"The blob": (grey > 100, 0.9)} if (grey > 100).any() else {}


def ball(places, centre, radius=11.03):
    return np.linalg.norm(places - centre, axis=-1) < radius


def world_of(affine, shape):
    return nibabel.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))


RAS, LAS = np.diag([2.0, 3, 4, 1]), np.diag([-2.0, 3, 4, 1])
AFFINES = [RAS, LAS, *(affine_of(np.random.default_rng(seed), 0.5) for seed in range(4))]


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("axis", ["axial", "sagittal", "j"])
def test_a_blob_of_a_nifti_comes_back_where_it_lies_in_mm(tmp_path, affine, axis):
    shape = (13, 12, 11)
    world = world_of(affine, shape)
    centre = world[7, 5, 4]
    path = nifti(tmp_path / "a.nii.gz", np.where(ball(world, centre), 200, 10).astype(np.int16), affine)
    answer = ask_volume(Painter(bright), open_volume(path, axis=axis, window=WINDOW), "Segment it.", progress=False)
    answer.save(tmp_path / "b.nii.gz", tmp_path / "b.npy")
    image = nibabel.load(tmp_path / "b.nii.gz")
    labels = np.asanyarray(image.dataobj)
    np.testing.assert_allclose(image.affine, nibabel.load(path).affine, atol=1e-5)
    np.testing.assert_array_equal(labels == 1, ball(world_of(image.affine, image.shape), centre))
    assert labels.any() and labels.max() == 1 and image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), labels[None] == 1)
    (blob,) = answer.structures
    assert (blob.entity, blob.phrase, blob.voxels) == ("blob", "The blob", labels.sum())
    assert blob.volume_mm3 == pytest.approx(labels.sum() * abs(np.linalg.det(affine[:3, :3])), rel=1e-4)
    along = np.flatnonzero(labels.any(tuple(n for n in range(3) if n != answer.volume.grids[0].axis)))
    assert blob.slices == (along[0], along[-1]) and answer.segmented_slices() == along.tolist()


@pytest.mark.parametrize("directions", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0.8, 0.6, 0, -0.36, 0.48, 0.8)])
def test_a_blob_of_a_series_comes_back_where_it_lies_in_mm(tmp_path, directions):
    count, height, width, origin, step = 9, 30, 60, (10, 20, 30), 2.5  # files say 2 mm thick
    normal = np.cross(directions[:3], directions[3:])
    rows, columns = np.mgrid[:height, :width]
    places = []  # LPS of every pixel, by highdicom: PS3.3 C.7.6.2.1.1
    for k in range(count):
        first = (np.array(origin) + k * step * normal).tolist()
        to_lps = highdicom.spatial.PixelToReferenceTransformer(first, list(directions), [0.5, 0.25])
        places.append(to_lps(np.stack([columns.ravel(), rows.ravel()], 1)).reshape(height, width, 3))
    places = np.array(places)
    centre = places[5, 11, 37]
    truth = ball(places, centre, 5.03)
    series(tmp_path / "s", np.where(truth, 200, 10).astype(np.uint16), directions=directions, origin=origin, step=step)
    answer = ask_volume(Painter(bright), open_volume(tmp_path / "s", window=WINDOW), "Segment it.", progress=False)
    answer.save(tmp_path / "b.nii", tmp_path / "b.dcm", tmp_path / "b.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), truth[None])
    assert answer.structures[0].volume_mm3 == pytest.approx(truth.sum() * 2.5 * 0.125)

    image = nibabel.load(tmp_path / "b.nii")
    assert image.shape == (width, height, count)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj) == 1, ball(world_of(image.affine, image.shape), centre * [-1, -1, 1], 5.03))

    by_place = {tuple(np.round(ds.ImagePositionPatient, 4)): ds for ds in map(pydicom.dcmread, answer.volume.files)}
    seg = highdicom.seg.segread(tmp_path / "b.dcm")
    ordered = [by_place[tuple(np.round(p[0, 0], 4))] for p in places]
    pixels = seg.get_pixels_by_source_instance([ds.SOPInstanceUID for ds in ordered], assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(pixels[..., 0].astype(bool), truth)
    plain = pydicom.dcmread(tmp_path / "b.dcm")  # and by pydicom: each frame in the place that it says
    for frame, group in zip(plain.pixel_array, plain.PerFrameFunctionalGroupsSequence, strict=True):
        place = group.PlanePositionSequence[0].ImagePositionPatient
        (k,) = [k for k in range(count) if np.allclose(places[k][0, 0], place, atol=1e-3)]
        np.testing.assert_array_equal(frame.astype(bool), truth[k])
    assert plain.NumberOfFrames == truth.any((1, 2)).sum() and plain.StudyInstanceUID == ordered[0].StudyInstanceUID


def shapes(grey):
    """Two structures that overlap, the second unnamed where the first is small; a third that is named but never seen."""
    rows, columns = np.indices(grey.shape)
    level = int(grey.max())
    seen = {"a liver": (columns < level // 20, 0.8 if level % 40 else 0.4), "cyst": (grey < 0, 0.3)}
    return seen | ({"Spleen": (rows < 2, 0.6)} if level > 60 else {})


def levels(count, shape=(6, 9)):
    return np.stack([np.full(shape, 20 * k) for k in range(count)])


@pytest.mark.parametrize("many", [False, True])
def test_structures_go_by_their_name_and_keep_what_they_share(tmp_path, many):
    """Slice k shows the level 20 k: the liver covers k columns, the spleen two rows from slice 4 on."""
    count = 6
    if many:
        path = saved(enhanced(levels(count).astype(np.uint16)), tmp_path / "a.dcm")
    else:
        path = tmp_path / "s"
        series(path, levels(count).astype(np.uint16))
    painter = Painter(shapes)
    answer = ask_volume(painter, open_volume(path, window=WINDOW), "Segment all.", progress=False)
    assert painter.batches == [3, 3]  # not 4 and 2: one slice alone would be another shape to compile
    liver, cyst, spleen = answer.structures
    columns, rows = np.indices((6, 9))[::-1]
    truth = np.array([[columns < k for k in range(count)], [columns < 0] * count, [(rows < 2) & (k > 3) for k in range(count)]])
    for structure, mask in zip(answer.structures, truth, strict=True):
        np.testing.assert_array_equal(structure.mask, mask)
        assert structure.voxels == mask.sum()
    assert (liver.slices, cyst.slices, spleen.slices) == ((1, 5), None, (4, 5))
    # 6 rows of k columns weigh 0.4 where 20 k is a multiple of 40, else 0.8.
    assert liver.score == pytest.approx((0.8 * (1 + 3 + 5) + 0.4 * (2 + 4)) / 15)
    assert cyst.score == pytest.approx(0.3) and (liver.uncertain, cyst.uncertain, spleen.uncertain) == (False, True, False)
    assert answer.describe().split("\n") == [
        f"a liver: 90 voxels, {90 * answer.volume.voxel_mm3 / 1000:.2f} cm³, slices 1 to 5, score {liver.score:.2f}",
        "cyst: 0 voxels, 0.00 cm³, no slice, score 0.30, uncertain",
        f"Spleen: 36 voxels, {36 * answer.volume.voxel_mm3 / 1000:.2f} cm³, slices 4 to 5, score 0.60",
        "nothing segmented on 1 of 6 slices",
    ]

    answer.save(*(tmp_path / f"b.{ending}" for ending in ("json", "npy", "nii.gz", "dcm", "png")))
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), truth)
    labels = np.asanyarray(nibabel.load(tmp_path / "b.nii.gz").dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(labels, np.where(truth[2], 3, truth[0]))  # later ones lie on top
    values = json.loads((tmp_path / "b.json").read_text())
    assert values["slices"] == 6 and values["size"] == [6, 9] and values["texts"] == ["Here."] * 6 and values["truncated"] == []
    for row, mask in zip(values["structures"], truth, strict=True):
        assert sorted(map(int, row["rle"])) == np.flatnonzero(mask.any((1, 2))).tolist()
        for k, rle in row["rle"].items():
            np.testing.assert_array_equal(coco.decode(rle), mask[int(k)])
    names = {"id", "phrase", "entity", "rle", "voxels", "volume_mm3", "slices", "score", "uncertain"}
    assert set(values["structures"][0]) == names and values["structures"][1]["slices"] is None
    seg = highdicom.seg.segread(tmp_path / "b.dcm")
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["a liver", "Spleen"]
    if many:
        uid = pydicom.dcmread(path).SOPInstanceUID
        pixels = seg.get_pixels_by_source_frame(uid, range(1, 7), assert_missing_frames_are_empty=True)
    else:
        uids = [grid.dataset.SOPInstanceUID for grid in answer.volume.grids]
        pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(pixels.transpose(3, 0, 1, 2).astype(bool), truth[[0, 2]])
    assert {item.SegmentAlgorithmType for item in seg.SegmentSequence} == {"AUTOMATIC"}


def test_one_name_twice_on_a_slice_is_one_structure(tmp_path):
    def rule(grey):
        return {"The cyst": (np.indices(grey.shape)[1] == 1, 0.5), "cyst.": (np.indices(grey.shape)[1] > 1, 0.9)}

    answer = ask_volume(Painter(rule), open_volume(nifti(tmp_path / "a.nii", np.zeros((4, 5, 3), np.int16), RAS)), "?", progress=False)
    (cyst,) = answer.structures
    assert cyst.phrase == "The cyst" and cyst.voxels == 3 * 3 * 5 and cyst.score == pytest.approx((0.5 + 2 * 0.9) / 3)


def test_a_sheet_shows_at_most_25_painted_slices(tmp_path):
    volume = nifti(tmp_path / "a.nii", np.moveaxis(levels(40) // 20, 0, 2).astype(np.int16), RAS)
    answer = ask_volume(Painter(lambda grey: {"it": (grey >= 3, 0.9)}), open_volume(volume, window=WINDOW), "?", progress=False)
    assert answer.segmented_slices() == list(range(3, 40))
    shown = []
    asked = answer.volume.load_slice
    object.__setattr__(answer.volume, "load_slice", lambda k: shown.append(k) or asked(k))
    answer.save(tmp_path / "b.png")
    assert len(shown) == 25 and shown[0] == 3 and shown[-1] == 39 and Image.open(tmp_path / "b.png").width > 800
    single = ask_volume(Painter(lambda grey: {"it": (grey == 7, 0.9)}), answer.volume, "?", progress=False)
    assert single.describe().startswith("it: 54 voxels, 1.30 cm³, slice 7, score 0.90\n")
    empty = ask_volume(Painter(lambda grey: {}), answer.volume, "?", progress=False)
    empty.save(tmp_path / "c.png", tmp_path / "c.nii.gz", tmp_path / "c.npy", tmp_path / "c.json")
    assert np.load(tmp_path / "c.npy").shape == (0, 6, 9, 40) and empty.describe() == "nothing segmented on 40 of 40 slices"
    assert not np.asanyarray(nibabel.load(tmp_path / "c.nii.gz").dataobj).any()


def test_only_one_batch_of_pictures_is_in_memory(tmp_path):
    """Slices are shown as their batch comes, each once, and nothing keeps them."""
    volume = open_volume(nifti(tmp_path / "a.nii", np.zeros((4, 5, 10), np.int16), RAS), window=WINDOW)
    shown, asked, painter = [], volume.load_slice, Painter(bright, batch_size=3)
    object.__setattr__(volume, "load_slice", lambda k: shown.append((k, len(painter.batches))) or asked(k))
    ask_volume(painter, volume, "?", progress=False)
    assert painter.batches == [3, 3, 2, 2]
    assert shown[1:] == list(zip(range(10), [0, 0, 0, 1, 1, 1, 2, 2, 3, 3], strict=True))  # the first is looked at by the check


def test_what_cannot_be_written_is_refused(tmp_path):
    series(tmp_path / "gap", levels(4).astype(np.uint16), at=[0, 1, 3, 4])
    series(tmp_path / "free", levels(3).astype(np.uint16), without=["FrameOfReferenceUID"])
    series(tmp_path / "bare", levels(3).astype(np.uint16), SOPInstanceUID="", StudyInstanceUID="")
    scan = nifti(tmp_path / "a.nii", np.zeros((4, 5, 3), np.int16), RAS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gap, free, bare, whole = (open_volume(p, window=WINDOW) for p in (tmp_path / "gap", tmp_path / "free", tmp_path / "bare", scan))
    for volume, name, error in (
        (gap, "b.nii.gz", "does not say where in the patient its slices lie, or they are not evenly spaced; use .dcm, .npy or .json"),
        (free, "b.dcm", "cannot refer to a series without FrameOfReferenceUID; use .nii.gz"),
        (bare, "b.dcm", "this one lacks SOPInstanceUID, StudyInstanceUID; use .nii.gz"),
        (whole, "b.dcm", "only DICOM input can be saved as DICOM SEG; use .nii.gz"),
    ):
        with pytest.raises(UserError, match=error):
            check_outputs(tmp_path / name, grid=volume.grids)
    answer = ask_volume(Painter(lambda grey: {"it": (grey > 999, 0.9)}), gap, "?", progress=False)
    with pytest.raises(UserError, match="b.dcm: the answer segments nothing"):
        answer.save(tmp_path / "b.json", tmp_path / "b.dcm")
    assert not (tmp_path / "b.json").exists()
    ask_volume(Painter(bright), gap, "?", progress=False).save(tmp_path / "c.json")
    ask_volume(Painter(lambda grey: {"it": (grey >= 0, 0.9)}), gap, "?", progress=False).save(tmp_path / "gap.dcm")
    assert pydicom.dcmread(tmp_path / "gap.dcm").NumberOfFrames == 4
    with pytest.raises(UserError, match="question: is empty"):
        ask_volume(Painter(bright), gap, "", progress=False)


def test_a_model_is_asked_of_every_slice(tmp_path):
    """A small model with random weights: a volume's answer is that of its slices one by one, whatever it says."""
    config = tiny_config(max_turns=2)
    config.generate.max_new_tokens = 24
    mimo = Mimo(config, random_params(config), make_tokenizer(tmp_path))
    values = np.random.default_rng(0).integers(0, 255, (30, 24, 5)).astype(np.int16)
    volume = open_volume(nifti(tmp_path / "a.nii.gz", values, LAS), window=WINDOW)
    answer = ask_volume(mimo, volume, "Segment the liver.", progress=False)
    alone = mimo.predict([Request(shown, "Segment the liver.") for shown in volume])
    assert answer.texts == [a.text for a in alone] and answer.truncated == [k for k, a in enumerate(alone) if a.truncated]
    names = list(dict.fromkeys(e.entity for a in alone for e in a.entities))
    assert [s.entity for s in answer.structures] == names
    for s, k in itertools.product(answer.structures, range(5)):
        expected = np.logical_or.reduce([np.zeros(volume.size, bool), *(e.mask for e in alone[k].entities if e.entity == s.entity)])
        np.testing.assert_array_equal(s.on_slice(k), expected)
    with pytest.raises(UserError, match="question: is empty"):
        ask_volume(mimo, volume, " ")


@needs_real
def test_real_scans_there_and_back(tmp_path):
    raw = Path(REAL) / "raw"
    uids = {name: pydicom.uid.generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    (tmp_path / "s").mkdir()
    (tmp_path / "bare").mkdir()
    for n, path in enumerate(sorted(raw.glob("CT*"))):
        shutil.copy(path, tmp_path / "bare")
        ds = pydicom.dcmread(path)  # anonymised to the last identifier
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        for name, uid in uids.items():
            setattr(ds, name, uid)
        saved(ds, tmp_path / "s" / str((n + 1) % 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        bare, volume = open_volume(tmp_path / "bare"), open_volume(tmp_path / "s", window="bone")
    with pytest.raises(UserError, match="lacks SOPClassUID, SOPInstanceUID, StudyInstanceUID, SeriesInstanceUID; use .nii.gz"):
        check_outputs(tmp_path / "b.dcm", grid=bare.grids)
    answer = ask_volume(Painter(lambda grey: {"bone": (grey > 120, 0.9)}), volume, "Segment the bones.", progress=False)
    answer.save(tmp_path / "b.nii.gz", tmp_path / "b.dcm", tmp_path / "b.png")
    stored = [pydicom.dcmread(path) for path in volume.files]
    hu = np.stack(
        [ds.RescaleSlope * ds.pixel_array + ds.RescaleIntercept for ds in sorted(stored, key=lambda ds: ds.ImagePositionPatient[2])]
    )
    truth = np.clip(np.rint((hu + 450) / 1500 * 255), 0, 255) > 120
    image = nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).transpose(2, 1, 0) == 1, truth)
    np.testing.assert_allclose(image.affine[:3, 3], [249.51171875, 437.51171875, -770.5])
    np.testing.assert_allclose(image.affine[:3, :3], np.diag([-0.9765625, -0.9765625, 2]))
    assert answer.structures[0].volume_mm3 == pytest.approx(truth.sum() * 2 * 0.9765625**2)
    seg = highdicom.seg.segread(tmp_path / "b.dcm")
    pixels = seg.get_pixels_by_source_instance([g.dataset.SOPInstanceUID for g in volume.grids])
    np.testing.assert_array_equal(pixels[..., 0].astype(bool), truth)

    marked = nibabel.load(raw / "example_seg.nii.gz")  # the file that lies beside the CT, asked about as if it were one
    volume = open_volume(raw / "example_seg.nii.gz", axis="coronal", window=(0, 2))
    top = np.asanyarray(marked.dataobj) >= 2
    answer = ask_volume(Painter(lambda grey: {"x": (grey == 255, 0.9)}), volume, "?", progress=False)
    answer.save(tmp_path / "c.nii.gz")
    made = nibabel.load(tmp_path / "c.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(made.dataobj) == 1, top)
    np.testing.assert_array_equal(made.affine, marked.affine)
