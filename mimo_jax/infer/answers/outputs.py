"""The files that an answer is written to: the endings that are supported, checks before anything runs, and atomic writing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from mimo_jax.data.images.image import Grid
from mimo_jax.errors import UserError
from mimo_jax.files import atomic_write
from mimo_jax.infer.answers.write_masks import check_nifti, check_seg

Writer = Callable[[Path, BinaryIO], None]  # (path, for error messages; open file)
ENDINGS = (".png", ".json", ".npy", ".nii", ".nii.gz", ".dcm")


def ending(path: Path) -> str:
    """The ending of a path in lower case, such as ".nii.gz"."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def check_outputs(*paths: str | os.PathLike, grid: Grid | Sequence[Grid] | None = None) -> None:
    """Raises UserError for a path that an answer cannot be written to: an unsupported ending, a folder that is missing or not writable, or
    a medical format for which the input has no geometry. grid: that of the image, or those of the slices of a volume."""
    grids = grid if isinstance(grid, Sequence) else [] if grid is None else [grid]
    for path in map(Path, paths):
        if ending(path) not in ENDINGS:
            raise UserError(f"{path}: has an unknown ending; use one of {', '.join(ENDINGS)}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; create it first")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; choose another name")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: the folder {path.parent} is not writable; choose another")
        if ending(path) in (".nii", ".nii.gz"):
            check_nifti(path, grids)
        if ending(path) == ".dcm":
            check_seg(path, grids)


def write_all(paths: Sequence[str | os.PathLike], writers: Mapping[str, Writer]) -> None:
    """Write each path with the writer of its ending. All are written to temporary files first and then renamed, so that a failure leaves
    existing files unchanged."""
    with contextlib.ExitStack() as stack:
        for path in dict.fromkeys(map(Path, paths)):
            part = stack.enter_context(atomic_write(path))
            try:
                with open(part, "xb") as file:
                    writers[ending(path)](path, file)
            except OSError as error:  # such as a full disk: name the requested file, not the temporary one
                error.filename = str(path)
                raise


def write_json(file: BinaryIO, values: dict) -> None:
    """Write `values` as UTF-8 JSON."""
    file.write((json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
