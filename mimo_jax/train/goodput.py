"""Goodput: the fraction of a run's time, over all its starts, that was spent training. RUN/goodput.jsonl holds one event per line:

    start     the run starts or resumes at `step`; `time` is when the process started
    restore   restoring the state took `seconds`
    ready     the first step is compiled and dispatched
    step      steps `first` + 1 … `step`: `seconds` spent training, waiting for data (`wait`) and compiling (`compile`)
    save, evaluate   `seconds` during which no step could run
    stop      `reason`: done, stopped, or the error that ended the run

`time` is in seconds since 1970, by the clock of process 0, which alone writes. A killed process writes no stop: the time from its last
line to the next start then counts as downtime.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

FILE = "goodput.jsonl"
_LOSS_NAMES = {"restore": "restoring", "compile": "compiling", "wait": "data wait", "save": "saving", "evaluate": "evaluating"}


class Interval(NamedTuple):
    """The steps since the last interval. seconds: time spent training; wait: time spent waiting for data."""

    steps: int
    seconds: float
    wait: float


class Account:
    """Accumulates how many seconds were spent on what, from the events in order."""

    def __init__(self):
        self.began = self.last = 0.0
        self.done = False
        self.lost: Counter[str] = Counter()
        self.trained: list[tuple[int, int, float]] = []  # (first, last, seconds) of the steps first + 1 … last

    def add(self, event: dict) -> None:
        if event["event"] == "start":
            self.began = self.began or event["time"]
            down = max(0.0, event["time"] - (self.last or event["time"]))
            if self.done:  # a finished run was given more steps later; the pause is not downtime
                self.began += down
            else:
                self.lost["downtime"] += down
            self._repeat_after(event["step"])
        elif event["event"] == "step":
            self.trained.append((event["first"], event["step"], event["seconds"]))
            self.lost.update({_LOSS_NAMES[name]: event[name] for name in ("wait", "compile")})
        elif event["event"] in _LOSS_NAMES:
            self.lost[_LOSS_NAMES[event["event"]]] += event["seconds"]
        self.done = event.get("reason") == "done"
        self.last = event["time"]

    def _repeat_after(self, step: int) -> None:
        """Count the time of the steps after `step` as lost: they were not saved and are repeated."""
        kept = []
        for first, last, seconds in self.trained:
            fraction = min(1.0, max(0.0, (step - first) / (last - first)))
            self.lost["repeated steps"] += (1 - fraction) * seconds
            if fraction:
                kept.append((first, min(last, step), fraction * seconds))
        self.trained = kept

    def seconds(self) -> float:
        """Seconds since the first start."""
        return self.last - self.began

    def goodput(self) -> float:
        """Fraction of that time that was spent training."""
        return sum(seconds for *_, seconds in self.trained) / max(self.seconds(), 1e-9)

    def losses(self) -> dict[str, float]:
        """Fractions of that time that were lost, by cause, largest first; time without another cause counts as starting up."""
        total = max(self.seconds(), 1e-9)
        fractions = {name: seconds / total for name, seconds in self.lost.items()}
        fractions["starting up"] = max(0.0, 1 - self.goodput() - sum(fractions.values()))
        return dict(sorted(fractions.items(), key=lambda item: -item[1]))


class Goodput:
    """Records the events of this start of a run, as a context manager."""

    def __init__(self, workdir: Path, began: float, step: int, total: int, restored: float = 0.0):
        """began: `time.time()` when the process started; step, total: the steps at which the run resumes and ends; restored: seconds that
        restoring the state took."""
        path = workdir / FILE
        self.account = Account()
        for event in read_events(path):
            self.account.add(event)
        self.file = None
        if jax.process_index() == 0:
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            self.file = open(path, "a", buffering=1)
            if torn:  # the process was killed while writing a line; the next event must start on a new one
                self.file.write("\n")
        self.step = self.first = step
        self.total, self.stopped = total, False  # stopped: the run was asked to stop
        self.since = self.wait = self.compile = self.paused = 0.0
        self.lengths: set[int] = set()
        self._record("start", at=began, step=step)
        if restored:
            self._record("restore", step=step, seconds=restored)

    def record_step(self, step: int, length: int, wait: float, dispatch: float) -> None:
        """Call after each step with the seconds spent waiting for data and dispatching the step. The dispatch of the first step of a
        sequence length includes compilation."""
        if not self.lengths:
            self.since = time.perf_counter() - wait - dispatch
            self._record("ready", step=step)
        if length not in self.lengths:
            self.lengths.add(length)
            self.compile += dispatch
        self.step = step
        self.wait += wait

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Time the block as a "save" or "evaluate" event."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.paused += seconds
        self._record(what, step=self.step, seconds=seconds)

    def interval(self) -> Interval:
        """The steps since the last call; the device must have finished them."""
        now = time.perf_counter()
        interval = Interval(self.step - self.first, max(0.0, now - self.since - self.paused - self.wait - self.compile), self.wait)
        self._record("step", first=self.first, step=self.step, seconds=interval.seconds, wait=self.wait, compile=self.compile)
        self.first, self.since = self.step, now
        self.wait = self.compile = self.paused = 0.0
        return interval

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_) -> None:
        if self.step > self.first:
            self.interval()
        reason = failed.__name__ if failed else "stopped" if self.stopped or self.step < self.total else "done"
        self._record("stop", step=self.step, reason=reason)
        if self.file:
            self.file.close()

    def summary(self) -> str:
        """One line: the fraction of time spent training, and what took the rest."""
        lost = ", ".join(f"{name} {fraction:.1%}" for name, fraction in self.account.losses().items() if fraction >= 0.0005)
        return f"goodput {self.account.goodput():.1%} of {format_duration(self.account.seconds())}" + (f"; {lost}" if lost else "")

    def _record(self, event: str, at: float | None = None, **fields) -> None:
        line = {"time": round(time.time() if at is None else at, 3), "event": event}
        line |= {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
        self.account.add(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")


def read_events(path: Path) -> list[dict]:
    """The events of a file; an incomplete line, left by a killed process, is skipped."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


def format_duration(seconds: float) -> str:
    """Format as "8.2 s", "12 min 04 s", "3 h 20 min" or "2 d 4 h"."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    if rounded < 86400:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{rounded // 86400} d {rounded % 86400 // 3600} h"
