"""Labels are whole numbers: what is stored as a fraction, or is in no table, is refused rather than given a wrong name."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mimo_jax.errors import UserError

_TOLERANCE = 0.01  # distance from a whole number that the arithmetic of a rescale slope may cause
_MAX_SHOWN = 8  # values in an error


class LabelValueError(UserError):
    """Values that are no labels; the message lists them."""


def whole_labels(values: np.ndarray, name: str) -> np.ndarray:
    """Values of any shape -> int32, rounded. name: that of their file. Raises LabelValueError for values that are further than 0.01 from
    a whole number, or below 0."""
    rounded = values
    if values.dtype.kind not in "iub":
        rounded = np.rint(values)
        finite = np.isfinite(values) & (np.abs(values) < 2**31)
        wrong = ~finite | (np.abs(values - np.where(finite, rounded, 0)) > _TOLERANCE)
        if wrong.any():
            raise LabelValueError(f"{name}: has values that are no whole numbers: {_listed(values[wrong])}; save labels as whole numbers")
    if values.size and rounded.min() < 0:
        raise LabelValueError(f"{name}: has values below 0: {_listed(values[rounded < 0])}; save labels as whole numbers from 0")
    return rounded.astype(np.int32)


def check_labels(labels: np.ndarray, known: Collection[int], name: str) -> None:
    """Raise LabelValueError if there are labels other than 0 and those of the table `known`."""
    found: set[int] = set()
    for part in np.atleast_1d(labels):  # in parts, to save memory
        found.update(np.unique(part).tolist())
    if unknown := found - {0, *known}:
        raise LabelValueError(
            f"{name}: has labels that its table does not name: {_listed(np.array(sorted(unknown)))}; add them to it, "
            "with null as the name of what is to be left out"
        )


def _listed(values: np.ndarray) -> str:
    distinct = np.unique(values)
    shown = ", ".join(f"{value:g}" for value in distinct[:_MAX_SHOWN].tolist())
    return shown + f" and {len(distinct) - _MAX_SHOWN} more" * (len(distinct) > _MAX_SHOWN)
