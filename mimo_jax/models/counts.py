"""Counts of floating-point operations that each part of the model reports; `analysis.flops` adds them up."""

from __future__ import annotations

from typing import NamedTuple


class MatmulCounts(NamedTuple):
    """Counts of one part. tokens: ordered path regex -> number of tokens that the matrix is applied to; products: FLOPs of the matrix
    products of two activations, such as queries with keys."""

    tokens: dict[str, float]
    products: float


def attention_flops(queries: int, keys: float, width: int) -> float:
    """FLOPs of the products of queries with keys and of weights with values; `width` is the width of all heads together."""
    return 4.0 * queries * keys * width
