"""One training step under one `jax.jit`: the gradients of the trained parameters, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mimo_jax import pathtree, sharding
from mimo_jax.analysis.aot import LoweredStep
from mimo_jax.config import Config
from mimo_jax.models import mesh, scan
from mimo_jax.models.lora import sample_keys
from mimo_jax.train import losses
from mimo_jax.train.optimizer import schedule
from mimo_jax.train.state import TrainSetup

# XLA options by platform. TPU: all-gather a layer's weights before they are used. Otherwise XLA multiplies by one device's slice at a
# time (80 columns for SAM on 16 devices) and accumulates the partial products in memory.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


def make_step(setup: TrainSetup) -> Callable:
    """Returns the jitted step: (state, donated; frozen; batch) -> (state, metrics as fp32 scalars).

    A step whose loss or gradient is not finite leaves the state unchanged and reports `finite` = 0.
    With `train.grad_accum_steps` micro-batches the loss is the same as without: sums are divided once by the weight of the full batch.
    """
    cfg, lora = setup.config.train, setup.config.model.lora
    rate = schedule(cfg)

    def loss_fn(params, frozen, batch, weights):
        model = scan.bind(setup.graphdef, pathtree.merge(params, frozen))
        with mesh.use_mesh(setup.mesh):
            sums = losses.batch_sums(model, batch, cfg.loss_chunk)
        return losses.combine(sums, cfg.loss, weights), sums

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(params, frozen, batch, weights):
        if cfg.grad_accum_steps == 1:
            return gradient(params, frozen, batch, weights)
        micro = micro_batches(batch, setup.config.data.batch_size // setup.config.data.samples_per_image, cfg.grad_accum_steps)
        micro = jax.lax.with_sharding_constraint(micro, sharding.micro_batch_sharding(setup.mesh))

        def body(carry, part):
            return jax.tree.map(jnp.add, carry, gradient(params, frozen, part, weights)), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, frozen, first, weights))
        return jax.lax.scan(body, zeros, micro)[0]

    def step(state, frozen, batch):
        weights = losses.normalizers(batch)
        if lora.rank and lora.dropout:
            batch = batch | {"dropout_keys": sample_keys(cfg.seed, state["step"], batch["input_ids"].shape[0])}
        (loss, sums), grads = accumulated(state["params"], frozen, batch, weights)
        norm = optax.global_norm(grads)
        updates, opt = setup.optimizer.update(grads, state["opt"], state["params"])
        moved = {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, state)
        metrics = {
            "loss": loss,
            "ce": sums["ce"] / weights["tokens"],
            **{name: sums[name] / weights["segs"] for name in ("bce", "dice", "iou", "true_iou")},
            "attention_map": sums["attention_map"] / weights["attention_maps"],
            "token_accuracy": sums["right"] / weights["tokens"],
            "grad_norm": norm,
            "learning_rate": rate(state["step"]),
            "tokens": weights["tokens"],
            "input_tokens": batch["token_mask"].sum().astype(jnp.float32),
            "finite": finite.astype(jnp.float32),
        }
        return new, metrics

    everywhere = sharding.replicated(setup.mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(setup.state_shardings, setup.frozen_shardings, sharding.batch_sharding(setup.mesh)),
        out_shardings=(setup.state_shardings, everywhere),
        compiler_options=COMPILER_OPTIONS.get(setup.mesh.devices.flat[0].platform),
    )


def lower_step(config: Config, mesh: Mesh, batch: dict[str, jax.ShapeDtypeStruct]) -> LoweredStep:
    """Lower the step of a config on a mesh, whose devices may be described only, for `analysis.aot.compile_step`."""
    setup = TrainSetup(config, mesh)
    return LoweredStep(make_step(setup).lower(setup.state, setup.frozen, batch), setup.state, setup.base_reason)


def micro_batches(batch: dict[str, jax.Array], images: int, parts: int) -> dict[str, jax.Array]:
    """Split a batch of `images` images, whose arrays have one row or K rows per image, into [parts, rows / parts, ...]: part i gets the
    images i, i + parts, … with their samples, so that each device splits its own rows and nothing is communicated."""

    def cut(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // images
        x = x.reshape(images // parts, parts, rows, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, images // parts * rows, *x.shape[3:])

    return jax.tree.map(cut, batch)
