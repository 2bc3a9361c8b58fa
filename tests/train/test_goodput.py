"""Where a run's time went: the sums over kills and resumes, and the events as they are written."""

import json
import time

import pytest

from mimo_jax.train.goodput import FILE, Account, Goodput, format_duration, read_events

KILLED = [
    {"time": 100.0, "event": "start", "step": 0},
    {"time": 110.0, "event": "ready", "step": 1},
    {"time": 120.0, "event": "step", "first": 0, "step": 10, "seconds": 8.0, "wait": 1.0, "compile": 5.0},
    {"time": 122.0, "event": "save", "step": 10, "seconds": 2.0},
    {"time": 130.0, "event": "step", "first": 10, "step": 20, "seconds": 8.0, "wait": 0.0, "compile": 0.0},
]
RESUMED = [
    {"time": 150.0, "event": "start", "step": 15},
    {"time": 153.0, "event": "restore", "step": 15, "seconds": 3.0},
    {"time": 170.0, "event": "step", "first": 15, "step": 25, "seconds": 12.0, "wait": 0.0, "compile": 2.0},
    {"time": 174.0, "event": "evaluate", "step": 25, "seconds": 4.0},
    {"time": 200.0, "event": "stop", "step": 25, "reason": "stopped"},
]


def test_steps_after_the_last_save_are_lost_and_every_second_is_accounted_for():
    account = Account()
    for event in KILLED + RESUMED:
        account.add(event)
    assert account.seconds() == 100
    assert account.goodput() == pytest.approx(0.24)  # 8 + half of 8 + 12
    lost = account.losses()
    assert lost["repeated steps"] == pytest.approx(0.04)
    assert lost["downtime"] == pytest.approx(0.20)
    assert (lost["compiling"], lost["saving"], lost["evaluating"], lost["restoring"], lost["data wait"]) == (0.07, 0.02, 0.04, 0.03, 0.01)
    assert account.goodput() + sum(lost.values()) == pytest.approx(1)


def test_a_run_that_was_done_did_not_wait_for_its_next_steps():
    account = Account()
    for event in [*KILLED, {"time": 131.0, "event": "stop", "step": 20, "reason": "done"}, {"time": 9131.0, "event": "start", "step": 20}]:
        account.add(event)
    assert account.seconds() == 31 and "downtime" not in {name for name, share in account.losses().items() if share}


def test_events_are_written_as_they_come_and_a_torn_line_stays_alone(tmp_path):
    path = tmp_path / FILE
    path.write_text("".join(json.dumps(event) + "\n" for event in KILLED) + '{"time": 131.0, "ev')
    began = time.time()
    with Goodput(tmp_path, began, step=10, total=12, restored=0.5) as goodput:
        for step in (11, 12):
            time.sleep(0.05)
            goodput.record_step(step, 56, wait=0.01, dispatch=0.02)
            assert [event["event"] for event in read_events(path)][-1] == "ready"
        took = goodput.interval()
        with goodput.during("save"):
            time.sleep(0.05)
    new = read_events(path)[len(KILLED) :]
    assert [event["event"] for event in new] == ["start", "restore", "ready", "step", "save", "stop"]
    assert new[0]["time"] == pytest.approx(began, abs=1e-3) and new[-1]["reason"] == "done"
    assert took.steps == 2 and took.wait == pytest.approx(0.02) and new[3]["compile"] == 0.02  # one length: compiled once
    assert 0.03 < took.seconds < 5 and new[3]["seconds"] == pytest.approx(took.seconds, abs=1e-3)
    assert 0.05 <= new[4]["seconds"] < 5
    assert goodput.summary().startswith("goodput ") and "downtime" in goodput.summary()


def test_what_ends_a_run_is_told(tmp_path):
    with pytest.raises(ZeroDivisionError), Goodput(tmp_path, time.time(), step=0, total=9) as goodput:
        goodput.record_step(1, 56, 0.0, 0.0)
        raise ZeroDivisionError
    events = read_events(tmp_path / FILE)
    assert events[-1]["reason"] == "ZeroDivisionError" and events[-2]["event"] == "step" and events[-2]["step"] == 1


def test_saving_is_no_part_of_a_step(tmp_path):
    start = time.monotonic()
    with Goodput(tmp_path, time.time(), step=0, total=9) as goodput:
        goodput.record_step(1, 56, 0.0, 0.0)
        with goodput.during("save"):
            time.sleep(0.3)
        assert goodput.interval().seconds <= time.monotonic() - start - 0.3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2 s"), (724, "12 min 04 s"), (12000, "3 h 20 min"), (187200, "2 d 4 h"), (59.96, "1 min 00 s")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
