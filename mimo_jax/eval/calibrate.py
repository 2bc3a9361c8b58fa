"""Fit a checkpoint's scores on a split: its grounded questions are asked, and what is painted in answer is held against the truth."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mimo_jax.config import Config
from mimo_jax.data.loading.sources import open_source, open_sources
from mimo_jax.data.records import DataError
from mimo_jax.data.schema import Record
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.eval.accumulator import Accumulator
from mimo_jax.eval.evaluate import Joined, answered, choose, perspectives_of
from mimo_jax.eval.report import score_table
from mimo_jax.eval.standard_metrics import GROUNDED, score_quality
from mimo_jax.infer.answers.calibration import MIN_ENTITIES, UNCALIBRATED, Calibration, CalibrationError
from mimo_jax.infer.predictor import Mimo


def calibrate(
    mimo: Mimo, records: Sequence[Record], limit: int | None, perspectives: Sequence[str], split: str
) -> tuple[Calibration, Accumulator]:
    """Fitted on the answers to the samples of `records`, a source or a list (`limit` and `perspectives` as in `evaluate`), and those
    answers. CalibrationError, before anything is asked, where too little is marked in them; and where the model paints too little."""
    chosen = choose(records, limit, [p for p in perspectives if p in GROUNDED])
    marked = 0
    for number, indices in chosen.items():
        samples = records[number].samples if isinstance(records, list) else records.samples(number)
        marked += sum(not target.absent for i in indices for target in samples[i].targets)
    if marked < MIN_ENTITIES:
        raise CalibrationError(f"calibration: split {split} has {marked} marked structures to fit on, {MIN_ENTITIES} are needed")
    results = answered(mimo, records, chosen)
    return Calibration.fit(results.painted, {"split": split, "samples": sum(map(len, chosen.values()))}), results


def calibrate_checkpoint(
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    split: str,
    limit: int | None = None,
    base: str | os.PathLike | None = None,
    allow_untrained: bool = False,
) -> Calibration:
    """`mimo eval --calibrate`: fit on a split, keep it with the checkpoint's step, and print what it does on that split. Raises
    UserError or DataError, nothing written, for what cannot be read or is too little."""
    mimo = Mimo.load(checkpoint, base, allow_untrained)
    print(mimo.origin)
    path = mimo.calibration_path
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: may not be written; change its folder's permissions, or copy the checkpoint")
    calibration, results = calibrate(mimo, open_source(data, split), limit, perspectives_of(mimo.config), split)
    calibration.write(path)
    print("\n".join(score_table(score_quality(results.painted, calibration))))
    print(f"\ncalibration: {path}")
    return calibration


def calibrate_params(config: Config, params: dict, tokenizer: Tokenizer) -> Calibration:
    """At the end of training: fitted on `train.calibrate_samples` validation samples of the run's own sources. Where there are too
    few, that is said, and scores stay as they are."""
    try:
        sources = open_sources(config, "val")
        perspectives = [p for p, weight in config.data.weights.items() if weight]
        mimo = Mimo(config, params, tokenizer)
        return calibrate(mimo, Joined(sources.values()), config.train.calibrate_samples, perspectives, "val")[0]
    except (DataError, CalibrationError) as error:
        print(f"scores are not calibrated: {error}", file=sys.stderr)
        return UNCALIBRATED
