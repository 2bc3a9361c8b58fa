"""The summary that a run prints before its first step, and the memory of that step once it is compiled."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.extend.backend import get_backend
from jax.sharding import Mesh

from mimo_jax import __version__, pathtree, sharding
from mimo_jax.analysis import data_summary, flops, hardware
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import Config
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.records import RecordFolder

_ROOT = Path(__file__).resolve().parents[2]
_CHANGES = 8  # maximum number of changed config fields that are listed


class SummarizedRun(Protocol):
    """The attributes of a run that a summary needs, such as those of `mimo_jax.train.state.TrainSetup`: its config, its mesh, and nested
    dicts of the shapes and shardings of its parameters and optimizer."""

    config: Config
    mesh: Mesh
    base_reason: str
    params: dict
    param_shardings: dict
    train: dict
    train_shardings: dict
    frozen: dict
    frozen_shardings: dict
    state: dict
    state_shardings: dict

    def trains(self, path: str) -> bool: ...


def print_summary(plan: SummarizedRun, sources: Mapping[str, RecordFolder | Manifest], workdir: Path, first: int) -> None:
    """Print the summary. sources: the data by name; first: the step at which the run resumes, 0 for a new run."""
    data = data_summary.data_lines(plan.config, sources) if jax.process_index() == 0 else {}  # only process 0 prints
    lines = [versions(), *run_lines(plan, sources, workdir), *(_line(name, text) for name, text in data.items())]
    print("\n".join([*lines, *parameter_table(plan), memory_line(plan), flops_line(plan)]))
    if first:
        print(f"resuming at step {first} of {plan.config.train.steps}")


def schedule_lines(config: Config, num_samples: int, tokens: float, padded: float) -> list[str]:
    """The length of a run in steps, epochs, samples and tokens, and the learning rate if it was chosen for another batch size. num_samples:
    samples that the batches are drawn from; tokens, padded: mean tokens of a sample, without and with padding."""
    steps, batch, rate = config.train.steps, config.data.batch_size, config.train.learning_rate
    seen, reference = steps * batch, config.train.reference_batch_size
    counts = f"{seen:,} samples, about {_count(seen * tokens)} tokens ({_count(seen * padded)} with padding)"
    lines = [_line("length", f"{steps:,} steps of {batch:,} samples = {seen / num_samples:.3g} epochs of {num_samples:,}: {counts}")]
    if reference and reference != batch:
        ratio = batch / reference
        rule = f"for {ratio:.3g} times as many, the square-root rule for Adam multiplies it by {ratio**0.5:.2g}"
        lines.append(
            _line("rate", f"{rate:g} (config.train.learning_rate); the config's own is for {reference:,} samples per step: {rule}")
        )
    return lines


def _count(number: float) -> str:
    """A number as "1.2 M"."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P")).strip()


def versions() -> str:
    made = f"mimo_jax {__version__}{_commit()}, Python {platform.python_version()}, jax {jax.__version__}"
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("jaxlib", "flax", "optax", "orbax-checkpoint")]
    backend = get_backend()
    if backend.platform != "cpu":  # CUDA's version, or libtpu's
        libraries.append(backend.platform_version.split("\n")[0])
    return ", ".join([made, *libraries])


def _commit() -> str:
    """The git commit of a checkout, and whether files were changed since; empty for an installed package."""
    if not (_ROOT / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return f" (git {git('rev-parse', '--short=10', 'HEAD')}{', changed' if git('status', '--porcelain', '-uno') else ''})"
    except (OSError, subprocess.SubprocessError):  # git is not installed, or the checkout belongs to another user
        return ""


def run_lines(plan: SummarizedRun, sources: Mapping[str, RecordFolder | Manifest], workdir: Path) -> list[str]:
    """One line each for devices, base, data, weights and config."""
    config, data = plan.config, plan.config.data
    axes = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    images = ", ".join(f"{name} ({len(source):,} images)" for name, source in sources.items())
    shared = f", {data.samples_per_image} per image" if data.samples_per_image > 1 else ""
    lengths = " or ".join(map(str, config.buckets()))
    lines = {
        "devices": f"{plan.mesh.size} × {plan.mesh.devices.flat[0].device_kind}{processes}; mesh {axes}",
        "base": plan.base_reason.removeprefix("base "),
        "data": f"{images}; {data.batch_size} samples per step{shared}, {lengths} tokens each",
        "weights": checkpoint.origin(workdir).replace("weights: ", "") + _unlike_init(config),
        "config": f"{workdir / 'config.json'}{_changes(plan, workdir)}",
    }
    return [_line(name, text) for name, text in lines.items()]


def _changes(plan: SummarizedRun, workdir: Path) -> str:
    """The fields in which the config differs from the one that the run started with."""
    changed = _differences(checkpoint.read_config(workdir).to_dict(), plan.config.to_dict())
    return f"; changed since: {changed}" if changed else ""


def _unlike_init(config: Config) -> str:
    """The model's settings that differ from those of `init.path`: its parameters fit in shape, but were made for others."""
    path = config.init.path
    if not path or not Path(path).exists():  # a run that resumes no longer needs it
        return ""
    changed = _differences(checkpoint.read_config(checkpoint.run_of(path)).to_dict()["model"], config.to_dict()["model"])
    return f"; config.model differs from that of {path}: {changed}" if changed else ""


def _differences(then: dict, now: dict) -> str:
    """The first _CHANGES fields whose values differ, as "train.steps 2 → 4", and the number of the others."""
    then, now = pathtree.flatten(then), pathtree.flatten(now)
    changed = [f"{name.replace('/', '.')} {then.get(name)} → {value}" for name, value in now.items() if then.get(name) != value]
    more = f" and {len(changed) - _CHANGES} more" if len(changed) > _CHANGES else ""
    return f"{', '.join(changed[:_CHANGES])}{more}"


def parameter_table(plan: SummarizedRun) -> list[str]:
    """Parameters by part of the model, trained and frozen ones in separate rows: number, bytes, bytes per device."""
    counts: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(3, np.int64))
    places = pathtree.flatten(plan.param_shardings)
    for path, leaf in pathtree.flatten(plan.params).items():
        kind, size = ("trained" if plan.trains(path) else "frozen"), leaf.dtype.itemsize
        per_device = int(np.prod(places[path].shard_shape(leaf.shape)))
        for row in ((path.split("/")[0], kind), ("all", kind)):
            counts[row] += np.array([leaf.size, leaf.size * size, per_device * size])
    rows = [
        (part, kind, f"{number:,}", size_of(total), size_of(per_device))
        for (part, kind), (number, total, per_device) in sorted(counts.items(), key=_order)
    ]
    rows = [("parameters", "", "number", "size", "per device"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]


def _order(item: tuple) -> tuple:
    (part, kind), _ = item
    return part == "all", part, kind


def memory_line(plan: SummarizedRun) -> str:
    """The memory per device that is in use during the whole run; activations need more."""
    sizes = {
        "frozen": sharding.bytes_per_device(plan.frozen, plan.frozen_shardings),
        "trained": sharding.bytes_per_device(plan.train, plan.train_shardings),
        "optimizer": sharding.bytes_per_device(plan.state["opt"], plan.state_shardings["opt"]),
    }
    sizes["gradients"] = sizes["trained"]
    room = hardware.device_memory(plan.mesh.devices.flat[0])
    parts = " + ".join(f"{name} {size_of(value)}" for name, value in sizes.items())
    return _line("memory", f"{parts} = {size_of(sum(sizes.values()))} per device{f' of {size_of(room)}' if room else ''}, plus activations")


def flops_line(plan: SummarizedRun) -> str:
    """FLOPs per sample and per step, at the longest sequence length."""
    length, samples = plan.config.buckets()[-1], plan.config.data.batch_size
    parts = sorted(flops.step(plan.config, length).items(), key=lambda item: -item[1])
    total = sum(value for _, value in parts)
    named = ", ".join(f"{part} {value / total:.0%}" for part, value in parts if value >= 0.005 * total)
    return _line("FLOPs", f"{flops_of(total)} per sample of {length} tokens ({named}), {flops_of(total * samples)} per step")


def compiled_step_line(compiled: jax.stages.Compiled, length: int, seconds: float) -> str:
    """The memory per device of the compiled step for sequences of `length` tokens, as the compiler reports it; a CPU has no peak."""
    found = compiled.memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes} if found else {}
    if found and jax.default_backend() != "cpu":
        sizes["at its peak"] = found.peak_memory_in_bytes
    taken = ", ".join(f"{size_of(size)} {name}" for name, size in sizes.items())
    return _line("step", f"compiled for {length} tokens in {seconds:.1f} s{f': {taken}, per device' if taken else ''}")


def _line(name: str, text: str) -> str:
    return f"{name:<10}  {text}"


def size_of(size: float) -> str:
    """Bytes as "1.2 GiB"."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def flops_of(count: float) -> str:
    """FLOPs as "20.1 TFLOP"."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 0.9995 * base and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 or value >= 99.95 else 1
    return f"{value:.{digits}f} {units[power]}"
