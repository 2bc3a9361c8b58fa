"""The frozen base of a run: its frozen parameters, written once, verified against their hashes, and found if they were moved.

RUN/base.json         fingerprint, path of the base, and [dtype, shape, SHA-256] of every parameter
RUN/base/arrays       the arrays, unless the base of another run already has them
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
from mimo_jax.checkpoints.arrays import CheckpointError, summarize


def write(run: Path, leaves: Iterator[tuple[str, Any]], place: Path | None = None) -> dict:
    """Write a base from an iterator of its parameters, (path, array), and base.json; returns the content of base.json.

    place: the final directory of the run, if it is renamed afterwards."""
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
    """Write the frozen parameters (nested dict) of a run unless they are already written; returns their fingerprint. If the base of
    `source`, the directory of another run, has all of them, only a reference to it is written. Raises CheckpointError if the run has
    steps with another base."""
    flat = pathtree.flatten(frozen)
    leaves = {path: [*arrays.spec(leaf), storage.hash_array(leaf)] for path, leaf in flat.items()}
    saved = files.read_json(workdir / "base.json")
    if saved and saved["fingerprint"] == fingerprint(leaves):
        return saved["fingerprint"]
    if saved and (workdir / "steps").is_dir() and any((workdir / "steps").glob("*/" + storage.MANIFEST)):
        raise CheckpointError(f"{workdir}: its steps were trained on another frozen base; use another --workdir")
    shared = _shared_base(source, leaves)
    if shared is None:
        return write(workdir, iter(flat.items()))["fingerprint"]
    return _write_record(workdir, shared, leaves, workdir)["fingerprint"]


def load(run: Path, abstract: dict | None = None, shardings: Any = None, base: str | os.PathLike | None = None) -> dict:
    """The frozen parameters of a run, as a nested dict. The base is searched for at its recorded path, then at its path relative to
    the run, then in `base` (the folder of a base, or of a run that has it); its files are verified against the recorded hashes.

    abstract: the expected parameters (CheckpointError lists the differences), None for those that are recorded; shardings: as in
    `arrays.with_shardings`."""
    record = read_record(run)
    leaves = record["leaves"]
    specs = {path: leaf[:2] for path, leaf in leaves.items()}
    if abstract is None:
        abstract = arrays.abstract(specs)
    arrays.compare(specs, arrays.specs(abstract), run / "base.json")
    if not leaves:
        return {}
    wanted = pathtree.flatten(arrays.with_shardings(abstract, shardings))
    folder = find(run, base, wanted)
    existing = files.read_json(folder / storage.MANIFEST)["leaves"][arrays.STATE]
    return pathtree.unflatten(arrays.read_parameters(folder, existing, wanted))


def find(run: Path, base: str | os.PathLike | None = None, wanted: dict[str, Any] | None = None) -> Path:
    """The folder of the base of a run. Its files are verified against their SHA-256: all of them, or those that this process reads for
    the parameters `wanted`, {path: abstract with sharding}. Raises CheckpointError with every folder tried and what is wrong with it."""
    record = read_record(run)
    candidates = [Path(record["path"]), run / record["relative"]]
    if base is not None:
        candidates += [Path(base) / "base" if (Path(base) / "base").is_dir() else Path(base)]
    tried = {}
    for folder in dict.fromkeys(files.absolute(folder) for folder in candidates):
        tried[folder] = _unfit(folder, record["leaves"], wanted)
        if tried[folder] is None:
            return folder
    reasons = "; ".join(f"{folder} {why}" for folder, why in tried.items())
    raise CheckpointError(f"{run}: its frozen base {record['fingerprint'][:12]} is not found: {reasons}; name its folder with --base DIR")


def read_record(run: Path) -> dict:
    """The content of base.json. Raises CheckpointError if it is missing or damaged."""
    record = files.read_json(run / "base.json")
    if record is None or record.get("fingerprint") != fingerprint(record.get("leaves", {})):
        raise CheckpointError(f"{run / 'base.json'}: is missing or damaged; copy it from where the run was made")
    return record


def fingerprint(leaves: dict[str, list]) -> str:
    """SHA-256 over the names, dtypes, shapes and values of parameters, {path: [dtype, shape, SHA-256]}."""
    return hashlib.sha256(json.dumps(dict(sorted(leaves.items()))).encode()).hexdigest()


def hashed(leaves: Iterator[tuple[str, Any]], into: dict[str, list]) -> Iterator[tuple[str, Any]]:
    """Yield the same (path, array), and set into[path] to [dtype, shape, SHA-256], computed in a thread while the array is written."""
    with ThreadPoolExecutor(1) as pool:
        for path, leaf in leaves:
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                into[path] = [*arrays.spec(leaf), storage.hash_array(leaf)]  # gathers, so all processes must be at the same leaf
                yield path, leaf
                continue
            digest = pool.submit(storage.hash_array, leaf)
            into[path] = arrays.spec(leaf)
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


def _shared_base(source: Path | None, leaves: dict) -> Path | None:
    """The base folder of another run, if process 0 finds all these parameters in it; None otherwise."""
    if source is None:
        return None
    record = files.read_json(source / "base.json") or {"path": "", "relative": "base"}
    candidates = [files.absolute(source / record["relative"]), Path(record["path"])]
    fit = [jax.process_index() == 0 and _unfit(folder, leaves) is None for folder in candidates]
    return next((folder for folder, fits in zip(candidates, distributed.gather(fit)[0], strict=True) if fits), None)


def _unfit(folder: Path, leaves: dict, wanted: dict[str, Any] | None = None) -> str | None:
    """Why these parameters cannot be read from a base folder; None if they can."""
    if not (folder / storage.MANIFEST).is_file():
        return "is not a complete base"
    fault = storage.verify(folder, lambda name: False)  # of the manifest itself
    if fault:
        return fault
    existing = files.read_json(folder / storage.MANIFEST)["leaves"].get(arrays.STATE)
    if existing is None:
        return "is not a complete base"
    differing = [path for path, leaf in leaves.items() if existing.get(path) != leaf]
    if differing:
        return f"is another base: {summarize(differing)}"
    return storage.verify(folder) if wanted is None else storage.verify(folder, arrays.files_read(folder, wanted))
