"""`mimo sweep`: from flags to runs, and to one summary of them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import names, positive, seeds
from mimo_jax.errors import EXIT_OK, EXIT_PARTIAL, EXIT_TEMPFAIL, UserError

if TYPE_CHECKING:
    from mimo_jax.sweep.jobs import SweepCluster
    from mimo_jax.sweep.plan import Sweep

CLUSTERS = ("slurm", "gke")


def add_sweep(commands) -> None:
    """The parser of `mimo sweep` among those of the other commands."""
    sweep = commands.add_parser(
        "sweep",
        help="train and measure variants of a config; the same command goes on where it stopped",
        description="Train every variant of a config with every seed, measure each on the test split, and sum them up.",
        epilog="""examples:
  mimo sweep --config configs/ablations.py --data data/phantom --workdir runs/ablations --dry-run
  mimo sweep --config configs/ablations.py --data data/phantom --workdir runs/ablations --only aligner,queries --seeds 0,1,2
  mimo sweep --config configs/ablations.py --base-config configs/mimo_7b.py --init IMPORT --data DIR --workdir DIR --only data
  mimo sweep --config configs/ablations.py --data DIR --workdir DIR --backend slurm --launch="--accelerator h100:8 --nodes 2"

Finished runs are passed over, stopped ones go on. --config.… flags count for every run, as --config.train.steps=500.""",
    )
    sweep.add_argument("--config", required=True, metavar="FILE", help="names groups of variants, as configs/ablations.py does")
    sweep.add_argument("--base-config", metavar="FILE", help="vary this config instead of the one that FILE names")
    sweep.add_argument("--workdir", required=True, metavar="DIR", help="where every run gets a directory, and the summary lies")
    sweep.add_argument("--data", action="append", required=True, metavar="[NAME=]DIR", help="as for `mimo train`; repeatable")
    sweep.add_argument("--test", metavar="DIR", help="whose test split is asked (default: that of --data, if it is one)")
    sweep.add_argument("--init", metavar="PATH", help="checkpoint whose weights every run starts from")
    sweep.add_argument("--only", type=names, default=[], metavar="GROUP,…", help="groups to run (default: all)")
    sweep.add_argument("--seeds", type=seeds, default=[0], metavar="N,…", help="seeds of every variant (default: 0)")
    sweep.add_argument("--limit", type=positive, metavar="N", help="only the first N samples of the test split")
    sweep.add_argument("--backend", choices=("local", *CLUSTERS), default="local", help="where to train (default: on this machine)")
    sweep.add_argument("--launch", type=shlex.split, default=[], metavar="FLAGS", help="for the launcher of --backend, as one word after =")
    sweep.add_argument("--jobs", type=positive, metavar="N", help="runs at a time (default: 1; on a cluster all)")
    sweep.add_argument("--dry-run", action="store_true", help="print the runs and their commands, and do nothing")
    sweep.set_defaults(run=_sweep, overrides=())


def _sweep(args: argparse.Namespace) -> int:
    from mimo_jax.cli.train import sources_of
    from mimo_jax.sweep.jobs import SubmittedJob, SweepCluster
    from mimo_jax.sweep.plan import Common, base_of, check_folders, make_sweep
    from mimo_jax.sweep.run import Processes, run_all

    sources = sources_of(args.data)
    if not args.test and len(sources) > 1:
        raise UserError("--test: is missing; of several --data, say whose test split is asked")
    test = os.path.abspath(args.test) if args.test else next(iter(sources.values())).path
    shared = (*([f"--config.init.path={args.init}"] if args.init else []), *args.overrides)
    common = Common(args.base_config or base_of(args.config), tuple(args.data), shared, test, args.limit)
    workdir = Path(args.workdir)
    sweep = make_sweep(args.config, workdir, sources, common, args.only, args.seeds)
    check_folders(sweep.runs)
    cluster = SweepCluster(args.backend, tuple(args.launch)) if args.backend in CLUSTERS else None
    if cluster:
        cluster.check(workdir)
    elif args.launch:
        raise UserError(f"--launch {shlex.join(args.launch)}: is for a cluster; add --backend {' or '.join(CLUSTERS)}")
    if args.dry_run:
        _show(sweep, cluster)
        return EXIT_OK
    begin = partial(SubmittedJob, cluster=cluster) if cluster else Processes
    failed, stopped = run_all(sweep.runs, begin, args.jobs or (len(sweep.runs) if cluster else 1))
    if stopped:
        print("stopped; run the same command to go on" + ("; submitted jobs do so by themselves" if cluster else ""), file=sys.stderr)
        return EXIT_TEMPFAIL

    from mimo_jax.sweep.summary import write_summary

    reports = {run.name: report for run in sweep.runs if (report := run.report())}
    part = f"{args.limit} samples" if args.limit else "all samples"
    about = f"{shlex.join([common.base, *args.overrides])}: {part} of the test split of {test}, seeds {','.join(map(str, args.seeds))}."
    print(write_summary(workdir, about, sweep.groups, reports))
    print(f"summary: {', '.join(str(workdir / f'summary.{kind}') for kind in ('md', 'json', 'png'))}")
    for name, reason in failed.items():
        print(f"mimo: {name}: failed: {reason}", file=sys.stderr)
    return EXIT_PARTIAL if failed else EXIT_OK


def _show(sweep: Sweep, cluster: SweepCluster | None) -> None:
    """The groups, and every command of every run that is due."""
    for group, variants in sweep.groups.items():
        for variant, runs in variants.items():
            print(f"{group:14}{variant:26}{' '.join(runs)}")
    for run in sweep.runs:
        due = run.due()
        print(f"\n# {run.name}{'' if due else ': finished'}")
        for words in due:
            print(shlex.join(cluster.submit(run) if cluster and words[0] == "train" else ["mimo", *words]))
