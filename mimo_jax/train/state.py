"""The training state: what is differentiated and saved, separate from what is frozen.

    train  = {params (fp32), opt, step}   donated to each step, written at each checkpoint
    frozen = {path: parameter}            an input of the step, never an output, never in the optimizer

What is random in a step (LoRA's dropout) depends on the seed, the step and the sample alone, so the state holds no key. The loader samples
with per-record keys, and its position is saved next to the state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mimo_jax import parameters, pathtree, sharding
from mimo_jax.analysis import hardware
from mimo_jax.config import Config, ConfigError
from mimo_jax.models import mimo
from mimo_jax.train.optimizer import make_optimizer


class TrainSetup:
    """Everything that is known before an array exists: graph, shapes, dtypes, shardings, optimizer.

    base_reason: one line that says how the frozen base is placed, and why; unsharded: {path: reason} of parameters that are not split,
    because the mesh does not divide them. Raises ConfigError for a batch that the mesh does not divide."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        _check_batch(config, mesh)
        self.graphdef, shapes = mimo.abstract(config)
        self.multipliers = parameters.multipliers(config, shapes)
        self.optimizer: optax.GradientTransformation = make_optimizer(config.train, self.multipliers)
        self.params = parameters.with_dtypes(config, shapes)
        self.train, self.frozen = pathtree.partition(self.params, self.trains)
        memory = hardware.device_memory(mesh.devices.flat[0])
        placed = sharding.model_shardings(config.mesh, mesh, memory, self.train, self.frozen)
        self.train_shardings, self.frozen_shardings, self.base_reason, self.unsharded = placed
        self.param_shardings = pathtree.merge(self.train_shardings, self.frozen_shardings)
        self.state = jax.eval_shape(self._new_state, self.train)
        self.state_shardings = self._state_shardings(self.state)

    def trains(self, path: str) -> bool:
        return self.multipliers[path] is not None

    def _new_state(self, params: dict) -> dict[str, Any]:
        return {"params": params, "opt": self.optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    def _state_shardings(self, state: dict[str, Any]) -> Any:
        """Optimizer slots are placed like their parameter, whose path is the end of theirs; everything else is replicated."""
        everywhere = sharding.replicated(self.mesh)
        places = pathtree.flatten(self.train_shardings)

        def place(path, leaf):
            keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            owners = (places.get("/".join(keys[start:])) for start in range(len(keys)))
            return next(filter(None, owners), everywhere) if leaf.ndim else everywhere

        opt = jax.tree_util.tree_map_with_path(place, state["opt"])
        return {"params": self.train_shardings, "opt": opt, "step": everywhere}

    def initial_params(self, key: jax.Array) -> dict:
        """All parameters drawn from `key`, with their dtypes and shardings."""

        def make(key):
            return jax.tree.map(lambda x, s: x.astype(s.dtype), mimo.init_params(self.config, key), self.params)

        return jax.jit(make, out_shardings=self.param_shardings)(key)

    def start(self, params: dict) -> tuple[dict, dict]:
        """(train state at step 0, frozen) from all parameters."""
        train, frozen = pathtree.partition(params, self.trains)
        return jax.jit(self._new_state, out_shardings=self.state_shardings)(train), frozen

    def counts(self) -> dict[str, int]:
        """Number of parameters: trained and frozen."""
        sizes = {path: leaf.size for path, leaf in pathtree.flatten(self.params).items()}
        trained = sum(size for path, size in sizes.items() if self.trains(path))
        return {"trained": trained, "frozen": sum(sizes.values()) - trained}


def _check_batch(config: Config, mesh: Mesh) -> None:
    images, per_image = config.images(), config.data.samples_per_image
    num_shards, micro_batches = sharding.num_batch_shards(mesh), config.train.grad_accum_steps
    unit = num_shards * micro_batches
    if images % unit:
        factor = f" x config.train.grad_accum_steps {micro_batches}" if micro_batches > 1 else ""
        raise ConfigError(
            f"config.data.batch_size: its {images} images ({per_image} samples each) are not a multiple of the {num_shards} parts "
            f"that the mesh splits a batch into{factor}; the next size that fits is {-(-images // unit) * unit * per_image}"
        )
