"""The runs of a sweep on this machine: `mimo train`, then `mimo eval`, each in its own process.

Finished runs are skipped, stopped runs resume, and a run that fails does not stop the others.
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
from mimo_jax.sweep.plan import SweepRun

JOB_FILE = "job.json"  # exists in a run's directory while a cluster job works on the run
_POLL_SECONDS = 0.2  # between two polls of the active workers


class RunWorker(Protocol):
    """Does the remaining work of one run. reason: why the run failed, empty if it has not failed."""

    run: SweepRun
    reason: str

    def poll(self, stopping: bool) -> bool:
        """Start the next command if none is running, unless `stopping`; returns whether the worker is still active."""
        ...

    def stop(self) -> None:
        """Ask the running command to save and exit."""
        ...


class LocalWorker:
    """Runs the commands on this machine. The child processes inherit the lock on the run's directory, so that a child that outlives a
    killed sweep prevents the next sweep from starting a second one."""

    def __init__(self, run: SweepRun, backend: str = "local"):
        self.run, self.reason = run, ""
        self.remaining = run.remaining()
        self.child: subprocess.Popen | None = None
        run.folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(run.folder / files.LOCK)
        job = files.read_json(run.folder / JOB_FILE)
        if self.lock is None:
            self._fail("another process is working on it; wait for that process, or end it")
        elif job and job["backend"] != backend:
            self._fail(f"job {job['id']} was submitted for it; sweep with --backend {job['backend']}, or end that and remove {JOB_FILE}")

    def poll(self, stopping: bool) -> bool:
        if self.child is not None:
            code = self.child.poll()
            if code is None:
                return True
            self.child = None
            done = self.remaining.pop(0)
            if code and not stopping:
                self._fail(f"mimo {done[0]} ended with exit code {code}; see {self._log(done)}")
        if self.remaining and not stopping:
            words = self.remaining[0]
            with open(self._log(words), "a") as log:
                print(f"$ mimo {shlex.join(words)}", file=log, flush=True)
                environment = os.environ | {"MIMO_PROCESSES": "1"}  # a run is a single process even if the sweep is a cluster task
                self.child = subprocess.Popen(
                    [sys.executable, "-m", "mimo_jax.cli", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
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
        self.remaining, self.reason = [], reason


def _lock(path: Path) -> IO | None:
    """The locked file, None if another process holds the lock."""
    try:
        return files.locked(path, blocking=False)
    except BlockingIOError:
        return None


def run_all(runs: Sequence[SweepRun], start: Callable[[SweepRun], RunWorker], jobs: int) -> tuple[dict[str, str], bool]:
    """Finish all runs, `jobs` at a time; returns ({name of a failed run: reason}, whether the sweep was stopped on request)."""
    waiting = [run for run in runs if run.remaining()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already", flush=True)
    active: list[RunWorker] = []
    failed: dict[str, str] = {}
    stop_sent = False
    with StopSignal() as stop, ExitStack() as stack:  # no child is left behind, whatever ends the sweep
        stack.callback(lambda: [worker.stop() for worker in active])
        while active or (waiting and not stop.received):
            while waiting and len(active) < jobs and not stop.received:
                active.append(start(waiting.pop(0)))
                _print_status(active[-1].run, f"started, {len(waiting)} waiting")
            if stop.received and not stop_sent:
                stop_sent = True
                for worker in active:
                    worker.stop()
            for worker in [worker for worker in active if not worker.poll(stop.received)]:
                active.remove(worker)
                if worker.reason:
                    failed[worker.run.name] = worker.reason
                _print_status(worker.run, f"failed: {worker.reason}" if worker.reason else "stopped" if worker.run.remaining() else "done")
            time.sleep(_POLL_SECONDS)
    return failed, stop.received


def _print_status(run: SweepRun, status: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {run.name}: {status}", flush=True)
