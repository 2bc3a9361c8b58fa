"""The command `mimo sweep`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import InputPath, OutputPath, names, positive, seeds
from mimo_jax.errors import EXIT_OK, EXIT_PARTIAL, EXIT_TEMPFAIL, UserError

if TYPE_CHECKING:
    from mimo_jax.sweep.jobs import SweepCluster
    from mimo_jax.sweep.plan import Sweep

CLUSTERS = ("slurm", "gke")


def add_sweep(commands) -> None:
    """Add the parser of `mimo sweep`."""
    sweep = commands.add_parser(
        "sweep",
        help="train and evaluate variants of a config; the same command resumes a stopped sweep",
        description="""Train every variant of a config with every seed, evaluate each on the test split, and write a summary. Of the
groups `aligner` and `data` of configs/ablations.py, the tables of the paper are written to DIR/paper.md.""",
        epilog="""examples:
  mimo sweep --config configs/ablations.py --data data/phantom --workdir runs/ablations --dry-run
  mimo sweep --config configs/ablations.py --data data/phantom --workdir runs/ablations --only aligner,queries --seeds 0,1,2
  mimo sweep --config configs/ablations.py --base-config configs/mimo_7b.py --init IMPORT --data DIR --workdir DIR --only data
  mimo sweep --config configs/ablations.py --data DIR --workdir DIR --backend slurm --launch="--accelerator h100:8 --nodes 2"

Finished runs are skipped, stopped ones resume. --config.… flags, such as --config.train.steps=500, apply to every run.""",
    )
    sweep.add_argument(
        "--config",
        type=InputPath,
        required=True,
        metavar="FILE",
        help="a file that defines groups of variants, such as configs/ablations.py",
    )
    sweep.add_argument("--base-config", type=InputPath, metavar="FILE", help="vary this config instead of the one named in FILE")
    sweep.add_argument("--workdir", type=OutputPath, required=True, metavar="DIR", help="directory for the runs and the summary")
    sweep.add_argument(
        "--data", type=InputPath, action="append", required=True, metavar="[NAME=]DIR", help="as for `mimo train`; repeatable"
    )
    sweep.add_argument(
        "--test", type=InputPath, metavar="DIR", help="dataset whose test split is evaluated (default: --data, if there is only one)"
    )
    sweep.add_argument("--init", type=InputPath, metavar="PATH", help="checkpoint to initialise the parameters of every run from")
    sweep.add_argument("--only", type=names, default=[], metavar="GROUP,…", help="groups to run (default: all)")
    sweep.add_argument("--seeds", type=seeds, default=[0], metavar="N,…", help="seeds of every variant (default: 0)")
    sweep.add_argument("--limit", type=positive, metavar="N", help="only the first N samples of the test split")
    sweep.add_argument("--backend", choices=("local", *CLUSTERS), default="local", help="where to train (default: local, on this machine)")
    sweep.add_argument(
        "--launch", type=shlex.split, default=[], metavar="FLAGS", help="flags for the launcher of --backend, as one word after ="
    )
    sweep.add_argument("--jobs", type=positive, metavar="N", help="number of runs at a time (default: 1; on a cluster, all)")
    peers_help = "figures of others for the tables of the paper: CSV with the columns table, model, column, value, address"
    sweep.add_argument("--peers", type=InputPath, metavar="FILE", help=peers_help)
    box_help = "report of `mimo eval --sam-box` on the same test data, a row of the tables of the paper"
    sweep.add_argument("--sam-box", type=InputPath, metavar="FILE", help=box_help)
    sweep.add_argument("--dry-run", action="store_true", help="print the runs and their commands without running them")
    sweep.set_defaults(run=_sweep, overrides=())


def _sweep(args: argparse.Namespace) -> int:
    from mimo_jax.cli.train import sources_of
    from mimo_jax.sweep.jobs import ClusterWorker, SweepCluster
    from mimo_jax.sweep.plan import SPLIT, SharedSettings, base_config, check_folders, make_sweep
    from mimo_jax.sweep.run import LocalWorker, run_all

    sources = sources_of(args.data)
    if not args.test and len(sources) > 1:
        raise UserError("--test: is missing; with several --data, name the dataset whose test split is evaluated")
    test = os.path.abspath(args.test) if args.test else next(iter(sources.values())).path
    shared = (*([f"--config.init.path={args.init}"] if args.init else []), *args.overrides)
    common = SharedSettings(args.base_config or base_config(args.config), tuple(args.data), shared, test, args.limit)
    workdir = Path(args.workdir)
    sweep = make_sweep(args.config, workdir, sources, common, args.only, args.seeds)
    check_folders(sweep.runs)
    cluster = SweepCluster(args.backend, tuple(args.launch)) if args.backend in CLUSTERS else None
    if cluster:
        cluster.check(workdir)
    elif args.launch:
        raise UserError(f"--launch {shlex.join(args.launch)}: applies only to a cluster; add --backend {' or '.join(CLUSTERS)}")
    from mimo_jax.sweep.paper_tables import markdown, paper_tables, read_peers, read_sam_box

    peers = read_peers(Path(args.peers)) if args.peers else []
    sam_box = read_sam_box(Path(args.sam_box), test, SPLIT, args.limit) if args.sam_box else None
    if args.dry_run:
        _print_plan(sweep, cluster)
        return EXIT_OK
    begin = partial(ClusterWorker, cluster=cluster) if cluster else LocalWorker
    failed, stopped = run_all(sweep.runs, begin, args.jobs or (len(sweep.runs) if cluster else 1))
    if stopped:
        print("stopped; run the same command to resume" + ("; submitted jobs continue by themselves" if cluster else ""), file=sys.stderr)
        return EXIT_TEMPFAIL

    from mimo_jax.sweep.summary import write_summary

    reports = {run.name: report for run in sweep.runs if (report := run.report())}
    part = f"{args.limit} samples" if args.limit else "all samples"
    about = f"{shlex.join([common.base, *args.overrides])}: {part} of the test split of {test}, seeds {','.join(map(str, args.seeds))}."
    print(write_summary(workdir, about, sweep.groups, reports))
    print(f"summary: {', '.join(str(workdir / f'summary.{kind}') for kind in ('md', 'json', 'png'))}")
    tables, missing = paper_tables(sweep.groups, reports, peers, sam_box)
    if tables:
        text = markdown(about, tables, missing, peers)
        (workdir / "paper.md").write_text(text, encoding="utf-8")
        print(f"\n{text}\ntables of the paper: {workdir / 'paper.md'}")
    for name, reason in failed.items():
        print(f"mimo: {name}: failed: {reason}", file=sys.stderr)
    return EXIT_PARTIAL if failed else EXIT_OK


def _print_plan(sweep: Sweep, cluster: SweepCluster | None) -> None:
    """Print the groups, and the remaining commands of every run."""
    for group, variants in sweep.groups.items():
        for variant, runs in variants.items():
            print(f"{group:14}{variant:30}{' '.join(runs)}")
    for run in sweep.runs:
        remaining = run.remaining()
        print(f"\n# {run.name}{'' if remaining else ': finished'}")
        for words in remaining:
            print(shlex.join(cluster.submit(run) if cluster and words[0] == "train" else ["mimo", *words]))
