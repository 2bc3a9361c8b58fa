"""10,000 valid and invalid requests of every kind to one model in one process: answers, refusals, faults, memory.

    python benchmarks/fuzz.py [--requests 10000] [--checkpoint runs/a]

Without a checkpoint, a tiny model with random weights answers. A fault is a result that is neither an answer nor a one-line error, or that
needs more than 30 s. The exit code is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mimo_jax.infer.predictor import Mimo  # noqa: E402
from tests.data.handmade import tokenizer  # noqa: E402
from tests.infer.fuzzing import Fuzz  # noqa: E402
from tests.tiny_config import random_params, tiny_config  # noqa: E402


def resident() -> float:
    """Resident memory of this process, MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, of damaged files
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.checkpoint:
            mimo = Mimo.load(args.checkpoint)
        else:
            config = tiny_config(max_turns=2)
            mimo = Mimo(config, random_params(config), tokenizer(folder))
        fuzz = Fuzz(mimo, folder, args.seed)
        for number in range(1, args.requests + 1):
            fuzz.once()
            if number % max(1, args.requests // 10) == 0:
                print(
                    f"{number}: {fuzz.answers} answers, {fuzz.refused} refused, {len(fuzz.faults)} faults, {resident():.0f} MiB", flush=True
                )
    print(f"slowest {fuzz.slowest:.1f} s")
    for fault, count in Counter(fault.split(" for {")[0] for fault in fuzz.faults).most_common():
        print(f"{count} x {fault}")
    return 1 if fuzz.faults else 0


if __name__ == "__main__":
    sys.exit(main())
