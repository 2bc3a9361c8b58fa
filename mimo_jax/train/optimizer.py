"""The optimizer, and the table of what trains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mimo_jax import pathtree
from mimo_jax.config import Config, ConfigError, TrainConfig


def multipliers(config: Config, params: dict) -> dict[str, float | None]:
    """{parameter path: learning-rate multiplier, None where frozen}, by the first row of `config.trainables` that matches.

    ConfigError if a parameter is matched by no row, or if nothing trains."""
    table = config.trainables
    try:
        made = {path: pathtree.first_match(path, table, "config.trainables") for path in pathtree.flatten(params)}
    except KeyError as error:
        raise ConfigError(error.args[0]) from None
    if all(value is None for value in made.values()):
        raise ConfigError("config.trainables: freezes every parameter; give at least one row a multiplier")
    return made


def schedule(cfg: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then linear decay to `final_learning_rate` at the last step."""
    warmup = min(cfg.warmup_steps, cfg.steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, cfg.learning_rate, max(warmup, 1)),
            optax.linear_schedule(cfg.learning_rate, cfg.final_learning_rate, max(cfg.steps - warmup, 1)),
        ],
        [warmup],
    )


def make_optimizer(cfg: TrainConfig, table: dict[str, float | None]) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay of matrices, schedule, and each path's multiplier."""

    def scale_by_path(updates, _params=None):
        flat = pathtree.flatten(updates)
        return pathtree.unflatten({path: u * table[path] for path, u in flat.items()})

    def matrices(params):
        return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2),
        optax.add_decayed_weights(cfg.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(cfg)),
        optax.stateless(scale_by_path),
    )
