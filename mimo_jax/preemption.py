"""Handling of stop signals such that the current work is finished and saved first."""

from __future__ import annotations

import signal
import threading


class StopSignal:
    """A context manager within which SIGTERM and SIGINT only set `received`; a second SIGINT interrupts as usual. Only the main thread can
    handle signals; in other threads it does nothing."""

    def __init__(self):
        self.received = False
        catching = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._receive) for number in catching}

    def _receive(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_) -> None:
        self.restore()
