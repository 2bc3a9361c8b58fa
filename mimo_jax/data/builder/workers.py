"""Runs jobs in a pool of processes: returns results in order, keeps a few jobs ahead, and can be stopped between two jobs."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Self, TypeVar

from mimo_jax.data.records import DataError
from mimo_jax.preemption import StopSignal
from mimo_jax.process import keep_freed_memory

_AHEAD = 3  # jobs submitted ahead per worker
Job, Result = TypeVar("Job"), TypeVar("Result")


class Workers:
    """A pool of `count` processes; with 1, this process does the work. While it is open, SIGTERM and SIGINT let running jobs finish and
    prevent new ones."""

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._signal = StopSignal()
        self._pool = ProcessPoolExecutor(self.count, get_context("spawn"), _begin) if self.count > 1 else None
        return self

    @property
    def stopped(self) -> bool:
        return self._signal.received

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of the jobs; ends early once stopped. Raises DataError if a process dies."""
        ahead: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                if self.stopped:
                    break
                if self._pool is None:
                    yield function(job)
                    continue
                ahead.append(self._pool.submit(function, job))
                if len(ahead) >= _AHEAD * self.count:
                    yield ahead.popleft().result()
            while ahead and not self.stopped:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process died, perhaps for lack of memory; run the same command again with fewer --workers") from None
        finally:
            for future in ahead:
                future.cancel()

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._signal.restore()


class Beam(Workers):
    """Runs jobs on Apache Beam. Their results must be files on a file system that all machines share; a job whose results exist must
    return quickly. flags: pipeline options; by default Beam's runner in this process is used."""

    def __init__(self, flags: Sequence[str]):
        super().__init__(1)
        try:
            self._beam = importlib.import_module("apache_beam")
        except ImportError:
            raise DataError('apache_beam is not installed, which --runner beam needs: pip install "mimo_jax[beam]"') from None
        self._options = importlib.import_module("apache_beam.options.pipeline_options").PipelineOptions(list(flags))

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        jobs = list(jobs)
        with self._beam.Pipeline(options=self._options) as pipeline:
            _ = pipeline | self._beam.Create(jobs) | self._beam.Reshuffle() | self._beam.Map(function)
        yield from super().map(function, jobs)


def _begin() -> None:
    """Set up a worker process: only the parent handles signals, and the worker exits as soon as the parent dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    keep_freed_memory()

    def exit_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
