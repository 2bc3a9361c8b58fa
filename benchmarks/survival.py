"""Fault tolerance of runs: real processes are killed, preempted, and their files damaged; the results are compared with an uninterrupted
run.

    python benchmarks/survival.py [--parts kill,preempt,flip,signals] [--config FILE] [--kills 20] [--signals 100] [--seed 0]

kill: SIGKILL at random times, every other one during a save; the final parameters must be bit-identical.
preempt: SIGTERM to one of two processes; then one process with one device, and one with four virtual devices, resume.
flip: one random bit of a step's checkpoint (50 trials) or of the frozen base (10) is flipped.
signals: SIGTERM, every other time two of them, at random moments of the start, the steps, the saves, the evaluations and the end of a run.

Without --config, the model is that of tests/tiny_config.py, so that a process starts in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from mimo_jax import files, pathtree, sharding  # noqa: E402
from mimo_jax.checkpoints import checkpoint, frozen_params, loading  # noqa: E402
from mimo_jax.checkpoints.checkpoint import CheckpointError, Checkpoints, CheckpointWarning  # noqa: E402
from mimo_jax.config import MeshConfig  # noqa: E402
from mimo_jax.data.builder.phantom_set import build_phantoms  # noqa: E402
from mimo_jax.data.loading.loader import make_loader  # noqa: E402
from mimo_jax.data.loading.sources import open_sources  # noqa: E402
from mimo_jax.data.tokenizer import load_tokenizer  # noqa: E402
from mimo_jax.train.goodput import read_events  # noqa: E402
from mimo_jax.train.state import TrainSetup  # noqa: E402

SMALL = """
from tests.tiny_config import {model}

def get_config():
    config = {model}()
    config.data.batch_size = 8
    config.train.final_learning_rate = config.train.learning_rate  # the learning rate of a step does not depend on the number of steps
    return config
"""
EVERY_STEP = {"train.log_every": 1, "train.eval_samples": 0, "train.calibrate_samples": 0}
EVALUATED = {"train__eval_every": 4, "train__eval_samples": 8, "train__num_overlays": 2, "train__calibrate_samples": 24}


class Runs:
    """Runs of `mimo train` with one config on one dataset."""

    def __init__(self, config: str | None, folder: Path, model: str = "tiny_config"):
        """model: a function of tests/tiny_config.py, for runs without a config of their own."""
        self.folder, self.data = folder, folder / "phantom"
        self.config = config or str(folder / "small.py")
        folder.mkdir(exist_ok=True)
        if config is None:
            (folder / "small.py").write_text(SMALL.format(model=model))
        build_phantoms(self.data, 24, seed=5, progress=False)

    def start(self, workdir: Path, devices: int = 1, place: tuple[str, int, int] | None = None, **settings) -> subprocess.Popen:
        """A process of the run in `workdir`. place: (coordinator, process, processes); settings: `train__steps=3`."""
        flags = EVERY_STEP | {name.replace("__", "."): value for name, value in settings.items()}
        command = [sys.executable, "-m", "mimo_jax.cli", "train", "--config", self.config, "--data", str(self.data)]
        command += ["--workdir", str(workdir), *(f"--config.{name}={value}" for name, value in flags.items())]
        environment = dict(zip(("MIMO_COORDINATOR", "MIMO_PROCESS", "MIMO_PROCESSES"), map(str, place), strict=True)) if place else {}
        wanted = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        log = open(f"{workdir}.log", "a")
        return subprocess.Popen(command, env=os.environ | environment | {"XLA_FLAGS": wanted}, stdout=log, stderr=log)

    def finish(self, workdir: Path, **settings) -> None:
        code = self.start(workdir, **settings).wait()
        if code:
            raise SystemExit(f"a run ended with {code}; see {workdir}.log")


def rows(workdir: Path) -> dict[int, dict]:
    """Metrics by step, as far as they are written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row for row in map(json.loads, (line for line in lines if line.endswith("}")))}


def unfinished(workdir: Path) -> bool:
    """Whether a step is being saved."""
    return any(not (step / "manifest.json").exists() for step in (workdir / "steps").glob("*"))


def wait_until(true, process: subprocess.Popen, seconds: float, pause: float) -> bool:
    until = time.monotonic() + seconds
    while not true() and process.poll() is None and time.monotonic() < until:
        time.sleep(pause)
    return true()


# --- the parts


def kill(runs: Runs, kills: int, rng: random.Random) -> Iterator[str]:
    settings = {"train__steps": 25 * kills, "train__checkpoint_every": 4}
    alone, killed = runs.folder / "alone", runs.folder / "killed"
    runs.finish(alone, **settings)
    in_save, at = 0, []
    for number in range(kills):
        process = runs.start(killed, **settings)
        before = len((killed / "metrics.jsonl").read_text().splitlines()) if (killed / "metrics.jsonl").exists() else 0
        wait_until(lambda before=before: len(rows_written(killed)) > before, process, 600, 0.01)
        if number % 2:
            wait_until(lambda: unfinished(killed), process, 60, 0.0005)
        else:
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            raise SystemExit(f"the run was over before kill {number + 1}, with code {process.returncode}; see {killed}.log")
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_save += unfinished(killed)
        at.append(max(rows(killed)))
    runs.finish(killed, **settings)
    last = settings["train__steps"]
    a, b = (pathtree.flatten(loading.load_params(run / "steps" / str(last))) for run in (alone, killed))
    same = a.keys() == b.keys() and all(np.array_equal(np.asarray(a[path]), np.asarray(b[path])) for path in a)
    yield f"kill: {kills} times SIGKILL, {in_save} of them during a save, at steps {at} of {last}; final parameters bit-identical: {same}"


def rows_written(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def preempt(runs: Runs, rng: random.Random) -> Iterator[str]:
    alone, two = runs.folder / "left", runs.folder / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    long_run = {"train__steps": 100000, "train__checkpoint_every": 100000}
    pair = [runs.start(two, 1, (at, number, 2), **long_run) for number in range(2)]
    wait_until(lambda: len(rows_written(two)) > rng.randrange(3, 12), pair[0], 600, 0.05)
    pair[1].send_signal(signal.SIGTERM)
    codes = [process.wait() for process in pair]
    stopped = Checkpoints(two).latest()
    yield f"preempt: SIGTERM to process 1 of 2; exit codes {codes}, both saved step {stopped} (complete only if both wrote it)"

    settings = {"train__steps": stopped + 20, "train__checkpoint_every": 100000}
    runs.finish(alone, **settings)
    wanted = rows(alone)
    for devices in (1, 4):
        again = runs.folder / f"on_{devices}"
        shutil.copytree(two, again)
        runs.finish(again, devices=devices, **settings)
        found = rows(again)
        worst = max(abs(found[s]["loss"] / wanted[s]["loss"] - 1) for s in range(stopped + 1, stopped + 21))
        yield f"preempt: resumed on one process, {devices} device(s): loss of 20 steps within {worst:.1e} relative of an uninterrupted run"
    yield f"preempt: sample ids of 100 batches identical: {same_samples(two, stopped)}"


def same_samples(run: Path, step: int) -> bool:
    """Whether loaders that resume at a step, one alone or two that share the images, return the same batches as an uninterrupted one."""
    config = checkpoint.read_config(run)
    tokenizer, sources = load_tokenizer(run / "tokenizer.json", config.model), open_sources(config, config.data.split)
    position = json.loads((run / "steps" / str(step) / "extra.json").read_text())
    half = config.images() // 2
    uninterrupted = make_loader(config, tokenizer, sources)
    for _ in range(step):
        next(uninterrupted)
    others = [make_loader(config, tokenizer, sources, mine) for mine in (None, range(half), range(half, 2 * half))]
    for loader in others:
        loader.restore(position)
    for number in range(step, step + 100):
        if any(loader.records(number) != uninterrupted.records(number) for loader in others):
            return False
        batch, alone, first, second = next(uninterrupted), *(next(loader) for loader in others)
        for name, value in batch.items():
            if not (np.array_equal(value, alone[name]) and np.array_equal(value, np.concatenate([first[name], second[name]]))):
                return False
    return True


def signals(runs: Runs, count: int, rng: random.Random) -> Iterator[str]:
    settings = EVALUATED | {"train__steps": 10, "train__checkpoint_every": 4}
    last = settings["train__steps"]
    alone = runs.folder / "undisturbed"
    since = time.monotonic()
    runs.finish(alone, **settings)
    lasts = time.monotonic() - since
    moments = [(begun_start, lasts / 3), (begun_step, 0.5), (begun_save, 0.02), (begun_evaluation, 2.0), (begun_end, 0.5)]
    ended: Counter[str] = Counter()
    finished = same = sent = 0
    while sent < count:
        run = runs.folder / f"signalled{finished}"
        begun, delay = moments[sent % len(moments)]
        name, before = begun.__name__.removeprefix("begun_"), listing(run)
        process = runs.start(run, **settings)
        wait_until(partial(begun, run, written(run)), process, 600, 0.01)
        time.sleep(rng.uniform(0, delay))
        if process.poll() is None:  # else the run was over before this moment came
            process.send_signal(signal.SIGTERM)
            if sent % 2:
                time.sleep(rng.uniform(0, 0.5))
                process.send_signal(signal.SIGTERM)
            sent += 1
            ended[f"{name} {process.wait()}"] += 1
            print(f"signal {sent} of {count}: {name}, exit code {process.returncode}", file=sys.stderr)
        code = process.returncode
        before_main = code == -signal.SIGTERM and listing(run) == before
        if code not in (0, 75) and not before_main:
            raise SystemExit(f"signal {sent}, {name}: the run ended with {code}; see {run}.log")
        if code and sent == count:
            runs.finish(run, **settings)
        if not code or sent == count:
            finished, same = finished + 1, same + same_end(alone, run, last)
            print(f"runs at their end: {finished}, bit-identical: {same}", file=sys.stderr)
    codes = ", ".join(f"{name}: {number}" for name, number in sorted(ended.items()))
    yield f"signals: {sent} times SIGTERM, every other time twice; moment and exit code: {codes}"
    yield f"signals: {finished} runs made of these starts; steps, reports and final parameters bit-identical: {same} of {finished}"


def written(run: Path) -> tuple[int, int]:
    """Number of rows of metrics and of starts that a run has written."""
    return len(rows(run)), sum(event["event"] == "start" for event in read_events(run / "goodput.jsonl"))


# Whether what a signal is to interrupt has begun, given what was written before the process started.


def begun_start(run: Path, before: tuple[int, int]) -> bool:
    return True


def begun_step(run: Path, before: tuple[int, int]) -> bool:
    return written(run)[0] > before[0]


def begun_save(run: Path, before: tuple[int, int]) -> bool:
    return unfinished(run)


def begun_evaluation(run: Path, before: tuple[int, int]) -> bool:
    evaluated = [int(folder.name) for folder in (run / "eval").glob("*")]
    stages = files.read_json(run / "stages.json") or {}
    return written(run)[1] > before[1] and bool(evaluated) and max(evaluated) not in stages.values()


def begun_end(run: Path, before: tuple[int, int]) -> bool:
    return "final evaluation" in (files.read_json(run / "stages.json") or {})


def listing(run: Path) -> list[tuple[str, int]]:
    """Name and time of change of every file of a run."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())


def same_end(a: Path, b: Path, last: int) -> bool:
    """Whether two runs have the same losses at every step, the same report of every evaluation and the same final parameters."""
    losses = [{step: row["loss"] for step, row in rows(run).items()} for run in (a, b)]
    reports = [{path.parent.name: path.read_text() for path in run.glob("eval/*/report.json")} for run in (a, b)]
    one, other = (pathtree.flatten(loading.load_params(run / "steps" / str(last))) for run in (a, b))
    arrays_equal = one.keys() == other.keys() and all(np.array_equal(np.asarray(one[path]), np.asarray(other[path])) for path in one)
    return losses[0] == losses[1] and reports[0] == reports[1] and arrays_equal


def flip(runs: Runs, rng: random.Random) -> Iterator[str]:
    run, copy = runs.folder / "flipped", runs.folder / "copy"
    runs.finish(run, train__steps=4, train__checkpoint_every=2)
    plan = TrainSetup(checkpoint.read_config(run), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    shutil.copytree(run, copy)
    fell_back = 0
    for _ in range(50):
        undo = flip_bit(copy / "steps" / "4", rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, position = Checkpoints(copy).restore(4, plan.state, plan.state_shardings)
        fell_back += position == {"batch": 2} and any(issubclass(w.category, CheckpointWarning) for w in caught)
        undo()
    yield f"flip: one bit anywhere in a step's checkpoint: found, and the previous step restored, {fell_back} of 50 times"
    named = 0
    relative = json.loads((copy / "base.json").read_text())  # the copy's base must be read, not the original one
    shutil.rmtree(run)
    for _ in range(10):
        undo = flip_bit(copy / "base", rng)
        try:
            frozen_params.load(copy, plan.frozen, plan.frozen_shardings)
        except CheckpointError as error:
            named += undo.name in str(error)
        undo()
    frozen_params.load(copy, plan.frozen, plan.frozen_shardings)
    yield f"flip: one bit anywhere in the frozen base {relative['fingerprint'][:12]}: found, and the file named, {named} of 10 times"


def flip_bit(folder: Path, rng: random.Random):
    """Flip one bit of a folder's files, each with equal probability; returns a function that restores it, with the `name` of the file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    (file,) = rng.choices(paths, [path.stat().st_size for path in paths])
    data = file.read_bytes()
    at = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[at // 8] ^= 1 << at % 8
    file.write_bytes(changed)

    def undo() -> None:
        file.write_bytes(data)

    undo.name = str(file.relative_to(folder))
    return undo


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--parts", default="kill,preempt,flip,signals")
    flags.add_argument("--config", help="default: the model of tests/tiny_config.py")
    flags.add_argument("--kills", type=int, default=20)
    flags.add_argument("--signals", type=int, default=100)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args.config, Path(folder))
        parts = {
            "kill": lambda: kill(runs, args.kills, rng),
            "preempt": lambda: preempt(runs, rng),
            "flip": lambda: flip(runs, rng),
            "signals": lambda: signals(Runs(args.config, Path(folder) / "signals", "quick_config"), args.signals, rng),
        }
        for part in args.parts.split(","):
            for line in parts[part]():
                print(line, flush=True)


if __name__ == "__main__":
    main()
