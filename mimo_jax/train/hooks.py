"""Hooks of the training loop: each is called after every step and decides for itself how often it acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.train.goodput import Goodput


@dataclass
class StepInfo:
    """The outcome of one step. `state` is valid until the next step donates it."""

    step: int  # number of steps done
    state: dict[str, Any]
    metrics: dict[str, jax.Array]  # metrics of this step, on the device
    samples: int  # number of samples in the global batch
    last: bool  # no step follows: the run ends or was stopped
    position: Callable[[], dict]  # returns the loader's position, JSON-serializable
    length: int = 0  # T, the number of tokens that the sequences are padded to
    wait: float = 0.0  # seconds spent waiting for data
    dispatch: float = 0.0  # seconds until the step was dispatched; for the first step of a length, this includes compilation


@dataclass
class Save:
    """Saves a checkpoint every n steps, for each n of `every` (0: never), and at the end."""

    checkpoints: Checkpoints
    every: tuple[int, ...]
    goodput: Goodput

    def __call__(self, info: StepInfo) -> None:
        if info.last or any(every and info.step % every == 0 for every in self.every):
            with self.goodput.during("save"):
                self.checkpoints.save(info.step, info.state, info.position())

    def close(self) -> None:
        with self.goodput.during("save"):
            self.checkpoints.wait()
