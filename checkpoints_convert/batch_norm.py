"""Folds a BatchNorm into the convolution before it, and back. In evaluation it is a scale and a shift of each channel.

    name.c.weight, name.bn.{weight, bias, running_mean, running_var}    as in a file, for convolutions without a bias (Conv2d_BN of TinyViT)
    name.c.weight, name.bn.bias                                         folded: weight and bias of one convolution

The tables have rows for the two folded tensors. An export adds the other tensors of a BatchNorm that only shifts: scale 1, mean 0 and
variance 1 - eps, so that its output is that of the folded convolution. Importing that gives the same bits again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from checkpoints_convert.readers import Tensors

EPS = 1e-5  # of torch's BatchNorm, which no file contains
_PARTS = ("weight", "bias", "running_mean", "running_var")


class FoldedTensors(Mapping[str, np.ndarray]):
    """The tensors of a file with its BatchNorms folded, in float32; the others are unchanged. One whose tensors are incomplete or of
    other shapes is not folded. kinds, files: as of `Tensors`."""

    def __init__(self, tensors: Tensors):
        self.files, self._tensors = tensors.files, tensors
        self.kinds = {}
        for key, (dtype, shape) in tensors.kinds.items():
            if not self._is_folded(name := _name(key)):
                self.kinds[key] = (dtype, shape)
            elif key in (f"{name}.c.weight", f"{name}.bn.bias"):
                self.kinds[key] = (np.dtype(np.float32), shape)

    def _is_folded(self, name: str) -> bool:
        kinds = self._tensors.kinds
        channels = kinds.get(f"{name}.c.weight", (None, ()))[1][:1]
        return bool(channels) and all(kinds.get(f"{name}.bn.{part}", (None, ()))[1] == channels for part in _PARTS)

    def __getitem__(self, key: str) -> np.ndarray:
        name = _name(key)
        if not self._is_folded(name):
            return self._tensors[key]
        scale, shift, mean, variance = (self._tensors[f"{name}.bn.{part}"].astype(np.float64) for part in _PARTS)
        with np.errstate(invalid="ignore", divide="ignore"):  # values that are not finite are reported with the key of the tensor
            scale /= np.sqrt(variance + EPS)
            if key.endswith(".bias"):
                return (shift - mean * scale).astype(np.float32)
            weight = self._tensors[key]
            return (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


def _name(key: str) -> str:
    """The part of a key before the convolution or the BatchNorm."""
    return re.sub(r"\.(c|bn)\.\w+$", "", key)


def unfolded(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """(key, tensor) of an export, with the tensors that a folded BatchNorm lacks after each `bn.bias`."""
    for key, value in tensors:
        yield key, value
        if key.endswith(".bn.bias"):
            ones = np.ones(value.shape, np.float32)
            yield f"{_name(key)}.bn.weight", ones
            yield f"{_name(key)}.bn.running_mean", 0 * ones
            yield f"{_name(key)}.bn.running_var", ones * np.float32(1 - EPS)
            yield f"{_name(key)}.bn.num_batches_tracked", np.zeros((), np.int64)
