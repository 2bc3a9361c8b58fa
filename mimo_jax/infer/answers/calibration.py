"""Scores that mean something: from what speaks for a painted mask to the IoU that it has on average.

Axis letters: M side of the mask decoder's output, E painted entities of the split that a calibration is fitted on, F parts of the
evidence.

The map is monotone in each part: a sum of their log-odds with weights of 0 or more (logistic regression), then a rising curve through the
mean IoU of groups of equal size (isotonic regression). What was painted where nothing is counts with IoU 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from mimo_jax import files
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame

VERSION = 1
MIN_ENTITIES = 100
_GROUP, _GROUPS = 25, 40  # entities in a point of the curve, at least; points, at most
_EDGE = 0.01  # how near to 0 and 1 evidence still counts: nearer, the order of good masks becomes noise
_SHRINK = 1e-3


class CalibrationError(UserError):
    """Too little to fit a calibration on, or a damaged one."""


@dataclass(frozen=True)
class ConfidenceFeatures:
    """What speaks for a painted mask, each part from 0 to 1. iou: the mask decoder's estimate of its IoU. seg_prob: probability of the
    `<SEG>` token. word_prob: least probability of a token since the `<SEG>` before. pixel_iou: the IoU to expect if every pixel were as
    likely as its logit says."""

    iou: float
    seg_prob: float
    word_prob: float
    pixel_iou: float

    @staticmethod
    def of(logits: np.ndarray, frame: Frame, iou: float, probs: np.ndarray) -> ConfidenceFeatures:
        """logits float [M, M] over the SAM frame of the image; iou: as the decoder gives it, clipped here; probs [n]: of the tokens
        after the `<SEG>` before, up to the mask's own."""
        rows, cols = (math.ceil(logits.shape[0] * side / frame.side) for side in frame.size)
        content = np.asarray(logits[:rows, :cols], np.float64)  # the rest is padding
        inside, p = content > 0, expit(content)
        union = inside.sum() + p[~inside].sum()
        return ConfidenceFeatures(float(np.clip(iou, 0.0, 1.0)), float(probs[-1]), float(np.min(probs)), float(p[inside].sum() / union))


@dataclass(frozen=True)
class Calibration:
    """A score for each entity, and below which score it is `uncertain`. Without a fit: iou × seg_prob, and 0.5.

    weights [F]: of the log-odds of each part of the evidence; places, expected: the curve from their sum to the expected IoU, both
    ascending; fitted: on what, and how the bound was chosen."""

    weights: tuple[float, ...] = ()
    places: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()
    uncertain_below: float = 0.5
    fitted: dict = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights)

    def scores(self, evidence: Sequence[ConfidenceFeatures]) -> np.ndarray:
        """float64 [E], 0 … 1."""
        if not self:
            return np.array([e.iou * e.seg_prob for e in evidence])
        return np.interp(_log_odds(evidence) @ self.weights, self.places, self.expected)

    @staticmethod
    def fit(painted: Sequence[tuple[ConfidenceFeatures, float]], about: dict) -> Calibration:
        """The map for which scores are expected IoUs. painted [E]: each painted entity's evidence, and its IoU with the truth, 0
        where there is none; about: what to remember of the data. The bound of `uncertain` is the one that best tells IoU < 0.5 apart
        (Youden's J). CalibrationError for fewer than MIN_ENTITIES."""
        if len(painted) < MIN_ENTITIES:
            raise CalibrationError(
                f"calibration: {len(painted)} painted structures are too few to fit on, {MIN_ENTITIES} are needed; give more samples"
            )
        evidence, y = [e for e, _ in painted], np.array([iou for _, iou in painted])
        x = _log_odds(evidence)
        weights = _weights(x, y)
        sums = x @ weights
        groups = np.array_split(np.argsort(sums, kind="stable"), min(_GROUPS, len(y) // _GROUP))
        means = np.array([y[group].mean() for group in groups])
        curve = isotonic_regression(means, weights=[len(group) for group in groups]).x
        places = [float(sums[group].mean()) for group in groups]
        made = Calibration(tuple(weights.tolist()), tuple(places), tuple(curve.tolist()))
        bound, j = _bound(made.scores(evidence), y < 0.5)
        fitted = about | {"entities": len(y), "mean_iou": float(y.mean()), "bound": "Youden's J of IoU < 0.5", "j": j}
        return dataclasses.replace(made, uncertain_below=bound, fitted=fitted)

    # --- on disk

    def to_json(self) -> dict:
        """As a plain dict with the version and a SHA-256 of the rest."""
        content = {"version": VERSION, **dataclasses.asdict(self), "weights": dict(zip(_PARTS, self.weights, strict=True))}
        return content | {"sha256": _digest(content)}

    @staticmethod
    def from_json(content: dict) -> Calibration:
        """Inverse of `to_json`; ValueError says what is wrong."""
        if content.get("version") != VERSION:
            raise ValueError(f"is of version {content.get('version')}, not {VERSION}")
        values = {name: value for name, value in content.items() if name not in ("version", "sha256")}
        if content.get("sha256") != _digest(content) or list(values.get("weights", ())) != list(_PARTS):
            raise ValueError("is not as it was written")
        lists = {"weights": values["weights"].values(), "places": values["places"], "expected": values["expected"]}
        return Calibration(**values | {name: tuple(value) for name, value in lists.items()})

    def write(self, path: Path) -> None:
        """All or nothing."""
        files.write_json(path, self.to_json())

    @staticmethod
    def read(path: Path) -> Calibration:
        """That of a step; without a file, the one that is not fitted. CalibrationError for a damaged file."""
        if not path.exists():
            return UNCALIBRATED
        try:
            return Calibration.from_json(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            reason = str(error) if type(error) is ValueError else "is damaged"
            raise CalibrationError(f"{path}: {reason}; fit it anew with mimo eval --calibrate, or remove it") from None


UNCALIBRATED = Calibration()  # of a model that was never calibrated
_PARTS = tuple(part.name for part in dataclasses.fields(ConfidenceFeatures))


def _log_odds(evidence: Sequence[ConfidenceFeatures]) -> np.ndarray:
    """float64 [E, F]."""
    parts = np.array([dataclasses.astuple(e) for e in evidence], np.float64).reshape(-1, len(_PARTS))
    return logit(np.clip(parts, _EDGE, 1 - _EDGE))


def _weights(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logistic regression of y in 0 … 1 on x [E, F] with weights of 0 or more, shrunk a little -> [F]."""
    spread = x.std(axis=0)
    spread[spread == 0] = 1.0
    z = (x - x.mean(axis=0)) / spread

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        at = w[0] + z @ w[1:]
        error = expit(at) - y
        value = np.mean(np.logaddexp(0, at) - y * at) + _SHRINK * w[1:] @ w[1:]
        return value, np.concatenate([[error.mean()], z.T @ error / len(y) + 2 * _SHRINK * w[1:]])

    start = np.array([0.0] + [1.0] * x.shape[1])
    return minimize(loss, start, jac=True, bounds=[(None, None)] + [(0, None)] * x.shape[1]).x[1:] / spread


def _bound(scores: np.ndarray, bad: np.ndarray) -> tuple[float, float | None]:
    """(the score below which most of what is `bad` and least of the rest lies, J there); the usual 0.5 where all or none is bad."""
    places = np.unique(scores)
    if bad.all() or not bad.any() or len(places) < 2:
        return UNCALIBRATED.uncertain_below, None
    cuts = (places[1:] + places[:-1]) / 2
    below = [np.searchsorted(np.sort(part), cuts) / len(part) for part in (scores[bad], scores[~bad])]
    best = int(np.argmax(below[0] - below[1]))
    return float(cuts[best]), float(below[0][best] - below[1][best])


def _digest(content: dict) -> str:
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
