"""Phantoms: pure in (seed, index), sound by the schema, laid out as a radiologist expects, and not to be had by trivial means."""

import io

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.builder import phantom_scenes
from mimo_jax.data.builder.phantom import MODALITY_SHARES, make_phantom
from mimo_jax.data.builder.phantom_shapes import MIN_RADIUS, Shape, smooth_field
from mimo_jax.errors import UserError
from mimo_jax.eval.baselines import fit_baselines
from mimo_jax.eval.metrics import iou
from tests.eval.guessing import score_baselines


@pytest.fixture(scope="module")
def records():
    return [make_phantom(11, index) for index in range(240)]


def test_is_pure_in_seed_and_index(records):
    assert make_phantom(11, 7).to_bytes() == records[7].to_bytes()
    assert make_phantom(12, 7).image != records[7].image
    assert len({record.image for record in records}) == len(records)


def test_keeps_the_schema_and_the_sizes(records):
    sides = set()
    for record in records:
        record.check()
        pixels = np.asarray(Image.open(io.BytesIO(record.image)))
        assert pixels.shape[:2] == (record.height, record.width)
        assert pixels.dtype == np.uint8 and (pixels.ndim == 3) == (record.channels == 3)
        assert len({mask.mask_id for mask in record.masks}) == len(record.masks)
        sides |= {record.height, record.width}
    assert min(sides) >= 96 and max(sides) <= 160
    assert {side % 2 for side in sides} == {0, 1}
    assert sum(record.height != record.width for record in records) > 150


def test_size_range_is_kept_and_checked():
    for index in range(12):
        record = make_phantom(0, index, size=(64, 72))
        assert 64 <= min(record.height, record.width) <= max(record.height, record.width) <= 72
    with pytest.raises(UserError, match="smallest"):
        make_phantom(0, 0, size=(100, 90))


def test_every_modality_comes_as_often_as_planned(records):
    for modality, share in MODALITY_SHARES.items():
        found = np.mean([record.modality == modality for record in records])
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / len(records))


def test_the_patients_right_is_on_the_images_left(records):
    """In body terms: a right organ's centre lies left of its twin's, in the image, although bodies are turned by up to 15 degrees."""
    pairs = 0
    for record in records:
        centre = {mask.entity: (mask.box_xyxy[0] + mask.box_xyxy[2]) / 2 for mask in record.masks}
        for entity in centre:
            if entity.startswith("left ") and entity.replace("left", "right") in centre:
                assert centre[entity.replace("left", "right")] < centre[entity], record.id
                pairs += 1
        if record.modality == "CT" and {"liver", "spleen"} <= set(centre):
            assert centre["liver"] < centre["spleen"], record.id
    assert pairs > 60


def test_lesions_lie_in_their_organs_and_are_large_enough(records):
    lesions = 0
    for record in records:
        masks = {mask.mask_id: mask.decode() for mask in record.masks}
        for mask in record.masks:
            least = np.pi * (MIN_RADIUS * max(record.height, record.width)) ** 2
            assert mask.area_px > 0.6 * least, (record.id, mask.mask_id)
            if mask.parent_mask_id:
                lesions += 1
                assert masks[mask.mask_id][~masks[mask.parent_mask_id]].sum() == 0, (record.id, mask.mask_id)
        ids = list(masks)
        for i, one in enumerate(ids):
            for other in ids[i + 1 :]:
                if record.mask(other).parent_mask_id != one:
                    assert not (masks[one] & masks[other]).any(), (record.id, one, other)
    assert lesions > 50


def test_what_is_shown_is_what_was_planned():
    rng = np.random.default_rng(3)
    for modality, anatomy in phantom_scenes.ANATOMY.items():
        plans = [anatomy.plan(rng) for _ in range(600)]
        assert all(len([organ for organ in anatomy.organs if organ not in plan]) <= 1 for plan in plans)
        for entity, share in anatomy.presence().items():
            found = np.mean([entity in plan for plan in plans])
            assert abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / len(plans)) + 1e-9, (modality, entity)


def test_lesion_counts_are_even(records):
    """Layouts that do not fit are drawn again with the same plan, so crowded images are not rarer."""
    for modality, anatomy in phantom_scenes.ANATOMY.items():
        numbers = [sum(m.entity == anatomy.lesion for m in r.masks) for r in records if r.modality == modality]
        share = np.bincount(numbers, minlength=anatomy.max_lesions + 1) / len(numbers)
        assert len(share) == anatomy.max_lesions + 1
        even = 1 / (anatomy.max_lesions + 1)
        assert np.abs(share - even).max() < 4 * np.sqrt(even * (1 - even) / len(numbers)), (modality, share)


def test_trivial_baselines_fail(records):
    baselines = fit_baselines(records[:160])
    for name, perspectives in score_baselines(baselines, records[160:]).items():
        for perspective in ("I", "II", "III", "IV"):
            assert 0.02 < perspectives[perspective]["mean"] < 0.35, (name, perspective)


def test_a_shape_is_the_ellipse_it_says():
    y, x = np.mgrid[:60, :80].astype(np.float32)
    shape = Shape(40, 30, 20, 10, angle=0.5)
    cos, sin = np.cos(0.5), np.sin(0.5)
    u, v = cos * (x - 40) + sin * (y - 30), cos * (y - 30) - sin * (x - 40)
    assert iou(shape.level(x, y) > 0, (u / 20) ** 2 + (v / 10) ** 2 < 1) > 0.99
    rows, columns = shape.window(60, 80)
    outside = np.ones((60, 80), bool)
    outside[rows, columns] = False
    assert not (shape.level(x, y) > 0)[outside].any()


def test_smooth_field_is_smooth_and_varied():
    field = smooth_field(np.random.default_rng(0), 90, 120, 4)
    assert field.shape == (90, 120) and 0.3 < field.std() < 1.5
    assert np.abs(np.diff(field, axis=1)).max() < 0.35
