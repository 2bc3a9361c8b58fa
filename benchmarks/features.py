"""What the feature cache saves: the same training steps with pictures and with features that `mimo data encode` wrote.

    python benchmarks/features.py --checkpoint runs/a --data data/phantom [--steps 20] [--images 256]

The config is tiny_lora without augmentation, from the checkpoint: CLIP and SAM's encoder are frozen. Of the data, the first images are
copied, so that nothing is written beside the original. Reported are the loss of each way, the median time of a step on the device
with the batch in hand, and the loader's samples per second without a cache of views.
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
import numpy as np  # noqa: E402

from configs import tiny_lora  # noqa: E402
from mimo_jax import checkpoint, pathtree, sharding  # noqa: E402
from mimo_jax.config import Config, SourceConfig  # noqa: E402
from mimo_jax.data.loader import make_loader  # noqa: E402
from mimo_jax.data.records import open_records, write_records  # noqa: E402
from mimo_jax.data.sources import open_sources  # noqa: E402
from mimo_jax.data.tokenizer import Tokenizer  # noqa: E402
from mimo_jax.train.encode import encode_checkpoint, fingerprint  # noqa: E402
from mimo_jax.train.loop import _initial_params  # noqa: E402
from mimo_jax.train.state import Plan  # noqa: E402
from mimo_jax.train.step import make_step  # noqa: E402


def config_for(run: str, data: Path, features: bool) -> Config:
    config = tiny_lora.get_config()
    config.init.path = run
    config.data.sources = {"copy": SourceConfig(path=str(data))}
    config.data.augment, config.data.features, config.data.cache_mb = False, features, 0
    config.validate()
    return config


def measure(config: Config, steps: int) -> tuple[list[float], float, float]:
    """(losses, median seconds of a step, samples per second of the loader)."""
    plan = Plan(config, sharding.make_mesh(config.mesh))
    state, frozen = plan.start(_initial_params(plan))
    tokenizer = Tokenizer(checkpoint.tokenizer_path(config.init.path), config.model)
    loader = make_loader(config, tokenizer, open_sources(config, "train"))
    if config.data.features:
        loader.use_features(fingerprint(config, pathtree.flatten(frozen)))
    start = time.perf_counter()
    batches = list(itertools.islice(loader, steps))
    loading = steps * config.data.batch_size / (time.perf_counter() - start)
    loader.close()
    step, losses, seconds = make_step(plan), [], []
    for batch in batches:
        start = time.perf_counter()
        state, metrics = step(state, frozen, jax.device_put(batch, sharding.of_batch(plan.mesh)))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return losses, statistics.median(seconds[2:]), loading


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
        plain, cached = (measure(config_for(args.checkpoint, data, features), args.steps) for features in (False, True))
    apart = np.abs(np.array(cached[0]) / np.array(plain[0]) - 1)
    print("| | pictures | features |\n|---|---|---|")
    print(f"| loss, first and last step | {plain[0][0]:.5f}, {plain[0][-1]:.5f} | {cached[0][0]:.5f}, {cached[0][-1]:.5f} |")
    print(f"| a step, ms, median | {1000 * plain[1]:.0f} | {1000 * cached[1]:.0f} |")
    print(f"| loader, samples/s | {plain[2]:.0f} | {cached[2]:.0f} |")
    print(f"\nloss apart, relative: first step {apart[0]:.1e}, at most {apart.max():.1e} in {args.steps} steps that each train on")


if __name__ == "__main__":
    main()
