"""Signals that ask for a stop."""

import os
import signal
import threading

import pytest

from mimo_jax.preemption import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_kept_a_second_ctrl_c_interrupts_and_all_is_as_before_in_the_end(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    assert before == {n: signal.getsignal(n) for n in before}


def test_other_threads_leave_signals_alone():
    before, made = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: made.append(StopSignal()))
    thread.start()
    thread.join()
    assert not made[0].received and signal.getsignal(signal.SIGTERM) == before
