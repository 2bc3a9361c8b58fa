"""Readers: each describes one kind of source as `items.Item`s, before any pixel is read."""

from __future__ import annotations

import difflib
import os

from mimo_jax.data.builder.readers.biomedparse import BiomedParse
from mimo_jax.data.builder.readers.dicom_seg import DicomSeg
from mimo_jax.data.builder.readers.folders import Folders
from mimo_jax.data.builder.readers.gcg import Gcg
from mimo_jax.data.builder.readers.llava_med import LlavaMed
from mimo_jax.data.builder.readers.manifest import ManifestReader
from mimo_jax.data.builder.readers.mecovqa import MeCoVqa
from mimo_jax.data.builder.readers.nifti import Nifti
from mimo_jax.data.builder.readers.pathvqa import PathVqa
from mimo_jax.data.builder.readers.reader import DatasetReader
from mimo_jax.data.builder.readers.sa_med2d import SaMed2d
from mimo_jax.data.builder.readers.slake import Slake
from mimo_jax.data.builder.readers.vqa_rad import VqaRad
from mimo_jax.data.records import DataError

KINDS: dict[str, type[DatasetReader]] = {}  # value of --source -> reader


def register_reader(kind: str, reader: type[DatasetReader]) -> None:
    """Add a kind of source for `mimo data build --source KIND`. Raises ValueError for a kind that is already registered."""
    if kind in KINDS:
        raise ValueError(f"source {kind}: is already registered as {KINDS[kind].__name__}; choose another name")
    KINDS[kind] = reader


for _reader in (SaMed2d, BiomedParse, ManifestReader, Folders, MeCoVqa, LlavaMed, VqaRad, Slake, PathVqa, Gcg, DicomSeg, Nifti):
    register_reader(_reader.name, _reader)


def open_reader(kind: str, path: str | os.PathLike, **options) -> DatasetReader:
    """The reader of a source of this kind. Options: dataset, modality, licence, and those of the kind's `options`; None means not
    given. Raises DataError for an unknown kind or option, for a path with another layout and, here or while `items` runs, for a damaged
    index."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind.casefold().replace("_", "-"), KINDS, 1)
        raise DataError(f"source {kind}: is unknown; " + (f"did you mean {near[0]}?" if near else f"use one of {', '.join(KINDS)}"))
    return KINDS[kind](path, **options)
