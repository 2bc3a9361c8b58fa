"""Writes a dataset of phantoms as a record folder; its contents do not depend on the number of processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator, Mapping

import numpy as np
from tqdm import tqdm

from mimo_jax.data.builder.phantom import DATASET, make_phantom, phantom_name
from mimo_jax.data.records import DataError, write_records
from mimo_jax.data.schema import Record

BUILDER_VERSION = "1.2"  # increased whenever the same seed would give different phantoms
SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}


def build_phantoms(
    out: str | os.PathLike,
    images: int,
    seed: int = 0,
    splits: Mapping[str, float] = SPLITS,
    workers: int = 0,
    size: tuple[int, int] = (96, 160),
    progress: bool = True,
) -> dict:
    """Write `images` phantoms of the series `seed` to the new folder `out`; returns its dataset_info.

    splits: name → share of the groups (each phantom is its own case). workers: number of processes that draw, 0 for this process
    alone. size: smallest and largest side in pixels. Raises DataError.
    """
    if images < 1:
        raise DataError(f"{images} images: give a number of phantoms, 1 or more")
    split_of = assign_splits([phantom_name(seed, index) for index in range(images)], splits, seed)
    info = {"name": DATASET, "builder": "phantoms", "builder_version": BUILDER_VERSION, "seed": seed, "images": images, "size": list(size)}
    records = tqdm(_draw(images, seed, size, workers), total=images, desc="phantoms", unit="image", disable=not progress)
    return write_records(out, (_into(record, split_of) for record in records), info)


def assign_splits(groups: list[str], splits: Mapping[str, float], seed: int) -> dict[str, str]:
    """Group → split, at random by `seed`, in the given shares (which need not sum to one), rounded to groups; each split with a positive
    share gets at least one. Raises DataError."""
    names = [name for name, share in splits.items() if share > 0]
    if not names or any(share < 0 for share in splits.values()):
        raise DataError(f"splits {dict(splits)}: give each a share of 0 or more, at least one above 0")
    groups = sorted(set(groups))
    if len(groups) < len(names):
        raise DataError(f"{len(groups)} groups cannot fill {len(names)} splits ({', '.join(names)}); give more images or fewer splits")
    total = sum(splits[name] for name in names)
    sizes = {name: max(1, round(len(groups) * splits[name] / total)) for name in names}
    largest = max(names, key=lambda name: sizes[name])
    sizes[largest] += len(groups) - sum(sizes.values())
    order = np.random.default_rng([seed, len(groups)]).permutation(len(groups))
    labels = [name for name in names for _ in range(sizes[name])]
    return {groups[at]: label for at, label in zip(order, labels, strict=True)}


def _draw(images: int, seed: int, size: tuple[int, int], workers: int) -> Iterator[Record]:
    """Phantoms 0 .. images - 1, in order."""
    draw = functools.partial(make_phantom, seed, size=size)
    if workers < 1:
        yield from map(draw, range(images))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(draw, range(images), chunksize=16)


def _into(record: Record, split_of: Mapping[str, str]) -> Record:
    record.split = split_of[record.group]
    return record
