"""Where a conversion goes: a folder that is whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mimo_jax.checkpoints import frozen_params
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


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into. When the block ends well it becomes `out`; otherwise it goes, and what the disk refused
    is a CheckpointError."""
    stage = out.with_name(f".{out.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with frozen_params.writing(stage):
            stage.mkdir()
            yield stage
            if out.exists():
                out.rmdir()
            os.rename(stage, out)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
