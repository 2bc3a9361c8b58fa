"""Trees of arrays on disk, by orbax: written one array after the other, so that a tree may be larger than memory, and read
into place. Orbax loads a flipped bit, another dtype or another shape without a word; who calls this holds files to their
hashes (`storage`) and shapes to what is expected (`compare`).
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mimo_jax import files, pathtree
from mimo_jax.checkpoints import storage
from mimo_jax.errors import UserError

STATE = "state"  # orbax's own name for the item that is written in parts
# A stored chunk: small enough that a process which needs a part of an array reads little more than that part.
CHUNK_BYTES = 64 * 2**20
_BATCH_BYTES = 256 * 2**20  # small arrays are written together
_READ_BYTES = 256 * 2**20  # arrays of so many bytes are read together
_LISTED = 6  # differences that a message spells out


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model, or cannot be written; one line that names it."""


def _context() -> ocp.Context:
    """Chunks as files of their own, uncompressed: no second copy of an array is made while it is written or read."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False
    return context


def write(folder: Path, leaves: Iterator[tuple[str, Any]]) -> None:
    """Write parameters (path, array) under `folder`/arrays; nothing restorable exists there before the last one is written.

    An array is let go before the next one is asked for, so that of large ones only one is held."""
    batch: dict[str, Any] = {}
    written = False
    with _context():
        for path, leaf in leaves:
            batch[path] = leaf
            del leaf
            if sum(held.nbytes for held in batch.values()) >= _BATCH_BYTES:
                ocp.partial.save(folder / "arrays", pathtree.unflatten(batch))
                written = True
                batch.clear()
                _trim()
        if batch:
            ocp.partial.save(folder / "arrays", pathtree.unflatten(batch))
        if batch or written:
            ocp.partial.finalize(folder / "arrays")


def _trim() -> None:
    """Hand freed memory back to the system; glibc would keep half a gigabyte for every large array."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def read(folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """{item: abstract tree with shardings} -> {item: tree of arrays}, of those items of `folder`/arrays."""
    return ocp.load_checkpointables(folder / "arrays", items)


def read_parameters(
    folder: Path, there: Iterable[str], wanted: dict[str, Any], then: Callable[[str, jax.Array], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """{path: abstract with sharding} -> {path: array}, some of the parameters `there` that `write` left in `folder`; a few at a
    time, so that little more memory is taken than they fill. then: what is kept of each, as {path: array}, in its place."""
    nothing = dict.fromkeys(there, ocp.PLACEHOLDER)
    loaded: dict[str, Any] = {}
    batch: dict[str, Any] = {}

    def fetch() -> None:
        # Orbax lets go of what it read from the disk when the copy on the device stands.
        found = pathtree.flatten(jax.block_until_ready(read(folder, {STATE: pathtree.unflatten(nothing | batch)})[STATE]))
        for path in batch:
            leaf = found.pop(path)
            loaded.update(then(path, leaf) if then else {path: leaf})
        del leaf
        batch.clear()
        _trim()

    for path, leaf in wanted.items():
        if batch and sum(map(nbytes, batch.values())) + nbytes(leaf) > _READ_BYTES:
            fetch()
        batch[path] = leaf
    if batch:
        fetch()
    return loaded


def files_read(folder: Path, wanted: dict[str, Any]) -> Callable[[str], bool]:
    """Whether this process reads a file below `folder`, by its name there, for parameters {path: abstract with sharding} that `write`
    left: chunks of which its devices hold a part, and all that is no chunk."""
    needed = set()
    for path, leaf in wanted.items():
        home = f"arrays/{STATE}/{path.replace('/', '.')}"
        about = files.read_json(folder / home / "zarr.json")
        if about is None:  # it is no chunk, so its damage will be found
            continue
        chunk = about["chunk_grid"]["configuration"]["chunk_shape"]
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
            spans = (part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
            grid = [range(first // side, -(-last // side)) for (first, last, _), side in zip(spans, chunk, strict=True)]
            needed.update("/".join([home, "c", *map(str, place)]) for place in itertools.product(*grid))
    return lambda name: name in needed or not re.search(r"/c(/\d+)*$", name)


def on_first_process(tree: dict, place: Callable[[dict], Any] | None = None) -> dict | None:
    """Arrays (nested dict) of which several processes hold parts, on devices of process 0; None in the others, though all call this.
    Whole arrays pass one by one through the memory of every process. place: as in `placed`, from their shapes."""
    if jax.process_count() == 1:
        return tree
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    wanted = pathtree.flatten(placed(abstract, place))
    there = {}
    for path, leaf in pathtree.flatten(tree).items():
        whole = storage.gather_to_host(leaf)
        if jax.process_index() == 0:
            there[path] = jax.device_put(whole, wanted[path].sharding)
    return pathtree.unflatten(there) if jax.process_index() == 0 else None


# --- trees by name


def nbytes(leaf: Any) -> int:
    """Of an array, or of a shape."""
    return leaf.size * np.dtype(leaf.dtype).itemsize


def kind(leaf: Any) -> list:
    return [str(np.dtype(leaf.dtype)), list(leaf.shape)]


def kinds(tree: Any) -> dict[str, list]:
    """Any tree of arrays or shapes as {"a/b/c": [dtype, shape]}."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): kind(leaf) for path, leaf in flat}


def abstract(kinds: dict[str, list]) -> dict:
    """Nested dict of ShapeDtypeStructs from what `kinds` recorded."""
    return pathtree.unflatten({path: jax.ShapeDtypeStruct(tuple(leaf[1]), jax.numpy.dtype(leaf[0])) for path, leaf in kinds.items()})


def placed(abstract: Any, shardings: Any) -> Any:
    """The abstract tree with a sharding on every leaf. shardings: the same tree of them, one for all, a function from the
    abstract tree to one of these, or None for the first device of this process."""
    if callable(shardings):
        shardings = shardings(abstract)
    if shardings is None:
        shardings = SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)


def compare(there: dict[str, list], wanted: dict[str, list], where: Path) -> None:
    """CheckpointError that lists parameters which are missing, left over, or of another dtype or shape."""
    differing = [f"lacks {path}" for path in sorted(wanted.keys() - there.keys())]
    differing += [f"also has {path}" for path in sorted(there.keys() - wanted.keys())]
    differing += [
        f"{path} is {there[path][0]}{there[path][1]}, the config needs {kind[0]}{kind[1]}"
        for path, kind in sorted(wanted.items())
        if path in there and there[path] != kind
    ]
    if differing:
        raise CheckpointError(f"{where} does not fit the config: {some(differing)}")


def some(rows: list[str]) -> str:
    return ", ".join(rows[:_LISTED]) + (f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else "")
