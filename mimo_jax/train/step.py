"""One training step, under one `jax.jit`: gradients of the trained parameters alone, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mimo_jax import pathtree, sharding
from mimo_jax.models import stack
from mimo_jax.train import losses
from mimo_jax.train.optimizer import schedule
from mimo_jax.train.state import Plan


def make_step(plan: Plan) -> Callable:
    """(state donated, frozen, batch) -> (state, metrics: scalars fp32).

    A step whose loss or gradient is not finite leaves the state as it was and reports `finite` = 0.
    With `train.accumulate` micro-batches, the loss is the same as without: sums are divided once by the weight of the whole batch.
    """
    cfg = plan.config.train
    rate = schedule(cfg)

    def loss_fn(params, frozen, batch, weights):
        model = stack.bind(plan.graphdef, pathtree.merge(params, frozen))
        sums = losses.batch_sums(model, batch)
        return losses.total(sums, cfg.loss, weights), sums

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(params, frozen, batch, weights):
        if cfg.accumulate == 1:
            return gradient(params, frozen, batch, weights)
        micro = jax.tree.map(lambda x: x.reshape(cfg.accumulate, -1, *x.shape[1:]), batch)

        def body(carry, part):
            return jax.tree.map(jnp.add, carry, gradient(params, frozen, part, weights)), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, frozen, first, weights))
        return jax.lax.scan(body, zeros, micro)[0]

    def step(state, frozen, batch):
        weights = losses.weights_of(batch)
        (loss, sums), grads = accumulated(state["params"], frozen, batch, weights)
        norm = optax.global_norm(grads)
        updates, opt = plan.optimizer.update(grads, state["opt"], state["params"])
        moved = {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, state)
        metrics = {
            "loss": loss,
            "ce": sums["ce"] / weights["tokens"],
            **{name: sums[name] / weights["segs"] for name in ("bce", "dice", "iou", "true_iou")},
            "look": sums["look"] / weights["looks"],
            "token_accuracy": sums["right"] / weights["tokens"],
            "grad_norm": norm,
            "learning_rate": rate(state["step"]),
            "tokens": weights["tokens"],
            "finite": finite.astype(jnp.float32),
        }
        return new, metrics

    everywhere = sharding.replicated(plan.mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(plan.state_shardings, plan.frozen_shardings, sharding.of_batch(plan.mesh)),
        out_shardings=(plan.state_shardings, everywhere),
    )
