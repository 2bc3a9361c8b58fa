"""SAM with box prompts, the row of the paper's tables that needs no language model: every structure that a prompted question (II and IV)
asks for is segmented from the tight box of its true mask, by the SAM of a checkpoint alone. In an import, that is the released SAM.

Axis letters: H, W height and width of the original image; n boxes; M side of the mask decoder's output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mimo_jax.config import PROMPTED
from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.loading.sources import open_source
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.schema import Record, Sample
from mimo_jax.data.transforms import mask_from_logits
from mimo_jax.errors import UserError
from mimo_jax.eval import scoring
from mimo_jax.eval.accumulator import Accumulator, GroundTruth, SampleResult, ground_truths
from mimo_jax.eval.compare import write_samples
from mimo_jax.eval.evaluate import write_report
from mimo_jax.eval.registry import values_by_sample
from mimo_jax.eval.report import make_report
from mimo_jax.eval.selection import select_samples, windows_of
from mimo_jax.geometry import box_to_corners, mask_to_box
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import ConfidenceFeatures
from mimo_jax.infer.engine.requests import EncodedImage
from mimo_jax.infer.predictor import Mimo
from mimo_jax.models import mimo as mimo_model
from mimo_jax.models import scan

METHOD = "SAM with the tight box of each true mask; the names are given"


class BoxPromptedSam:
    """SAM's prompt encoder and mask decoder of a loaded model, with boxes as the only prompts."""

    def __init__(self, mimo: Mimo):
        graphdef, _ = mimo_model.abstract(mimo.config)
        self.params = mimo.engine.params

        def segment(params, features, corners):
            model = scan.bind(graphdef, params)
            labels = jnp.broadcast_to(jnp.array([2, 3]), corners.shape[:-1])  # a box's top left and bottom right
            sparse = model.sam_prompt.embed_points(corners + 0.5, labels)
            features = jax.tree.map(lambda leaf: leaf[None], features)
            return model.sam_decoder(features, model.sam_prompt.dense_pe(), sparse[None], model.sam_prompt.no_mask())

        self._segment = jax.jit(segment)

    def masks(self, image: EncodedImage, boxes: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """(mask bool [H, W], predicted IoU) of each half-open box [n, 4] in pixels of the image."""
        padded = np.concatenate([boxes, np.repeat(boxes[:1], (1 << (len(boxes) - 1).bit_length()) - len(boxes), axis=0)])
        corners = image.sam_frame.to_frame(box_to_corners(padded)).astype(np.float32)
        logits, iou = jax.device_get(self._segment(self.params, image.features, corners))
        size = image.pixels.shape[:2]
        return [(mask_from_logits(logits[0, k, 0], image.sam_frame, *size), float(iou[0, k, 0])) for k in range(len(boxes))]


def collect_box_results(mimo: Mimo, records: Sequence[Record], chosen: dict[int, list[int]]) -> Accumulator:
    """Segment and score the chosen samples."""
    results, sam = Accumulator(), BoxPromptedSam(mimo)
    for window in tqdm(windows_of(chosen, mimo.config.generate.batch_size), desc="evaluate", unit="batch", disable=None):
        readable: list[tuple[Record, list[Sample], np.ndarray]] = []
        for number, indices in window.items():
            record = records[number]
            samples = [record.samples[i] for i in indices]
            try:
                readable.append((record, samples, record_image(record)))
            except UserError as error:
                results.unusable += [{"sample": sample.sample_id, "reason": str(error)} for sample in samples]
        encoded = mimo.encode([pixels for *_, pixels in readable]) if readable else []
        for (record, samples, _), image in zip(readable, encoded, strict=True):
            for sample in samples:
                _score(sam, record, sample, image, results)
    return results


def _score(sam: BoxPromptedSam, record: Record, sample: Sample, image: EncodedImage, results: Accumulator) -> None:
    results.samples[sample.perspective] += 1
    results.scored.append(SampleResult(sample.sample_id, record.group, scoring.digest(record, sample)))
    for turn in range(1, len(sample.turns), 2):
        truths = ground_truths(record, sample, turn)
        found = sam.masks(image, np.array([mask_to_box(truth.mask) for truth in truths])) if truths else []
        scoring.score_masks(record, sample, turn, truths, _answer(truths, found, image), {}, results)


def _answer(truths: Sequence[GroundTruth], found: Sequence[tuple[np.ndarray, float]], image: EncodedImage) -> Answer:
    entities = [
        Entity.of(k, truth.name, mask, ConfidenceFeatures(min(max(iou, 0.0), 1.0), 1.0, 1.0, 1.0))
        for k, (truth, (mask, iou)) in enumerate(zip(truths, found, strict=True))
    ]
    return Answer("", [], entities, False, "", image.pixels, Prompts())


def evaluate_sam_box(
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    split: str,
    out: str | os.PathLike,
    limit: int | None = None,
    base: str | os.PathLike | None = None,
    allow_untrained: bool = False,
) -> dict:
    """`mimo eval --sam-box`: write the report of box-prompted SAM, whose `method` says so. limit: the same samples as for `mimo eval`, of
    which those of II and IV are used. Raises UserError or DataError if an input cannot be read."""
    out = Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out}: cannot be written; give the path of a file in an existing folder")
    mimo = Mimo.load(checkpoint, base, allow_untrained)
    print(mimo.origin)
    records = open_source(data, split)
    chosen = {
        number: prompted
        for number, indices in select_samples(records, limit).items()
        if (prompted := [i for i in indices if records.samples(number)[i].perspective in PROMPTED])
    }
    results = collect_box_results(mimo, records, chosen)
    report = make_report(results) | {"method": METHOD, "checkpoint": str(checkpoint), "origin": mimo.origin, "data": str(data)}
    report |= {"split": split, "limit": limit}
    write_samples(values_by_sample(results), out)
    write_report(report, out)
    for name in ("miou", "ap50"):
        print(f"{name}: {', '.join(f'{p} {report[name][p]}' for p in PROMPTED)} ({METHOD})")
    print(f"report: {out}")
    return report
