"""Handling of stop signals such that the current work is finished and saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_active: list[StopSignal] = []  # innermost last


class StopSignal:
    """A context manager within which SIGTERM and SIGINT only set `received`, however often SIGTERM comes; a second SIGINT interrupts as
    usual. Within another one, `received` says whether a signal arrived since the outer one began. Only the main thread can handle
    signals; in other threads it does nothing."""

    def __init__(self):
        self.received = stop_received()
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            _active.append(self)
            self.previous = {number: signal.signal(number, _receive) for number in SIGNALS}

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def stop_received() -> bool:
    """Whether a signal has arrived since the outermost active `StopSignal` began."""
    return any(stop.received for stop in _active)


def _note(number, frame) -> None:
    for stop in _active:
        stop.received = True


def _receive(number, frame) -> None:
    _note(number, frame)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block, such as the last save of a run, a signal does nothing more than to set `received` of every `StopSignal`."""
    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, _note) for number in SIGNALS} if in_main else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT for the rest of this process, which has its exit code and is about to end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
