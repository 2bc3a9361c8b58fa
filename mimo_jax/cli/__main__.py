"""The process of `mimo`, and of `python -m mimo_jax.cli`."""

import sys

from mimo_jax import preemption, process
from mimo_jax.cli.main import main


def run() -> int:
    """Set up this process, then run the command of its command line; returns the exit code."""
    command = "".join(sys.argv[1:2])
    process.set_up(command)
    if command != "train":
        return main()
    preemption.StopSignal()  # for the rest of this process: a training run ends in order, whenever it is asked to
    code = main()
    preemption.ignore_signals()
    return code


if __name__ == "__main__":
    sys.exit(run())
