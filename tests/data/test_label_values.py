"""Labels are rounded within 0.01 of a whole number; everything else is refused with the list of values."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mimo_jax.data.label_values import LabelValueError, check_labels, whole_labels
from mimo_jax.data.transforms import ImageError, decode_labels


@settings(deadline=None, max_examples=100)
@given(arrays.arrays(np.int32, (3, 5), elements=st.integers(0, 40000)), st.floats(-0.009, 0.009))
def test_values_near_whole_numbers_are_rounded(labels, offset):
    np.testing.assert_array_equal(whole_labels(labels + offset, "x"), labels)
    np.testing.assert_array_equal(whole_labels(labels, "x"), labels)


@pytest.mark.parametrize("value, shown", [(1.5, "1.5"), (2.98, "2.98"), (np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1"), (1e12, "1e\\+12")])
def test_other_values_are_refused(value, shown):
    values = np.array([[0.0, 3.0], [value, 1.0]])
    with pytest.raises(LabelValueError, match=f"seg.nii: has values .*: {shown};"):
        whole_labels(values, "seg.nii")


def test_labels_outside_the_table_are_listed():
    check_labels(np.array([[0, 1], [3, 3]]), (1, 3, 7), "a.png")
    with pytest.raises(LabelValueError, match="a.png: has labels that its table does not name: 2, 9; add them to it, with null"):
        check_labels(np.array([[0, 1], [9, 2]]), (1, 3), "a.png")
    with pytest.raises(LabelValueError, match=": 2, 3, 4, 5, 6, 7, 8, 9 and 10 more;"):
        check_labels(np.arange(21), (1, 20), "a.png")


def test_float_pictures_of_labels():
    def tiff(values):
        stream = io.BytesIO()
        Image.fromarray(np.array(values, np.float32)).save(stream, "TIFF")
        return stream.getvalue()

    assert decode_labels(tiff([[0, 1.996], [3, 0]])).tolist() == [[0, 2], [3, 0]]
    with pytest.raises(ImageError, match="l.tif: has values that are no whole numbers: 1.5, 1.9;"):
        decode_labels(tiff([[0, 1.9], [3, 1.5]]), name="l.tif")
