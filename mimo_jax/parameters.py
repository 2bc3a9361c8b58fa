"""Which parameters train, and the dtype of every parameter: for training, restoring, import and export alike."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from mimo_jax import pathtree
from mimo_jax.config import Config, ConfigError

# Frozen, but never rounded: a bf16 positional encoding is off by up to 0.13.
ALWAYS_FP32 = r"^sam_prompt/gaussian$"


def multipliers(config: Config, params: dict) -> dict[str, float | None]:
    """{parameter path: learning-rate multiplier, None if frozen}, from the first row of `config.trainables` that matches, and from
    `config.freeze`.

    Raises ConfigError if no row matches a parameter, or if nothing trains."""
    table = config.trainables
    try:
        made = {path: pathtree.first_match(path, table, "config.trainables") for path in pathtree.flatten(params)}
    except KeyError as error:
        raise ConfigError(error.args[0]) from None
    if config.freeze:
        made = {path: None if re.search(config.freeze, path) else value for path, value in made.items()}
    if all(value is None for value in made.values()):
        name, remedy = ("freeze", "match less") if config.freeze else ("trainables", "give at least one row a multiplier")
        raise ConfigError(f"config.{name}: freezes every parameter; {remedy}")
    return made


def with_dtypes(config: Config, shapes: dict) -> dict:
    """Nested dict of shapes -> nested dict of ShapeDtypeStructs: float32 for trained parameters, `config.model.frozen_dtype` for others."""
    table, frozen = multipliers(config, shapes), jnp.dtype(config.model.frozen_dtype)

    def dtype(path: str):
        return jnp.float32 if table[path] is not None or re.search(ALWAYS_FP32, path) else frozen

    return pathtree.unflatten({path: jax.ShapeDtypeStruct(leaf.shape, dtype(path)) for path, leaf in pathtree.flatten(shapes).items()})
