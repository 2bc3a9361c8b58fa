"""Calibration of scores: fitted on val and measured on test, for subsets of the features; and false positives for absent structures.

    python benchmarks/calibration.py --checkpoint runs/demo/run --data runs/demo/phantom
    python benchmarks/calibration.py --checkpoint runs/demo/run --data runs/demo/phantom --images normal/*.png

--images: files without a lesion, for questions that ask for one.
"""

from __future__ import annotations

import argparse
import dataclasses

from mimo_jax.data.images.open_image import open_image
from mimo_jax.data.loading.sources import open_source
from mimo_jax.eval.calibrate import calibrate
from mimo_jax.eval.evaluate import collect_results
from mimo_jax.eval.selection import select_samples
from mimo_jax.eval.standard_metrics import GROUNDED, score_quality
from mimo_jax.infer.answers.calibration import Calibration
from mimo_jax.infer.predictor import Mimo, Request

# Name -> the features that the fit may use; the others are set to a constant.
PARTS = {
    "predicted IoU, <SEG>": ("iou", "seg_prob"),
    "and words": ("iou", "seg_prob", "word_prob"),
    "and pixels": ("iou", "seg_prob", "pixel_iou"),
    "all": ("iou", "seg_prob", "word_prob", "pixel_iou"),
}
QUESTIONS = ("Segment the lesion.", "Segment the tumor.", "Is there a tumor? Outline it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", nargs="*", default=[])
    args = parser.parse_args()
    mimo = Mimo.load(args.checkpoint)
    print(mimo.origin)
    calibration, fitted = calibrate(mimo, open_source(args.data, "val"), None, GROUNDED, "val")
    test = open_source(args.data, "test")
    results = collect_results(mimo, test, select_samples(test, None, GROUNDED))

    print(f"\n{len(fitted.segmented)} masks of val, {len(results.segmented)} of test")
    print(f"{'':24}{'bin error':>12}{'Spearman':>12}{'AUROC':>12}{'below':>12}")
    _row("not calibrated", score_quality(results.segmented, calibration)["plain"])
    for name, used in PARTS.items():
        fit = Calibration.fit(_with_features(fitted.segmented, used), {})
        _row(name, score_quality(_with_features(results.segmented, used), fit)["calibrated"])
    score = score_quality(results.segmented, calibration)
    print("\nuncertain, for IoU < 0.5:")
    for kind in ("plain", "calibrated"):
        print(f"{kind:24} precision {score[kind]['uncertain']['precision']} recall {score[kind]['uncertain']['recall']}")

    absent = {n: [i for i, s in enumerate(test.samples(n)) if s.targets and all(t.absent for t in s.targets)] for n in range(len(test))}
    nothing = collect_results(mimo, test, {n: indices for n, indices in absent.items() if indices})
    scores = calibration.scores([evidence for evidence, _ in nothing.segmented])
    not_abstained = sum(not a.abstained for a in nothing.abstentions)
    count = len(nothing.abstentions)
    print(f"\nphantoms without the requested structures: {not_abstained} of {count} answers have masks, {len(scores)} in total")
    print(f"of these below the threshold ({calibration.uncertain_below:.2f}): {int((scores < calibration.uncertain_below).sum())}")

    mimo.calibration = calibration
    images = mimo.encode([open_image(path) for path in args.images]) if args.images else []
    for question in QUESTIONS if images else ():
        answers = mimo.predict([Request(image, question) for image in images])
        shown = [f"{e.phrase} {e.score:.2f}{' uncertain' if e.uncertain else ''}" for answer in answers for e in answer.entities]
        with_masks = sum(bool(answer.entities) for answer in answers)
        print(f"{question} {with_masks} of {len(answers)} images with masks: {'; '.join(shown) or 'none'}")


def _row(name: str, score: dict) -> None:
    print(f"{name:24}" + "".join(f"{score[key]:12.3f}" for key in ("expected_calibration_error", "spearman", "auroc", "below")))


def _with_features(pairs: list, used: tuple[str, ...]) -> list:
    rest = {part.name: 0.5 for part in dataclasses.fields(pairs[0][0]) if part.name not in used}
    return [(dataclasses.replace(evidence, **rest), iou) for evidence, iou in pairs]


if __name__ == "__main__":
    main()
