"""Confidence calibration: map the confidence features of a predicted mask to its expected IoU.

Axis letters: M side of the mask decoder's output, E predicted masks of the split that a calibration is fitted on, F confidence
features.

The map is monotone in each feature: a sum of their log-odds with non-negative weights (logistic regression), then a rising curve
through the mean IoU of groups of equal size (isotonic regression). A mask without a matching true entity has IoU 0.
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
from scipy.special import expit, logit

from mimo_jax import files
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame

VERSION = 1
MIN_ENTITIES = 100
_MIN_GROUP, _MAX_GROUPS = 25, 40  # minimum number of masks per point of the curve, maximum number of points
_CLIP = 0.01  # features are clipped to [_CLIP, 1 - _CLIP]: closer to 0 and 1 their order is noise
_L2 = 1e-3  # weight of the L2 penalty


class CalibrationError(UserError):
    """There are too few masks to fit a calibration, or its file is damaged."""


@dataclass(frozen=True)
class ConfidenceFeatures:
    """Features that predict the quality of a mask, each from 0 to 1. iou: the mask decoder's estimate of its IoU. seg_prob: probability of
    the `<SEG>` token. word_prob: minimum probability of a token since the previous `<SEG>`. pixel_iou: the expected IoU if the logits are
    taken as pixel probabilities."""

    iou: float
    seg_prob: float
    word_prob: float
    pixel_iou: float

    @staticmethod
    def of(logits: np.ndarray, frame: Frame, iou: float, probs: np.ndarray) -> ConfidenceFeatures:
        """logits float [M, M] over the SAM frame of the image; iou: the decoder's output, clipped here; probs [n]: probabilities of the
        tokens after the previous `<SEG>`, up to and including the mask's own."""
        rows, cols = (math.ceil(logits.shape[0] * side / frame.side) for side in frame.size)
        content = np.asarray(logits[:rows, :cols], np.float64)  # without the padding
        inside, p = content > 0, expit(content)
        union = inside.sum() + p[~inside].sum()
        return ConfidenceFeatures(float(np.clip(iou, 0.0, 1.0)), float(probs[-1]), float(np.min(probs)), float(p[inside].sum() / union))


@dataclass(frozen=True)
class Calibration:
    """Maps confidence features to scores; masks with a score below `uncertain_below` are uncertain. If it is not fitted, the score is
    iou × seg_prob and the threshold 0.5.

    weights [F]: weights of the log-odds of the features; places, expected: the curve from their weighted sum to the expected IoU, both
    ascending; fitted: the data it was fitted on, and how the threshold was chosen."""

    weights: tuple[float, ...] = ()
    places: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()
    uncertain_below: float = 0.5
    fitted: dict = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights)

    def scores(self, evidence: Sequence[ConfidenceFeatures]) -> np.ndarray:
        """The scores, float64 [E], 0 … 1."""
        if not self:
            return np.array([e.iou * e.seg_prob for e in evidence])
        return np.interp(_log_odds(evidence) @ self.weights, self.places, self.expected)

    @staticmethod
    def fit(segmented: Sequence[tuple[ConfidenceFeatures, float]], about: dict) -> Calibration:
        """Fit the map to expected IoUs. segmented [E]: the features of each predicted mask and its IoU with the truth, 0 if there is none;
        about: description of the data, stored in `fitted`. The threshold `uncertain_below` is the one that best separates IoU < 0.5
        (Youden's J). Raises CalibrationError for fewer than MIN_ENTITIES masks."""
        if len(segmented) < MIN_ENTITIES:
            raise CalibrationError(
                f"calibration: {len(segmented)} segmented structures are too few to fit on, {MIN_ENTITIES} are needed; give more samples"
            )
        from scipy.optimize import isotonic_regression  # slow to import, and needed only here

        evidence, y = [e for e, _ in segmented], np.array([iou for _, iou in segmented])
        x = _log_odds(evidence)
        weights = _weights(x, y)
        sums = x @ weights
        groups = np.array_split(np.argsort(sums, kind="stable"), min(_MAX_GROUPS, len(y) // _MIN_GROUP))
        means = np.array([y[group].mean() for group in groups])
        curve = isotonic_regression(means, weights=[len(group) for group in groups]).x
        places = [float(sums[group].mean()) for group in groups]
        calibration = Calibration(tuple(weights.tolist()), tuple(places), tuple(curve.tolist()))
        threshold, j = _threshold(calibration.scores(evidence), y < 0.5)
        fitted = about | {"entities": len(y), "mean_iou": float(y.mean()), "bound": "Youden's J of IoU < 0.5", "j": j}
        return dataclasses.replace(calibration, uncertain_below=threshold, fitted=fitted)

    # --- on disk

    def to_json(self) -> dict:
        """The fields as a plain dict, with the version and a SHA-256 of the content."""
        content = {"version": VERSION, **dataclasses.asdict(self), "weights": dict(zip(_PARTS, self.weights, strict=True))}
        return content | {"sha256": _digest(content)}

    @staticmethod
    def from_json(content: dict) -> Calibration:
        """Inverse of `to_json`; raises ValueError, which says what is wrong."""
        if content.get("version") != VERSION:
            raise ValueError(f"has version {content.get('version')}, not {VERSION}")
        values = {name: value for name, value in content.items() if name not in ("version", "sha256")}
        if content.get("sha256") != _digest(content) or list(values.get("weights", ())) != list(_PARTS):
            raise ValueError("does not match its SHA-256")
        lists = {"weights": values["weights"].values(), "places": values["places"], "expected": values["expected"]}
        return Calibration(**values | {name: tuple(value) for name, value in lists.items()})

    def write(self, path: Path) -> None:
        """Write atomically."""
        files.write_json(path, self.to_json())

    @staticmethod
    def read(path: Path) -> Calibration:
        """Read the calibration of a step; UNCALIBRATED if there is no file. Raises CalibrationError for a damaged file."""
        if not path.exists():
            return UNCALIBRATED
        try:
            return Calibration.from_json(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            reason = str(error) if type(error) is ValueError else "is damaged"
            raise CalibrationError(f"{path}: {reason}; fit it again with mimo eval --calibrate, or remove it") from None


UNCALIBRATED = Calibration()
_PARTS = tuple(part.name for part in dataclasses.fields(ConfidenceFeatures))


def _log_odds(evidence: Sequence[ConfidenceFeatures]) -> np.ndarray:
    """The log-odds of the clipped features, float64 [E, F]."""
    parts = np.array([dataclasses.astuple(e) for e in evidence], np.float64).reshape(-1, len(_PARTS))
    return logit(np.clip(parts, _CLIP, 1 - _CLIP))


def _weights(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logistic regression of y in 0 … 1 on x [E, F] with non-negative weights and a small L2 penalty; returns the weights [F]."""
    from scipy.optimize import minimize

    spread = x.std(axis=0)
    spread[spread == 0] = 1.0
    z = (x - x.mean(axis=0)) / spread

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        at = w[0] + z @ w[1:]
        error = expit(at) - y
        value = np.mean(np.logaddexp(0, at) - y * at) + _L2 * w[1:] @ w[1:]
        return value, np.concatenate([[error.mean()], z.T @ error / len(y) + 2 * _L2 * w[1:]])

    start = np.array([0.0] + [1.0] * x.shape[1])
    return minimize(loss, start, jac=True, bounds=[(None, None)] + [(0, None)] * x.shape[1]).x[1:] / spread


def _threshold(scores: np.ndarray, bad: np.ndarray) -> tuple[float, float | None]:
    """Returns (the threshold that best separates the scores of `bad` masks from the others, Youden's J there); the default 0.5 and None if
    all or none are bad."""
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
