"""Savings of the feature cache: the same training steps with images and with features that `mimo data encode` wrote.

    python benchmarks/features.py --checkpoint runs/a --data data/phantom [--steps 20] [--images 256]

The config is tiny_lora without augmentation, starting from the checkpoint: CLIP and SAM's encoder are frozen. The first images of the data
are copied, so that nothing is written next to the original. The report has the loss of each run, the median step time without loading,
and the loader's samples per second without a cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from configs import tiny_lora  # noqa: E402
from mimo_jax import pathtree, sharding  # noqa: E402
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import Config, SourceConfig  # noqa: E402
from mimo_jax.data.loading.encode_features import encode_checkpoint, fingerprint  # noqa: E402
from mimo_jax.data.loading.loader import make_loader  # noqa: E402
from mimo_jax.data.loading.sources import open_sources  # noqa: E402
from mimo_jax.data.records import open_records, write_records  # noqa: E402
from mimo_jax.data.tokenizer import load_tokenizer  # noqa: E402
from mimo_jax.models import mimo
from mimo_jax.train.loop import _initial_params  # noqa: E402
from mimo_jax.train.state import TrainSetup  # noqa: E402
from mimo_jax.train.step import make_step  # noqa: E402


def config_for(run: str, data: Path, features: bool) -> Config:
    config = tiny_lora.get_config()
    config.init.path = run
    config.data.sources = {"copy": SourceConfig(path=str(data))}
    config.data.augment, config.data.features, config.data.cache_mb = False, features, 0
    config.validate()
    return config


class TrainingRun:
    """Training with images or with features on preloaded batches. loading: samples per second of the loader."""

    def __init__(self, config: Config, steps: int):
        self.plan = TrainSetup(config, sharding.make_mesh(config.mesh))
        self.state, self.frozen = self.plan.start(_initial_params(self.plan))
        self.step = make_step(self.plan)
        tokenizer = load_tokenizer(checkpoint.tokenizer_path(config.init.path), config.model)
        loader = make_loader(config, tokenizer, open_sources(config, "train"))
        if config.data.features:
            loader.use_features(fingerprint(config, pathtree.flatten(self.frozen)), mimo.feature_shapes(config))
        start = time.perf_counter()
        self.batches = list(itertools.islice(loader, steps))
        self.loading = steps * config.data.batch_size / (time.perf_counter() - start)
        loader.close()
        self.fixed, self.trained, self.seconds, self.busy = [], [], [], []

    def run(self, number: int, train: bool) -> None:
        """A step on one batch: from the current state if `train`, else from the initial parameters without updating them."""
        batch = jax.device_put(self.batches[number], sharding.batch_sharding(self.plan.mesh))
        state = self.state if train else jax.tree.map(jnp.copy, self.state)
        start, used = time.perf_counter(), time.process_time()
        state, metrics = self.step(state, self.frozen, batch)
        (self.trained if train else self.fixed).append(float(metrics["loss"]))
        self.seconds.append(time.perf_counter() - start)
        self.busy.append(time.process_time() - used)
        if train:
            self.state = state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "copy"
        source = open_records(args.data, "train")
        write_records(data, (source[i] for i in range(min(args.images, len(source)))), {})
        start = time.perf_counter()
        encoded = encode_checkpoint(args.checkpoint, data)
        print(f"encoded {encoded.written} images in {time.perf_counter() - start:.1f} s, compiling included\n")
        plain, cached = (TrainingRun(config_for(args.checkpoint, data, features), args.steps) for features in (False, True))
    for train, number in itertools.product((False, True), range(args.steps)):
        for way in (plain, cached):  # alternating, so that other jobs on the machine slow both
            way.run(number, train)
    print("| | images | features |\n|---|---|---|")
    losses = [f"{way.trained[0]:.5f}, {way.trained[-1]:.5f}" for way in (plain, cached)]
    print(f"| loss, first and last step | {' | '.join(losses)} |")
    for name in ("seconds", "busy"):
        times = [1000 * statistics.median(getattr(way, name)) for way in (plain, cached)]
        what = "" if name == "seconds" else ", on all cores together"
        print(f"| step, ms{what}, median | {times[0]:.0f} | {times[1]:.0f} |")
    print(f"| loader, samples/s | {plain.loading:.0f} | {cached.loading:.0f} |")
    fixed, trained = (np.abs(np.array(getattr(cached, n)) / np.array(getattr(plain, n)) - 1) for n in ("fixed", "trained"))
    print(f"\nrelative loss difference: {args.steps} batches, same parameters: mean {fixed.mean():.1e}, maximum {fixed.max():.1e};")
    print(f"{args.steps} steps of separate training: maximum {trained.max():.1e}")


if __name__ == "__main__":
    main()
