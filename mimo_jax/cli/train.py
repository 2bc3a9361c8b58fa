"""The commands `mimo train`, `mimo compile` and `mimo profile`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mimo_jax import files
from mimo_jax.cli.arg_types import InputPath, OutputPath, named_paths, positive
from mimo_jax.config import SourceConfig
from mimo_jax.errors import EXIT_OK, UserError

_CONFIG_HELP = "a config file; packaged ones are found by name, such as configs/tiny.py"


def add_train(commands) -> None:
    """Add the parser of `mimo train`."""
    train = commands.add_parser(
        "train",
        help="train or fine-tune a model; the same command resumes a stopped run",
        description="Train a model. After a stop (exit code 75), run the same command again to resume.",
        epilog="""examples:
  mimo train --config configs/tiny.py --data data/phantom --workdir runs/a
  mimo train --config configs/tiny.py --data data/phantom --workdir runs/a --config.train.steps=500
  mimo train --config configs/tiny_lora.py --init runs/a --data my_data --workdir runs/b
  mimo train --config configs/tiny.py --data ct=data/ct --data mr=data/mr --config.data.sources.mr.weight=2 --workdir runs/c

Every field of the config can be set by its path, such as --config.train.steps=500.""",
    )
    train.add_argument("--config", type=InputPath, required=True, metavar="FILE", help=_CONFIG_HELP)
    train.add_argument(
        "--workdir", type=OutputPath, required=True, metavar="DIR", help="directory of the run; also gs://B/x, if B is mounted at /gcs/B"
    )
    data_help = "a dataset written by `mimo data`, or a .jsonl manifest; repeatable"
    train.add_argument("--data", type=InputPath, action="append", default=[], metavar="[NAME=]DIR", help=data_help)
    train.add_argument("--init", type=InputPath, metavar="PATH", help="checkpoint to initialise the parameters from, or a named model")
    train.set_defaults(run=_train, overrides=())


def add_compile(commands) -> None:
    """Add the parser of `mimo compile`."""
    compile_ = commands.add_parser(
        "compile",
        help="check that a training step fits a machine that is not available",
        description="""Compile the training step for a TPU topology on a machine without TPUs, and report its memory per chip, the
communication between the chips, and the minimum time per step. Needs pip install "mimo_jax[tpu]".

Topologies: TPU v4 and v5p as v4:2x2x4, v5p:2x2x4; v5e and v6e as v5e:16x16, v6e:4x4; cpu:8 is a CPU that acts as 8 devices.""",
        epilog="""examples:
  mimo compile --config configs/mimo_7b.py --topology v5e:16x16 --batch-per-chip 4 --out report.json
  mimo compile --config configs/mimo_7b.py --topology v5p:2x2x4 --slices 2 --batch-per-chip 8 --largest
  mimo compile --config configs/mimo_7b.py --topology v6e:16x16 --batch-per-chip 8 --config.model.remat=dots
  mimo compile --config configs/tiny.py --topology cpu:8 --batch-per-chip 2 --length 256

The exit code is 0 even if the step does not fit; see "fits" in the report.""",
    )
    compile_.add_argument("--config", type=InputPath, required=True, metavar="FILE", help=_CONFIG_HELP)
    compile_.add_argument("--topology", required=True, metavar="NAME", help="type and arrangement of the chips, such as v5e:16x16")
    compile_.add_argument("--batch-per-chip", type=positive, required=True, metavar="N", help="samples in a batch per chip")
    compile_.add_argument("--length", type=positive, metavar="N", help="tokens per sample; default: the largest of config.data.buckets")
    compile_.add_argument(
        "--slices", type=positive, default=1, metavar="N", help="number of such slices, connected by a network (default: 1)"
    )
    compile_.add_argument(
        "--largest", action="store_true", help="search the largest batch per chip that fits, with a few more compilations"
    )
    compile_.add_argument("--out", type=OutputPath, metavar="FILE", help="write the report there, as JSON")
    compile_.set_defaults(run=_compile, overrides=())


def add_profile(commands) -> None:
    """Add the parser of `mimo profile`."""
    profile = commands.add_parser(
        "profile",
        help="trace a few steps of a run with jax's profiler",
        description="Run a few steps from a run's newest checkpoint under jax's profiler; write a trace to RUN/profile. No step is saved.",
        epilog="""examples:
  mimo profile --workdir runs/a
  mimo profile --workdir runs/a --steps 5 --after 10 --data data/phantom""",
    )
    profile.add_argument("--workdir", type=OutputPath, required=True, metavar="DIR", help="directory of the run")
    profile.add_argument("--steps", type=positive, default=3, metavar="N", help="number of steps to trace (default: 3)")
    profile.add_argument(
        "--after", type=positive, default=2, metavar="N", help="number of warm-up steps before them, which compile everything (default: 2)"
    )
    profile.add_argument(
        "--data",
        type=InputPath,
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="datasets to use instead of the run's own; repeatable",
    )
    profile.set_defaults(run=_profile)


def _train(args: argparse.Namespace) -> int:
    from mimo_jax.config_flags import load_config

    overrides = list(args.overrides)
    if args.init:
        overrides.append(f"--config.init.path={args.init}")
    config = load_config(["--config", args.config, *overrides], sources_of(args.data))

    from mimo_jax import distributed

    def work() -> int:
        from mimo_jax.train.loop import train  # only once the processes have joined

        with named_paths(args):
            return train(config, args.workdir)

    return distributed.run(work, config.train.heartbeat_timeout)


def sources_of(flags: Sequence[str]) -> dict[str, SourceConfig]:
    """The values of `--data` as entries of `config.data.sources`; without NAME=, the entry is named after its folder."""
    sources: dict[str, SourceConfig] = {}
    for flag in flags:
        name, equals, path = flag.partition("=")
        if not equals or os.path.exists(flag):
            name, path = Path(os.path.abspath(flag)).stem, flag
        if not name or not path:
            raise UserError(f"--data {flag}: cannot be parsed; write --data DIR or --data NAME=DIR")
        if name in sources:
            raise UserError(f"--data {flag}: is a second dataset named {name}; give it another name, such as --data {name}2={path}")
        sources[name] = SourceConfig(path=os.path.abspath(path))
    return sources


def _profile(args: argparse.Namespace) -> int:
    from mimo_jax import distributed

    def work() -> int:
        from mimo_jax.train.profile import profile  # only once the processes have joined

        with named_paths(args):
            return profile(args.workdir, args.steps, args.after, sources_of(args.data))

    return distributed.run(work)


def _compile(args: argparse.Namespace) -> int:
    from mimo_jax.analysis import topology
    from mimo_jax.config_flags import load_config

    target = topology.parse_topology(args.topology, args.slices)
    config = load_config(["--config", args.config, *args.overrides])
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {Path(args.out).parent}; create it first")
    with target.environment():
        from mimo_jax.analysis import aot
        from mimo_jax.train.step import lower_step

        report = aot.compile_step(config, target, lower_step, args.batch_per_chip, args.length, args.largest)
    print(aot.table(report))
    if args.out:
        files.write_json(Path(args.out), report)
        print(f"written to {args.out}", file=sys.stderr)
    return EXIT_OK
