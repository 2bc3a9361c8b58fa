"""What happens around the steps: each hook owns its interval and sees every tick of the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.train.goodput import Goodput


@dataclass
class StepInfo:
    """After one step. `state` lives until the next step donates it."""

    step: int  # steps done
    state: dict[str, Any]
    metrics: dict[str, jax.Array]  # of this step, on the device
    samples: int  # in this step's global batch
    last: bool  # nothing follows: the end, or a stop
    position: Callable[[], dict]  # the loader's position, JSON-able
    length: int = 0  # T, tokens to which its sequences are padded
    wait: float = 0.0  # seconds spent waiting for data
    dispatch: float = 0.0  # seconds until the step was handed to the device; the first of a length is compiled in them


@dataclass
class Save:
    """A checkpoint every `every` steps and at the end."""

    checkpoints: Checkpoints
    every: int
    goodput: Goodput

    def __call__(self, tick: StepInfo) -> None:
        if tick.step % self.every == 0 or tick.last:
            with self.goodput.during("save"):
                self.checkpoints.save(tick.step, tick.state, tick.position())

    def close(self) -> None:
        with self.goodput.during("save"):
            self.checkpoints.wait()


@dataclass
class Periodic:
    """Calls `run(tick)` every `every` steps (0: never)."""

    every: int
    run: Callable[[StepInfo], None]

    def __call__(self, tick: StepInfo) -> None:
        if self.every and tick.step % self.every == 0 and not tick.last:
            self.run(tick)

    def close(self) -> None:
        pass
