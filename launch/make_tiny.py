"""Make the model `tiny` that this package ships: phantoms, training, figures, model card. Anybody gets the same kind of model with

    python launch/make_tiny.py --workdir runs/make_tiny

which takes an hour on two cores. The same command resumes. The result replaces mimo_jax/checkpoints/shipped/tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from demo_steps import mimo

from mimo_jax.checkpoints import named

NAME = "tiny"
CARD = """# tiny

A MIMO of 2.6 million parameters that answers about phantoms: synthetic, medical-looking images of 96 to 160 pixels. It shows what the
software does, and it is a start for fine-tuning on two cores.

**Research use only.** It knows no real image. Nothing that it says or segments is a diagnosis.

| | |
|---|---|
| made by | `python launch/make_tiny.py`: `configs/tiny.py`, {steps} steps of 32 samples |
| trained on | nine tenths of {images} phantoms (`mimo data phantom --images {images} --seed 0`); no image of a patient |
| weights | drawn from a seed and trained; rounded to bfloat16 |
| licence | Apache-2.0 |

## Figures

On {samples} questions about phantoms of the test split, free-running, with 95 % intervals:

| measure | |
|---|---|
{rows}

Without looking (the mean mask of each structure): {baselines}.

## Limits

- Real images are outside of what it was trained on. It notices that for some of them (`understood: false`), and not for all.
- It knows the phrases of the questions' templates, and the structures of the phantoms. Other words are listed with the answer.
- It was trained on single turns, and on at most two structures an answer.
- Small and thin structures are missed more often than large ones.
"""
PERSPECTIVES = {"I": "named structures (I)", "II": "pointed at (II)", "III": "knowledge (III)", "IV": "knowledge, pointed at (IV)"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the data and of the run")
    parser.add_argument("--images", type=int, default=6000, help="number of phantoms (default: 6000)")
    parser.add_argument("--steps", type=int, default=2000, help="number of steps (default: 2000)")
    parser.add_argument("--samples", type=int, default=500, help="number of questions of the figures (default: 500)")
    args = parser.parse_args()
    data, run, report = (args.workdir / name for name in ("phantom", "run", "report.json"))
    if not data.exists():
        mimo("data", "phantom", "--out", data, "--images", args.images, "--seed", 0)
    mimo("train", "--config", "configs/tiny.py", "--data", data, "--workdir", run, f"--config.train.steps={args.steps}")
    os.environ["MIMO_HOME"] = str((args.workdir / "home").resolve())
    ship(run, "")
    mimo("eval", "--checkpoint", NAME, "--data", data, "--split", "test", "--limit", args.samples, "--out", report)
    ship(run, model_card(json.loads(report.read_text()), args.images, args.steps, args.samples))
    return 0


def ship(run: Path, card: str) -> None:
    """Replace the packed model by the newest step of a run."""
    shutil.rmtree(named.SHIPPED / NAME, ignore_errors=True)
    named.pack(run, named.SHIPPED / NAME, card)


def model_card(report: dict, images: int, steps: int, samples: int) -> str:
    """The model card with the figures of an evaluation."""

    def value(name: str, *path: str) -> str:
        number, interval = report[name], report["intervals"].get(name)
        for key in path:
            number, interval = number[key], interval and interval[key]
        return f"{number:.2f} ({interval[0]:.2f} to {interval[1]:.2f})" if interval else f"{number:.2f}"

    rows = [f"| mean overlap (IoU), {text} | {value('miou', kind)} |" for kind, text in PERSPECTIVES.items()]
    rows.append(f"| right name of what is pointed at | {value('naming_accuracy')} |")
    rows.append(f"| masks of structures that are not there | {value('no_target_fpr')} |")
    rows.append(f"| closed questions | {value('vqa_closed_accuracy')} |")
    baselines = ", ".join(f"{kind} {report['baselines']['mean_mask'][kind]:.2f}" for kind in PERSPECTIVES)
    return CARD.format(images=images, steps=steps, samples=samples, rows="\n".join(rows), baselines=baselines)


if __name__ == "__main__":
    sys.exit(main())
