"""LiteMedSAM's image encoder (TinyViT, 75 GFLOP) here and in PyTorch on the same cores, alternated in one process.

python benchmarks/lite_encoder.py [--weights lite_medsam.pth --threads 2 --runs 9]

The PyTorch encoder is that of the tests, with the names and the layout (NCHW) of the published one. Prints the median time of each, the
time of the processor that all threads used, and the difference of their features. Without --weights, they are random."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else the threads of torch take the cores while they wait for work

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--weights", type=Path, help="lite_medsam.pth")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--runs", type=int, default=9)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before jax counts the cores
    measure(args.weights, args.runs)


def measure(weights: Path | None, runs: int) -> None:
    import jax

    from mimo_jax.model_config import TinyVitConfig
    from mimo_jax.models import scan
    from tests.models.test_tiny_vit import brought_here
    from tests.models.torch_tiny_vit import random_tiny_vit

    cfg = TinyVitConfig()
    there = random_tiny_vit(cfg)
    if weights is not None:
        tensors = torch.load(weights, weights_only=True)
        own = {key.removeprefix("image_encoder."): value for key, value in tensors.items() if key.startswith("image_encoder.")}
        there.load_state_dict(own, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        graphdef, params = brought_here(cfg, there, Path(folder))
    x = np.random.default_rng(0).random((1, 256, 256, 3), np.float32)
    x_there = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    params = jax.tree.map(jax.numpy.asarray, params)
    encode = jax.jit(lambda params, x: scan.bind(graphdef, params)(x))

    def torch_encode() -> np.ndarray:
        with torch.inference_mode():
            return there(x_there).permute(0, 2, 3, 1).numpy()

    timed = {"torch": torch_encode, "mimo_jax": lambda: np.asarray(encode(params, x))}
    features = {name: encoder() for name, encoder in timed.items()}  # the first run compiles
    difference = np.linalg.norm(features["mimo_jax"] - features["torch"]) / np.linalg.norm(features["torch"])
    times = {name: [] for name in timed}
    for _ in range(runs):
        for name, encoder in timed.items():
            times[name].append(seconds(encoder))
    wall, busy = ({name: statistics.median(pair[k] for pair in pairs) for name, pairs in times.items()} for k in (0, 1))
    for name in timed:
        print(f"{name}: median {wall[name]:.2f} s, {busy[name]:.2f} s of processor time, of {runs} runs")
    ratios = [f"{each['mimo_jax'] / each['torch']:.2f}" for each in (wall, busy)]
    print(f"mimo_jax / torch: {ratios[0]} in time, {ratios[1]} in processor time; features differ by {difference:.1e} (relative L2)")


def seconds(function: Callable) -> tuple[float, float]:
    """(time, time of the processor) of a call."""
    start, busy = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    main()
