"""Prompts read from what other tools write, and from anything else."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from mimo_jax.data.prompt_files import MAX_PROMPTS, join_prompts, read_prompts
from mimo_jax.data.prompts import PromptError, Prompts, prompts_from_mask
from mimo_jax.errors import UserError

HEIGHT, WIDTH = 30, 44


def blob(seed=0, height=HEIGHT, width=WIDTH):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) > 0.6
    mask[5:20, 10:30] = True
    return mask


def rle(mask):
    made = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in made["size"]], "counts": made["counts"].decode()}


def runs(mask):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def png(mask):
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return stream.getvalue()


def equal(a, b):
    assert np.array_equal(a.points, b.points) and np.array_equal(a.boxes, b.boxes)
    assert [s.tolist() for s in a.scribbles] == [s.tolist() for s in b.scribbles]


def test_json_of_every_kind_from_a_file_bytes_and_a_dict(tmp_path):
    content = {
        "points": [[3, 4, 0], [5, 6.5]],
        "boxes": [[1, 2, 20, 30]],
        "scribbles": [[[1, 2], [3, 4]], [[5, 5]]],
        "masks": [rle(blob()), {"size": [HEIGHT, WIDTH], "counts": runs(blob(1))}],
    }
    expected = Prompts(
        np.array([[3.0, 4, 0], [5, 6.5, 1]]),
        np.array([[1.0, 2, 20, 30]]),
        [np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 5]]), *prompts_from_mask(blob()).scribbles, *prompts_from_mask(blob(1)).scribbles],
    )
    text = b"\xef\xbb\xbf " + json.dumps(content).encode()
    (tmp_path / "a.json").write_bytes(text)
    for source in (content, text, tmp_path / "a.json", str(tmp_path / "a.json"), expected):
        equal(read_prompts(source, HEIGHT, WIDTH), expected)
    equal(join_prompts([expected, Prompts()]), expected)
    assert not read_prompts({"points": [], "boxes": None}, HEIGHT, WIDTH) and not join_prompts([])


@pytest.mark.parametrize("seed", range(20))
def test_a_mask_is_the_same_stroke_however_it_is_given(seed, tmp_path):
    height, width = np.random.default_rng(seed).integers(1, 60, 2)
    mask = blob(seed, height, width)
    mask[0, 0] |= not mask.any()
    Image.fromarray(mask).save(tmp_path / "m.tiff")
    forms = [mask, png(mask), tmp_path / "m.tiff", rle(mask), {"size": [height, width], "counts": runs(mask)}, {"segmentation": rle(mask)}]
    for form in forms:
        equal(read_prompts(form, height, width), prompts_from_mask(mask))


def test_coco_annotations(tmp_path):
    corners = [[10, 5, 30, 5, 30, 20, 10, 20], [1, 1, 4, 1, 4, 4, 1, 4]]
    filled = np.zeros((HEIGHT, WIDTH), bool)
    filled[5:20, 10:30] = filled[1:4, 1:4] = True
    annotation = {"id": 1, "image_id": 2, "category_id": 3, "area": 309, "iscrowd": 0, "bbox": [1, 1, 29, 19], "segmentation": corners}
    equal(read_prompts(annotation, HEIGHT, WIDTH), prompts_from_mask(filled))
    assert read_prompts({"bbox": [1, 2, 29.5, 19]}, HEIGHT, WIDTH).boxes.tolist() == [[1, 2, 30.5, 21]]


@pytest.mark.parametrize(
    "source, says",
    [
        ({"point": [[1, 2]]}, "'point' is unknown; did you mean points?"),
        ({"polygon": []}, "'polygon' is unknown; use points, boxes, scribbles, masks"),
        ({"points": 3}, r"points: is a number; give \[\[x, y, label\]"),
        ({"points": [[1]]}, "points: has 1 numbers; give"),
        ({"points": [[1, "2"]]}, "points: '2' is not a finite number"),
        ({"points": [[1, float("nan")]]}, "points: nan is not a finite number"),
        ({"points": [[1, True]]}, "points: True is not a finite number"),
        ({"points": [[1, 10**5000]]}, "points: a number of about 5001 digits is not a finite number"),
        ({"points": [[1, 2, 0.5]]}, "point 0: label 0.5"),
        ({"points": [[99, 2]]}, r"point 0: \(99, 2\) is outside the image of 44x30"),
        ({"points": [[1, 2]] * (MAX_PROMPTS + 1)}, "has 65 prompts; the limit is 64"),
        ({"boxes": [[1, 2, 3]]}, "boxes: has 3 numbers; give"),
        ({"boxes": [[5, 5, 5, 9]]}, "has no area"),
        ({"scribbles": [[]]}, "scribbles: one has 0 points"),
        ({"scribbles": [[[1, 2]] * 10_001]}, "scribbles: one has 10001 points; give 1 to 10000"),
        ({"masks": [7]}, "a mask is a number; give a COCO RLE"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH], "x": 1}, "'x' is unknown"),
        ({"size": [9, 8], "counts": [72]}, "a mask has 8x9 pixels, the image 44x30"),
        ({"size": [HEIGHT], "counts": [72]}, r"size: is \[30\]; give \[height, width\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, 1321]}, "counts: give COCO's string, or a list of nonnegative"),
        ({"size": [HEIGHT, WIDTH], "counts": [1, 1]}, "counts: cover 2 pixels; the image has 44x30"),
        ({"size": [HEIGHT, WIDTH], "counts": "P"}, "counts: is not a compressed COCO string"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "empty mask"),
        ({"segmentation": [[1, 2, 3, 4]]}, "segmentation: has 4 numbers; give polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e8]]}, "a polygon exceeds the image of 44x30"),
        ({"segmentation": []}, "segmentation: has 0 polygons"),
        (np.ones((9, 8), bool), "a mask has 8x9 pixels, the image 44x30"),
        (np.ones((HEIGHT, WIDTH), np.uint8), r"an array uint8\[30, 44\]; give bool \[height, width\], such as array > 0"),
        (Prompts(boxes=np.array([[0, 0, 99, 9]])), "exceeds the image of 44x30"),
        ([1], "is a list; give an object"),
        (None, "is nothing; give an object"),
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"points": [[' + b"9" * 9999 + b", 1]]}", "is not JSON"),
        (b"{" + b" " * 2**24, "is a JSON file of 16777217 bytes; the limit is 16777216"),
        (b"\x89PNG", "not an image of a supported format"),
        (png(np.ones((4, 4), bool)), "a mask has 4x4 pixels, the image 44x30"),
    ],
)
def test_what_cannot_be_a_prompt_is_one_line_that_says_why(source, says):
    with pytest.raises(PromptError, match=f"^marks: .*{says}") as caught:
        read_prompts(source, HEIGHT, WIDTH, "marks")
    assert "\n" not in str(caught.value) and str(caught.value).count("marks: ") == 1


def test_files_that_are_not_there_are_named(tmp_path):
    for path, why in ((tmp_path / "gone.json", "No such file"), (tmp_path, "Is a directory"), ("a\0b", "cannot be opened")):
        with pytest.raises(UserError, match=why):
            read_prompts(path, HEIGHT, WIDTH)


numbers = st.one_of(st.integers(-2, 50), st.floats(), st.integers(), st.booleans(), st.text(max_size=3), st.none())
keys = st.sampled_from(["points", "boxes", "scribbles", "masks", "size", "counts", "segmentation", "bbox", "id", "pionts"])
values = st.recursive(
    st.one_of(numbers, st.just([HEIGHT, WIDTH]), st.text("0123OPo", max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=400)
@given(st.one_of(values, st.dictionaries(keys, values, max_size=3)))
def test_any_json_gives_prompts_or_a_prompt_error(content):
    for source in (content, json.dumps(content).encode()):
        try:
            read = read_prompts(source, HEIGHT, WIDTH)
        except PromptError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(read, Prompts)


@settings(max_examples=200)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"{", b'{"points": [[1, 2]]}', png(blob()), b'{"size": [30, 44], "counts": "', b"II*\0", b"BM", b"\xff\xd8\xff"]),
    st.integers(0, 300),
)
def test_any_bytes_give_prompts_or_a_prompt_error(noise, start, at):
    try:
        assert isinstance(read_prompts(start[:at] + noise + start[at:], HEIGHT, WIDTH), Prompts)
    except PromptError as error:
        assert str(error).startswith("prompts: ")


@settings(max_examples=200)
@given(st.text("".join(map(chr, range(48, 112))), max_size=40))
def test_any_string_of_counts_gives_the_mask_that_coco_writes_so_or_an_error(text):
    try:
        read = read_prompts({"size": [6, 5], "counts": text}, 6, 5)
    except PromptError:
        return
    mask = coco.decode({"size": [6, 5], "counts": text}).astype(bool)
    equal(read, prompts_from_mask(mask))
