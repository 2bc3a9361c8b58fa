"""Signals that ask for a stop."""

import os
import signal
import threading

import pytest

from mimo_jax.preemption import SIGNALS, StopSignal, stop_received, uninterrupted


def handlers() -> dict:
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_kept_a_second_ctrl_c_interrupts_and_all_is_as_before_in_the_end(number):
    before = handlers()
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    assert before == handlers()


def test_sigterm_may_come_as_often_as_it_likes():
    with StopSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received


def test_an_inner_signal_knows_of_what_came_before_and_tells_the_outer_one():
    before = handlers()
    with StopSignal() as outer:
        with StopSignal() as first:
            os.kill(os.getpid(), signal.SIGTERM)
        with StopSignal() as second:
            assert second.received
        assert outer.received and first.received and stop_received()
        os.kill(os.getpid(), signal.SIGTERM)  # the outer one still catches it
    assert before == handlers() and not stop_received()


def test_nothing_interrupts_the_last_save():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)


def test_other_threads_leave_signals_alone():
    before, made = handlers(), []
    thread = threading.Thread(target=lambda: made.append(StopSignal()))
    thread.start()
    thread.join()
    assert not made[0].received and before == handlers()
