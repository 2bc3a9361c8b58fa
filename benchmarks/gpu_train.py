"""Training steps of a whole model with random weights on the available device, compared with PyTorch in the same run: samples/s and MFU.

    python benchmarks/gpu_train.py                                                                 # mimo_7b, on a GPU
    python benchmarks/gpu_train.py --config configs/tiny_lora.py --batches 8 --length 64           # on a CPU, in minutes

Batches have images, or features of the frozen encoders (`config.data.features`). The PyTorch side trains like LISA:
transformers' Llama with peft's LoRA and gradient checkpointing, CLIP, segment-anything, bf16 by autocast, fused Adam. One GPU is used, and
each row is measured in a new process, so that all memory is free. MFU counts what the model needs (`mimo_jax/analysis/flops.py`), without
recomputation.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.torch_mimo import FEATURES, TorchMimo, Training, on_device  # noqa: E402
from mimo_jax import parameters, pathtree, sharding  # noqa: E402
from mimo_jax.analysis import flops, hardware
from mimo_jax.config import Config, MeshConfig  # noqa: E402
from mimo_jax.config_flags import load_config  # noqa: E402
from mimo_jax.models import mimo  # noqa: E402
from mimo_jax.train.state import TrainSetup  # noqa: E402
from mimo_jax.train.step import make_step  # noqa: E402
from tests.tiny_config import random_batch  # noqa: E402

WARM = 2  # warm-up steps that are not timed


class Row(NamedTuple):
    """seconds: median step time; memory: peak memory in GiB, None if the device does not report it."""

    device: str
    seconds: float
    memory: float | None


def settings(args: argparse.Namespace, batch: int, features: bool) -> Config:
    config = load_config(["--config", args.config, *args.overrides], {})
    config.data.batch_size, config.data.features, config.data.augment, config.train.grad_accum_steps = batch, features, False, 1
    config.data.buckets = str(args.length or config.buckets()[-1])
    config.validate()
    return config


def random_arrays(config: Config) -> dict[str, np.ndarray]:
    batch = random_batch(config, length=config.buckets()[0])
    if not config.data.features:
        return batch
    rng = np.random.default_rng(0)
    for key, shape in mimo.feature_shapes(config).items():
        values = rng.standard_normal((config.images(), *shape), np.float32)
        batch[key] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return {key: value for key, value in batch.items() if not key.startswith(("vision_", "sam_")) or key in FEATURES}


def median_seconds(step: Callable[[], float], repeats: int) -> float:
    taken = []
    for number in range(WARM + repeats):
        started = time.perf_counter()
        if not math.isfinite(step()):
            raise FloatingPointError("a loss that is not finite")
        if number >= WARM:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def ours(config: Config, repeats: int) -> Row:
    device = jax.devices()[0]
    plan = TrainSetup(config, sharding.make_mesh(MeshConfig(), [device]))
    state, frozen = plan.start(plan.initial_params(jax.random.key(0)))
    step, batch = make_step(plan), jax.device_put(random_arrays(config), sharding.batch_sharding(plan.mesh))

    def call() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    seconds, about = median_seconds(call, repeats), device.memory_stats()
    return Row(device.device_kind, seconds, about and about["peak_bytes_in_use"] / hardware.GIB)


def theirs(config: Config, repeats: int) -> Row:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = TorchMimo(config)
    training, batch = Training(model, config), on_device(random_arrays(config), device)
    seconds = median_seconds(lambda: training(batch)[0], repeats)
    if device == "cpu":
        return Row(device, seconds, None)
    return Row(torch.cuda.get_device_name(), seconds, torch.cuda.max_memory_allocated() / hardware.GIB)


def count(config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of trained and frozen parameters of both sides, without making arrays."""
    shapes = mimo.abstract(config)[1]
    trains, counts = parameters.multipliers(config, shapes), {"trained": 0, "frozen": 0}
    for path, leaf in pathtree.flatten(shapes).items():
        counts["frozen" if trains[path] is None else "trained"] += leaf.size
    with torch.device("meta"):
        return counts, TorchMimo(config).counts()


def measured(side: Callable, config: Config, repeats: int) -> Row | None:
    """The row of one side; None if it runs out of memory."""
    try:
        return side(config, repeats)
    except (jax.errors.JaxRuntimeError, torch.OutOfMemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def in_new_process(function: Callable, *args):
    """The result of `function` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/mimo_7b.py")
    parser.add_argument("--batches", default="4,8", help="samples per step")
    parser.add_argument("--length", type=int, default=0, help="tokens per sample; default: the config's longest bucket")
    parser.add_argument("--repeats", type=int, default=10)
    args, args.overrides = parser.parse_known_args()  # --config.… flags
    batches = [int(batch) for batch in args.batches.split(",")]
    config = settings(args, batches[0], features=False)
    our_counts, torch_counts = in_new_process(count, config)
    print(f"{config.name}, {config.buckets()[0]} tokens, {config.model.dtype}, remat {config.model.remat}")
    print(f"parameters: {our_counts}, torch: {torch_counts}")
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    if our_counts != torch_counts:
        sys.exit("the two models have different numbers of parameters")
    print("\n| | image encoders | batch | samples/s | ms per step | TFLOP/s | MFU | GiB | on |\n|---|---|---|---|---|---|---|---|---|")
    for features in (False, True):
        for batch in batches:
            config = settings(args, batch, features)
            for name, side in (("jax", ours), ("torch", theirs)):
                row = in_new_process(measured, side, config, args.repeats)
                start = f"| {name} | {'cached' if features else 'run'} | {batch} |"
                if row is None:
                    print(f"{start} out of memory |||||", flush=True)
                    continue
                rate, chip = batch / row.seconds, hardware.find_hardware(row.device)
                speed = rate * sum(flops.step(config, config.buckets()[0]).values())
                share = f"{speed / chip.flops:.1%}" if chip else "unknown"
                memory = "unknown" if row.memory is None else f"{row.memory:.1f}"
                print(
                    f"{start} {rate:.2f} | {1000 * row.seconds:.1f} | {speed / 1e12:.3f} | {share} | {memory} | {row.device} |", flush=True
                )


if __name__ == "__main__":
    main()
