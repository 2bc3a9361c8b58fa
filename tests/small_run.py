"""Runs of a few numbers, for tests of what is written and read: a base, a state, steps, and a bit that a bad disk flips."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mimo_jax.checkpoints import checkpoint
from mimo_jax.checkpoints.checkpoint import Checkpoints
from tests.tiny_config import tiny_config

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def frozen_tree(seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "vision": {"kernel": jax.random.normal(keys[0], (8, 4), jnp.bfloat16), "scale": jnp.float32(seed)},
        "llm": {"layers": {"kernel": jax.random.normal(keys[1], (2, 4, 4))}},
    }


def train_state(step: int) -> dict:
    params = {"aligner": {"kernel": jax.random.normal(jax.random.key(step), (16, 8)), "bias": jnp.full((8,), float(step))}}
    return {"params": params, "opt": OPTIMIZER.init(params), "step": jnp.int32(step), "rng": jax.random.key_data(jax.random.key(step))}


def abstract() -> dict:
    return jax.eval_shape(lambda: train_state(0))


def begin(workdir: Path, frozen: dict | None = None, steps: tuple[int, ...] = (), **kwargs) -> Checkpoints:
    """A run with these steps saved."""
    config = tiny_config()
    checkpoint.open_run(workdir, config)
    (workdir / "tokenizer.json").write_text("{}")
    checkpoint.start_run(workdir, config, frozen_tree() if frozen is None else frozen)
    checkpoints = Checkpoints(workdir, **kwargs)
    for step in steps:
        checkpoints.save(step, train_state(step), {"position": step})
    checkpoints.wait()
    return checkpoints


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def flip_bit(folder: Path) -> Path:
    """Change one bit in the largest file below `folder`, as a bad disk would."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    return file
