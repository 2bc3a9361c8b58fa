"""Fit what an answer says of its likeness to the training data, on training and validation samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mimo_jax.config import Config
from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.loading.sources import open_source, open_sources
from mimo_jax.data.records import DataError
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.eval.evaluate import EvaluationStopped
from mimo_jax.eval.selection import ConcatSource
from mimo_jax.infer.answers.familiarity import Familiarity
from mimo_jax.infer.predictor import Mimo

_RECORDS = 4096  # whose questions are read
_TRAIN_IMAGES, _VAL_IMAGES = 512, 256  # which are encoded
_CHUNK = 32  # images in memory at a time


def fit_checkpoint(mimo: Mimo, data: str) -> Familiarity:
    """Fit on the splits train and val of a dataset; Familiarity() if it lacks one of them."""
    try:
        return fit_familiarity(mimo, open_source(data, "train"), open_source(data, "val"))
    except DataError:
        return Familiarity()


def fit_params(config: Config, params: dict, tokenizer: Tokenizer, stop: Callable[[], bool] = lambda: False) -> Familiarity:
    """Fit at the end of training, on the run's own sources; Familiarity() if they lack a split. Raises EvaluationStopped once `stop`,
    which is polled between chunks of images, returns True."""
    try:
        train, val = (ConcatSource(open_sources(config, split).values()) for split in ("train", "val"))
    except DataError:
        return Familiarity()
    return fit_familiarity(Mimo(config, params, tokenizer), train, val, stop)


def fit_familiarity(mimo: Mimo, train: Sequence, val: Sequence, stop: Callable[[], bool] = lambda: False) -> Familiarity:
    """train, val: sources of records, of different patients or cases. A part of each is read, spread evenly. stop: as in `fit_params`."""
    questions = [
        [turn.text for number in _spread(source, _RECORDS) for sample in source.samples(number) for turn in sample.turns[::2]]
        for source in (train, val)
    ]
    images = [_pooled(mimo, source, limit, stop) for source, limit in ((train, _TRAIN_IMAGES), (val, _VAL_IMAGES))]
    return Familiarity.fit(*questions, *images)


def _spread(source: Sequence, limit: int) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)).tolist()


def _pooled(mimo: Mimo, source: Sequence, limit: int, stop: Callable[[], bool]) -> np.ndarray:
    """The pooled features [n, D] of images of a source; those that cannot be decoded are left out."""
    found = []
    numbers = _spread(source, limit)
    for at in range(0, len(numbers), _CHUNK):
        if stop():
            raise EvaluationStopped
        pixels = []
        for number in numbers[at : at + _CHUNK]:
            record = source[number]
            try:
                pixels.append(record_image(record))
            except UserError:
                continue
        found += mimo.pooled_features(pixels)
    return np.array(found)
