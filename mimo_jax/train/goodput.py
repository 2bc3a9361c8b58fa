"""Where the time of a run went, over all its starts: RUN/goodput.jsonl, one event a line, and the share of it that trained.

    start     it goes on at `step`; the line's time is that at which the process began to
    restore   `seconds` until parameters were back
    ready     the first step is compiled and under way
    step      steps `first` + 1 … `step`: `seconds` that trained, and those that waited for data (`wait`) or compiled (`compile`)
    save, evaluate   `seconds` in which no step could run
    stop      `reason`: done, stopped, or the error that ended it

`time` is in seconds since 1970, by the clock of process 0, which alone writes. A kill leaves no stop: all from the last line to the next
start is then downtime.
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
_LOST = {"restore": "restoring", "compile": "compiling", "wait": "data wait", "save": "saving", "evaluate": "evaluating"}


class Interval(NamedTuple):
    """Steps since the interval before. seconds: those that trained; wait: those that waited for data."""

    steps: int
    seconds: float
    wait: float


class Account:
    """Seconds by what they were spent on, from the events in their order."""

    def __init__(self):
        self.began = self.last = 0.0
        self.done = False
        self.lost: Counter[str] = Counter()
        self.trained: list[tuple[int, int, float]] = []  # after this step, up to this one, seconds

    def add(self, event: dict) -> None:
        if event["event"] == "start":
            self.began = self.began or event["time"]
            down = max(0.0, event["time"] - (self.last or event["time"]))
            if self.done:  # and was asked for more later
                self.began += down
            else:
                self.lost["downtime"] += down
            self._repeat_after(event["step"])
        elif event["event"] == "step":
            self.trained.append((event["first"], event["step"], event["seconds"]))
            self.lost.update({_LOST[name]: event[name] for name in ("wait", "compile")})
        elif event["event"] in _LOST:
            self.lost[_LOST[event["event"]]] += event["seconds"]
        self.done = event.get("reason") == "done"
        self.last = event["time"]

    def _repeat_after(self, step: int) -> None:
        """Steps beyond `step` were not saved, so they are done again."""
        kept = []
        for first, last, seconds in self.trained:
            share = min(1.0, max(0.0, (step - first) / (last - first)))
            self.lost["repeated steps"] += (1 - share) * seconds
            if share:
                kept.append((first, min(last, step), share * seconds))
        self.trained = kept

    def seconds(self) -> float:
        """Since the first start."""
        return self.last - self.began

    def goodput(self) -> float:
        """Share of that time which trained."""
        return sum(seconds for *_, seconds in self.trained) / max(self.seconds(), 1e-9)

    def losses(self) -> dict[str, float]:
        """Share of that time by what else took it, largest first; what nothing else accounts for went into starting up."""
        total = max(self.seconds(), 1e-9)
        shares = {name: seconds / total for name, seconds in self.lost.items()}
        shares["starting up"] = max(0.0, 1 - self.goodput() - sum(shares.values()))
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


class Goodput:
    """The events of a run from this start on, written as they come, while it holds."""

    def __init__(self, workdir: Path, began: float, step: int, total: int, restored: float = 0.0):
        """began: `time.time()` when the process started on this run, which goes on at `step` and ends at `total`; restored: seconds that
        it took to get back there."""
        path = workdir / FILE
        self.account = Account()
        for event in read(path):
            self.account.add(event)
        self.file = None
        if jax.process_index() == 0:
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            self.file = open(path, "a", buffering=1)
            if torn:  # by a kill in mid-write: what follows is not to join it
                self.file.write("\n")
        self.step = self.first = step
        self.total = total
        self.since = self.wait = self.compile = self.aside = 0.0
        self.lengths: set[int] = set()
        self._record("start", at=began, step=step)
        if restored:
            self._record("restore", step=step, seconds=restored)

    def tick(self, step: int, length: int, wait: float, dispatch: float) -> None:
        """After each step: how long it waited for data, and how long it took to hand it to the device. The first step of a sequence
        length is compiled then."""
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
        """Around a "save" or an "evaluate"."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.aside += seconds
        self._record(what, step=self.step, seconds=seconds)

    def interval(self) -> Interval:
        """The steps since the last call. The device must have finished them."""
        now = time.perf_counter()
        made = Interval(self.step - self.first, max(0.0, now - self.since - self.aside - self.wait - self.compile), self.wait)
        self._record("step", first=self.first, step=self.step, seconds=made.seconds, wait=self.wait, compile=self.compile)
        self.first, self.since = self.step, now
        self.wait = self.compile = self.aside = 0.0
        return made

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_) -> None:
        if self.step > self.first:
            self.interval()
        reason = failed.__name__ if failed else "stopped" if self.step < self.total else "done"
        self._record("stop", step=self.step, reason=reason)
        if self.file:
            self.file.close()

    def summary(self) -> str:
        """One line: the share of time that trained, and what took the rest."""
        lost = ", ".join(f"{name} {share:.1%}" for name, share in self.account.losses().items() if share >= 0.0005)
        return f"goodput {self.account.goodput():.1%} of {duration(self.account.seconds())}" + (f"; {lost}" if lost else "")

    def _record(self, event: str, at: float | None = None, **fields) -> None:
        line = {"time": round(time.time() if at is None else at, 3), "event": event}
        line |= {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
        self.account.add(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict]:
    """The events of a file; a line that a kill cut short is passed over."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


def duration(seconds: float) -> str:
    """ "8.2 s", "12 min 04 s", "3 h 20 min", "2 d 4 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
