"""How well images and questions unlike the training data are recognised, and what `generate.zoom` does for small structures.

python benchmarks/familiarity.py --checkpoint runs/demo/run --data runs/demo/phantom --other FOLDER_OF_IMAGES
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.loading.sources import open_source
from mimo_jax.eval.familiarity import fit_checkpoint
from mimo_jax.infer.engine.requests import Request
from mimo_jax.infer.predictor import Mimo

STRANGE = ("Segment the unicorn.", "Segment everything", "请分割肝脏", "Segmentez le foie", "What is the meaning of life?")
ENLARGED, ASKED, ROW = 6, 24, 8  # the canvas is so many times as large as a phantom; phantoms asked about; images encoded together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "data", "other"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    mimo = Mimo.load(args.checkpoint)
    fitted = fit_checkpoint(mimo, args.data)
    test = open_source(args.data, "test")
    likeness(mimo, fitted, test, sorted(Path(args.other).iterdir()))
    zoom(mimo, test)


def likeness(mimo, fitted, test, others) -> None:
    known = distances(mimo, fitted, [record_image(test[i]) for i in range(len(test))])
    strange = distances(mimo, fitted, [open_image(path) for path in others])
    auroc = (known[:, None] < strange[None]).mean()
    print(f"images: AUROC {auroc:.4f}")
    for name, values in (("test", known), ("other", strange)):
        print(f"images: flagged {np.mean(values > 1):.1%} of {len(values)} {name}")
    asked = [turn.text for i in range(len(test)) for sample in test.samples(i) for turn in sample.turns[::2]]
    for name, questions in (("test", asked), ("strange", STRANGE)):
        flagged = [not fitted.likeness(fitted.readable(question), None).question for question in questions]
        print(f"questions: flagged {np.mean(flagged):.1%} of {len(flagged)} {name}")


def distances(mimo, fitted, images) -> np.ndarray:
    rows = [row for at in range(0, len(images), ROW) for row in mimo.pooled_features(images[at : at + ROW])]
    return fitted.distances(np.array(rows)) / fitted.image_limit


def zoom(mimo, test) -> None:
    """IoU of structures of phantoms that are laid on a larger black canvas, so that they are ENLARGED times smaller for the model."""
    requests, truths = [], []
    for number in range(len(test)):
        record = test[number]
        sample = next((s for s in record.samples if s.perspective == "I" and len(s.targets) == 1 and not s.targets[0].absent), None)
        if sample is None or len(requests) == ASKED:
            continue
        pixels = record_image(record)
        height, width = pixels.shape[:2]
        canvas, truth = np.zeros((height * ENLARGED, width * ENLARGED, 3), np.uint8), np.zeros((height * ENLARGED, width * ENLARGED), bool)
        at = np.s_[2 * height : 3 * height, 2 * width : 3 * width]
        canvas[at] = pixels
        truth[at] = np.any([record.mask(mask_id).decode() for mask_id in sample.targets[0].mask_ids], axis=0)
        requests.append(Request(canvas, sample.turns[0].text))
        truths.append(truth)
    for on in (False, True):
        mimo.config.generate.zoom = on
        ious = [best(mimo.predict([request])[0], truth) for request, truth in zip(requests, truths, strict=True)]
        print(f"zoom {on}: mean IoU {np.mean(ious):.3f} of {len(ious)} structures, above 0.5: {np.mean(np.array(ious) > 0.5):.1%}")


def best(answer, truth: np.ndarray) -> float:
    return max(((e.mask & truth).sum() / (e.mask | truth).sum() for e in answer.entities), default=0.0)


if __name__ == "__main__":
    main()
