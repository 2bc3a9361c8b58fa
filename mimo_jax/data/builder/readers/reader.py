"""The base of all readers: the path of a source, its options, and the record of what is skipped."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder.items import Item
from mimo_jax.data.images.image import check_window
from mimo_jax.data.mask_levels import parse_threshold
from mimo_jax.data.records import DataError
from mimo_jax.errors import UserError

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val", "test": "test"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_OPTIONS = {"dataset": "", "modality": "", "licence": "", "mask_threshold": None}


class DatasetReader(ABC):
    """A source of one kind at a path; each kind is a subclass. All kinds accept the options dataset (default: the name of the folder),
    modality and licence, for what the source does not say, and mask_threshold, the least value in a mask (`MaskRef.threshold`). Values
    may be texts, as on a command line.

    skip_counts: how often something (an image, a line, a data set) was skipped, by (what, reason); `items` fills it."""

    name: ClassVar[str]  # the --source value
    expected_layout: ClassVar[str]  # for the error about a source with another layout
    options: ClassVar[dict[str, object]] = {}  # further options: name -> default

    def __init__(self, path: str | os.PathLike, **options):
        known = {**_OPTIONS, **self.options}
        if wrong := sorted(set(options) - set(known)):
            raise DataError(f"source {self.name} has no option {wrong[0]}; its options are {', '.join(sorted(known))}")
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(f"{path}: no such file or folder")
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.values = {name: _typed(name, options.get(name), default) for name, default in known.items()}
        self.dataset: str = self.values["dataset"] or self.folder.resolve().name
        self.modality: str = self.values["modality"]
        self.licence: str = self.values["licence"]
        self.mask_threshold: float | None = self.values["mask_threshold"]
        if self.modality and self.modality not in MODALITIES:
            raise DataError(f"modality {self.modality!r}: use one of {', '.join(MODALITIES)}")
        self.skip_counts: Counter[tuple[str, str]] = Counter()
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Find the index of the source, or raise `layout_error`."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The items, as described in `items.Reader`."""

    def skip(self, what: str, reason: str) -> None:
        self.skip_counts[what, reason] += 1

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """`skip_counts` as (what, reason)."""
        return [(what, f"{reason} ({count} times)" if count > 1 else reason) for (what, reason), count in self.skip_counts.items()]

    def layout_error(self) -> DataError:
        return DataError(f"{self.path}: is not a {self.name} source; expected {self.expected_layout}")

    def required_modality(self) -> str:
        """The option modality, for kinds whose sources never contain it. Raises DataError if it is not given."""
        if not self.modality:
            raise DataError(
                f"{self.path}: {self.name} does not say the modality of its images; give --modality, one of {', '.join(MODALITIES)}"
            )
        return self.modality

    def find_folder(self, *names: str) -> Path:
        """The first existing folder of these names in the source, or else next to it; the source's own folder if there is none."""
        places = [place / name for place in (self.folder, self.folder.parent) for name in names]
        return next((place for place in places if place.is_dir()), self.folder)


def _typed(name: str, value: object, default: object) -> Any:
    """The value of an option, a text if it comes from a command line, converted to the type of its default; "window" to `Window`, and
    "mask_threshold" to a number."""
    if value is None:
        return default
    try:
        if name == "window":
            window = tuple(float(part) for part in value.split(",")) if isinstance(value, str) and "," in value else value
            check_window(window)
            return window
        if name == "mask_threshold":
            return parse_threshold(value)
        if isinstance(default, int) and int(value) != value and not isinstance(value, str):
            raise ValueError
        return int(value) if isinstance(default, int) else value
    except UserError as error:
        raise DataError(f"option {name}={value}: {error}") from None
    except ValueError:
        raise DataError(f"option {name}={value}: is not a number") from None


def image_files(folder: Path) -> list[str]:
    """The image files of a folder and its subfolders, as sorted paths relative to it."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        within = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if within == "." else f"{within}/"
        found += [prefix + name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def case_of(stem: str) -> str:
    """The case in an image's name: CASE of CASE_SLICE if CASE also has a number ("amos_0004_75", "s0114_111"), else the name."""
    return re.sub(r"(\d.*)_\d+$", r"\1", stem)


def split_of(name: str) -> str:
    """The split in a file's or folder's name ("train.json", "label2image_test", "testset.json"); "" if there is none."""
    words = Path(name).stem.casefold().replace("-", "_").replace("set", "").split("_")
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")
