"""What happens around the steps: each hook owns its interval and sees every tick of the loop."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mimo_jax.checkpoint import Checkpoints
from mimo_jax.errors import UserError


class NotFinite(UserError):
    """The loss or its gradient stopped being a number."""


@dataclass
class Tick:
    """After one step. `state` lives until the next step donates it."""

    step: int  # steps done
    state: dict[str, Any]
    metrics: dict[str, jax.Array]  # of this step, on the device
    samples: int  # in this step's global batch
    last: bool  # nothing follows: the end, or a stop
    position: Callable[[], dict]  # the loader's position, JSON-able
    wait: float = 0.0  # seconds spent waiting for data


def _summary_writer(folder: Path):
    """tensorboardX's writer. It imports torch wherever torch is installed, seconds and hundreds of megabytes for a tensor type that we
    never hand it; so torch is hidden from it."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder))


class Metrics:
    """Means of the metrics to `metrics.jsonl` and TensorBoard, and a progress bar with the time left.

    Steps are fetched from the device only every `every` steps, so that the device never waits for the host. A step that
    was not finite raises NotFinite with the newest good checkpoint's name."""

    def __init__(self, workdir: Path, every: int, first: int, total: int, checkpoints: Checkpoints):
        self.every, self.total, self.checkpoints = every, total, checkpoints
        self.file = open(workdir / "metrics.jsonl", "a", buffering=1)
        self.board = _summary_writer(workdir / "tensorboard")
        self.bar = tqdm(total=total, initial=first, desc="train", unit="step", dynamic_ncols=True, smoothing=0.05)
        self.pending: list[dict[str, jax.Array]] = []
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()

    def __call__(self, tick: Tick) -> None:
        self.pending.append(tick.metrics)
        self.samples += tick.samples
        self.waited += tick.wait
        self.bar.update(1)
        if tick.step % self.every and not tick.last:
            return
        rows = jax.device_get(self.pending)
        seconds = time.perf_counter() - self.since
        row = {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
        finite = row.pop("finite") == 1.0
        row["learning_rate"] = float(rows[-1]["learning_rate"])
        row |= {"samples_per_second": self.samples / seconds, "step_seconds": seconds / len(rows), "data_wait": self.waited / seconds}
        self.file.write(json.dumps({"step": tick.step, **row}) + "\n")
        for name, value in row.items():
            self.board.add_scalar(name, value, tick.step)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f} ce {row['ce']:.3f} iou {row['true_iou']:.2f}")
        self.pending, self.samples, self.waited, self.since = [], 0, 0.0, time.perf_counter()
        if not finite:
            good = self.checkpoints.latest()
            where = (
                f"the last good checkpoint is step {good} in {self.checkpoints.workdir}"
                if good is not None
                else "no checkpoint was written yet"
            )
            raise NotFinite(
                f"loss or gradient not finite at or before step {tick.step}; {where}; lower config.train.learning_rate and run again"
            )

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()


@dataclass
class Save:
    """A checkpoint every `every` steps and at the end. It runs after `Metrics` has seen that the step was finite."""

    checkpoints: Checkpoints
    every: int
    metrics: Metrics
    saved: int = field(default=-1)

    def __call__(self, tick: Tick) -> None:
        if (tick.step % self.every and not tick.last) or self.saved == tick.step:
            return
        if self.metrics.pending:  # never save what has not been seen to be finite
            finite = min(float(m["finite"]) for m in jax.device_get(self.metrics.pending))
            if finite < 1.0:
                return
        self.checkpoints.save(tick.step, tick.state, tick.position())
        self.saved = tick.step

    def close(self) -> None:
        self.checkpoints.wait()


@dataclass
class Every:
    """Calls `run(tick)` every `every` steps (0: never)."""

    every: int
    run: Callable[[Tick], None]

    def __call__(self, tick: Tick) -> None:
        if self.every and tick.step % self.every == 0 and not tick.last:
            self.run(tick)

    def close(self) -> None:
        pass
