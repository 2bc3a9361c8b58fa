"""Named invertible operations between a torch tensor and a parameter, as views where possible.

An op never changes a value or a dtype, so that import followed by export returns the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Op(NamedTuple):
    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _transpose(*axes: int) -> Op:
    """Permute the axes: axis i of the flax array is axis axes[i] of the torch one."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Op(lambda a: a.transpose(axes), lambda a: a.transpose(back))


OPS: dict[str, Op] = {
    "identity": Op(lambda a: a, lambda a: a),
    "linear": _transpose(1, 0),  # [out, in] <-> [in, out]
    "conv": _transpose(2, 3, 1, 0),  # [out, in, y, x] <-> [y, x, in, out]
    # [in, out, y, x] <-> [in, y, x, out], for the matmul and pixel shuffle of `sam_decoder.Upscale`: not flipped.
    "conv_transpose": _transpose(0, 2, 3, 1),
    "pointwise": Op(lambda a: a.reshape(a.shape[:2]).T, lambda a: a.T[:, :, None, None]),  # [out, in, 1, 1] <-> [in, out]
    # [channel, 1, y, x] <-> [y, x, channel]
    "depthwise": Op(lambda a: a.reshape(a.shape[0], *a.shape[2:]).transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None]),
    # [1, ...] <-> [...]; the reshape fails where the first axis is not 1.
    "squeeze": Op(lambda a: a.reshape(a.shape[1:]), lambda a: a[None]),
}


_STRIP = 16  # rows of a strip, which is read and written within the CPU cache


def copy(to: np.ndarray, source: np.ndarray) -> None:
    """to[...] = source, with a cast; a large transposed matrix is copied in strips, which is four times as fast as in numpy."""
    if source.ndim == 2 and source.flags.f_contiguous and not source.flags.c_contiguous:
        for at in range(0, source.shape[1], _STRIP):
            to[:, at : at + _STRIP] = source[:, at : at + _STRIP]
    else:
        to[...] = source
