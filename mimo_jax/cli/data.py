"""`mimo data`: the flags of its subcommands, and what they call when they run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import InputPath, OutputPath, fraction, index, named_paths, positive, ratios, shard, threshold
from mimo_jax.errors import EXIT_OK, EXIT_PARTIAL, EXIT_TEMPFAIL, EXIT_USAGE, UserError
from mimo_jax.process import cache_home

if TYPE_CHECKING:
    from mimo_jax.data.builder.build_plan import Options

_CPUS = os.cpu_count() or 1
_FAULTS_SHOWN = 20

EXAMPLES = {
    "phantom": """examples:
  mimo data phantom --out data/phantom --images 2000 --seed 0
  mimo data phantom --out data/small --images 64""",
    "build": """examples:
  mimo data build --source sa-med2d --in SAMed2Dv1 --out data/sa_med2d --workers 8
  mimo data build --source manifest --in my/manifest.jsonl --out data/mine --ratios 0.7,0.1,0.2
  mimo data build --source folders --in my_folder --modality CT --dataset mine --out data/mine
  MIMO_LLM_URL=https://host/v1 MIMO_LLM_MODEL=name mimo data build --qa llm --source manifest --in my --out data/mine
  mimo data build --source biomedparse --in BiomedParse --out data/bmp --perspectives I,II --duplicates group""",
    "merge": """examples:
  mimo data merge data/ct data/mr --out data/all""",
    "split": """examples:
  mimo data split data/mine --by group --ratios 0.8,0.1,0.1 --seed 3
  mimo data split data/all --by dataset --ratios 0.7,0.1,0.2 --out data/held_out""",
    "stats": """examples:
  mimo data stats data/mine
  mimo data stats data/mine --json --plots plots""",
    "validate": """examples:
  mimo data validate data/mine""",
    "view": """examples:
  mimo data view data/mine --index 12 --out sample.png
  mimo data view data/mine --split test --index 0-24 --out sheet.png""",
    "encode": """examples:
  mimo data encode --checkpoint runs/a --data data/mine
  mimo data encode --checkpoint runs/a --data data/mine --process 3/8     # the fourth of eight machines
  mimo train --config configs/mimo_7b.py --init runs/a --data data/mine --config.data.features=True --workdir runs/b""",
}


def add_data(commands) -> None:
    """Add the parser of `mimo data` to those of the other commands."""
    data = commands.add_parser("data", help="make and inspect datasets", description="Make and inspect datasets.")
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=description, epilog=EXAMPLES[name])

    phantom = verb(
        "phantom",
        "make synthetic images with every kind of question",
        "Draw medical-looking images with organs and lesions, and every kind of question about them.",
    )
    phantom.add_argument("--out", type=OutputPath, required=True, metavar="DIR", help="folder to write the dataset to")
    phantom.add_argument("--images", type=positive, default=2000, metavar="N", help="default: 2000")
    phantom.add_argument("--seed", type=index, default=0, metavar="N", help="the same seed gives the same images; default: 0")
    phantom.add_argument("--workers", type=positive, default=_CPUS, metavar="N", help="number of processes; default: one per core")
    phantom.set_defaults(run=_phantom)

    build = verb(
        "build",
        "build a dataset from existing images and masks",
        """Build a dataset: images as they are (repaired where necessary), masks as RLE, questions of every perspective, splits by
patient or case without near-duplicates across them. The result depends on the source and the flags, not on --workers.

A build that was stopped (Ctrl-C, SIGTERM: exit code 75) or killed resumes when the same command is run again. Items that cannot be read
are listed in OUT/rejects.jsonl (exit code 3), suspicious ones in OUT/warnings.jsonl.""",
    )
    build.add_argument(
        "--source", required=True, metavar="KIND", help="the layout: sa-med2d, biomedparse, manifest, folders, …; an unknown one lists all"
    )
    build.add_argument("--in", type=InputPath, required=True, metavar="PATH", dest="source_path", help="path of the source")
    build.add_argument("--out", type=OutputPath, required=True, metavar="DIR", help="folder to write the dataset to")
    for name, what in (
        ("dataset", "name of the data set"),
        ("modality", "modality, such as CT or X-ray"),
        ("licence", "licence of the images"),
    ):
        build.add_argument(f"--{name}", metavar="TEXT", help=f"{what}, if the source does not say")
    build.add_argument(
        "--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="another option of the source; repeatable"
    )
    threshold_help = "least value in a mask, such as 1 for masks of ids or 128 for soft edges; default: decided for each file"
    build.add_argument("--mask-threshold", type=threshold, metavar="VALUE", help=threshold_help)
    build.add_argument(
        "--perspectives", type=_names, metavar="LIST", help="perspectives to generate, such as I,II; default: vqa,I,II,III,IV"
    )
    qa_help = "who writes III and IV: templates (default), or the OpenAI-compatible endpoint of MIMO_LLM_URL, _MODEL and _KEY"
    build.add_argument("--qa", choices=("templates", "llm"), default="templates", help=qa_help)
    build.add_argument(
        "--llm-cache", type=OutputPath, metavar="DIR", help="where replies are cached; default: mimo_jax/llm in the user's cache folder"
    )
    build.add_argument(
        "--llm-requests", type=positive, default=10_000, metavar="N", help="maximum number of requests per process; default: 10000"
    )
    _splitting(build)
    build.add_argument(
        "--max-rejects", type=fraction, default=0.01, metavar="SHARE", help="share of the items that may be unreadable; default: 0.01"
    )
    build.add_argument("--workers", type=positive, default=_CPUS, metavar="N", help="number of processes; default: one per core")
    build.add_argument("--runner", choices=("local", "beam"), default="local", help="processes on this machine (default), or Apache Beam")
    beam_help = "pipeline options, such as '--runner=FlinkRunner'; all machines must see --in and --out"
    build.add_argument("--beam", type=shlex.split, default=[], metavar="FLAGS", help=beam_help)
    build.set_defaults(run=_build)

    merge = verb("merge", "merge datasets", "Write the records of several datasets to one; each record keeps its split.")
    merge.add_argument("folders", type=InputPath, nargs="+", metavar="DIR", help="datasets")
    merge.add_argument("--out", type=OutputPath, required=True, metavar="DIR", help="folder to write the dataset to")
    _duplicates(merge)
    merge.set_defaults(run=_merge)

    split = verb(
        "split",
        "split a dataset again",
        "Divide the records of a dataset into train, val and test again; their questions stay as they are.",
    )
    split.add_argument("folder", type=InputPath, metavar="DIR", help="a dataset")
    split.add_argument(
        "--by",
        choices=("group", "dataset"),
        default="group",
        help="what must not be divided: a patient or case, or a data set; default: group",
    )
    split.add_argument(
        "--out", type=OutputPath, metavar="DIR", help="folder to write the dataset to; default: replace DIR once the new one is complete"
    )
    _splitting(split)
    split.set_defaults(run=_split)

    stats = verb(
        "stats", "count what a dataset contains", "Count images, masks and questions by split, modality, entity, perspective and more."
    )
    stats.add_argument("folder", type=InputPath, metavar="DIR", help="a dataset")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--plots", type=OutputPath, metavar="DIR", help="write a bar chart of each table there, as PNG")
    stats.set_defaults(run=_stats)

    validate = verb(
        "validate",
        "check a dataset for damage",
        "Read every byte, decode every image and mask, and check them against their recorded values. Faults are listed (exit code 2).",
    )
    validate.add_argument("folder", type=InputPath, metavar="DIR", help="a dataset")
    validate.add_argument("--workers", type=positive, default=_CPUS, metavar="N", help="number of processes; default: one per core")
    validate.set_defaults(run=_validate)

    view = verb("view", "draw records", "Draw a record with its masks, prompts, questions and answers, or a contact sheet of several.")
    view.add_argument("folder", type=InputPath, metavar="DIR", help="a dataset")
    view.add_argument("--index", type=_range, default=(0, 0), metavar="N|N-M", help="records of the split, counted from 0; default: 0")
    view.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    view.add_argument("--out", type=OutputPath, required=True, metavar="FILE", help="a .png file")
    view.set_defaults(run=_view)

    encode = verb(
        "encode",
        "cache the features of frozen image encoders for training",
        """Write the features of a checkpoint's vision and SAM encoders for every image next to the records, in bfloat16. With
--config.data.features=True, training that freezes both encoders reads them instead of decoding and encoding images. Existing features
are kept: a job that was stopped (exit code 75) or killed resumes when the same command is run again.""",
    )
    encode.add_argument(
        "--checkpoint",
        type=InputPath,
        required=True,
        metavar="PATH",
        help="the checkpoint that training starts from, or a run that started from it",
    )
    encode.add_argument("--base", type=InputPath, metavar="DIR", help="path of the checkpoint's frozen base, if it was moved")
    encode.add_argument("--data", type=InputPath, required=True, metavar="DIR", help="a dataset, or a .jsonl manifest")
    encode.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    encode.add_argument("--batch", type=positive, default=8, metavar="N", help="images per device and step; default: 8")
    share_help = "encode only every Nth image, starting with the Ith, counted from 0; default: the share of this process of the cluster"
    encode.add_argument("--process", type=shard, metavar="I/N", help=share_help)
    encode.set_defaults(run=_encode)


def _splitting(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ratios", type=ratios, default=(0.9, 0.05, 0.05), metavar="A,B,C", help="train, val, test; default: 0.9,0.05,0.05"
    )
    command.add_argument("--seed", type=index, default=0, metavar="N", help="random seed; default: 0")
    _duplicates(command)


def _duplicates(command: argparse.ArgumentParser) -> None:
    what = "near-duplicate images in different splits: error, put their groups into one split, or drop those of train (else val)"
    command.add_argument("--duplicates", choices=("error", "group", "drop"), default="error", help=f"{what}; default: error")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.replace("-", "_"), value


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} is not a record number such as 12, or a range such as 0-24")
    return int(first), int(last or first)


# --- the subcommands


def _phantom(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.phantom_set import build_phantoms

    _print_splits(args.out, build_phantoms(args.out, args.images, args.seed, workers=args.workers))
    return EXIT_OK


def _build(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.pipeline import REJECTS, build
    from mimo_jax.data.builder.readers import open_reader
    from mimo_jax.data.builder.workers import Beam

    metadata = {name: value for name in ("dataset", "modality", "licence", "mask_threshold") if (value := getattr(args, name)) is not None}
    reader = open_reader(args.source, args.source_path, **metadata, **dict(args.option))
    options = _options(
        args,
        max_rejects=args.max_rejects,
        qa=args.qa,
        llm_cache=args.llm_cache or str(cache_home() / "llm"),
        llm_requests=args.llm_requests,
        **({"perspectives": args.perspectives} if args.perspectives else {}),
    )
    info = build(reader, args.out, options, Beam(args.beam) if args.runner == "beam" else args.workers)
    if info is None:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return EXIT_TEMPFAIL
    _print_splits(args.out, info)
    if empty := [name for name, share in info["ratios"].items() if share and name not in info["splits"]]:
        reason = "its source puts all groups into other splits" if info["split_by_source"] else "there are too few groups"
        print(f"  nothing in {', '.join(empty)}: {reason} (patients or cases)")
    for warning, count in info["warnings"].items():
        print(f"  {count} x {warning}")
    if info["unknown_entities"]:
        print(f"  unknown entities, kept under their own names: {', '.join(info['unknown_entities'])}")
    if info["rejected"]:
        where = os.path.join(args.out, REJECTS)
        print(f"{info['rejected']} of {info['items']} items have no record; the reasons are in {where}", file=sys.stderr)
        return EXIT_PARTIAL
    return EXIT_OK


def _merge(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.rewrite import merge_folders

    _print_splits(args.out, merge_folders(args.folders, args.out, _options(args)))
    return EXIT_OK


def _split(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.rewrite import split_folder

    _print_splits(args.out or args.folder, split_folder(args.folder, args.out, args.by, _options(args)))
    return EXIT_OK


def _options(args: argparse.Namespace, **more) -> Options:
    from mimo_jax.data.builder.build_plan import SPLITS, Options

    if "ratios" in args:
        more |= {"shares": dict(zip(SPLITS, args.ratios, strict=True)), "seed": args.seed}
    return Options(duplicates=args.duplicates, **more)


def _print_splits(out: str, info: Mapping) -> None:
    for name, split in info["splits"].items():
        kinds = ", ".join(f"{perspective} {count}" for perspective, count in split["perspectives"].items())
        print(f"{out} {name}: {split['records']} images, {split['masks']} masks, {split['samples']} samples ({kinds})")


def _stats(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.stats import describe, plot, statistics

    found = statistics(args.folder)
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else describe(found))
    if args.plots:
        print(f"written to {args.plots}: {', '.join(path.name for path in plot(found, args.plots))}", file=sys.stderr)
    return EXIT_OK


def _validate(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.validate import find_faults
    from mimo_jax.data.records import read_info

    faults = find_faults(args.folder, args.workers)
    for fault in faults[:_FAULTS_SHOWN]:
        print(fault, file=sys.stderr)
    if faults:
        print(f"mimo: error: {args.folder}: {len(faults)} faults; build it again, or copy it again from an intact one", file=sys.stderr)
        return EXIT_USAGE
    records = sum(split["records"] for split in read_info(args.folder)["splits"].values())
    print(f"{args.folder}: {records} records, all intact")
    return EXIT_OK


def _view(args: argparse.Namespace) -> int:
    from mimo_jax.data.loading.view import contact_sheet, draw_record
    from mimo_jax.data.records import open_records

    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: give a name that ends in .png")
    records = open_records(args.folder, args.split)
    first, last = args.index
    if last >= len(records):
        raise UserError(f"--index {last}: split {args.split} of {args.folder} has {len(records)} records, counted from 0")
    chosen = [records[i] for i in range(first, last + 1)]
    drawing = draw_record(chosen[0]) if len(chosen) == 1 else contact_sheet(chosen)
    drawing.save(args.out)
    print(f"written to {args.out}", file=sys.stderr)
    return EXIT_OK


def _encode(args: argparse.Namespace) -> int:
    from mimo_jax import distributed

    def work() -> int:
        import jax

        from mimo_jax.data.loading.encode_features import encode_checkpoint

        mine = args.process or (jax.process_index(), jax.process_count())
        with named_paths(args):
            done = encode_checkpoint(args.checkpoint, args.data, args.split, args.batch, *mine, args.base)
        counts_by_process = distributed.gather([done.written, done.existing, len(done.failed), done.stopped])
        written, before, failed, stopped = (sum(counts) for counts in zip(*counts_by_process, strict=True))
        print(f"{args.data} {args.split}: features of {written} images written, {before} existed already")
        if stopped:
            print("stopped; run the same command again to resume", file=sys.stderr)
            return EXIT_TEMPFAIL
        if failed:
            where = done.unreadable if len(counts_by_process) == 1 else done.unreadable.parent
            print(f"{failed} images cannot be read and have no features; the reasons are in {where}", file=sys.stderr)
            return EXIT_PARTIAL
        return EXIT_OK

    return work() if args.process else distributed.run(work)
