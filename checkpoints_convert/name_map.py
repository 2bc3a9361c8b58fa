"""Applies the tables of `rows` in both directions.

    leaves = pathtree.flatten(abstract), {"vision/...": ShapeDtypeStruct}
    import:  import_state(tensors, CLIP, layer_indices(config.model), leaves, CLIP_IGNORED)
    export:  export_state(parameters, CLIP, layer_indices(config.model))

The tables of several parts in one file are concatenated. For checkpoints larger than memory, `check` uses the shapes in
a file's header, and `import_leaves` and `export_tensors` process one leaf at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_convert.layouts import COMPONENTS
from checkpoints_convert.ops import OPS, Op, copy
from checkpoints_convert.rows import Row
from mimo_jax.errors import UserError
from mimo_jax.model_config import ModelConfig


class KeyMapError(UserError):
    """A checkpoint that does not fit the table; the message lists every key that is missing, left over or of another shape."""

    listing = True


Indices = Mapping[str, np.ndarray]


def layer_indices(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The values of each placeholder in this model's tables, as an array of the shape of the stack's leading axes (SAM: [stage, block])."""
    return {name: numbers for part in COMPONENTS.values() if part.fits(cfg) for name, numbers in part.indices(cfg).items()}


def paths_of(row: Row) -> list[str]:
    """The row's paths: several if it contains a choice such as {q,k,v}."""
    choice = re.search(r"\{([^{}]*)\}", row.path)
    if choice is None:
        return [row.path]
    return [row.path.replace(choice[0], part) for part in choice[1].split(",")]


def keys_of(row: Row, indices: Indices) -> np.ndarray:
    """Torch keys of the row, an array of str with the stack's leading axes (without axes if there is no placeholder)."""
    placeholder = re.search(r"\{(\w+)\}", row.key)
    if placeholder is None:
        return np.array(row.key, dtype=object)
    if placeholder[1] not in indices:
        raise KeyMapError(f"row {row.key!r}: unknown placeholder {placeholder[0]}; known are {', '.join(sorted(indices))}")
    numbers = indices[placeholder[1]]
    keys = np.empty(numbers.shape, dtype=object)
    for at in np.ndindex(numbers.shape):
        keys[at] = row.key.replace(placeholder[0], str(numbers[at]))
    return keys


def _filled(leaves: Mapping[str, Any], rows: Sequence[Row], indices: Indices) -> Iterator[tuple[np.ndarray, list[str], list[tuple], Op]]:
    """(torch keys, paths, shape of each path's part in torch, op) of the rows whose parameters are in `leaves`."""
    unnamed = sorted(leaves.keys() - {path for row in rows for path in paths_of(row)})
    if unnamed:
        raise KeyMapError(f"no row names the parameters {', '.join(unnamed)}; add rows to the key map")
    for row in rows:
        if row.op not in OPS:
            raise KeyMapError(f"row {row.key!r}: unknown op {row.op!r}; known are {', '.join(OPS)}")
        keys, paths, op = keys_of(row, indices), paths_of(row), OPS[row.op]
        absent = [path for path in paths if path not in leaves]
        if len(absent) == len(paths):
            continue
        if absent:
            raise KeyMapError(f"row {row.key!r} fills {', '.join(paths)}; the parameters lack {', '.join(absent)}")
        parts = []
        for path in paths:
            shape = leaves[path].shape
            if shape[: keys.ndim] != keys.shape:
                raise KeyMapError(f"parameter {path} {list(shape)} should be stacked {list(keys.shape)}; use the matching config")
            parts.append(op.to_torch(np.broadcast_to(np.uint8(0), shape[keys.ndim :])).shape)  # a view that needs no memory
        yield keys, paths, parts, op


def torch_shapes(leaves: Mapping[str, Any], rows: Sequence[Row], indices: Indices) -> dict[str, tuple[int, ...]]:
    """{torch key: shape} of parameters {path: anything with a shape}. Rows of other parameters are ignored.
    Raises KeyMapError for a parameter that no row names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for keys, _, parts, _ in _filled(leaves, rows, indices):
        shape = parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])
        shapes.update(dict.fromkeys(keys.ravel().tolist(), shape))
    return shapes


def mismatches(
    found: Mapping[str, Sequence[int]], rows: Sequence[Row], indices: Indices, leaves: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, list[str]]:
    """{"missing", "left over", "of another shape": tensors}: tensors that `leaves` {path: anything with a shape} needs and `found`
    {key: shape} lacks or has in another shape, and tensors that are not needed and that no regex of `ignored` matches."""
    wanted = torch_shapes(leaves, rows, indices)
    both = sorted(wanted.keys() & found.keys())
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(k for k in found.keys() - wanted.keys() if not any(re.search(p, k) for p in ignored)),
        "of another shape": [f"{k} {list(found[k])}, wanted {list(wanted[k])}" for k in both if tuple(found[k]) != wanted[k]],
    }


def check(
    found: Mapping[str, Sequence[int]], rows: Sequence[Row], indices: Indices, leaves: Mapping[str, Any], ignored: Sequence[str] = ()
) -> None:
    """Raise one KeyMapError that lists all `mismatches`."""
    raise_listed({"the checkpoint": mismatches(found, rows, indices, leaves, ignored)})


def raise_listed(problems: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Raise a KeyMapError that lists every tensor of {source: mismatches}, if there is any."""
    lines = []
    for source, kinds in problems.items():
        for kind, listed in kinds.items():
            lines += [f"{source}: {len(listed)} {kind}:", *(f"  {tensor}" for tensor in listed)] if listed else []
    if lines:
        raise KeyMapError("\n".join(["tensors do not fit the configuration", *lines]))


def import_leaves(
    tensors: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    indices: Indices,
    leaves: Mapping[str, Any],
    only: Collection[str] | None = None,
    start: Mapping[str, np.ndarray] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every parameter in `leaves`, or of those that are also in `only`, in the table's order and in the dtypes
    of `leaves`. Each torch tensor is read once, and one parameter is in memory at a time. Call `check` first. start: values for the parts
    of parameters whose tensor is missing."""
    start = start or {}
    for keys, paths, shapes, op in _filled(leaves, rows, indices):
        ends = np.cumsum([shape[0] for shape in shapes])[:-1] if len(paths) > 1 else []
        made = {path: np.empty(leaves[path].shape, leaves[path].dtype) for path in paths if only is None or path in only}
        for path in made.keys() & start.keys():
            made[path][...] = start[path]
        for at in np.ndindex(keys.shape) if made else ():
            if keys[at] not in tensors and made.keys() <= start.keys():
                continue
            tensor = tensors[keys[at]]
            for path, part in zip(paths, np.split(tensor, ends) if len(paths) > 1 else [tensor], strict=True):
                if path in made:
                    copy(made[path][at], op.to_flax(part))
        for path in list(made):
            yield path, made.pop(path)


def import_state(
    tensors: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices, leaves: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Torch tensors {key: array} -> the parameters of `leaves` {path: shape and dtype} as {path: array}. Raises KeyMapError as `check`
    does."""
    check({key: np.shape(value) for key, value in tensors.items()}, rows, indices, leaves, ignored)
    return dict(import_leaves(tensors, rows, indices, leaves))


def export_tensors(
    leaves: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices, shapes: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(torch key, array) of every row whose parameters are in `leaves`, each of which is read once. The arrays are views, contiguous only
    if the op keeps them so. shapes: {path: anything with a shape}, to avoid reading leaves for their shapes."""
    for keys, paths, _, op in _filled(leaves if shapes is None else shapes, rows, indices):
        values = [np.asarray(leaves[path]) for path in paths]
        for at in np.ndindex(keys.shape):
            parts = [op.to_torch(value[at]) for value in values]
            yield keys[at], parts[0] if len(parts) == 1 else np.concatenate(parts)
        del values


def export_state(leaves: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices) -> dict[str, np.ndarray]:
    """Inverse of `import_state`: parameters {path: array} -> torch tensors {key: array}."""
    return dict(export_tensors(leaves, rows, indices))
