"""What must be true of the folder that a conversion writes, before any work is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mimo_jax.errors import UserError


class TargetError(UserError):
    """A folder that cannot be written to; the message names the flag and the remedy."""


def check_target(out: Path, needed: int = 0) -> None:
    """TargetError for a folder that is there and holds something, or that cannot be made, or whose disk lacks `needed` bytes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"--out {out}: is there already; give a folder that is not, or is empty")
    if not out.parent.is_dir():
        raise TargetError(f"--out {out}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise TargetError(f"--out {out}: {out.parent} may not be written to; choose another, or change its permissions")
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise TargetError(f"--out {out}: needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room, or choose another")
