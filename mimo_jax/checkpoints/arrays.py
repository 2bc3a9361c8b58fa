"""Trees of arrays on disk, with Orbax. They are written one array after the other, so that a tree may be larger than memory, and read
with given shardings. Orbax does not report flipped bits, another dtype or another shape: callers verify the files against their hashes
(`storage.verify`) and the shapes against the expected ones (`compare`).
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

STATE = "state"  # the name that Orbax gives to an item written in parts
# Size of a stored chunk, small enough that a process that needs part of an array reads little more than that part.
CHUNK_BYTES = 64 * 2**20
_BATCH_BYTES = 256 * 2**20  # smaller arrays are written together
_READ_BYTES = 256 * 2**20  # arrays are read together up to this number of bytes
_MAX_LISTED = 6  # maximum number of differences in a message


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another model, or cannot be written; the message is one line that names it."""


def _context() -> ocp.Context:
    """Orbax settings with each chunk in its own uncompressed file: no second copy of an array is made while it is written or read."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False
    return context


def write(folder: Path, leaves: Iterator[tuple[str, Any]]) -> None:
    """Write parameters (path, array) to `folder`/arrays, which cannot be restored before the last one is written.

    Each array is released before the next one is requested, so that only one large array is in memory."""
    batch: dict[str, Any] = {}
    written = False
    with _context():
        for path, leaf in leaves:
            batch[path] = leaf
            del leaf
            if sum(array.nbytes for array in batch.values()) >= _BATCH_BYTES:
                ocp.partial.save(folder / "arrays", pathtree.unflatten(batch))
                written = True
                batch.clear()
                _trim()
        if batch:
            ocp.partial.save(folder / "arrays", pathtree.unflatten(batch))
        if batch or written:
            ocp.partial.finalize(folder / "arrays")


def _trim() -> None:
    """Return freed memory to the system; glibc would keep half a gigabyte per large array."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def read(folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Read some items of `folder`/arrays: {item: abstract tree with shardings} -> {item: tree of arrays}."""
    return ocp.load_checkpointables(folder / "arrays", items)


def read_parameters(
    folder: Path, existing: Iterable[str], wanted: dict[str, Any], transform: Callable[[str, jax.Array], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Read parameters that `write` wrote to `folder`: {path: abstract with sharding} -> {path: array}. They are read a few at a time,
    so that little more memory is used than they need. existing: the paths of all parameters in `folder`; transform(path, array):
    {path: array} that replaces each parameter as soon as it is read."""
    nothing = dict.fromkeys(existing, ocp.PLACEHOLDER)
    loaded: dict[str, Any] = {}
    batch: dict[str, Any] = {}

    def fetch() -> None:
        # Orbax frees its host buffers when the copy on the device is complete.
        found = pathtree.flatten(jax.block_until_ready(read(folder, {STATE: pathtree.unflatten(nothing | batch)})[STATE]))
        for path in batch:
            leaf = found.pop(path)
            loaded.update(transform(path, leaf) if transform else {path: leaf})
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
    """A function that returns whether this process reads a file, given its name relative to `folder`, to load parameters
    {path: abstract with sharding} that `write` wrote: the chunks that its devices need, and every file that is not a chunk."""
    needed = set()
    for path, leaf in wanted.items():
        prefix = f"arrays/{STATE}/{path.replace('/', '.')}"
        about = files.read_json(folder / prefix / "zarr.json")
        if about is None:  # missing or damaged; it is not a chunk, so it is verified
            continue
        chunk = about["chunk_grid"]["configuration"]["chunk_shape"]
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
            spans = (part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
            grid = [range(first // side, -(-last // side)) for (first, last, _), side in zip(spans, chunk, strict=True)]
            needed.update("/".join([prefix, "c", *map(str, chunk_index)]) for chunk_index in itertools.product(*grid))
    return lambda name: name in needed or not re.search(r"/c(/\d+)*$", name)


def on_every_process(tree: dict, place: Callable[[dict], Any] | None = None) -> dict:
    """Arrays (nested dict) of which several processes hold parts -> the same arrays on devices of each process. All processes must call
    this; the arrays are gathered one by one in the host memory of each. place: as in `with_shardings`, with devices of this process."""
    if jax.process_count() == 1:
        return tree
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    wanted = pathtree.flatten(with_shardings(abstract, place))
    gathered = {}
    for path, leaf in pathtree.flatten(tree).items():
        gathered[path] = jax.device_put(storage.gather_to_host(leaf), wanted[path].sharding)
    return pathtree.unflatten(gathered)


# --- trees by name


def nbytes(leaf: Any) -> int:
    """Size in bytes of an array or a ShapeDtypeStruct."""
    return leaf.size * np.dtype(leaf.dtype).itemsize


def spec(leaf: Any) -> list:
    """[dtype, shape] of an array or a ShapeDtypeStruct."""
    return [str(np.dtype(leaf.dtype)), list(leaf.shape)]


def specs(tree: Any) -> dict[str, list]:
    """{"a/b/c": [dtype, shape]} of any tree of arrays or ShapeDtypeStructs."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec(leaf) for path, leaf in flat}


def abstract(specs: dict[str, list]) -> dict:
    """Nested dict of ShapeDtypeStructs from {path: [dtype, shape]}; more items of the lists are ignored."""
    return pathtree.unflatten({path: jax.ShapeDtypeStruct(tuple(leaf[1]), jax.numpy.dtype(leaf[0])) for path, leaf in specs.items()})


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """The tree of ShapeDtypeStructs with a sharding for every leaf. shardings: the same tree of shardings, one for all, a function
    from the abstract tree to one of these, or None for the first device of this process."""
    if callable(shardings):
        shardings = shardings(abstract)
    if shardings is None:
        shardings = SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)


def compare(existing: dict[str, list], wanted: dict[str, list], where: Path) -> None:
    """Raise CheckpointError with a list of the parameters that are missing, unexpected, or of another dtype or shape."""
    differing = [f"lacks {path}" for path in sorted(wanted.keys() - existing.keys())]
    differing += [f"also has {path}" for path in sorted(existing.keys() - wanted.keys())]
    differing += [
        f"{path} is {existing[path][0]}{existing[path][1]}, the config needs {expected[0]}{expected[1]}"
        for path, expected in sorted(wanted.items())
        if path in existing and existing[path] != expected
    ]
    if differing:
        raise CheckpointError(f"{where} does not fit the config: {summarize(differing)}")


def summarize(rows: list[str]) -> str:
    """The first rows and the number of the others, in one line."""
    return ", ".join(rows[:_MAX_LISTED]) + (f" and {len(rows) - _MAX_LISTED} more" if len(rows) > _MAX_LISTED else "")
