"""Folders of arrays with a manifest, which is written last and has the SHA-256 of every file: a folder without one is incomplete."""

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
MANIFEST_HASH = "manifest.sha256"  # the SHA-256 of the manifest itself, written before it


def write_manifest(folder: Path, about: dict) -> None:
    """Complete a folder of arrays: write its manifest with `about`, the versions used, and the SHA-256 of every file in it."""
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST_HASH)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = {"mimo_jax": __version__, "jax": jax.__version__, "time": now}
    content = about | {"made": made, "files": hash_files(folder, names)}
    write_json(folder / MANIFEST_HASH, files.sha256_bytes(files.json_bytes(content)))
    write_json(folder / MANIFEST, content)


def verify(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """Verify the manifest and those files of a folder whose names are `wanted`; returns what is wrong with them, None if nothing is."""
    if not (folder / MANIFEST).is_file():
        return "is not complete (its save did not finish)"
    if (folder / MANIFEST_HASH).exists() and hash_files(folder, [MANIFEST])[MANIFEST] != read_json(folder / MANIFEST_HASH):
        return f"is damaged ({MANIFEST} does not match the SHA-256 in {MANIFEST_HASH})"
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return f"is damaged ({MANIFEST} cannot be read)"
    expected = {name: digest for name, digest in manifest["files"].items() if wanted(name)}
    found = hash_files(folder, list(expected))
    bad = [name for name in expected if found[name] != expected[name]]
    return f"is damaged (SHA-256 of {bad[0]}{f' and {len(bad) - 1} more' if bad[1:] else ''})" if bad else None


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """{name: SHA-256} of files in a folder; "" for one that is missing or is a folder."""

    def digest(name: str) -> str:
        try:
            return files.sha256(folder / name)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return ""

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(digest, names), strict=True))


def hash_array(leaf: Any) -> str:
    """SHA-256 of an array's values. If several processes hold parts of it, all must call this."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(gather_to_host(leaf))).reshape(-1).view(np.uint8)).hexdigest()


def gather_to_host(leaf: Any) -> Any:
    """The array with all its values in this process. If several processes hold parts of it, it is gathered, and all must call this."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    return leaf.addressable_data(0) if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)


def remove(folder: Path) -> None:
    """Remove a folder of arrays, its manifest first, so that a partly removed one does not look complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
