"""Runs with several processes: how they find and join each other, exchange values, and end together.

jax recognises Cloud TPU pods, GKE, SLURM (under srun), Kubernetes and Open MPI. Elsewhere, set for every process

    MIMO_COORDINATOR=host:port   address of process 0, the same for all
    MIMO_PROCESSES=n             number of processes; with 1, this process runs alone, whatever jax recognises
    MIMO_PROCESS=i               index of this process, from 0
    MIMO_JOIN_TIMEOUT=300        seconds within which all processes must have joined

Each process consists of a watcher and a worker that the watcher started. The watcher forwards SIGTERM, kills a worker that sends no
heartbeat for longer than it announced, and reports why a worker ended: when a peer is lost, jax aborts the process from another thread.

Exit codes of every process: 0 done · 1 or 2 as soon as any process fails with that code · 75 stopped on request, or a peer died, hangs
or did not join: the saved state is intact, and the same command for all processes resumes. (A process that was killed itself has the
exit code that the operating system gives it; all processes must be restarted together.)
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pickle
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
from jax.experimental import multihost_utils

from mimo_jax import errors
from mimo_jax.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_TEMPFAIL, EXIT_USAGE, UserError
from mimo_jax.jax_internals import coordination_client, find_cluster, preemption_noticed
from mimo_jax.preemption import StopSignal, stop_received, uninterrupted

_COORDINATOR, _PROCESSES, _PROCESS, _JOIN_TIMEOUT = "MIMO_COORDINATOR", "MIMO_PROCESSES", "MIMO_PROCESS", "MIMO_JOIN_TIMEOUT"
_CHANNEL = "MIMO_WATCHER"  # set by the watcher for its worker: file descriptor of the socket between them
_GRACE_SECONDS = 5.0  # time for the other processes to end by themselves after one has failed
_FOREVER_MS = 10**9  # effectively no timeout: lost peers are detected by their heartbeat
# Texts in the errors of a collective that failed because of a peer.
_PEER_ERRORS = re.compile(
    r"gloo|nccl|coordination|heartbeat|unavailable|deadline_exceeded|connection (reset|closed|refused)", re.IGNORECASE
)
_FAILED_KEY = "mimo/failed"  # its value is the exit code of the process that failed first, or "none" at the end of the run
_gathered = itertools.count()
_ending = threading.Lock()
_channel: socket.socket | None = None


class ClusterError(UserError):
    """The environment does not say how the processes find each other."""


class ProcessInfo(NamedTuple):
    """This process among those of the run. coordinator: host:port, None if jax finds it; source: where this information comes from."""

    process: int
    count: int
    coordinator: str | None
    source: str


def run(work: Callable[[], int], heartbeat_timeout: int = 100) -> int:
    """Join the other processes of the run, if there are any, call `work` and return its exit code. Must be called before anything uses a
    device. heartbeat_timeout: seconds without heartbeat after which a peer counts as dead.

    Raises ClusterError if the variables are incomplete or invalid. With several processes, errors of `work` are printed, not raised."""
    info = find_process_info()
    if info is None:
        return work()
    _join_timeout()  # report an invalid value before anything starts
    if _CHANNEL not in os.environ:
        return _watch(info)
    return _worker(info, work, heartbeat_timeout)


def find_process_info() -> ProcessInfo | None:
    """This process among those of its cluster; None if it is alone."""
    values = {name: os.environ[name] for name in (_COORDINATOR, _PROCESSES, _PROCESS) if os.environ.get(name)}
    if values.get(_PROCESSES) == "1":
        return None
    if values:
        return _info_from_environment(values)
    try:
        cluster = find_cluster()
        if cluster is None or cluster.count == 1:
            return None
        return ProcessInfo(cluster.process, cluster.count, None, cluster.kind)
    except Exception as error:  # each cluster has errors of its own
        problem = f"this looks like a cluster, but the number of processes cannot be determined ({type(error).__name__}: {error})"
        raise ClusterError(f"{problem}; set {_COORDINATOR}, {_PROCESSES} and {_PROCESS}, or {_PROCESSES}=1 to run alone") from error


def _info_from_environment(values: dict[str, str]) -> ProcessInfo:
    for name in (_COORDINATOR, _PROCESSES, _PROCESS):
        if name not in values:
            raise ClusterError(f"{name}: is not set, but {', '.join(values)} is; set all three, or {_PROCESSES}=1 to run alone")
    host, _, port = values[_COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"{_COORDINATOR}={values[_COORDINATOR]}: is not host:port, such as 10.0.0.1:8476")
    if not values[_PROCESSES].isdecimal() or int(values[_PROCESSES]) < 1:
        raise ClusterError(f"{_PROCESSES}={values[_PROCESSES]}: is not a number of processes")
    if not values[_PROCESS].isdecimal() or int(values[_PROCESS]) >= int(values[_PROCESSES]):
        raise ClusterError(
            f"{_PROCESS}={values[_PROCESS]}: is not one of 0 … {int(values[_PROCESSES]) - 1} ({_PROCESSES}={values[_PROCESSES]})"
        )
    return ProcessInfo(int(values[_PROCESS]), int(values[_PROCESSES]), values[_COORDINATOR], _COORDINATOR)


def _join_timeout() -> int:
    value = os.environ.get(_JOIN_TIMEOUT) or "300"
    if not value.isdecimal() or int(value) < 1:
        raise ClusterError(f"{_JOIN_TIMEOUT}={value}: is not a number of seconds, such as 300")
    return int(value)


# --- the watcher


def _watch(info: ProcessInfo) -> int:
    """Start this same command as the worker and wait for it; returns the exit code of this process."""
    stop = StopSignal()  # one that arrives before there is a worker to forward it to
    ours, theirs = socket.socketpair()
    environment = os.environ | {_CHANNEL: str(theirs.fileno())}
    worker = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.send_signal(signal.SIGTERM))
    if stop.received:
        worker.send_signal(signal.SIGTERM)
    joined, allowed, heard = False, 0.0, time.monotonic()
    while worker.poll() is None:
        if select.select([ours], [], [], 0.5)[0]:
            beats = ours.recv(4096)  # complete heartbeats, since each is sent in one call
            if not beats:
                break
            joined, allowed, heard = True, struct.unpack("d", beats[-8:])[0], time.monotonic()
        elif allowed and time.monotonic() - heard > allowed:
            worker.kill()
            worker.wait()
            return _report_restart(info, f"no step finished within {allowed:g} s (config.train.step_timeout): it, or a peer, hangs")
    code = worker.wait()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if -code == signal.SIGABRT and not joined:
        at = f", process 0 at {info.coordinator}" if info.coordinator else ""
        return _report_restart(
            info, f"not all processes joined within {_join_timeout()} s ({_JOIN_TIMEOUT}); {info.source} reports {info.count}{at}"
        )
    if -code == signal.SIGABRT:
        return _report_restart(info, "a peer died or no longer responds; the lines above say which")
    if -code in (signal.SIGTERM, signal.SIGKILL):
        return _report_restart(info, f"was killed by {name}")
    print(f"mimo: process {info.process}: was killed by {name}", file=sys.stderr)
    return EXIT_INTERNAL


def _report_restart(info: ProcessInfo, reason: str) -> int:
    """Print why the run must be restarted; returns EXIT_TEMPFAIL."""
    print(f"mimo: process {info.process}: {reason}; run the same command for all {info.count} processes to resume", file=sys.stderr)
    return EXIT_TEMPFAIL


def send_heartbeat(seconds: float) -> None:
    """Announce to the watcher that the next heartbeat follows within `seconds`; 0 means at any time."""
    if _channel is not None:
        _channel.sendall(struct.pack("d", seconds))


# --- the worker


def _worker(info: ProcessInfo, work: Callable[[], int], heartbeat_timeout: int) -> int:
    global _channel
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until all have joined, a stop ends this process at once; nothing has begun
    if stop_received():
        return EXIT_TEMPFAIL
    _channel = socket.socket(fileno=int(os.environ[_CHANNEL]))
    _channel.set_inheritable(False)
    threading.Thread(target=_end_with_watcher, daemon=True).start()
    if not _join(info, heartbeat_timeout):
        return EXIT_TEMPFAIL
    send_heartbeat(0)
    stderr = sys.stderr
    if info.process:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    listener = threading.Thread(target=_end_with_peers, daemon=True)
    listener.start()
    try:
        code = work()
    except BaseException as error:
        _exit_all(_report_error(info, error, stderr))
    gather("done")
    with contextlib.suppress(Exception):  # it is enough if one process sets it
        coordination_client().key_value_set(_FAILED_KEY, "none")
    listener.join()
    jax.distributed.shutdown()
    return code


def _join(info: ProcessInfo, heartbeat_timeout: int) -> bool:
    """Join the other processes; returns whether all joined in time, otherwise prints why not."""
    explicit = {}
    if info.coordinator:
        explicit = {"coordinator_address": info.coordinator, "num_processes": info.count, "process_id": info.process}
        explicit["cluster_detection_method"] = "deactivate"
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # on CPUs, the collectives of concurrent programs get mixed up
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=_join_timeout(),
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=_FOREVER_MS // 1000,
        )
    except Exception as error:  # each cluster has errors of its own
        problem = "not all processes joined" if info.process == 0 else f"process 0 was not reached at {info.coordinator or 'its address'}"
        line = f"{problem} within {_join_timeout()} s ({_JOIN_TIMEOUT}); {info.source} reports {info.count}: {_first_line(error)}"
        print(f"mimo: process {info.process}: {line}", file=sys.stderr)
        return False
    return True


def _end_with_watcher() -> None:
    _channel.recv(1)  # the watcher never sends: this returns when it has ended
    os._exit(EXIT_INTERNAL)


def _report_error(info: ProcessInfo, error: BaseException, stream) -> int:
    """Print what went wrong; returns the exit code for it."""
    lost = isinstance(error, Exception) and not isinstance(error, UserError) and _PEER_ERRORS.search(str(error))
    if lost:
        time.sleep(2 * _GRACE_SECONDS)  # if the peer failed with an exit code, this process ends meanwhile with the same one
    if isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", EXIT_INTERRUPTED
    elif lost:
        line, code = f"a peer died or no longer responds: {_first_line(error)}; run the same command for all to resume", EXIT_TEMPFAIL
    elif isinstance(error, UserError):
        line, code = errors.user_message(error), EXIT_USAGE
        if errors.traceback_wanted():
            traceback.print_exception(error, file=stream)
    else:
        line, code = "".join(traceback.format_exception(error)), EXIT_INTERNAL
    print(f"mimo: process {info.process}: error: {line}", file=stream, flush=True)
    return code


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def _exit_all(code: int) -> NoReturn:
    """End this process, and all others with the same code."""
    if not _ending.acquire(blocking=False):  # another thread is already ending the process
        threading.Event().wait()
    client = coordination_client()
    with contextlib.suppress(Exception):
        client.key_value_set(_FAILED_KEY, str(code))
    with contextlib.suppress(Exception):
        client.wait_at_barrier("mimo/ended", int(3000 * _GRACE_SECONDS))
    if jax.process_index() == 0:
        time.sleep(1)  # it runs the coordination service, without which the others abort
    os._exit(code)


def _end_with_peers() -> None:
    try:
        code = coordination_client().blocking_key_value_get(_FAILED_KEY, _FOREVER_MS)
    except Exception:  # process 0 has ended: this process is about to be aborted
        return
    if code != "none":
        time.sleep(_GRACE_SECONDS)
        _exit_all(int(code))


# --- collective operations, which all processes must call


def gather(value: Any) -> list:
    """The values (JSON-serializable) of all processes in order; waits until all processes have called it."""
    client = coordination_client()
    if client is None:
        return [value]
    key = f"mimo/gathered/{next(_gathered)}"
    client.key_value_set(f"{key}/{jax.process_index():08d}", json.dumps(value))
    client.wait_at_barrier(key, _FOREVER_MS)
    return [json.loads(text) for _, text in sorted(client.key_value_dir_get(key))]


def gather_objects(value: Any) -> list:
    """Like `gather`, for any values that can be pickled."""
    if coordination_client() is None:
        return [value]
    texts = gather(base64.b64encode(zlib.compress(pickle.dumps(value))).decode())
    return [pickle.loads(zlib.decompress(base64.b64decode(text))) for text in texts]


class PreemptionGuard:
    """Detects a request to stop (SIGTERM or SIGINT). If any of several processes receives one, all stop after the same step."""

    def __init__(self):
        self._stop_signal = StopSignal() if coordination_client() is None else None
        self._interrupt = None
        if self._stop_signal is None:  # jax handles SIGTERM and the preemption notices of the platform
            self._interrupt = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def should_stop_after(self, step: int) -> bool:
        """Whether to stop after this step. With several processes, all must call it after every step."""
        return self._stop_signal.received if self._stop_signal else multihost_utils.reached_preemption_sync_point(step)

    def requested(self) -> bool:
        """Whether any process was asked to stop, as far as this process knows: the others may learn it later."""
        return self._stop_signal.received if self._stop_signal else preemption_noticed()

    def last_save(self) -> contextlib.AbstractContextManager:
        """Around a save after which the run stops: not even a second SIGINT interrupts it."""
        return uninterrupted() if self._stop_signal else contextlib.nullcontext()

    def restore(self) -> None:
        if self._stop_signal:
            self._stop_signal.restore()
        else:
            signal.signal(signal.SIGINT, self._interrupt)
