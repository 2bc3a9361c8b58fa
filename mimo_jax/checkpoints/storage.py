"""Files that are whole or not there: JSON by rename, folders by a manifest with the SHA-256 of every file in them."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mimo_jax import __version__

MANIFEST = "manifest.json"
_OF_MANIFEST = "manifest.sha256"  # the SHA-256 of the manifest itself, written before it


def write_manifest(folder: Path, about: dict) -> None:
    """What makes a folder of arrays whole: `about`, versions, and the SHA-256 of every file in it."""
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != _OF_MANIFEST)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = {"mimo_jax": __version__, "jax": jax.__version__, "time": now}
    content = about | {"made": made, "files": hash_files(folder, names)}
    write_json(folder / _OF_MANIFEST, hashlib.sha256(_json_bytes(content)).hexdigest())
    write_json(folder / MANIFEST, content)


def verify(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with those files of a folder that are `wanted` by name; None if nothing."""
    if not (folder / MANIFEST).is_file():
        return "is not whole (its save did not finish)"
    if (folder / _OF_MANIFEST).exists() and hash_files(folder, [MANIFEST])[MANIFEST] != read_json(folder / _OF_MANIFEST):
        return f"is damaged ({MANIFEST} has another SHA-256 than {_OF_MANIFEST} says)"
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return f"is damaged ({MANIFEST} cannot be read)"
    expected = {name: digest for name, digest in manifest["files"].items() if wanted(name)}
    found = hash_files(folder, list(expected))
    bad = [name for name in expected if found[name] != expected[name]]
    return f"is damaged (SHA-256 of {bad[0]}{f' and {len(bad) - 1} more' if bad[1:] else ''})" if bad else None


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files; a missing one has none."""

    def digest(name: str) -> str:
        try:
            with open(folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return ""

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(digest, names), strict=True))


def hash_array(leaf: Any) -> str:
    """SHA-256 of an array's values, whoever holds them."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(gather_to_host(leaf))).reshape(-1).view(np.uint8)).hexdigest()


def gather_to_host(leaf: Any) -> Any:
    """An array with all its values in this process, gathered if others hold parts of it: then all call this."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    return leaf.addressable_data(0) if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)


def read_json(path: Path) -> Any:
    """The file's content, None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """All or nothing: written beside it, then renamed."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(_json_bytes(content))
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def remove(folder: Path) -> None:
    """Remove a step or base, the manifest first, so that nothing half removed looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def absolute(path: str | os.PathLike) -> Path:
    return Path(os.path.abspath(path))


def disk_fault(error: BaseException | None) -> str | None:
    """What the operating system refused, if that is what went wrong; tensorstore reports it within a text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return os.strerror(int(code.group(1)))
        error = error.__cause__ or error.__context__
    return None


# What orbax says of its own accord, and would stand between a user and the one line that matters. Errors of its threads it also
# raises; when one array of several cannot be written, the others report to a loop that has ended.


def _worth_saying(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "Handler._open_and_write" not in record.getMessage()
    orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not orbax or (record.levelno < logging.ERROR and "Skipping merge of OCDBT" not in str(record.msg))


def _worth_raising(unraisable: Any) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_worth_saying)
sys.unraisablehook = _worth_raising
