"""Fit the confidence calibration of a checkpoint on a split: ask its grounded questions and compare the predicted with the true masks."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Sequence

from mimo_jax.checkpoints.checkpoint import FAMILIARITY
from mimo_jax.config import Config
from mimo_jax.data.loading.sources import open_source, open_sources
from mimo_jax.data.records import DataError
from mimo_jax.data.schema import Record
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.eval.accumulator import Accumulator
from mimo_jax.eval.evaluate import collect_results, supported_perspectives
from mimo_jax.eval.familiarity import fit_checkpoint
from mimo_jax.eval.report import score_table
from mimo_jax.eval.selection import ConcatSource, group_of, select_samples
from mimo_jax.eval.standard_metrics import GROUNDED, score_quality
from mimo_jax.infer.answers.calibration import MIN_ENTITIES, UNCALIBRATED, Calibration, CalibrationError
from mimo_jax.infer.predictor import Mimo


def calibrate(
    mimo: Mimo,
    records: Sequence[Record],
    limit: int | None,
    perspectives: Sequence[str],
    split: str,
    without: Collection[str] = (),
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Calibration, Accumulator]:
    """Returns (calibration, results it was fitted on) for the samples of `records`, a source or a list; `limit` and `perspectives` as in
    `evaluate`, `without` as in `select_samples`. stop, and several processes: see `collect_results`. Raises CalibrationError, before the
    model runs, if the samples have too few masks, and afterwards if the model predicts too few."""
    chosen = select_samples(records, limit, [p for p in perspectives if p in GROUNDED], without)
    num_annotated = 0
    for number, indices in chosen.items():
        samples = records[number].samples if isinstance(records, list) else records.samples(number)
        num_annotated += sum(not target.absent for i in indices for target in samples[i].targets)
    if num_annotated < MIN_ENTITIES:
        raise CalibrationError(f"calibration: split {split} has {num_annotated} annotated structures to fit on, {MIN_ENTITIES} are needed")
    results = collect_results(mimo, records, chosen, stop=stop)
    return Calibration.fit(results.segmented, {"split": split, "samples": sum(map(len, chosen.values()))}), results


def calibrate_checkpoint(
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    split: str,
    limit: int | None = None,
    base: str | os.PathLike | None = None,
    allow_untrained: bool = False,
) -> Calibration:
    """`mimo eval --calibrate`: fit on a split, save the calibration with the checkpoint's step, and print the quality of the scores.
    Raises UserError or DataError, with nothing written, if the data cannot be read or are too few."""
    mimo = Mimo.load(checkpoint, base, allow_untrained)
    print(mimo.origin)
    path = mimo.calibration_path
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: no permission to write; change its folder's permissions, or copy the checkpoint")
    calibration, results = calibrate(mimo, open_source(data, split), limit, supported_perspectives(mimo.config), split)
    calibration.write(path)
    if familiarity := fit_checkpoint(mimo, data):
        familiarity.write(path.with_name(FAMILIARITY))
    print("\n".join(score_table(score_quality(results.segmented, calibration) | {"in_sample": True})))
    print(f"\ncalibration: {path}")
    return calibration


def calibrate_params(config: Config, params: dict, tokenizer: Tokenizer, stop: Callable[[], bool] = lambda: False) -> Calibration:
    """Fit at the end of training on `train.calibrate_samples` validation samples of the run's own sources, of other patients or cases than
    the `train.eval_samples` of its evaluation. If those are too few, fit on all and say so: `fitted["in_sample"]` is then True. If there
    are too few in all, print that and return UNCALIBRATED. stop, and several processes: see `collect_results`."""
    perspectives = [p for p, weight in config.data.weights.items() if weight]
    try:
        records = ConcatSource(open_sources(config, "val").values())
        evaluated = select_samples(records, config.train.eval_samples, perspectives)
        mimo = Mimo(config, params, tokenizer)
        arguments = (mimo, records, config.train.calibrate_samples, perspectives, "val")
        if evaluated:
            try:
                calibration = calibrate(*arguments, {group_of(records, number) for number in evaluated}, stop)[0]
                return _marked(calibration, in_sample=False)
            except CalibrationError as error:
                print(f"scores are calibrated on patients or cases that the run's evaluation also has: {error}", file=sys.stderr)
        return _marked(calibrate(*arguments, stop=stop)[0], in_sample=bool(evaluated))
    except (DataError, CalibrationError) as error:
        print(f"scores are not calibrated: {error}", file=sys.stderr)
        return UNCALIBRATED


def _marked(calibration: Calibration, in_sample: bool) -> Calibration:
    """The calibration with a note whether the evaluation at the end of its run has patients or cases that it was fitted on."""
    return dataclasses.replace(calibration, fitted=calibration.fitted | {"in_sample": in_sample})
