"""Nested dicts and their flat form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax import pathtree

names = st.text("abcxyz_0", min_size=1, max_size=4)
leaves = st.dictionaries(names, st.integers(), min_size=1, max_size=3)
trees = st.recursive(leaves, lambda t: st.dictionaries(names, t, min_size=1, max_size=3))


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    assert pathtree.unflatten(pathtree.flatten(tree)) == tree


@given(trees, st.integers(0, 5))
def test_partition_and_merge_are_inverse(tree, number):
    a, b = pathtree.partition(tree, lambda path: len(path) % 6 == number)
    assert pathtree.merge(a, b) == tree
    assert not pathtree.flatten(a).keys() & pathtree.flatten(b).keys()


def test_the_first_match_decides_and_none_is_an_error():
    table = {r"^a/": 1, r"b": 2}
    assert pathtree.first_match("a/b", table, "table") == 1 and pathtree.first_match("x/b", table, "table") == 2
    with pytest.raises(KeyError, match="table: no row matches parameter 'c'"):
        pathtree.first_match("c", table, "table")


def test_merge_refuses_trees_that_share_a_leaf():
    with pytest.raises(KeyError, match="a/b"):
        pathtree.merge({"a": {"b": 1}}, {"a": {"b": 2}})
