"""The frozen base of a run: written once, held to its hashes, found again wherever it was moved.

RUN/base.json         fingerprint, where the base lies, and every parameter's [dtype, shape, SHA-256]
RUN/base/arrays       the arrays, unless they already lie in another run's base
RUN/base/manifest.json   SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from mimo_jax import distributed, files, pathtree
from mimo_jax.checkpoints import arrays, storage
from mimo_jax.checkpoints.arrays import CheckpointError, some


def write(run: Path, leaves: Iterator[tuple[str, Any]], place: Path | None = None) -> dict:
    """Write a base from its parameters (path, array) as they come; returns and keeps the record of base.json.

    place: the run's directory in the end, if it is renamed afterwards."""
    hashes: dict[str, list] = {}
    folder = run / "base"
    with files.disk_errors(folder, CheckpointError), files.removed_on_failure(folder):
        if jax.process_index() == 0:
            storage.remove(folder)
            folder.mkdir(parents=True)
        arrays.write(folder, hashed(leaves, hashes))
        if jax.process_index() == 0:
            storage.write_manifest(folder, {"leaves": {arrays.STATE: hashes}})
    return _write_record(run, (place or run) / "base", hashes, place or run)


def save(workdir: Path, frozen: dict, source: Path | None = None) -> str:
    """Write the frozen parameters (nested dict) of a run, once; returns their fingerprint. Where the base of `source`, another
    run's directory, holds them all, only a reference is written. CheckpointError if another base lies there already."""
    flat = pathtree.flatten(frozen)
    leaves = {path: [*arrays.kind(leaf), storage.hash_array(leaf)] for path, leaf in flat.items()}
    saved = files.read_json(workdir / "base.json")
    if saved and saved["fingerprint"] == fingerprint(leaves):
        return saved["fingerprint"]
    if saved and (workdir / "steps").is_dir() and any((workdir / "steps").glob("*/" + storage.MANIFEST)):
        raise CheckpointError(f"{workdir}: its steps were trained on another frozen base; use another --workdir")
    lender = _lender(source, leaves)
    if lender is None:
        return write(workdir, iter(flat.items()))["fingerprint"]
    return _write_record(workdir, lender, leaves, workdir)["fingerprint"]


def load(run: Path, abstract: dict | None = None, shardings: Any = None, base: str | os.PathLike | None = None) -> dict:
    """The frozen parameters of a run, as a nested dict. Looked for where the run says, then relative to it, then in `base` (a
    base folder, or the run that holds it); always held to the recorded hashes.

    abstract: what is expected (CheckpointError lists what differs), None for whatever there is; shardings as in
    `arrays.placed`."""
    record = read_record(run)
    leaves = record["leaves"]
    kinds = {path: leaf[:2] for path, leaf in leaves.items()}
    if abstract is None:
        abstract = arrays.abstract(kinds)
    arrays.compare(kinds, arrays.kinds(abstract), run / "base.json")
    if not leaves:
        return {}
    wanted = pathtree.flatten(arrays.placed(abstract, shardings))
    folder = find(run, base, wanted)
    there = files.read_json(folder / storage.MANIFEST)["leaves"][arrays.STATE]
    return pathtree.unflatten(arrays.read_parameters(folder, there, wanted))


def find(run: Path, base: str | os.PathLike | None = None, wanted: dict[str, Any] | None = None) -> Path:
    """The folder that holds the base of a run, its files held to their SHA-256: all of them, or those that this process reads for the
    parameters `wanted`, {path: abstract with sharding}. CheckpointError says what was tried, and why not."""
    record = read_record(run)
    places = [Path(record["path"]), run / record["relative"]]
    if base is not None:
        places += [Path(base) / "base" if (Path(base) / "base").is_dir() else Path(base)]
    tried = {}
    for folder in dict.fromkeys(files.absolute(place) for place in places):
        tried[folder] = _unfit(folder, record["leaves"], wanted)
        if tried[folder] is None:
            return folder
    reasons = "; ".join(f"{folder} {why}" for folder, why in tried.items())
    raise CheckpointError(f"{run}: its frozen base {record['fingerprint'][:12]} is not found: {reasons}; name its folder with --base DIR")


def read_record(run: Path) -> dict:
    record = files.read_json(run / "base.json")
    if record is None or record.get("fingerprint") != fingerprint(record.get("leaves", {})):
        raise CheckpointError(f"{run / 'base.json'}: is missing or damaged; copy it from where the run was made")
    return record


def fingerprint(leaves: dict[str, list]) -> str:
    """SHA-256 over names, dtypes, shapes and values of parameters {path: [dtype, shape, SHA-256]}."""
    return hashlib.sha256(json.dumps(dict(sorted(leaves.items()))).encode()).hexdigest()


def hashed(leaves: Iterator[tuple[str, Any]], into: dict[str, list]) -> Iterator[tuple[str, Any]]:
    """The same (path, array), and `into` path -> [dtype, shape, SHA-256], taken in a thread while the array is written."""
    with ThreadPoolExecutor(1) as pool:
        for path, leaf in leaves:
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                into[path] = [*arrays.kind(leaf), storage.hash_array(leaf)]  # gathers, so all processes go together
                yield path, leaf
                continue
            digest = pool.submit(storage.hash_array, leaf)
            into[path] = arrays.kind(leaf)
            yield path, leaf
            into[path] = [*into[path], digest.result()]
            del leaf, digest  # both hold the array


def _write_record(run: Path, folder: Path, leaves: dict, place: Path) -> dict:
    relative = os.path.relpath(folder, place)
    record = {"fingerprint": fingerprint(leaves), "path": str(folder), "relative": relative, "leaves": leaves}
    if jax.process_index() == 0:
        with files.disk_errors(run / "base.json", CheckpointError):
            files.write_json(run / "base.json", record)
    return record


def _lender(source: Path | None, leaves: dict) -> Path | None:
    """The base folder behind another run, if it holds all these parameters, as process 0 finds them."""
    if source is None:
        return None
    record = files.read_json(source / "base.json") or {"path": "", "relative": "base"}
    places = [files.absolute(source / record["relative"]), Path(record["path"])]
    fit = [jax.process_index() == 0 and _unfit(folder, leaves) is None for folder in places]
    return next((folder for folder, fits in zip(places, distributed.gather(fit)[0], strict=True) if fits), None)


def _unfit(folder: Path, leaves: dict, wanted: dict[str, Any] | None = None) -> str | None:
    """Why a base folder cannot give these parameters; None if it can."""
    if not (folder / storage.MANIFEST).is_file():
        return "holds no whole base"
    fault = storage.verify(folder, lambda name: False)  # of the manifest itself
    if fault:
        return fault
    there = files.read_json(folder / storage.MANIFEST)["leaves"].get(arrays.STATE)
    if there is None:
        return "holds no whole base"
    differing = [path for path, leaf in leaves.items() if there.get(path) != leaf]
    if differing:
        return f"is another base: {some(differing)}"
    return storage.verify(folder) if wanted is None else storage.verify(folder, arrays.files_read(folder, wanted))
