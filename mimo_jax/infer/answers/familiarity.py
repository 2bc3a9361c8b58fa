"""How much an image and a question are like the training data: fitted with the calibration, stored beside it, said with every answer.

Axis letters: N training images, V validation images, D pooled features of an image.

An image is compared by the mean and standard deviation of both encoders' features over its positions: its distance to the nearest
training image after shrunk whitening (the Mahalanobis metric; nearest neighbour as in Sun et al. 2022, arXiv:2204.06507). A question is
compared by its words. Each limit is the smallest that at most 3 % of the validation samples exceed.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax import files
from mimo_jax.data.builder.entities import american, mentions
from mimo_jax.infer.answers.calibration import CalibrationError

MIN_IMAGES = 20  # training images, and validation images, below which images are not compared
_EXCEEDING = 0.03
_SHRINKAGE = 0.3  # weight of the identity in the correlation matrix
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Likeness:
    """What a request has in common with the training data. image: the distance of its image as a multiple of the limit, None if images
    are not compared; words: of the question, not in any training question; question: whether there are no more of them than the limit."""

    image: float | None
    words: tuple[str, ...]
    question: bool

    @property
    def understood(self) -> bool:
        """Whether both the image and the question are like the training data."""
        return self.question and not self.image_unlike

    @property
    def image_unlike(self) -> bool:
        return self.image is not None and self.image > 1

    def notes(self) -> list[str]:
        """A line about the image and one about the question, if they are unlike the training data."""
        image = f"(the image is unlike the training data: its distance is {self.image or 0:.1f} times the limit)"
        question = f"(the question has words that no training question has: {', '.join(self.words)})"
        return [image] * self.image_unlike + [question] * (not self.question)

    def to_json(self) -> dict:
        image = None if self.image is None else round(self.image, 3)
        return {"image": image, "image_unlike": self.image_unlike, "question_unlike": not self.question, "words": list(self.words)}


@dataclass(frozen=True)
class Familiarity:
    """words: those of the training questions, as they are written there; word_limit: number of other words that a question may have;
    images: pooled features of training images float32 [N, D], N = 0 if images are not compared; image_limit: distance."""

    words: frozenset[str] = frozenset()
    word_limit: int = 0
    images: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    image_limit: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.words)

    @staticmethod
    def fit(train_questions: Iterable[str], val_questions: Iterable[str], train: np.ndarray, val: np.ndarray) -> Familiarity:
        """train [N, D], val [V, D]: pooled features of images, of different patients or cases."""
        words = frozenset(word for question in train_questions for word in _WORD.findall(question))
        partial = Familiarity(words)
        counts = [len(partial.unknown_words(question)) for question in val_questions]
        word_limit = int(np.quantile(counts, 1 - _EXCEEDING, method="higher")) if counts else 0
        if min(len(train), len(val)) < MIN_IMAGES:
            return Familiarity(words, word_limit)
        compared = Familiarity(words, word_limit, np.asarray(train, np.float32))
        return Familiarity(words, word_limit, compared.images, float(np.quantile(compared.distances(val), 1 - _EXCEEDING)))

    # --- images

    @cached_property
    def _metric(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(mean [D], standard deviation [D], principal directions [R, D], their factors [R]) of the whitening."""
        mean, spread = self.images.mean(axis=0), self.images.std(axis=0) + 1e-6
        _, singular, directions = np.linalg.svd((self.images - mean) / spread, full_matrices=False)
        variance = singular**2 / (len(self.images) - 1)
        return mean, spread, directions, 1 / np.sqrt((1 - _SHRINKAGE) * variance + _SHRINKAGE) - 1 / np.sqrt(_SHRINKAGE)

    def _whitened(self, features: np.ndarray) -> np.ndarray:
        mean, spread, directions, factors = self._metric
        z = (features - mean) / spread
        return (z @ directions.T * factors) @ directions + z / np.sqrt(_SHRINKAGE)

    @cached_property
    def _neighbours(self) -> np.ndarray:
        return self._whitened(self.images)

    def distances(self, features: np.ndarray) -> np.ndarray:
        """The distance [V] of each image, by its pooled features [V, D], to the nearest training image."""
        return np.array([np.linalg.norm(self._neighbours - row, axis=1).min() for row in self._whitened(np.asarray(features))])

    # --- questions

    def unknown_words(self, question: str) -> list[str]:
        """The words of a question that no training question has, whatever their case."""
        found = (word for word in _WORD.findall(question) if not {word, word.lower(), word.capitalize()} & self.words)
        return list(dict.fromkeys(found))

    def readable(self, question: str) -> str:
        """The question in the words of the training: where it has others, names of structures are replaced by those of entities.csv, and
        words by their lower case or American spelling, if the training has these. Unchanged before anything is fitted."""
        if not self.words:
            return question
        for mention in reversed(mentions(question)):
            if not self._has(question[mention.start : mention.end]) and self._has(mention.entity.name):
                question = question[: mention.start] + mention.entity.name + question[mention.end :]

        def known(match: re.Match) -> str:
            word = match[0]
            forms = [word, word.lower(), word.capitalize()] if match.start() else [word, word.capitalize(), word.lower()]
            return next((form for form in [*forms, american(word.lower())] if form in self.words), word)

        return _WORD.sub(known, question)

    def _has(self, text: str) -> bool:
        return self.words.issuperset(_WORD.findall(text))

    def likeness(self, question: str, pooled: np.ndarray | None) -> Likeness:
        """The likeness of a request; pooled: the features [D] of its image, None if they are unknown."""
        words = self.unknown_words(question)
        compared = pooled is not None and len(self.images)
        image = float(self.distances(pooled[None])[0] / self.image_limit) if compared else None
        return Likeness(image, tuple(words), len(words) <= self.word_limit)

    # --- on disk

    def write(self, path: Path) -> None:
        """Write atomically."""
        about = json.dumps({"words": sorted(self.words), "word_limit": self.word_limit, "image_limit": self.image_limit})
        with files.atomic_write(path) as part, open(part, "xb") as file:
            np.savez(file, about=np.frombuffer(about.encode(), np.uint8), images=self.images)

    @staticmethod
    def read(path: Path) -> Familiarity:
        """Read that of a step; nothing is fitted if there is no file. Raises CalibrationError for a damaged file."""
        if not path.exists():
            return Familiarity()
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(stored["about"].tobytes())
                return Familiarity(frozenset(about["words"]), about["word_limit"], stored["images"], about["image_limit"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
            raise CalibrationError(f"{path}: is damaged; fit it again with mimo eval --calibrate, or remove it") from None


def pooled(x_img: Any, features: Sequence[Any]) -> np.ndarray:
    """The mean and standard deviation of features over their positions, float32 [D]. x_img [I, Dc]; features: arrays [g, g, C]."""
    arrays = [np.asarray(array, np.float32) for array in (x_img, *features)]
    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]
    return np.concatenate([part for row in rows for part in (row.mean(axis=0), row.std(axis=0))])
