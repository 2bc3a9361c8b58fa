"""The figures of a run while it trains: a row every `log_every` steps.

It holds the means of the step's own metrics over those steps that were finite, and what the clock and the machine add:

    step_seconds, samples_per_second, tokens_per_second (without padding), data_wait (share of the time)
    tflops_per_device, mfu (of its peak in bf16, where `hardware` knows it): what the model needs (`flops`), not what a program does
    hbm_gib, hbm_peak_gib: of the fullest device; on a CPU rss_gib, rss_peak_gib of this process
    eta_seconds, goodput (share of the time since the first start that trained)
    skipped: steps whose loss or gradient was not finite
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mimo_jax.analysis import flops, hardware
from mimo_jax.config import Config
from mimo_jax.train.goodput import Goodput, duration
from mimo_jax.train.hooks import StepInfo
from mimo_jax.train.writers import MetricWriters

_SHOWN = {"loss": "loss {:.3f}", "samples_per_second": "{:.1f} samples/s", "mfu": "MFU {:.1%}", "data_wait": "data wait {:.1%}"}


class Metrics:
    """The hook that reports. Steps are fetched from the device only every `log_every` steps, so that it never waits for the host."""

    def __init__(self, config: Config, goodput: Goodput, reports: MetricWriters):
        self.config, self.goodput, self.reports = config, goodput, reports
        self.every, self.total = config.train.log_every, config.train.steps
        self.devices, self.hardware = jax.device_count(), hardware.of_kind(jax.devices()[0].device_kind)
        self.pending: list[dict[str, jax.Array]] = []
        self.flops, self.flops_of = 0.0, {}  # since the last row; of one sample, by its length
        self.bar = tqdm(total=self.total, initial=goodput.step, desc="train", unit="step", dynamic_ncols=True, smoothing=0.05, disable=None)

    def __call__(self, tick: StepInfo) -> None:
        self.goodput.tick(tick.step, tick.length, tick.wait, tick.dispatch)
        self.pending.append(tick.metrics)
        if tick.length not in self.flops_of:
            self.flops_of[tick.length] = sum(flops.step(self.config, tick.length).values())
        self.flops += self.flops_of[tick.length] * tick.samples
        self.bar.update(1)
        if tick.step % self.every == 0 or tick.last:
            self._report(tick.step, tick.samples)

    def _report(self, step: int, samples: int) -> None:
        row = means(jax.device_get(self.pending))
        took = self.goodput.interval()
        seconds = max(took.seconds + took.wait, 1e-9)
        each = seconds / took.steps
        row |= {"step_seconds": each, "samples_per_second": samples / each, "data_wait": took.wait / seconds}
        if row["input_tokens"] is not None:
            row["tokens_per_second"] = row["input_tokens"] / each
        speed = self.flops / seconds / self.devices
        row["tflops_per_device"] = speed / 1e12
        if self.hardware:
            row["mfu"] = speed / self.hardware.flops
        row |= memory() | {"eta_seconds": (self.total - step) * each, "goodput": self.goodput.account.goodput()}
        self.pending, self.flops = [], 0.0
        self.reports.row(step, row)
        shown = ", ".join(form.format(row[name]) for name, form in _SHOWN.items() if row.get(name) is not None)
        self.bar.set_postfix_str(shown)
        if self.bar.disable:  # no terminal: a log file
            print(f"step {step}/{self.total}: {shown}, {duration(row['eta_seconds'])} left", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of the steps that were finite, by name; the last learning rate. None where no step was."""
    finite = [row for row in rows if row["finite"] == 1.0]
    made = {name: float(np.mean([row[name] for row in finite])) if finite else None for name in rows[0] if name != "finite"}
    return made | {"learning_rate": float(rows[-1]["learning_rate"]), "skipped": len(rows) - len(finite)}


def memory() -> dict[str, float]:
    """GiB in use and at most: of the fullest device of this process, or on a CPU of the process itself."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if stats:
        used, peak = (max(found[name] for found in stats) for name in ("bytes_in_use", "peak_bytes_in_use"))
        return {"hbm_gib": used / hardware.GIB, "hbm_peak_gib": peak / hardware.GIB}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    made = {"rss_peak_gib": peak / hardware.GIB}
    pages = Path("/proc/self/statm")
    if pages.exists():
        made["rss_gib"] = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / hardware.GIB
    return made
