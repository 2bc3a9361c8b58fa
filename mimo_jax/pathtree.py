"""Nested dicts of arrays as flat {path: leaf}, with paths like "llm/layers/attention/q/kernel"."""

from __future__ import annotations

import re
from typing import Any


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in sorted order, so that two equal trees are flattened in the same order."""
    flat: dict[str, Any] = {}
    for key in sorted(tree, key=str):
        path = f"{prefix}{key}"
        if isinstance(tree[key], dict):
            flat.update(flatten(tree[key], path + "/"))
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat: dict[str, Any]) -> dict:
    """Inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def first_match(path: str, table: dict[str, Any], what: str) -> Any:
    """Value of the first row whose regex matches `path` (re.search); raises KeyError with `what` and the path if none does."""
    for pattern, value in table.items():
        if re.search(pattern, path):
            return value
    raise KeyError(f"{what}: no row matches parameter {path!r}; add one")


def partition(tree: dict, keep) -> tuple[dict, dict]:
    """Split a nested dict into (leaves with `keep(path)`, the others); `merge` is the inverse."""
    flat = flatten(tree)
    return (
        unflatten({p: v for p, v in flat.items() if keep(p)}),
        unflatten({p: v for p, v in flat.items() if not keep(p)}),
    )


def merge(a: dict, b: dict) -> dict:
    """Union of two nested dicts that share no leaf."""
    flat_a, flat_b = flatten(a), flatten(b)
    both = sorted(flat_a.keys() & flat_b.keys())
    if both:
        raise KeyError(f"both trees have {', '.join(both[:5])}")
    return unflatten({**flat_a, **flat_b})
