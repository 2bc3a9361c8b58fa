"""The mesh that a function is traced for, set by a context manager around the call of a model.

    with use_mesh(mesh):
        out = model(batch)

Without it, a model runs where its arguments are, and XLA alone decides what is split.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from mimo_jax.sharding import mesh_axes, num_batch_shards


class MeshContext(NamedTuple):
    """platform: "cpu", "gpu" or "tpu"; capability: compute capability of an NVIDIA device, such as 9.0 for Hopper, else 0; devices: number
    of devices; mesh: the mesh that the program is partitioned over, None if it is not known."""

    platform: str
    capability: float
    devices: int
    mesh: Mesh | None = None


_context: contextvars.ContextVar[MeshContext | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Set the mesh while a function is traced. The devices of the mesh may be those of a machine that is not available."""
    token = _context.set(_describe(mesh.devices.flat[0], mesh.size, mesh))
    try:
        yield
    finally:
        _context.reset(token)


def current() -> MeshContext:
    """The context that `use_mesh` set, else one of this process's devices."""
    return _context.get() or _describe(jax.devices()[0], jax.device_count())


def _describe(device: jax.Device, devices: int, mesh: Mesh | None = None) -> MeshContext:
    return MeshContext(device.platform, float(getattr(device, "compute_capability", 0) or 0), devices, mesh)


def constrain_batch(tree: Any) -> Any:
    """Constrain the leading axis of every array to the mesh axes of the batch. Otherwise XLA sometimes sends all samples to every device
    instead of gathering the weights of a layer."""
    mesh = current().mesh
    if mesh is None or mesh.size == 1:
        return tree

    def place(x: jax.Array) -> jax.Array:
        undivided = x.ndim == 0 or x.shape[0] % num_batch_shards(mesh)
        return x if undivided else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, mesh_axes("batch")))

    return jax.tree.map(place, tree)
