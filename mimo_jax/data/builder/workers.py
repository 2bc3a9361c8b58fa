"""Jobs for a pool of processes: results in the order of the jobs, a few jobs ahead, stopped between two of them."""

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

_AHEAD = 3  # jobs handed out for each worker
Job, Result = TypeVar("Job"), TypeVar("Result")


class Workers:
    """`count` processes; 1: this one alone. While it holds, SIGTERM and SIGINT let the jobs in hand be finished and no other begin."""

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
        """Results in the order of the jobs; ends early once stopped. Raises DataError where a process dies."""
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
            raise DataError(
                "a worker process died, of too little memory perhaps; run the same command again, with fewer --workers"
            ) from None
        finally:
            for future in ahead:
                future.cancel()

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._signal.restore()


class Beam(Workers):
    """Runs jobs whose results stay on the disk, and which are quick where these are there, on Apache Beam: `flags` are its
    pipeline's, by default those of the runner in this process. All machines share the file system."""

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
    """In a worker: the parent alone decides when to stop, and nothing is written after it was killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    keep_freed_memory()

    def follow() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
