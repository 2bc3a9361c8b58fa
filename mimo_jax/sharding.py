"""Sharding of every array: a table from logical axes to mesh axes, and an ordered table from parameter paths to logical axes.

Specs are written for the trailing axes of a parameter; leading axes (stacked layers, SAM's stages) are
never sharded. Mesh axes: `slice` (samples, over slow links), `data` (samples), `fsdp` (samples, and parameters if they are
sharded), `tensor` (heads and MLP columns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax import pathtree
from mimo_jax.config import ConfigError, MeshConfig
from mimo_jax.model_config import LlmConfig

AXES = ("slice", "data", "fsdp", "tensor")
# Logical axis -> the mesh axes that it is split over. All code that places arrays uses logical axes: parameters (RULES), kernels, the
# mesh context, batches and caches.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "sequence": (),
    "embed": ("fsdp",),  # the width of a residual stream
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
_MAX_BASE_FRACTION = 0.5  # largest fraction of a device's memory that a replicated base may use

# path regex -> logical axes of the trailing dimensions; the first match decides. Kinds of parts add rows: see `add_rules`.
RULES: dict[str, tuple[str | None, ...]] = {
    r"^embedding/base$": ("vocab", "embed"),
    r"^lm_head/base$": ("embed", "vocab"),
    r"^(embedding|lm_head)/grounding$": (),
    r"^llm/.*/(q|k|v)/kernel(_int8|_int4)?$": ("embed", "heads"),
    r"^llm/.*/(gate|up)/kernel(_int8|_int4)?$": ("embed", "mlp"),
    r"^llm/.*/o/kernel(_int8|_int4)?$": ("heads", "embed"),
    r"^llm/.*/down/kernel(_int8|_int4)?$": ("mlp", "embed"),
    r"^llm/.*/(q|k|v)/kernel_scale$": (None, "heads"),  # groups of inputs are few and often not divisible
    r"^llm/.*/(gate|up)/kernel_scale$": (None, "mlp"),
    r"^llm/.*/(o|down)/kernel_scale$": (None, "embed"),
    r"/lora_[ab]$": (),
    r"^(vision|sam_encoder)/.*/(q|k|v)/kernel$": ("embed", "heads"),
    r"^(vision|sam_encoder)/.*/up/kernel$": ("embed", "mlp"),
    r"^(vision|sam_encoder)/.*/o/kernel$": ("heads", "embed"),
    r"^(vision|sam_encoder)/.*/down/kernel$": ("mlp", "embed"),
    r"^(vision|sam_encoder|llm)/": (),
    r"^(seg_projection/hidden|aligner/project_out)/kernel$": ("embed", "mlp"),
    r"^(prompt|aligner|seg_projection|sam_prompt|sam_decoder)/": (),
}


def add_rules(rows: Mapping[str, tuple[str | None, ...]]) -> None:
    """Add rows before those of RULES. Raises ValueError for an unknown logical axis, and for a regex that has a row with other axes."""
    for pattern, axes in rows.items():
        unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXES]
        if unknown or RULES.get(pattern, axes) != axes:
            why = f"unknown axis {unknown[0]!r}; use one of {', '.join(LOGICAL_AXES)}" if unknown else "already has a row"
            raise ValueError(f"sharding rule {pattern!r}: {why}")
    rest = {pattern: axes for pattern, axes in RULES.items() if pattern not in rows}
    RULES.clear()
    RULES.update({**rows, **rest})


def mesh_axes(*logical: str | None) -> P:
    """PartitionSpec of an array with these logical axes, None for one that is never split."""
    made = (LOGICAL_AXES[axis] if axis is not None else () for axis in logical)
    return P(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in made))


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over these devices (default: all); raises ConfigError if the product of the axes is not their number. If the
    devices do not form several slices, `mesh.slices` arranges them as if they did, for tests of multi-slice runs."""
    devices = jax.devices() if devices is None else list(devices)
    device_slices = len({getattr(device, "slice_index", 0) for device in devices})
    slices = cfg.slices or device_slices
    if device_slices not in (1, slices):
        raise ConfigError(
            f"config.mesh.slices: is {slices}, but the devices form {device_slices} slices; set it to {device_slices}, or to 0"
        )
    sizes = [slices, cfg.data, cfg.fsdp, cfg.tensor]
    asked = " x ".join(map(str, sizes))
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1]))
        if sizes.count(-1) > 1 or rest < 1 or len(devices) % rest:
            raise ConfigError(f"config.mesh: {asked} does not fill {len(devices)} devices")
        sizes[sizes.index(-1)] = len(devices) // rest
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(f"config.mesh: {asked} does not make {len(devices)} devices")
    if device_slices == 1:
        return _mesh(tuple(sizes), devices)
    arranged = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (slices, 1, 1, 1), devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def inference_mesh(llm: LlmConfig) -> Mesh | None:
    """A mesh over the devices of this process for inference; None if there is only one device. If their number divides the heads
    of the language model, the devices split the heads and the KV cache (`tensor`); else only the parameters (`fsdp`)."""
    devices = jax.local_devices()
    count = len(devices)
    if count == 1:
        return None
    divided = all(heads % count == 0 for heads in llm.tensor_parallel_heads())
    return _mesh((1, 1, 1, count) if divided else (1, 1, count, 1), devices)


def _mesh(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def num_batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def spec(path: str, shape: tuple[int, ...]) -> P:
    """PartitionSpec of one parameter; raises KeyError if no row of RULES matches it."""
    axes = pathtree.first_match(path, RULES, "sharding.RULES")
    return mesh_axes(*[None] * (len(shape) - len(axes)), *axes) if axes else P()


def param_shardings(tree: dict, mesh: Mesh, unsharded: dict[str, str] | None = None, axes: Sequence[str] = AXES) -> dict:
    """NamedSharding for every leaf of a nested dict of arrays (or shapes), over the mesh `axes` only. A dimension that an axis does
    not divide is not split, and the reason is added to `unsharded` {parameter path: reason}."""
    made = {}
    for path, leaf in pathtree.flatten(tree).items():
        partition = []
        for size, entry in zip(leaf.shape, spec(path, leaf.shape), strict=False):
            names = tuple(axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if axis in axes)
            shards = math.prod(mesh.shape[axis] for axis in names)
            if size % shards:
                names = ()
                if unsharded is not None:
                    unsharded[path] = f"{shards} does not divide an axis of size {size} of parameter {path}"
            partition.append(names if len(names) > 1 else names[0] if names else None)
        made[path] = NamedSharding(mesh, P(*partition))
    return pathtree.unflatten(made)


class ModelShardings(NamedTuple):
    """train, frozen: shardings of the trained and the frozen parameters of a model (nested dicts); reason: how the frozen base is placed
    and why, in one line; unsharded: {path: reason} of parameters that are not split over an axis, because it does not divide them."""

    train: dict
    frozen: dict
    reason: str
    unsharded: dict[str, str]


def model_shardings(cfg: MeshConfig, mesh: Mesh, memory: int | None, train: dict, frozen: dict) -> ModelShardings:
    """Shardings of a model's parameters. train, frozen: nested dicts of shapes; memory: bytes per device, None if it is not known."""
    unsharded: dict[str, str] = {}
    axes, reason = _base_axes(cfg, mesh, memory, frozen)
    return ModelShardings(param_shardings(train, mesh, unsharded), param_shardings(frozen, mesh, unsharded, axes), reason, unsharded)


def _base_axes(cfg: MeshConfig, mesh: Mesh, memory: int | None, frozen: dict) -> tuple[tuple[str, ...], str]:
    """(mesh axes over which the frozen base is split, why)."""
    replicated, fsdp = tuple(axis for axis in AXES if axis != "fsdp"), mesh.shape["fsdp"]
    if fsdp == 1:
        return replicated, "base replicated: the mesh has no fsdp axis to split it over"
    if cfg.frozen_sharding != "auto":
        axes = AXES if cfg.frozen_sharding == "sharded" else replicated
        return axes, f"base {cfg.frozen_sharding}: set by config.mesh.frozen_sharding"
    stored = bytes_per_device(frozen, param_shardings(frozen, mesh, axes=replicated))
    if memory is None:
        return AXES, f"base sharded over {fsdp}: the memory of the devices is not known"
    room = f"{stored / 2**30:.1f} of {memory / 2**30:.1f} GiB per device"
    if stored <= _MAX_BASE_FRACTION * memory:
        return replicated, f"base replicated: it needs {room}"
    return AXES, f"base sharded over {fsdp}: replicated it would need {room}, more than {_MAX_BASE_FRACTION:.0%}"


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes per device of a tree of shapes with these shardings, a tree of the same structure."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)


def cache_sharding(mesh: Mesh, llm: LlmConfig, axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of every array of a language model's cache with these logical axes; replicated if the mesh does not divide its heads."""
    heads = math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["kv_heads"])
    return NamedSharding(mesh, mesh_axes(*axes) if llm.tensor_parallel_heads()[1] % heads == 0 else P())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: its leading axis is split over the batch axes of the mesh."""
    return NamedSharding(mesh, mesh_axes("batch"))


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [micro-batch, sample, ...]: the second axis is split over the batch axes of the mesh."""
    return NamedSharding(mesh, mesh_axes(None, "batch"))
