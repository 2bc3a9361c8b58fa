"""What a run does about a step that went wrong: skips it or stops, and writes down a loss out of line."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.config import TrainConfig
from mimo_jax.errors import UserError
from mimo_jax.train.hooks import StepInfo

_BEHIND = 2  # steps by which it looks back, so that the device never waits to be read
_WINDOW, _LEAST = 200, 30  # losses that the running mean and deviation are of, at most and at least


class NotFinite(UserError):
    """The loss or its gradient stopped being a number."""


class NonFiniteGuard:
    """Counts steps that were not finite: the state stayed as it was, but the batch is gone. Up to `train.max_skipped` in a row are
    reported and skipped; one more raises NotFinite, with the newest checkpoint's name.

    A loss `train.spike_threshold` standard deviations above the mean of the last 200 goes to RUN/spikes.jsonl: step, loss, mean,
    deviation, and the ids of the batch's records. records: from the number of a batch to these."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints, records: Callable[[int], list[str]]):
        self.config, self.checkpoints, self.records = config, checkpoints, records
        self.path: Path = checkpoints.workdir / "spikes.jsonl"
        self.ticks: deque[StepInfo] = deque()
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        self.skipped = 0  # in a row

    def __call__(self, tick: StepInfo) -> None:
        for name in ("loss", "finite"):
            tick.metrics[name].copy_to_host_async()
        self.ticks.append(tick)
        while self.ticks and (tick.last or len(self.ticks) > _BEHIND):
            self._look(self.ticks.popleft())

    def _look(self, tick: StepInfo) -> None:
        loss, finite = float(tick.metrics["loss"]), float(tick.metrics["finite"]) == 1.0
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            self._weigh(tick, loss)
        elif self.skipped <= self.config.max_skipped:
            allowed = f"{self.skipped} in a row, config.train.max_skipped allows {self.config.max_skipped}"
            print(f"step {tick.step}: loss or gradient is not finite; skipped ({allowed})", file=sys.stderr)
        else:
            self.checkpoints.wait()
            good = self.checkpoints.latest()
            where = f"the last good checkpoint is step {good} in {self.checkpoints.workdir}"
            raise NotFinite(
                f"loss or gradient not finite at step {tick.step}, as in the {self.skipped - 1} before it; "
                f"{where if good is not None else 'no checkpoint was written yet'}; lower config.train.learning_rate and run again"
            )

    def _weigh(self, tick: StepInfo, loss: float) -> None:
        if self.config.spike_threshold and len(self.losses) >= _LEAST:
            mean, deviation = float(np.mean(self.losses)), float(np.std(self.losses))
            if loss > mean + self.config.spike_threshold * deviation and jax.process_index() == 0:
                batch = tick.position()["batch"] - 1  # the position is that of the next one
                row = {"step": tick.step, "loss": loss, "mean": mean, "deviation": deviation, "records": self.records(batch)}
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
        self.losses.append(loss)

    def close(self) -> None:
        pass
