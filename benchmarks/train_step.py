"""The training step of the tiny model on a CPU compared with the same model in PyTorch, with the same weights and batch, in one run.

    python benchmarks/train_step.py [--config configs/tiny.py] [--rounds 10]

Both use float32 and two cores. Loss and gradient norm must agree before anything is timed. Steps of our model and of torch, eager
and compiled, alternate, five of each per round; medians are reported. The optimizer is Adam for both, and also Muon for our model.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

CORES = 2
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # before XLA counts the cores for its thread pool

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.torch_mimo import TorchMimo, Training, on_device  # noqa: E402
from mimo_jax import sharding  # noqa: E402
from mimo_jax.config import Config  # noqa: E402
from mimo_jax.config_flags import load_config  # noqa: E402
from mimo_jax.train.state import TrainSetup  # noqa: E402
from mimo_jax.train.step import make_step  # noqa: E402
from tests.tiny_config import random_batch  # noqa: E402

STEPS, TOLERANCE = 5, 1e-4  # steps per side and round; maximum relative difference of loss and gradient norm


class JaxTraining:
    """The training step on one batch, starting from a copy of `params`."""

    def __init__(self, plan: TrainSetup, params: dict, batch: dict[str, np.ndarray]):
        self.state, self.frozen = plan.start(jax.tree.map(np.asarray, params))
        self.step, self.batch = make_step(plan), jax.device_put(batch, sharding.batch_sharding(plan.mesh))

    def __call__(self) -> tuple[float, float]:
        """(loss, gradient norm) before the update."""
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])


def plan_for(config: Config, optimizer: str) -> TrainSetup:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, optimizer=optimizer))
    return TrainSetup(config, sharding.make_mesh(config.mesh))


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median step time of each in seconds; their steps alternate."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(STEPS):
                started = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    config = load_config(["--config", args.config], {})
    torch.set_num_threads(CORES)
    length = config.buckets()[0]
    batch = random_batch(config, length=length)
    plan = plan_for(config, "adam")
    params = plan.initial_params(jax.random.key(0))
    host = jax.tree.map(np.asarray, params)
    theirs = on_device(batch, "cpu")
    eager, compiled = (Training(TorchMimo(config, host), config, compiled) for compiled in (False, True))
    calls = {
        "jax": JaxTraining(plan, params, batch),
        "torch, eager": lambda: eager(theirs),
        "torch, compiled": lambda: compiled(theirs),
    }
    print(
        f"{config.name}, {sum(plan.counts().values()) / 1e6:.2f} M parameters, {plan.counts()['trained'] / 1e6:.2f} M trained; batch of "
        f"{config.data.batch_size}, {length} tokens, {config.data.samples_per_image} samples per image; float32, {CORES} cores"
    )
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    (loss, norm), *others = (call() for call in calls.values())
    for name, (their_loss, their_norm) in zip(list(calls)[1:], others, strict=True):
        difference = abs(their_loss / loss - 1), abs(their_norm / norm - 1)
        print(
            f"{name}: loss {their_loss:.6f}, ours {loss:.6f}, relative difference {difference[0]:.1e}; "
            f"gradient norm {their_norm:.5f}, ours {norm:.5f}, relative difference {difference[1]:.1e}"
        )
        if max(difference) > TOLERANCE:
            sys.exit(f"{name} and ours differ by more than {TOLERANCE}")
    calls["jax, muon"] = JaxTraining(plan_for(config, "muon"), params, batch)
    for call in calls.values():
        call()  # compile and warm up
    taken = medians(calls, args.rounds)
    best = min(seconds for name, seconds in taken.items() if name.startswith("torch"))
    print("\n| | ms per step | relative to the faster torch |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / best:.2f} |")


if __name__ == "__main__":
    main()
