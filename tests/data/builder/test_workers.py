"""The pool of processes: its order, its end, and that of its workers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mimo_jax.data.builder.workers import Workers
from mimo_jax.data.records import DataError


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_jobs(count):
    with Workers(count) as pool:
        assert list(pool.map(abs, iter(range(-20, 0)))) == list(range(20, 0, -1))


def test_jobs_are_taken_as_they_are_needed():
    taken = []
    jobs = (taken.append(n) or n for n in range(1000))
    with Workers(1) as pool:
        results = pool.map(abs, jobs)
        assert [next(results), next(results)] == [0, 1] and len(taken) == 2


def test_a_signal_lets_no_other_job_begin():
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with Workers(1) as pool:
        for result in pool.map(abs, range(100)):
            done.append(result)
            if result == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        assert pool.stopped and done == list(range(5))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(DataError, match="a worker process died"), Workers(2) as pool:
        list(pool.map(os._exit, [1]))


def test_workers_end_with_a_killed_parent():
    code = (
        "import os, time\nfrom mimo_jax.data.builder.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as pool:\n"
        "        print(*pool.map(os.getpgid, [0]), *pool._pool._processes, flush=True)\n"
        "        list(pool.map(time.sleep, [60, 60]))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()[1:]]
        parent.kill()
    assert workers
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
