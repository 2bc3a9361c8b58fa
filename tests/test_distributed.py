"""Several processes as one run: how they find each other, speak, and end; with real processes."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mimo_jax import distributed
from mimo_jax.distributed import ClusterError, ProcessInfo, find_process_info

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
# What a worker does: steps without end, each of which needs both processes, until something happens.
WORK = """
import os, sys, time
from mimo_jax import distributed
from mimo_jax.errors import UserError

def work():
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    me, case = jax.process_index(), sys.argv[1]
    mesh = jax.make_mesh((2,), ("d",))
    ones = jax.make_array_from_process_local_data(NamedSharding(mesh, P("d")), np.ones((1, 4), np.float32))
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
    stop = distributed.PreemptionGuard()
    assert not stop.requested()
    print("seen", distributed.gather({"process": me}), float(add(ones)), flush=True)
    print("a warning", file=sys.stderr, flush=True)
    open(f"worker{me}", "w").write(str(os.getpid()))
    for step in range(1, 100000):
        if step == 20 and me == 1:
            if case == "fails":
                raise UserError("DIR: holds no data; give another")
            if case == "hangs":
                time.sleep(1000)
        distributed.send_heartbeat(4 if case == "hangs" else 0)
        float(add(ones))
        time.sleep(0.02)
        if stop.should_stop_after(step):
            assert stop.requested()
            open(f"stopped{me}", "w").write(str(step))
            return 75

sys.exit(distributed.run(work, heartbeat_timeout=10))
"""


def pair(folder, case: str, **environment) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MIMO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "MIMO_PROCESSES": "2"} | environment
    (folder / "work.py").write_text(WORK)
    command = [sys.executable, "work.py", case]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    return [subprocess.Popen(command, env=os.environ | told | {"MIMO_PROCESS": str(i)}, **pipes) for i in range(2)]


def wait_for(*paths) -> None:
    until = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < until, "the workers did not start"
        time.sleep(0.1)


def ends(processes) -> tuple[list[int], list[str], list[str]]:
    """(exit codes, stdouts, stderrs)"""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [out for out, _ in said], [err for _, err in said]


@pytest.mark.parametrize("environment", [{}, {"MIMO_PROCESSES": "1"}, SLURM | {"SLURM_NTASKS": "1"}, SLURM | {"MIMO_PROCESSES": "1"}])
def test_one_process_is_alone_and_joins_nothing(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_process_info() is None
    assert distributed.run(lambda: 3) == 3
    assert distributed.gather("x") == ["x"]


def test_variables_and_a_cluster_that_jax_knows_are_understood(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_process_info() == ProcessInfo(1, 2, None, "SlurmCluster")
    for name, value in {"MIMO_COORDINATOR": "host:1", "MIMO_PROCESSES": "3", "MIMO_PROCESS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert find_process_info() == ProcessInfo(2, 3, "host:1", "MIMO_COORDINATOR")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MIMO_PROCESSES": "2"}, "MIMO_COORDINATOR: is not set, but MIMO_PROCESSES is; set all three"),
        ({"MIMO_COORDINATOR": "h:1", "MIMO_PROCESSES": "2"}, "MIMO_PROCESS: is not set"),
        ({"MIMO_COORDINATOR": "h", "MIMO_PROCESSES": "2", "MIMO_PROCESS": "0"}, "MIMO_COORDINATOR=h: is not host:port"),
        ({"MIMO_COORDINATOR": "h:1", "MIMO_PROCESSES": "2", "MIMO_PROCESS": "2"}, "MIMO_PROCESS=2: is not one of 0 … 1"),
        ({"MIMO_COORDINATOR": "h:1", "MIMO_PROCESSES": "two", "MIMO_PROCESS": "2"}, "MIMO_PROCESSES=two: is not a number"),
    ],
)
def test_variables_set_in_part_or_wrong_are_named(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError, match=message):
        find_process_info()


def test_a_time_to_join_that_is_no_number_is_named_before_anything_starts(monkeypatch):
    for name, value in {"MIMO_COORDINATOR": "h:1", "MIMO_PROCESSES": "2", "MIMO_PROCESS": "0", "MIMO_JOIN_TIMEOUT": "5m"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError, match="MIMO_JOIN_TIMEOUT=5m: is not a number of seconds, such as 300"):
        distributed.run(lambda: 0)


def test_a_coordinator_that_is_not_there_is_named_after_the_time_given(tmp_path):
    *_, second = pair(tmp_path, "", MIMO_JOIN_TIMEOUT="2", MIMO_COORDINATOR="127.0.0.1:9")
    _.pop().kill()
    codes, _, errors = ends([second])
    assert codes == [75]
    last = errors[0].splitlines()[-1]
    assert last.startswith("mimo: process 1: not all processes joined within 2 s (MIMO_JOIN_TIMEOUT)")
    assert "process 0 at 127.0.0.1:9" in last


def test_sigterm_to_one_stops_both_after_the_same_step_and_only_the_first_speaks(tmp_path):
    processes = pair(tmp_path, "")
    wait_for(tmp_path / "worker0", tmp_path / "worker1")
    processes[1].send_signal(signal.SIGTERM)
    codes, said, errors = ends(processes)
    assert codes == [75, 75], errors
    assert "seen [{'process': 0}, {'process': 1}] 8.0" in said[0] and "seen" not in said[1]
    assert "a warning" in errors[0] and "a warning" not in errors[1]
    assert (tmp_path / "stopped0").read_text() == (tmp_path / "stopped1").read_text()


def test_the_error_of_one_ends_both_with_its_code_and_is_told_with_its_number(tmp_path):
    codes, _, errors = ends(pair(tmp_path, "fails"))
    assert codes == [2, 2]
    assert "mimo: process 1: error: DIR: holds no data; give another" in errors[1]


@pytest.mark.parametrize("case", ["hangs", "dies"])
def test_a_peer_that_hangs_or_dies_ends_the_run(tmp_path, case):
    processes = pair(tmp_path, case)
    if case == "dies":
        wait_for(tmp_path / "worker0", tmp_path / "worker1")
        os.kill(int((tmp_path / "worker1").read_text()), signal.SIGKILL)
    codes, _, errors = ends(processes)
    assert codes == [75, 75]
    reason = "no step finished within 4 s" if case == "hangs" else "a peer died or no longer responds"
    assert reason in errors[0] and "run the same command for all" in errors[0].splitlines()[-1]
