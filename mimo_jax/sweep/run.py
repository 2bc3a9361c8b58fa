"""The runs of a sweep on this machine: `mimo train`, then `mimo eval`, as processes of their own.

What is finished is passed over, what was stopped goes on, and what fails does not stop the others.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Protocol

from mimo_jax import files
from mimo_jax.preemption import StopSignal
from mimo_jax.sweep.plan import Run

JOB = "job.json"  # in a run's directory while a cluster works on it
_GLANCE = 0.2  # seconds between two looks at what is at work


class Work(Protocol):
    """What is done for one run. reason: why it failed, empty while it has not."""

    run: Run
    reason: str

    def going(self, stopping: bool) -> bool:
        """Does what is next, where nothing is to stop; whether anything is at work."""
        ...

    def stop(self) -> None:
        """Asks what is at work to save and end."""
        ...


class Processes:
    """Work on this machine. The lock on the run's directory is the processes' too, so that one which outlives a killed sweep keeps
    the next from starting another beside it."""

    def __init__(self, run: Run, backend: str = "local"):
        self.run, self.reason = run, ""
        self.due = run.due()
        self.child: subprocess.Popen | None = None
        run.folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(run.folder / files.LOCK)
        job = files.read_json(run.folder / JOB)
        if self.lock is None:
            self._fail("another process is at work on it; wait for that one, or end it")
        elif job and job["backend"] != backend:
            self._fail(f"job {job['id']} was submitted for it; sweep with --backend {job['backend']}, or end that and remove {JOB}")

    def going(self, stopping: bool) -> bool:
        if self.child is not None:
            code = self.child.poll()
            if code is None:
                return True
            self.child = None
            done = self.due.pop(0)
            if code and not stopping:
                self._fail(f"mimo {done[0]} ended with exit code {code}; see {self._log(done)}")
        if self.due and not stopping:
            words = self.due[0]
            with open(self._log(words), "a") as log:
                print(f"$ mimo {shlex.join(words)}", file=log, flush=True)
                alone = os.environ | {"MIMO_PROCESSES": "1"}  # also where a sweep is one task of a cluster's
                self.child = subprocess.Popen(
                    [sys.executable, "-m", "mimo_jax.cli", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=alone,
                    start_new_session=True, pass_fds=[self.lock.fileno()],
                )  # fmt: skip
            return True
        if self.lock is not None:
            self.lock.close()
        return False

    def stop(self) -> None:
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)

    def _log(self, words: Sequence[str]) -> Path:
        return self.run.folder / f"{words[0]}.log"

    def _fail(self, reason: str) -> None:
        self.due, self.reason = [], reason


def _lock(path: Path) -> IO | None:
    """The locked file, None if another process has it."""
    try:
        return files.locked(path, blocking=False)
    except BlockingIOError:
        return None


def run_all(runs: Sequence[Run], begin: Callable[[Run], Work], jobs: int) -> tuple[dict[str, str], bool]:
    """Does what is due, `jobs` runs at a time; (name → why, of every run that failed; whether it was stopped on request)."""
    waiting = [run for run in runs if run.due()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already", flush=True)
    at_work: list[Work] = []
    failed: dict[str, str] = {}
    told = False
    with StopSignal() as stop, ExitStack() as leaving:  # no child stays behind, whatever ends the sweep
        leaving.callback(lambda: [work.stop() for work in at_work])
        while at_work or (waiting and not stop.received):
            while waiting and len(at_work) < jobs and not stop.received:
                at_work.append(begin(waiting.pop(0)))
                _say(at_work[-1].run, f"begins, {len(waiting)} wait")
            if stop.received and not told:
                told = True
                for work in at_work:
                    work.stop()
            for work in [work for work in at_work if not work.going(stop.received)]:
                at_work.remove(work)
                if work.reason:
                    failed[work.run.name] = work.reason
                _say(work.run, f"failed: {work.reason}" if work.reason else "stopped" if work.run.due() else "done")
            time.sleep(_GLANCE)
    return failed, stop.received


def _say(run: Run, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {run.name}: {what}", flush=True)
