"""The metrics of a run while it trains: one row every `log_every` steps.

A row holds the means of the step's own metrics over the finite steps, and these:

    step_seconds, samples_per_second, tokens_per_second (without padding), data_wait (fraction of the time)
    tflops_per_device, mfu (fraction of the bf16 peak, if `hardware` knows it): the FLOPs that the model needs (`flops`), not those that
        the compiled program executes, for sequences with their padding
    mfu_without_padding: the same for sequences of the mean length without padding
    hbm_gib, hbm_peak_gib: memory of the fullest device; on a CPU, rss_gib and rss_peak_gib of this process
    eta_seconds, goodput (fraction of the time since the first start that was spent training)
    skipped: number of steps whose loss or gradient was not finite
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
from mimo_jax.train.goodput import Goodput, format_duration
from mimo_jax.train.hooks import StepInfo
from mimo_jax.train.writers import MetricWriters

_PROGRESS_FORMATS = {"loss": "loss {:.3f}", "samples_per_second": "{:.1f} samples/s", "mfu": "MFU {:.1%}", "data_wait": "data wait {:.1%}"}


class Metrics:
    """The hook that writes metrics. They are fetched only every `log_every` steps, so that the device never waits for the host."""

    def __init__(self, config: Config, goodput: Goodput, writers: MetricWriters):
        self.config, self.goodput, self.writers = config, goodput, writers
        self.every, self.total = config.train.log_every, config.train.steps
        self.devices, self.hardware = jax.device_count(), hardware.find_hardware(jax.devices()[0].device_kind)
        self.pending: list[dict[str, jax.Array]] = []
        self.flops, self.flops_by_length = 0.0, {}  # total since the last row; FLOPs of one sample by its length
        self.bar = tqdm(total=self.total, initial=goodput.step, desc="train", unit="step", dynamic_ncols=True, smoothing=0.05, disable=None)

    def __call__(self, info: StepInfo) -> None:
        self.goodput.record_step(info.step, info.length, info.wait, info.dispatch)
        self.pending.append(info.metrics)
        self.flops += self._flops(info.length) * info.samples
        self.bar.update(1)
        if info.step % self.every == 0 or info.last:
            self._report(info.step, info.samples)
        self.latest = info

    def _flops(self, length: int) -> float:
        """FLOPs of a step per sample of `length` tokens."""
        if length not in self.flops_by_length:
            self.flops_by_length[length] = sum(flops.step(self.config, length).values())
        return self.flops_by_length[length]

    def _report(self, step: int, samples: int) -> None:
        row = finite_means(jax.device_get(self.pending))
        interval = self.goodput.interval()
        seconds = max(interval.seconds + interval.wait, 1e-9)
        step_seconds = seconds / interval.steps
        row |= {"step_seconds": step_seconds, "samples_per_second": samples / step_seconds, "data_wait": interval.wait / seconds}
        if row["input_tokens"] is not None:
            row["tokens_per_second"] = row["input_tokens"] / step_seconds
        flops_per_device = self.flops / seconds / self.devices
        row["tflops_per_device"] = flops_per_device / 1e12
        if self.hardware:
            row["mfu"] = flops_per_device / self.hardware.flops
            if row["input_tokens"] is not None:
                real = self._flops(round(row["input_tokens"] / samples)) * samples
                row["mfu_without_padding"] = real / step_seconds / self.devices / self.hardware.flops
        row |= memory() | {"eta_seconds": (self.total - step) * step_seconds, "goodput": self.goodput.account.goodput()}
        self.pending, self.flops = [], 0.0
        self.writers.write_scalars(step, row)
        shown = ", ".join(form.format(row[name]) for name, form in _PROGRESS_FORMATS.items() if row.get(name) is not None)
        self.bar.set_postfix_str(shown)
        if self.bar.disable:  # stderr is not a terminal but a log file
            print(f"step {step}/{self.total}: {shown}, {format_duration(row['eta_seconds'])} left", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()

    def flush(self) -> None:
        """Write the row of the steps since the last one, if there are any: the run stops here."""
        if self.pending:
            self._report(self.latest.step, self.latest.samples)


def finite_means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Name -> mean over the finite steps, None if there are none; the learning rate is that of the last step."""
    finite = [row for row in rows if row["finite"] == 1.0]
    averages = {name: float(np.mean([row[name] for row in finite])) if finite else None for name in rows[0] if name != "finite"}
    return averages | {"learning_rate": float(rows[-1]["learning_rate"]), "skipped": len(rows) - len(finite)}


def memory() -> dict[str, float]:
    """Current and peak memory in GiB of the fullest device of this process, or on a CPU of the process itself."""
    stats = [device_stats for device in jax.local_devices() if (device_stats := device.memory_stats())]
    if stats:
        used, peak = (max(device_stats[name] for device_stats in stats) for name in ("bytes_in_use", "peak_bytes_in_use"))
        return {"hbm_gib": used / hardware.GIB, "hbm_peak_gib": peak / hardware.GIB}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    usage = {"rss_peak_gib": peak / hardware.GIB}
    pages = Path("/proc/self/statm")
    if pages.exists():
        usage["rss_gib"] = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / hardware.GIB
    return usage
