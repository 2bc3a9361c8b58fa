"""What all readers share: where a source lies, what they may be told of it, and what they pass over."""

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
from mimo_jax.data.records import DataError
from mimo_jax.errors import UserError

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val", "test": "test"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_OPTIONS = {"dataset": "", "modality": "", "licence": ""}


class DatasetReader(ABC):
    """A source of one kind at a path; kinds derive from it. Options that every kind takes, for what the source does not say:
    dataset (default: the name of its folder), modality, licence. All may be texts, as a command line gives them.

    passed: how often what (a picture, a line, a data set) is passed over and why, counted by `items`."""

    name: ClassVar[str]  # the --source value
    expected_layout: ClassVar[str]  # what an error says that it should have found
    options: ClassVar[dict[str, object]] = {}  # besides those above: name -> what holds without it

    def __init__(self, path: str | os.PathLike, **options):
        known = {**_OPTIONS, **self.options}
        if wrong := sorted(set(options) - set(known)):
            raise DataError(f"source {self.name} has no option {wrong[0]}; it takes {', '.join(sorted(known))}")
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(f"{path}: no such file or folder")
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.told = {name: _typed(name, options.get(name), default) for name, default in known.items()}
        self.dataset: str = self.told["dataset"] or self.folder.resolve().name
        self.modality: str = self.told["modality"]
        self.licence: str = self.told["licence"]
        if self.modality and self.modality not in MODALITIES:
            raise DataError(f"modality {self.modality!r}: use one of {', '.join(MODALITIES)}")
        self.passed: Counter[tuple[str, str]] = Counter()
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Find the index of the source, or raise `layout_error`."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """What `items.Reader` says."""

    def skip(self, what: str, reason: str) -> None:
        self.passed[what, reason] += 1

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """`passed` as (what, why), one of each."""
        return [(what, f"{reason} ({count} times)" if count > 1 else reason) for (what, reason), count in self.passed.items()]

    def layout_error(self) -> DataError:
        return DataError(f"{self.path}: is no {self.name} source; looked for {self.expected_layout}")

    def needs_modality(self) -> str:
        """The modality that is told, for kinds whose sources never say it. Raises DataError without."""
        if not self.modality:
            raise DataError(f"{self.path}: {self.name} does not say what made its images; give --modality, one of {', '.join(MODALITIES)}")
        return self.modality

    def below(self, *names: str) -> Path:
        """The first folder of these names in the source, or else beside it; without any, the source's own."""
        places = [place / name for place in (self.folder, self.folder.parent) for name in names]
        return next((place for place in places if place.is_dir()), self.folder)


def _typed(name: str, value: object, default: object) -> Any:
    """An option's value, a text where it comes from a command line, as what its default is; "window" as `Window`."""
    if value is None:
        return default
    try:
        if name == "window":
            window = tuple(float(part) for part in value.split(",")) if isinstance(value, str) and "," in value else value
            check_window(window)
            return window
        return int(value) if isinstance(default, int) else value
    except UserError as error:
        raise DataError(f"option {name}={value}: {error}") from None
    except ValueError:
        raise DataError(f"option {name}={value}: is no number") from None


def pictures(folder: Path) -> list[str]:
    """The image files of a folder and those below it, as paths relative to it, sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        within = os.path.relpath(place, folder).replace(os.sep, "/")
        before = "" if within == "." else f"{within}/"
        found += [before + name for name in names if name.lower().endswith(PICTURES) and not name.startswith(".")]
    return sorted(found)


def case_of(stem: str) -> str:
    """The case that an image's name speaks of: of CASE_SLICE the first, where it too has a number ("amos_0004_75", "s0114_111")."""
    return re.sub(r"(\d.*)_\d+$", r"\1", stem)


def split_of(name: str) -> str:
    """The split that a file's or folder's name speaks of ("train.json", "label2image_test", "testset.json"); "" if it does not."""
    words = Path(name).stem.casefold().replace("-", "_").replace("set", "").split("_")
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")
