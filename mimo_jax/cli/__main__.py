"""The process of `mimo`, and of `python -m mimo_jax.cli`."""

import sys

from mimo_jax import process
from mimo_jax.cli.main import main


def run() -> int:
    """Set up this process, then run the command of its command line; returns the exit code."""
    process.set_up("".join(sys.argv[1:2]))
    return main()


if __name__ == "__main__":
    sys.exit(run())
