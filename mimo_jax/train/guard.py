"""Skips steps whose loss or gradient is not finite, stops the run after too many of them, and records outlier losses."""

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

_DELAY = 2  # a step is checked this many steps later, so that the device never waits for the host
_WINDOW, _MIN_LOSSES = 200, 30  # maximum and minimum number of losses for the running mean and deviation


class NotFinite(UserError):
    """The loss or its gradient stopped being a number."""


class NonFiniteGuard:
    """Counts non-finite steps. Such a step leaves the state unchanged, but its batch is not repeated. Up to `train.max_skipped` in a row
    are reported and skipped; one more raises NotFinite, which names the newest checkpoint.

    A loss more than `train.spike_threshold` standard deviations above the mean of the last 200 is an outlier: it is written to
    RUN/spikes.jsonl with its step, mean, deviation and the ids of the batch's records. records: maps a batch number to these ids."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints, records: Callable[[int], list[str]]):
        self.config, self.checkpoints, self.records = config, checkpoints, records
        self.path: Path = checkpoints.workdir / "spikes.jsonl"
        self.pending: deque[StepInfo] = deque()
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        self.skipped = 0  # non-finite steps in a row

    def __call__(self, info: StepInfo) -> None:
        for name in ("loss", "finite"):
            info.metrics[name].copy_to_host_async()
        self.pending.append(info)
        while self.pending and (info.last or len(self.pending) > _DELAY):
            self._check(self.pending.popleft())

    def _check(self, info: StepInfo) -> None:
        loss, finite = float(info.metrics["loss"]), float(info.metrics["finite"]) == 1.0
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            self._check_spike(info, loss)
        elif self.skipped <= self.config.max_skipped:
            allowed = f"{self.skipped} in a row, config.train.max_skipped allows {self.config.max_skipped}"
            print(f"step {info.step}: loss or gradient is not finite; skipped ({allowed})", file=sys.stderr)
        else:
            self.checkpoints.wait()
            good = self.checkpoints.latest()
            where = f"the last good checkpoint is step {good} in {self.checkpoints.workdir}"
            raise NotFinite(
                f"loss or gradient not finite at step {info.step}, as in the {self.skipped - 1} before it; "
                f"{where if good is not None else 'no checkpoint was written yet'}; lower config.train.learning_rate and run again"
            )

    def _check_spike(self, info: StepInfo, loss: float) -> None:
        if self.config.spike_threshold and len(self.losses) >= _MIN_LOSSES:
            mean, deviation = float(np.mean(self.losses)), float(np.std(self.losses))
            if loss > mean + self.config.spike_threshold * deviation and jax.process_index() == 0:
                batch = info.position()["batch"] - 1  # the position is that of the next batch
                row = {"step": info.step, "loss": loss, "mean": mean, "deviation": deviation, "records": self.records(batch)}
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
        self.losses.append(loss)

    def close(self) -> None:
        pass
