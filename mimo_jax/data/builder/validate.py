"""Checks a record folder for damage: every file by its SHA-256, every record by its pixels, masks, texts and index."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder.record import pixel_hash
from mimo_jax.data.builder.workers import Workers
from mimo_jax.data.records import DataError, Index, IndexBuilder, RecordFolder, damaged_files, read_info
from mimo_jax.data.schema import Record, RecordError
from mimo_jax.data.transforms import decode_image
from mimo_jax.errors import UserError
from mimo_jax.geometry import mask_to_box

_BLOCK = 256  # records per job


def find_faults(folder: str | os.PathLike, workers: int = 1, progress: bool = True) -> list[str]:
    """One line for each fault: files that are missing or differ from what was written; records that cannot be read, with their shard;
    records whose image, masks, samples or index are inconsistent; a group or id that is in two splits. Reads and decodes everything.
    Raises DataError if `folder` is not a record folder."""
    folder = Path(folder)
    faults = damaged_files(folder)
    ids, groups = defaultdict(set), defaultdict(set)
    jobs = []
    for name in sorted(read_info(folder)["splits"]):
        try:
            split = RecordFolder(folder, name)
        except DataError as error:
            faults.append(str(error))
            continue
        for key, group in zip(split.index.ids.tolist(), split.index.groups.tolist(), strict=True):
            ids[key].add(name)
            groups[group].add(name)
        if len(set(split.index.ids.tolist())) < len(split):
            faults.append(f"{folder}: {name} has an id twice")
        jobs += [(name, start, min(start + _BLOCK, len(split))) for start in range(0, len(split), _BLOCK)]
    for what, places in (("record", ids), ("group", groups)):
        faults += [
            f"{folder}: {what} {key.decode()} is in {' and '.join(sorted(splits))}" for key, splits in places.items() if len(splits) > 1
        ]
    with Workers(workers) as pool, tqdm(total=sum(stop - start for _, start, stop in jobs), unit="image", disable=not progress) as bar:
        for (_, start, stop), found in zip(jobs, pool.map(functools.partial(_faults_of, folder), jobs), strict=False):
            faults += found
            bar.update(stop - start)
        if pool.stopped:
            raise KeyboardInterrupt
    return faults


def _faults_of(folder: Path, job: tuple[str, int, int]) -> list[str]:
    name, start, stop = job
    split, found = RecordFolder(folder, name), []
    for i in range(start, stop):
        try:
            record = split[i]
            found += [f"{split.where(i)}: {fault}" for fault in _faults(record, name)]
            if split.samples(i) != record.samples:
                found.append(f"{split.where(i)}: its samples differ from those in {name}.samples.array_record")
            if not _fits(split.index, i, record):
                found.append(f"{split.where(i)}: differs from {name}.index.npz")
        except DataError as error:
            found.append(str(error))
    return found


def _faults(record: Record, split: str) -> Iterator[str]:
    """The faults within one record."""
    try:
        record.check()
        pixels = decode_image(record.image, name="its image")
    except (RecordError, UserError) as error:
        yield str(error)
        return
    if pixels.shape[:2] != (record.height, record.width):
        yield f"its image is {pixels.shape[1]}x{pixels.shape[0]}, not {record.width}x{record.height}"
    if re.match("[0-9a-f]{16}(-[0-9]+)?$", record.id) and record.id[:16] != pixel_hash(pixels):
        yield "its id is not the hash of its pixels"
    if record.split != split:
        yield f"its split is recorded as {record.split}"
    if record.modality not in MODALITIES:
        yield f"modality {record.modality!r} is unknown"
    if len({mask.mask_id for mask in record.masks}) < len(record.masks):
        yield "has a mask_id twice"
    for mask in record.masks:
        decoded = mask.decode()
        box = mask_to_box(decoded)
        if box is None:
            yield f"mask {mask.mask_id} is empty"
        elif mask.area_px != decoded.sum() or mask.box_xyxy != list(box):
            yield f"mask {mask.mask_id}: area_px or box_xyxy do not match its pixels"


def _fits(index: Index, i: int, record: Record) -> bool:
    builder = IndexBuilder()
    builder.add(record.id, record.group, record.samples)
    own = dataclasses.asdict(builder.build())
    part = slice(index.first[i], index.first[i + 1])
    stored = {"ids": index.ids[i : i + 1], "groups": index.groups[i : i + 1]}
    stored |= {name: getattr(index, name)[part] for name in ("perspective", "words", "text_bytes", "turns")}
    if (stored["turns"] < 0).all():  # an index of an earlier version
        del stored["turns"]
    return all(np.array_equal(own[name], values) for name, values in stored.items())
