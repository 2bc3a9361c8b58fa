"""MIMO in JAX: grounded answers about medical images. `from mimo_jax import Mimo` is the way in."""

__version__ = "0.1.0"
__all__ = ["Mimo", "__version__"]


def __getattr__(name: str):
    if name == "Mimo":  # imported when it is asked for: the command's help needs no jax
        from mimo_jax.infer.predictor import Mimo

        return Mimo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
