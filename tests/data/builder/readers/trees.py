"""Tiny trees laid out as sources are."""

import json

import numpy as np
from PIL import Image

from mimo_jax.data.builder.items import Item
from mimo_jax.data.builder.readers import open_reader


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def image(path, value=90, size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def listed(kind, path, **options) -> tuple[list[Item], list[tuple[str, str]]]:
    """(items, what was skipped); twice, for the order must be stable and a reader may be asked again."""
    reader = open_reader(kind, path, **options)
    items = list(reader.items())
    again = open_reader(kind, path, **options)
    assert list(again.items()) == items and again.skipped == reader.skipped
    assert len({item.id for item in items}) == len(items)
    return items, reader.skipped
