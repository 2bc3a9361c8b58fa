"""Splitting, merging and scanning of Flax NNX modules: the only place where modules meet plain JAX.

Axis letters: N layers of a stack.

Outside this file, parameters are nested dicts of arrays (`pathtree`), jitted by `jax.jit` and
differentiated by `jax.value_and_grad`; modules exist only while a function is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.models import mesh

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class ScanConfig(NamedTuple):
    """How a stack is run. remat: "none", "full" or "dots". unroll: unroll the loop over the layers in the compiled program. It is
    a fifth faster for small models on a CPU, where loops limit the fusion of operations, and slower to compile."""

    remat: str = "none"
    unroll: bool = False


SCAN = ScanConfig()


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, dict]:
    """(graphdef, nested dict of ShapeDtypeStruct) of the module that `make` builds, without its arrays."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def init_params(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> dict:
    """Nested dict of parameters drawn from `key`; for large models, call it under `jax.jit` with out_shardings."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))


def bind(graphdef: Any, params: dict) -> nnx.Module:
    """The module with these parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def rematerialised(function: Callable, remat: str) -> Callable:
    """`function` with its intermediates recomputed in the backward pass according to `remat`; for use inside a scan only."""
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=_POLICIES[remat], prevent_cse=False)


def num_stack_axes(path: str) -> int:
    """Number of leading axes of the parameter at `path` that are the layers of a `ScannedLayers`."""
    return path.split("/").count("block")


class ScannedLayers(nnx.Module):
    """N blocks of equal shapes, with parameters stacked on a leading axis N, applied by `lax.scan`, so that N layers compile as one.

    `make` builds one block from an Rngs. A block is called as `block(x, *shared, **per_layer) -> x` or, if the
    stack is called with `with_output=True`, `-> (x, y)`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, rngs: nnx.Rngs, scan: ScanConfig = SCAN):
        keys = jax.random.split(rngs.params(), layers)
        graphdef, _ = abstract(make)
        self.layers = layers
        self.scan = scan
        self.block = nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))

    def __call__(self, x: Any, *shared: Any, per_layer: Any = None, with_output: bool = False, num_layers: int | None = None):
        """x: the carry (any pytree). shared: arguments that are the same for every layer. per_layer: dict of arrays with leading axis N,
        whose entries are passed as keyword arguments. num_layers: run only this number of layers, from the bottom. Returns x, or
        (x, stacked outputs [N, ...]) if `with_output`."""
        graphdef, state = nnx.split(self.block)

        def body(carry, layer):
            params, extra = layer
            out = nnx.merge(graphdef, params)(mesh.constrain_batch(carry), *shared, **(extra or {}))
            return out if with_output else (out, None)

        body = rematerialised(body, self.scan.remat)
        if num_layers is None or num_layers == self.layers:
            x, ys = jax.lax.scan(body, x, (state, per_layer), unroll=self.scan.unroll or 1)
        else:
            # Layers are selected by index: a slice [:num_layers] of the parameters would be copied (CLIP ViT-H: 1.2 GB).
            def layer(i):
                return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), (state, per_layer))

            x, ys = jax.lax.scan(lambda carry, i: body(carry, layer(i)), x, jnp.arange(num_layers))
        return (x, ys) if with_output else x
