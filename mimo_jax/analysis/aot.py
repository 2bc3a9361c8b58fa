"""Cost of a training step on a machine that is not available: the real step is compiled ahead of time for its devices and analysed.

Memory is reported by the compiler (`memory_analysis`); collectives and traffic are read from the program's text (`hlo_cost`); FLOPs are
those that the model needs (`flops`). The estimate is a roofline: compute, memory, link and network each run at their peak and at the same
time, so no real step is faster.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mimo_jax import __version__, sharding
from mimo_jax.analysis import flops, hardware
from mimo_jax.analysis.hardware import GIB, Hardware
from mimo_jax.analysis.hlo_cost import Cost, program_cost
from mimo_jax.analysis.topology import Topology
from mimo_jax.config import Config, ConfigError
from mimo_jax.data.loading.collate import padding_features, padding_image, padding_sample, stack_batch
from mimo_jax.models import mimo

MAX_MEMORY_FRACTION = 0.9  # largest fraction of a chip's memory that a step may take
_MAX_COMPILATIONS = 5  # limit for the search for the largest batch
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class LoweredStep(NamedTuple):
    """A training step lowered for a mesh, the shapes of the trained state that it returns, and how the frozen base is placed and why."""

    lowered: jax.stages.Lowered
    state: Any
    base_reason: str


# (config, mesh, batch: shapes from `abstract_batch`) -> the lowered step, such as `train.step.lower_step`.
LowerStep = Callable[[Config, Mesh, dict[str, jax.ShapeDtypeStruct]], LoweredStep]


def compile_step(
    config: Config, topology: Topology, lower: LowerStep, batch_per_chip: int, length: int | None = None, largest: bool = False
) -> dict:
    """A report on the step that `lower` makes, with batch_per_chip samples of `length` tokens (default: the largest bucket) per chip:

        config, topology, chips, chip (its name), mesh {axis: size}, base_reason, length, batch_per_chip, versions, compile_seconds
        peak_hbm_bytes, argument_bytes, output_bytes, temp_bytes, alias_bytes, hbm_bytes (available per chip), fits (in 90 % of that)
        flops_per_sample (needed), program_flops (matrix products of the program per chip, without those inside kernels)
        hbm_traffic_bytes (per chip), collectives [{kind, axes, network, count, bytes (sent per chip)}]
        estimate {compute_s, memory_s, link_s, network_s, step_s, bound, samples_per_second, samples_per_second_per_chip, mfu}
        remedies (flags that need less memory, if the step does not fit)
        frozen_outputs (outputs that are not trained state: must be empty), uncounted_loops
        largest_batch (per chip; None unless `largest`), out_of_memory (the compiler's message if it runs out of memory, else None)

    All values are for one step. Unknown values are None: estimates for a CPU, and everything that is read from the program if the
    compiler runs out of memory; peak_hbm_bytes is then what the compiler says that it needs. Raises ConfigError for a batch or a config
    that cannot be split over the mesh."""
    config = copy.deepcopy(config)
    length = length or config.buckets()[-1]
    if length > config.model.llm.max_length:
        raise ConfigError(f"--length {length}: is more than config.model.llm.max_length ({config.model.llm.max_length}); lower it")
    if topology.slices > 1:
        config.mesh.slices = config.mesh.slices or topology.slices
    mesh = sharding.make_mesh(config.mesh, topology.devices())
    unit = _batch_unit(config, mesh)
    if batch_per_chip % unit:
        raise ConfigError(
            f"--batch-per-chip {batch_per_chip}: must be a multiple of {unit}, with config.data.samples_per_image "
            f"{config.data.samples_per_image}, config.train.grad_accum_steps {config.train.grad_accum_steps} and this mesh"
        )
    report = _compile_report(config, topology, lower, mesh, batch_per_chip, length)
    report["largest_batch"] = None
    if largest and report["hbm_bytes"]:
        report["largest_batch"] = largest_batch(report, unit, lambda batch: _compile_report(config, topology, lower, mesh, batch, length))
    return report


def _batch_unit(config: Config, mesh: Mesh) -> int:
    """The number that the batch per chip must be a multiple of, so that the mesh can split the images."""
    parts = config.data.samples_per_image * sharding.num_batch_shards(mesh) * config.train.grad_accum_steps
    return parts // math.gcd(parts, mesh.size)


def abstract_batch(config: Config, mesh: Mesh, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch of `data.batch_size` samples, as the loader makes it."""
    views = padding_image(config.model)
    if config.data.features:
        features = {key: np.zeros(shape, np.uint16) for key, shape in mimo.feature_shapes(config).items()}
        views = padding_features(features, config.model)
    one = stack_batch([{**views, "samples": [padding_sample(config)] * config.data.samples_per_image}], length)
    images, place = config.data.batch_size // config.data.samples_per_image, sharding.batch_sharding(mesh)
    return {key: jax.ShapeDtypeStruct((images * x.shape[0], *x.shape[1:]), x.dtype, sharding=place) for key, x in one.items()}


def _compile_report(config: Config, topology: Topology, lower: LowerStep, mesh: Mesh, batch_per_chip: int, length: int) -> dict:
    config.data.batch_size = batch_per_chip * topology.chips
    step = lower(config, mesh, abstract_batch(config, mesh, length))
    row = hardware.find_hardware(mesh.devices.flat[0].device_kind)
    needed = sum(flops.step(config, length).values())
    report = {
        "config": config.name,
        "topology": str(topology),
        "chips": topology.chips,
        "chip": row.name if row else mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "base_reason": step.base_reason,
        "length": length,
        "batch_per_chip": batch_per_chip,
        "versions": _versions(topology),
        "hbm_bytes": row.memory if row else None,
        "flops_per_sample": needed,
    }
    report["frozen_outputs"] = frozen_outputs(step.state, step.lowered.out_info)
    since = time.perf_counter()
    try:
        compiled, failure = step.lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, failure = None, str(error)
    report["compile_seconds"] = round(time.perf_counter() - since, 1)
    report |= _memory(compiled, failure, mesh.devices.flat[0].platform)
    peak = report["peak_hbm_bytes"]
    report["fits"] = peak is not None and peak <= MAX_MEMORY_FRACTION * row.memory if row else None
    report["remedies"] = _remedies(config, mesh, batch_per_chip) if report["fits"] is False else []
    cost = program_cost(compiled.as_text(), dict(mesh.shape)) if compiled else None
    report["program_flops"], report["hbm_traffic_bytes"] = (cost.flops, cost.memory) if cost else (None, None)
    report["collectives"] = _collectives(cost) if cost else None
    report["uncounted_loops"] = sorted(cost.unknown) if cost else None
    report["estimate"] = estimate(report, row) if cost and row else None
    return report


def _versions(topology: Topology) -> dict[str, str]:
    names = ["jax", "jaxlib", "flax", "optax", *(["libtpu"] if topology.kind != "cpu" else [])]
    return {"mimo_jax": __version__} | {name: importlib.metadata.version(name) for name in names}


def frozen_outputs(state: Any, outputs: Any) -> list[str]:
    """Paths of outputs of a step that are arrays of more than one element and not part of the trained state."""
    remaining = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
    extra = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        remaining[leaf.shape, leaf.dtype] -= 1
        if remaining[leaf.shape, leaf.dtype] < 0 and math.prod(leaf.shape) > 1:
            extra.append(jax.tree_util.keystr(path))
    return extra


def _memory(compiled: jax.stages.Compiled | None, failure: str | None, platform: str) -> dict:
    """Bytes per device. The CPU compiler reports no peak, so there it is the sum of all arrays of the program."""
    names = {f"{name}_bytes": f"{name}_size_in_bytes" for name in ("argument", "output", "temp", "alias")}
    if compiled is None:
        found = re.search(r"(?:Used|temporaries \() ?([\d.]+)([KMGT])", failure)
        needed = int(float(found[1]) * _UNITS[found[2]]) if found else None
        return {"peak_hbm_bytes": needed, **dict.fromkeys(names), "out_of_memory": failure.splitlines()[0]}
    memory = compiled.memory_analysis()
    sizes = {name: getattr(memory, attribute) for name, attribute in names.items()}
    peak = memory.peak_memory_in_bytes
    if platform == "cpu":
        peak = sizes["argument_bytes"] + sizes["output_bytes"] - sizes["alias_bytes"] + sizes["temp_bytes"]
    return {"peak_hbm_bytes": peak, **sizes, "out_of_memory": None}


def _remedies(config: Config, mesh: Mesh, batch_per_chip: int) -> list[str]:
    """Changes that need less memory, the cheapest first."""
    made = []
    if config.mesh.frozen_sharding != "sharded":
        made.append("--config.mesh.frozen_sharding=sharded")
    if mesh.shape["data"] > 1:
        made.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh.shape['data'] * mesh.shape['fsdp']}")
    if config.model.remat != "full":
        made.append("--config.model.remat=full")
    if batch_per_chip > 1:
        parts = 2 * config.train.grad_accum_steps
        made += [f"--config.train.grad_accum_steps={parts}"] if batch_per_chip % parts == 0 else []
        made.append(f"--batch-per-chip {batch_per_chip // 2}")
    return [*made, "more chips"]


def _collectives(cost: Cost) -> list[dict]:
    rows = [
        {"kind": kind, "axes": list(axes), "network": "slice" in axes, "count": round(count), "bytes": round(sent)}
        for (kind, axes), (count, sent) in cost.collectives.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def estimate(report: dict, row: Hardware) -> dict:
    """The fastest possible step according to the roofline, from the report on its program."""
    samples = report["batch_per_chip"]
    needed = report["flops_per_sample"] * samples
    sent = {network: sum(c["bytes"] for c in report["collectives"] if c["network"] is network) for network in (False, True)}
    seconds = {
        "compute": max(needed, report["program_flops"]) / row.flops,
        "memory": report["hbm_traffic_bytes"] / row.bandwidth,
        "link": sent[False] / row.link,
        "network": sent[True] / row.network,
    }
    bound = max(seconds, key=seconds.get)
    step = seconds[bound]
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "step_s": step,
        "bound": bound,
        "samples_per_second": samples * report["chips"] / step,
        "samples_per_second_per_chip": samples / step,
        "mfu": needed / step / row.flops,
    }


def largest_batch(first: dict, unit: int, compile_with: Callable[[int], dict]) -> int:
    """The largest batch per chip that fits, a multiple of `unit`; 0 if none fits. Memory is nearly linear in it, so few are compiled."""
    room = MAX_MEMORY_FRACTION * first["hbm_bytes"]
    known = {first["batch_per_chip"] // unit: first["peak_hbm_bytes"] or math.inf}
    for _ in range(_MAX_COMPILATIONS):
        fits = max((count for count, peak in known.items() if peak <= room), default=0)
        over = min((count for count, peak in known.items() if peak > room), default=math.inf)
        if over == fits + 1:
            break
        nearest = sorted((abs(peak - room), count) for count, peak in known.items() if peak < math.inf)[:2]
        slope = (known[nearest[1][1]] - known[nearest[0][1]]) / (nearest[1][1] - nearest[0][1]) if len(nearest) == 2 else 0.0
        if over < math.inf and known[over] == math.inf:  # the compiler did not report how much memory it needs
            guess = (fits + over) // 2
        elif slope > 0:
            guess = math.floor(nearest[0][1] + (room - known[nearest[0][1]]) / slope)
        else:
            guess = 2 * fits or over // 2
        guess = int(min(max(guess, fits + 1), over - 1))
        known[guess] = compile_with(guess * unit)["peak_hbm_bytes"] or math.inf
    return unit * max((count for count, peak in known.items() if peak <= room), default=0)


def table(report: dict) -> str:
    """A report as text."""
    mesh = " x ".join(f"{size} {axis}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['config']} on {report['topology']}: {report['chips']} chips ({report['chip']}), mesh {mesh}",
        report["base_reason"],
        f"{report['batch_per_chip']} samples per chip, {report['length']} tokens each; compiled in {report['compile_seconds']:.0f} s",
        "memory per chip:",
    ]
    for name in ("argument", "output", "temp"):
        if report[f"{name}_bytes"] is not None:
            about = f"  ({_size(report['alias_bytes'])} share memory with arguments)" if name == "output" else ""
            lines.append(f"  {name + 's':12}{_size(report[f'{name}_bytes']):>12}{about}")
    if report["peak_hbm_bytes"] is not None:
        of = f"  of {_size(report['hbm_bytes'])}" if report["hbm_bytes"] else ""
        lines.append(f"  {'peak':12}{_size(report['peak_hbm_bytes']):>12}{of}")
    if report["out_of_memory"]:
        lines.append(f"  the compiler ran out of memory: {report['out_of_memory']}")
    if report["collectives"]:
        lines.append("sent per chip and step:")
        lines += [
            f"  {row['kind']:20}over {', '.join(row['axes']):20}{row['count']:6} x{_size(row['bytes']):>12} in all"
            for row in report["collectives"]
        ]
    if report["estimate"]:
        e = report["estimate"]
        parts = ", ".join(f"{name} {e[f'{name}_s']:.3f}" for name in ("compute", "memory", "link", "network"))
        lines.append(f"lower bounds of the step time, s: {parts}")
        lines.append(
            f"  bound by {e['bound']}: {e['samples_per_second']:.1f} samples/s ({e['samples_per_second_per_chip']:.2f} per chip), "
            f"MFU {e['mfu']:.0%} ({report['flops_per_sample'] / 1e12:.1f} TFLOP per sample)"
        )
    if report["frozen_outputs"]:
        lines.append(f"fault: the step returns frozen arrays: {', '.join(report['frozen_outputs'])}")
    if report["largest_batch"] is not None:
        lines.append(f"largest batch that fits: {report['largest_batch']} samples per chip")
    if report["fits"] is not None:
        share = f"{report['peak_hbm_bytes'] / report['hbm_bytes']:.0%} of a chip's memory" if report["peak_hbm_bytes"] else "out of memory"
        lines.append(f"it fits: {share}" if report["fits"] else f"it does not fit: {share}; try {', or '.join(report['remedies'])}")
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"
