"""What the parts of the model say of their floating-point operations; `analysis.flops` adds them up."""

from __future__ import annotations

from typing import NamedTuple


class MatmulCounts(NamedTuple):
    """Of one part. tokens: ordered path regex -> how many tokens pass the matrix; products: FLOPs of the products of two activations,
    such as queries with keys."""

    tokens: dict[str, float]
    products: float


def attention_flops(queries: int, keys: float, width: int) -> float:
    """FLOPs of queries with keys and of weights with values, all heads together `width` wide."""
    return 4.0 * queries * keys * width
