"""Files that an answer is written to: what a name's ending asks for, whether it can be written, and writing all or none."""

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

Writer = Callable[[Path, BinaryIO], None]  # takes the name for errors, and the file
ENDINGS = (".png", ".json", ".npy", ".nii", ".nii.gz", ".dcm")


def ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def check_outputs(*paths: str | os.PathLike, grid: Grid | Sequence[Grid] | None = None) -> None:
    """UserError for a path that an answer could not be written to: another ending, no folder that may be written to, or a medical
    format for which the input has no geometry. grid: of the picture asked about, or of each slice of a volume."""
    grids = grid if isinstance(grid, Sequence) else [] if grid is None else [grid]
    for path in map(Path, paths):
        if ending(path) not in ENDINGS:
            raise UserError(f"{path}: cannot tell what to write; end the name in {', '.join(ENDINGS)}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; choose another name")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: the folder {path.parent} may not be written to; choose another")
        if ending(path) in (".nii", ".nii.gz"):
            check_nifti(path, grids)
        if ending(path) == ".dcm":
            check_seg(path, grids)


def write_all(paths: Sequence[str | os.PathLike], writers: Mapping[str, Writer]) -> None:
    """Each path by the writer of its ending. All are written beside their places first, then put there: a failure leaves what was
    there before."""
    with contextlib.ExitStack() as whole:
        for path in dict.fromkeys(map(Path, paths)):
            part = whole.enter_context(atomic_write(path))
            try:
                with open(part, "xb") as file:
                    writers[ending(path)](path, file)
            except OSError as error:  # a full disk, say: of the file that was asked for, not of the one beside it
                error.filename = str(path)
                raise


def write_json(file: BinaryIO, values: dict) -> None:
    file.write((json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
