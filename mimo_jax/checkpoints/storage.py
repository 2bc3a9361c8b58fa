"""Folders of arrays that are whole or not there, by a manifest with the SHA-256 of every file in them."""

from __future__ import annotations

import datetime
import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mimo_jax import __version__, files
from mimo_jax.files import read_json, write_json

MANIFEST = "manifest.json"
_OF_MANIFEST = "manifest.sha256"  # the SHA-256 of the manifest itself, written before it


def write_manifest(folder: Path, about: dict) -> None:
    """What makes a folder of arrays whole: `about`, versions, and the SHA-256 of every file in it."""
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != _OF_MANIFEST)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = {"mimo_jax": __version__, "jax": jax.__version__, "time": now}
    content = about | {"made": made, "files": hash_files(folder, names)}
    write_json(folder / _OF_MANIFEST, files.sha256_bytes(files.json_bytes(content)))
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
    """SHA-256 of files; one that is missing, or is a folder, has none."""

    def digest(name: str) -> str:
        try:
            return files.sha256(folder / name)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
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


def remove(folder: Path) -> None:
    """Remove a step or base, the manifest first, so that nothing half removed looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
