"""One item to one record: what is kept, repaired, rejected, and warned of."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mimo_jax.data.builder import record as under_test
from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.record import (
    BURNED_IN,
    DUPLICATE_MASK,
    EMPTY_MASK,
    EMPTY_MASK_SAMPLE,
    LARGE_MASK,
    SAME_PIXELS,
    BuiltRecord,
    Reject,
    make_record,
    perceptual_hash,
    pixel_hash,
)
from mimo_jax.data.builder.splits import MAX_COARSE_BITS, MAX_FINE_BITS
from mimo_jax.data.images.series import ALONE
from mimo_jax.data.transforms import decode_image
from mimo_jax.infer.answers.write_masks import write_seg
from tests.data.medical_files import dicom, nifti, saved

RNG = np.random.default_rng(0)
GREY = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 8), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC))
RGB = np.stack([GREY, GREY // 2, 255 - GREY], axis=2)
LIVER, SPLEEN, NOTHING = np.zeros((3, 40, 56), bool)
LIVER[5:30, 4:24] = True
SPLEEN[8:20, 40:52] = True


def saved_image(path, pixels, mode=None, **options):
    Image.fromarray(pixels, mode).save(path, **options)
    return str(path)


def saved_mask(path, mask, **options):
    return saved_image(path, mask.astype(np.uint8) * 255, **options)


def item(image, *masks, **fields) -> Item:
    fields = {"modality": "CT", "dataset": "mine", "group": "mine/a"} | fields
    return Item(id="a", image=str(image), masks=masks, **fields)


def made(image, *masks, **fields) -> BuiltRecord:
    result = make_record(item(image, *masks, **fields))
    assert isinstance(result, BuiltRecord), result
    return result


def refused(image, *masks, **fields) -> str:
    result = make_record(item(image, *masks, **fields))
    assert isinstance(result, Reject) and result.item == "a" and "\n" not in result.reason
    return result.reason


@pytest.fixture
def png(tmp_path):
    return saved_image(tmp_path / "a.png", GREY)


@pytest.mark.parametrize("name, pixels", [("a.png", GREY), ("a.png", RGB), ("a.jpg", RGB), ("a.jpg", GREY)])
def test_what_needs_no_repair_is_kept_byte_for_byte(tmp_path, name, pixels):
    path = tmp_path / name
    record = made(saved_image(path, pixels)).record
    assert record.image == path.read_bytes() and record.format == {"a.png": "png", "a.jpg": "jpeg"}[name]
    assert (record.height, record.width, record.channels, record.src_bit_depth) == (40, 56, 1 if pixels.ndim == 2 else 3, 8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_rotation_is_applied_once_and_gone(tmp_path, name, orientation):
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]  # how a camera would have stored it
    stored = np.asarray(Image.fromarray(RGB).transpose(turned))
    record = made(
        saved_image(tmp_path / name, stored, exif=exif(orientation)), MaskRef("liver", saved_mask(tmp_path / "l.png", LIVER))
    ).record
    assert (record.format, record.height, record.width) == ("png", 40, 56)
    with Image.open(io.BytesIO(record.image)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(image).astype(int) - RGB).mean() < (6 if name == "a.jpg" else 1e-9)
    np.testing.assert_array_equal(record.masks[0].decode(), LIVER)


def test_sixteen_bits_are_windowed(tmp_path):
    deep = (GREY.astype(np.uint16) + 1000) * 20
    path = saved_image(tmp_path / "a.png", deep)
    record = made(path).record
    assert (record.format, record.src_bit_depth, record.channels, record.window) == ("png", 16, 1, None)
    shown = decode_image(record.image)[..., 0]
    assert shown.min() == 0 and shown.max() == 255  # convert("L") would have been all white
    record = made(path, window=(20000.0, 25100.0)).record
    assert record.window == [20000.0, 25100.0]
    np.testing.assert_array_equal(decode_image(record.image)[..., 0], GREY)


def test_palettes_alpha_and_other_formats_become_png(tmp_path):
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "p.png")
    record = made(tmp_path / "p.png").record
    assert Image.open(io.BytesIO(record.image)).mode == "RGB"
    np.testing.assert_array_equal(decode_image(record.image), np.asarray(palette.convert("RGB")))
    alpha = np.dstack([RGB, np.where(LIVER, 255, 0).astype(np.uint8)])
    record = made(saved_image(tmp_path / "a.png", alpha)).record
    np.testing.assert_array_equal(decode_image(record.image), RGB * LIVER[..., None])
    for name in ("a.bmp", "a.tif"):
        record = made(saved_image(tmp_path / name, GREY)).record
        assert (record.format, record.channels) == ("png", 1)
        np.testing.assert_array_equal(decode_image(record.image)[..., 0], GREY)


def test_masks_palette_label_lossy_inverted_rle_polygon(tmp_path, png):
    labels = np.where(LIVER, 2, np.where(SPLEEN, 7, 0)).astype(np.uint8)
    indexed = Image.fromarray(labels, "P")
    indexed.putpalette([0, 0, 0] * 3 + [250, 250, 250] * 253)  # 2 is as black as the background
    indexed.save(tmp_path / "labels.png")
    both = str(tmp_path / "labels.png")
    soft = saved_mask(tmp_path / "soft.jpg", LIVER, quality=60)
    rle = coco.encode(np.asfortranarray(SPLEEN.astype(np.uint8)))
    record = made(
        png,
        MaskRef("liver", both, value=2),
        MaskRef("spleen", both, value=7),
        MaskRef("left kidney", soft),
        MaskRef("colon", saved_mask(tmp_path / "i.png", ~SPLEEN), inverted=True),
        MaskRef("stomach", rle={"size": [40, 56], "counts": rle["counts"].decode()}),
        MaskRef("aorta", polygon=((4.0, 5.0, 24.0, 5.0, 24.0, 30.0, 4.0, 30.0),)),
    ).record
    found = {mask.entity: mask.decode() for mask in record.masks}
    for name, wanted in (("liver", LIVER), ("spleen", SPLEEN), ("colon", SPLEEN), ("stomach", SPLEEN), ("aorta", LIVER)):
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    assert (found["left kidney"] ^ LIVER).sum() < 0.05 * LIVER.sum()
    assert [mask.mask_id for mask in record.masks[:3]] == ["liver_0", "spleen_0", "left_kidney_0"]


def test_suspicious_masks_cause_warnings(tmp_path, png):
    liver, empty, all_but = (saved_mask(tmp_path / f"{i}.png", mask) for i, mask in enumerate((LIVER, NOTHING, ~NOTHING)))
    result = made(
        png, MaskRef("liver", liver), MaskRef("spleen", empty), MaskRef("liver", liver), MaskRef("union_liver", liver),
        MaskRef("pancreas", liver), MaskRef("body", all_but),
    )  # fmt: skip
    assert sorted(result.warnings) == sorted([EMPTY_MASK, DUPLICATE_MASK, DUPLICATE_MASK, SAME_PIXELS, LARGE_MASK])
    assert [mask.entity for mask in result.record.masks] == ["liver", "pancreas", "body"]


def test_parts_name_their_whole(tmp_path, png):
    cyst = np.zeros_like(LIVER)
    cyst[10:14, 10:14] = True
    files = [saved_mask(tmp_path / f"{name}.png", mask) for name, mask in (("a", LIVER), ("b", cyst), ("c", SPLEEN))]
    refs = [MaskRef("liver", files[0]), MaskRef("liver cyst", files[1]), MaskRef("liver cyst", files[2], instance=1)]
    masks = made(png, *refs).record.masks
    assert [mask.parent_mask_id for mask in masks] == ["", "liver_0", ""]
    assert [mask.mask_id for mask in masks] == ["liver_0", "liver_cyst_0", "liver_cyst_1"]


def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path, png):
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-400])
    (tmp_path / "text.png").write_text("no image")
    small = saved_mask(tmp_path / "small.png", LIVER[:, :30])
    assert "damaged or truncated" in refused(tmp_path / "cut.png")
    assert "not an image" in refused(tmp_path / "text.png")
    assert "none.png" in refused(tmp_path / "none.png")
    assert "small.png: is 30x40, the image is 56x40" in refused(png, MaskRef("liver", small))
    assert "modality 'PET'" in refused(png, modality="PET")
    assert "counts" in refused(png, MaskRef("liver", rle={"size": [40, 56], "counts": [3]}))
    assert "lossy" in refused(png, MaskRef("liver", saved_mask(tmp_path / "l.jpg", LIVER), value=1))


def conversation(**changes):
    turns = [{"role": "user", "text": "What is this?", "prompted": [1]}, {"role": "assistant", "text": "A spleen."}]
    target = {"turn": 1, "entity": "spleen", "span": [2, 8], "mask": [1]}
    return {"perspective": "II", "turns": turns, "targets": [target]} | changes


def test_conversations_of_the_source(tmp_path, png):
    refs = [MaskRef(name, saved_mask(tmp_path / f"{name}.png", mask)) for name, mask in (("liver", LIVER), ("spleen", SPLEEN))]
    record = made(png, *refs, samples=(conversation(),)).record
    (sample,) = record.samples
    assert sample.turns[0].prompted == sample.targets[0].mask_ids == ["spleen_0"]
    assert sample.sample_id == f"{record.id}/0"
    empty = MaskRef("spleen", saved_mask(tmp_path / "e.png", NOTHING))
    result = made(png, refs[0], empty, samples=(conversation(),))
    assert result.record.samples == [] and result.warnings == (EMPTY_MASK, EMPTY_MASK_SAMPLE)
    twice = made(png, refs[1], refs[1], samples=(conversation(),)).record
    assert twice.samples[0].turns[0].prompted == ["spleen_0"]
    assert "sample 0: is not a conversation" in refused(png, *refs, samples=({"turns": "?"},))
    assert "perspective 'V'" in refused(png, *refs, samples=(conversation(perspective="V"),))
    outside = conversation(targets=[{"turn": 1, "entity": "x", "span": [0, 99], "mask": [0]}])
    assert "is outside the text" in refused(png, *refs, samples=(outside,))


def test_dicom_and_its_segmentation(tmp_path):
    stored = GREY.astype(np.int16) * 4 - 200
    path = saved(dicom(stored, RescaleIntercept=-100, RescaleSlope=1, BurnedInAnnotation="YES"), tmp_path / "a.dcm")
    result = made(path, window=(-300.0, 720.0))
    assert result.warnings == (BURNED_IN,)
    record = result.record
    assert (record.format, record.src_bit_depth, record.pixel_spacing_mm) == ("png", 16, [0.5, 0.25])
    assert record.orientation == "radiological"
    np.testing.assert_array_equal(decode_image(record.image)[..., 0], GREY)
    picture = under_test._read(item(path)).image
    with open(tmp_path / "seg.dcm", "wb") as file:
        write_seg(tmp_path / "seg.dcm", file, [("liver", LIVER[None]), ("spleen", SPLEEN[None])], [picture.grid], False)
    seg = str(tmp_path / "seg.dcm")
    masks = made(path, MaskRef("liver", seg, value=1), MaskRef("spleen", seg, value=2), MaskRef("aorta", seg)).record.masks
    for mask, wanted in zip(masks, (LIVER, SPLEEN, LIVER | SPLEEN), strict=True):
        np.testing.assert_array_equal(mask.decode(), wanted)
    other = saved(dicom(stored), tmp_path / "b.dcm")
    assert made(other, MaskRef("liver", seg, value=1)).warnings == (ALONE, EMPTY_MASK)  # the SEG speaks of another instance


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_nifti_is_shown_upright_and_its_labels_with_it(tmp_path, signs):
    world = np.zeros((20, 24, 6), np.int16)  # x to the patient's right falls: index 0 is right; y forward, z up
    world[:6, 10:, 3] = 1  # a structure on the patient's right, in front
    volume = world[:: -signs[0], :: signs[1], :: signs[2]]
    affine = np.diag([2.0 * signs[0], 3.0 * signs[1], 4.0 * signs[2], 1.0])
    image = nifti(tmp_path / "a.nii.gz", volume * 100 + np.arange(20, dtype=np.int16)[:, None, None], affine)
    labels = nifti(tmp_path / "l.nii.gz", volume, affine)
    k = 3 if signs[2] > 0 else 2
    fields = {"slice": f"axial:{k}", "slice_axis": "z", "slice_index": k, "window": (0.0, 120.0)}
    result = made(image, MaskRef("liver", str(labels), value=1), **fields)
    mask = result.record.masks[0].decode()
    assert mask.shape == (24, 20) and result.record.pixel_spacing_mm == [3.0, 2.0]
    rows, columns = np.nonzero(mask)
    assert columns.mean() < 10 and rows.mean() < 12  # the patient's right is on the left, the front is up
    shown = decode_image(result.record.image)[..., 0]
    assert shown[mask].min() > shown[~mask].max()
    moved = nifti(tmp_path / "m.nii.gz", volume, affine + np.eye(4)[:, [3, 1, 2, 0]] * [0, 0, 0, 5.0])
    assert "is not on the grid" in refused(image, MaskRef("liver", str(moved), value=1), **fields)
    assert "does not exist" in refused(image, slice="axial:6")


def test_hashes(tmp_path):
    smooth = np.asarray(Image.fromarray(GREY).resize((280, 200), Image.Resampling.BICUBIC))
    as_png, as_tif = (made(saved_image(tmp_path / name, smooth)).record for name in ("a.png", "a.tif"))
    assert as_png.id == as_tif.id == pixel_hash(np.repeat(smooth[..., None], 3, 2)) and len(as_png.id) == 16
    again = made(saved_image(tmp_path / "a.jpg", smooth, quality=70)).record
    smaller = made(saved_image(tmp_path / "s.png", np.asarray(Image.fromarray(smooth).resize((140, 100))))).record
    assert again.id != as_png.id
    for record in (again, smaller):
        assert (int(record.phash64, 16) ^ int(as_png.phash64, 16)).bit_count() <= MAX_COARSE_BITS
    whole = np.repeat(smooth[..., None], 3, 2)
    looks = [perceptual_hash(pixels)[1] for pixels in (whole, decode_image(again.image), decode_image(smaller.image), whole[::-1])]
    turned = [(int.from_bytes(looks[0]) ^ int.from_bytes(other)).bit_count() for other in looks[1:]]
    assert max(turned[:2]) <= MAX_FINE_BITS < 80 < turned[2]
    assert perceptual_hash(np.full((30, 30, 3), 7, np.uint8)) == ("", bytes(32))


def test_it_is_pure(png):
    one, two = make_record(item(png)), make_record(replace(item(png)))
    assert one == two


def test_an_orientation_after_the_pixels_is_read(tmp_path):
    """The eXIf chunk may stand after IDAT."""
    whole = io.BytesIO()
    Image.fromarray(RGB).save(whole, "PNG", exif=exif(6))
    data = whole.getvalue()
    at = data.index(b"eXIf") - 4
    length = int.from_bytes(data[at : at + 4], "big") + 12
    chunk, rest = data[at : at + length], data[:at] + data[at + length :]
    (tmp_path / "a.png").write_bytes(rest[: rest.index(b"IEND") - 4] + chunk + rest[rest.index(b"IEND") - 4 :])
    record = made(tmp_path / "a.png").record
    assert (record.height, record.width) == (56, 40)
    np.testing.assert_array_equal(decode_image(record.image), np.rot90(RGB, -1))
