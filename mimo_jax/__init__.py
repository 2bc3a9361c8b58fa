"""MIMO in JAX: grounded answers about medical images."""

__version__ = "0.1.0"
