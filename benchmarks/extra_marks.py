"""IoU of a structure marked with a box and one more mark that is true of it, minus its IoU with the box alone.

python benchmarks/extra_marks.py --checkpoint runs/demo/run --data runs/demo/phantom [--split test] [--questions 200]
"""

from __future__ import annotations

import argparse

import numpy as np

from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.loading.sources import open_source
from mimo_jax.data.prompts import Prompts, draw_outside, draw_prompts, joined
from mimo_jax.infer.engine.requests import Request
from mimo_jax.infer.predictor import Mimo

ROW = 16  # requests answered together
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    mimo = Mimo.load(args.checkpoint)
    asked = questions(open_source(args.data, args.split), args.questions)
    kinds = list(asked[0][2])
    ious = {kind: iou_of(mimo, [(pixels, text, marks[kind], truth) for pixels, text, marks, truth in asked]) for kind in kinds}
    rng = np.random.default_rng(0)
    print(f"{mimo.origin}\n{len(asked)} questions; mean IoU with the box alone {ious['box'].mean():.4f}")
    for kind in kinds[1:]:
        difference = ious[kind] - ious["box"]
        means = rng.choice(difference, (RESAMPLES, len(difference))).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        print(f"{kind:32} {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")


def questions(source, count: int) -> list[tuple[np.ndarray, str, dict[str, Prompts], np.ndarray]]:
    """(image, question of perspective II, prompts by kind, bool [H, W] mask) of the first structures that are pointed at, at most one of
    an image."""
    found: list = []
    for number in range(len(source)):
        record = source[number]
        pointed = [s for s in record.samples if s.perspective == "II" and len(s.targets) == 1 and not s.targets[0].absent]
        if pointed and len(found) < count:
            truth = np.any([record.mask(mask_id).decode() for mask_id in pointed[0].targets[0].mask_ids], axis=0)
            found.append((record_image(record), pointed[0].turns[0].text, marked(truth, np.random.default_rng(number)), truth))
    return found


def marked(mask: np.ndarray, rng: np.random.Generator) -> dict[str, Prompts]:
    box = draw_prompts(mask, rng, ("box",))
    points = draw_prompts(mask, rng, ("point",)).points
    more = {
        "a point inside": Prompts(points=points[:1]),
        "a scribble": draw_prompts(mask, rng, ("scribble",)),
        "a point outside": draw_outside(mask, rng, mask),
        "a point inside, one outside": joined([Prompts(points=points[:1]), draw_outside(mask, rng, mask)]),
    }
    return {"box": box} | {f"box and {kind}": joined([box, marks]) for kind, marks in more.items()}


def iou_of(mimo: Mimo, asked) -> np.ndarray:
    """float64 [questions]: IoU of the union of an answer's masks."""
    ious = []
    for at in range(0, len(asked), ROW):
        row = asked[at : at + ROW]
        for answer, (*_, truth) in zip(mimo.predict([Request(p, text, marks) for p, text, marks, _ in row]), row, strict=True):
            union = np.any([entity.mask for entity in answer.entities], axis=0) if answer.entities else np.zeros_like(truth)
            ious.append((union & truth).sum() / (union | truth).sum())
    return np.array(ious)


if __name__ == "__main__":
    main()
