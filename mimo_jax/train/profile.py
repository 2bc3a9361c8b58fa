"""`mimo profile`: runs a few steps under jax's profiler, starting from the newest checkpoint of a run; none of them is saved."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax

from mimo_jax import distributed
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import SourceConfig
from mimo_jax.distributed import PreemptionGuard
from mimo_jax.errors import EXIT_OK, EXIT_TEMPFAIL
from mimo_jax.train import loop

_MAX_LISTED = 12
_CONTAINERS = re.compile(r"^(while|call|conditional)\b")  # operations that contain others, whose time is already counted


def profile(workdir: str | os.PathLike, steps: int = 3, after: int = 2, sources: dict[str, SourceConfig] | None = None) -> int:
    """Write the trace of `steps` steps to RUN/profile/TIME, after `after` warm-up steps that compile everything; print how to open it and
    which operations took longest. Returns the exit code: 0, or 75 if a signal arrived before all steps were traced.

    sources: datasets to use instead of the run's own. Raises UserErrors before any work, among them CheckpointError for a run without a
    complete step. If there are several processes, all must call it, and each writes its own trace."""
    run, newest = checkpoint.resolve(workdir)
    config = checkpoint.read_config(run)
    config.data.sources = sources or config.data.sources
    resumed = loop.prepare(config, run, other_data=bool(sources))
    out = run / "profile" / distributed.gather(time.strftime("%Y-%m-%d-%H%M%S"))[0]
    stop = PreemptionGuard()
    try:
        infos = loop.steps(resumed.setup, resumed.state, resumed.frozen, resumed.loader, stop, newest + after + steps)
        for info in itertools.islice(infos, after):
            jax.block_until_ready(info.metrics)
        began = time.perf_counter()
        with jax.profiler.trace(str(out)):
            traced = [jax.block_until_ready(info.metrics) for info in itertools.islice(infos, steps)]
        seconds = (time.perf_counter() - began) / steps
    finally:
        distributed.send_heartbeat(0)
        stop.restore()
        resumed.loader.close()
    if len(traced) < steps:
        print(f"stopped after tracing {len(traced)} of {steps} steps", file=sys.stderr)
        return EXIT_TEMPFAIL
    print(f"traced {steps} steps after step {resumed.first + after}, {seconds:.3f} s each, tracing included: {out}")
    written = sorted(out.rglob("*.trace.json.gz"))
    if written:
        print(f"open it: {written[0]} in https://ui.perfetto.dev, or `pip install xprof`, then `xprof --logdir {out}`")
        print("\n".join(table(read_operations(written[0]), steps)))
    return EXIT_OK


def read_operations(trace: Path) -> dict[str, tuple[float, int]]:
    """Operation of the compiled programs -> (milliseconds, number of calls) in a trace.json.gz, summed over its devices and threads."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("ph") == "M" and e["name"] == "thread_name"}
    sums: dict[str, list] = defaultdict(lambda: [0.0, 0])
    for event in events:
        # CPU and GPU events carry the name of their operation; a TPU has a separate thread for operations.
        is_operation = "hlo_op" in event.get("args", {}) or threads.get((event.get("pid"), event.get("tid"))) == "XLA Ops"
        if event.get("ph") == "X" and is_operation and not _CONTAINERS.match(event["name"]):
            sums[event["name"]][0] += event["dur"] / 1000
            sums[event["name"]][1] += 1
    return {name: (took, count) for name, (took, count) in sums.items()}


def table(operations: dict[str, tuple[float, int]], steps: int) -> list[str]:
    """The slowest operations, one line each: milliseconds and calls per step, and their fraction of the time of all operations."""
    total = sum(took for took, _ in operations.values())
    ranked = sorted(operations.items(), key=lambda item: -item[1][0])[:_MAX_LISTED]
    lines = [f"{'ms/step':>10}  {'share':>6}  {'calls':>6}  operation"] if ranked else []
    return lines + [f"{took / steps:10.2f}  {took / total:6.1%}  {count / steps:6.0f}  {name}" for name, (took, count) in ranked]
