"""Checks of the output folder before a conversion starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mimo_jax.errors import UserError


class OutputFolderError(UserError):
    """An output folder that cannot be written; the message names the flag and the remedy."""


def check_output_folder(out: Path, needed: int = 0) -> None:
    """Raise OutputFolderError if the folder exists and is not empty, if it cannot be created, or if its disk lacks `needed` bytes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputFolderError(f"--out {out}: already exists; give a new or empty folder")
    if not out.parent.is_dir():
        raise OutputFolderError(f"--out {out}: folder {out.parent} does not exist; create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputFolderError(f"--out {out}: {out.parent} is not writable; choose another folder, or change its permissions")
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OutputFolderError(
            f"--out {out}: needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; free some space, or choose another folder"
        )
