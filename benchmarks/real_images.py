"""Fine-tunes a demo's checkpoint on a manifest of real images with several seeds, and reports the held-out mIoU of each entity.

    python benchmarks/real_images.py --manifest ../real/manifest.jsonl --init runs/demo/run --workdir runs/real --seeds 3

The split is by patient or case and the same for all seeds. Each seed is one timed `mimo train` and one `mimo eval`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def mimo(*arguments) -> float:
    """Run one command and return its seconds."""
    words = [str(argument) for argument in arguments]
    print("$ mimo", *words, flush=True)
    since = time.monotonic()
    subprocess.run([sys.executable, "-m", "mimo_jax.cli", *words], check=True)
    return time.monotonic() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--init", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    reports, seconds = [], []
    for seed in range(args.seeds):
        run = args.workdir / f"seed{seed}"
        seconds.append(
            mimo(
                *("train", "--config", "configs/tiny_finetune.py", "--init", args.init, "--data", args.manifest, "--workdir", run),
                *(f"--config.train.seed={seed}", f"--config.data.seed={seed}", f"--config.train.steps={args.steps}"),
                *("--config.data.weights.III=1", "--config.data.weights.IV=1"),  # lungs and heads are in the knowledge base
            )
        )
        out = args.workdir / f"report{seed}.json"
        overlays = args.workdir / f"overlays{seed}"
        mimo("eval", "--checkpoint", run, "--data", args.manifest, "--split", "test", "--out", out, "--overlays", overlays)
        reports.append(json.loads(out.read_text()))
    print(f"\n{'entity':34}{'mIoU':>8}{'mean mask':>11}  per seed")
    for entity in reports[0]["per_entity"]:
        parts = [report["per_entity"][entity] for report in reports]
        ious = [part["miou"] for part in parts]
        shown = " ".join(f"{value:.3f}" for value in ious)
        numbers = f"(n {parts[0]['n']}, cases {parts[0]['groups']})"
        print(f"{entity:34}{np.mean(ious):8.3f}{parts[0]['mean_mask_miou']:11.3f}  {shown}  {numbers}")
    print("not evaluable:", ", ".join(reports[0]["not_evaluable"]))
    print("training seconds:", " ".join(f"{s:.0f}" for s in seconds))


if __name__ == "__main__":
    main()
