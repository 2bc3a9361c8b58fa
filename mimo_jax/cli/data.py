"""`mimo data`: the flags of its verbs, and what they call when they run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import index, named_paths, part, positive, ratios, share
from mimo_jax.errors import EXIT_OK, EXIT_PARTIAL, EXIT_TEMPFAIL, EXIT_USAGE, UserError

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
  mimo data build --source biomedparse --in BiomedParse --out data/bmp --perspectives I,II --duplicates together""",
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
  mimo data encode --checkpoint runs/a --data data/mine --process 3/8     # one of eight, on as many machines
  mimo train --config configs/mimo_7b.py --init runs/a --data data/mine --config.data.features=True --workdir runs/b""",
}


def add_data(commands) -> None:
    """The parser of `mimo data` among those of the other commands."""
    data = commands.add_parser("data", help="make and look at datasets", description="Make datasets, and look at them.")
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=description, epilog=EXAMPLES[name])

    phantom = verb(
        "phantom",
        "synthetic images with every kind of question",
        "Draw medical-looking images with organs and lesions, and every kind of question about them.",
    )
    phantom.add_argument("--out", required=True, metavar="DIR", help="where the dataset goes")
    phantom.add_argument("--images", type=positive, default=2000, metavar="N", help="default: 2000")
    phantom.add_argument("--seed", type=index, default=0, metavar="N", help="the same seed makes the same images; default: 0")
    phantom.add_argument("--workers", type=positive, default=_CPUS, metavar="N", help="processes; default: one a core")
    phantom.set_defaults(run=_phantom)

    build = verb(
        "build",
        "a dataset of images and masks that you have",
        """Make a dataset: images as they are (repaired where they need it), masks as RLE, questions of every perspective, splits by
patient or case without duplicates across them. The result depends on the source and the flags, not on --workers.

A build that was stopped (Ctrl-C, SIGTERM: exit code 75) or killed goes on when the same command is run again. What cannot be read is
listed in OUT/rejects.jsonl (exit code 3), what looks wrong in OUT/notes.jsonl.""",
    )
    build.add_argument(
        "--source", required=True, metavar="KIND", help="the layout: sa-med2d, biomedparse, manifest, folders, …; a wrong one lists all"
    )
    build.add_argument("--in", required=True, metavar="PATH", dest="source_path", help="where the source lies")
    build.add_argument("--out", required=True, metavar="DIR", help="where the dataset goes")
    for name, what in (("dataset", "name of the data set"), ("modality", "such as CT or X-ray"), ("licence", "of the images")):
        build.add_argument(f"--{name}", metavar="TEXT", help=f"{what}, where the source does not say it")
    build.add_argument(
        "--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="another option of the source; repeatable"
    )
    build.add_argument("--perspectives", type=_names, metavar="LIST", help="questions to make, such as I,II; default: vqa,I,II,III,IV")
    qa_help = "who writes III and IV: templates (default), or the OpenAI-compatible endpoint of MIMO_LLM_URL, _MODEL and _KEY"
    build.add_argument("--qa", choices=("templates", "llm"), default="templates", help=qa_help)
    build.add_argument("--llm-cache", metavar="DIR", help="where replies are kept; default: mimo_jax/llm of the user's cache folder")
    build.add_argument("--llm-requests", type=positive, default=10_000, metavar="N", help="most requests of a process; default: 10000")
    _splitting(build)
    build.add_argument(
        "--max-rejects", type=share, default=0.01, metavar="SHARE", help="of the items that may be unreadable; default: 0.01"
    )
    build.add_argument("--workers", type=positive, default=_CPUS, metavar="N", help="processes; default: one a core")
    build.add_argument("--runner", choices=("local", "beam"), default="local", help="processes of this machine (default), or Apache Beam")
    beam_help = "flags of its pipeline, such as '--runner=FlinkRunner'; all machines see --in and --out"
    build.add_argument("--beam", type=shlex.split, default=[], metavar="FLAGS", help=beam_help)
    build.set_defaults(run=_build)

    merge = verb("merge", "several datasets to one", "Write the records of several datasets to one; each stays in the split that it has.")
    merge.add_argument("folders", nargs="+", metavar="DIR", help="datasets")
    merge.add_argument("--out", required=True, metavar="DIR", help="where the dataset goes")
    _duplicates(merge)
    merge.set_defaults(run=_merge)

    split = verb(
        "split", "split a dataset anew", "Divide the records of a dataset into train, val and test anew; their questions stay as they are."
    )
    split.add_argument("folder", metavar="DIR", help="a dataset")
    split.add_argument(
        "--by", choices=("group", "dataset"), default="group", help="what stays together: a patient or case, or a data set; default: group"
    )
    split.add_argument("--out", metavar="DIR", help="where the dataset goes; without it, it takes the place of DIR once it is whole")
    _splitting(split)
    split.set_defaults(run=_split)

    stats = verb("stats", "what a dataset holds", "Count images, masks and questions, by everything that they differ in.")
    stats.add_argument("folder", metavar="DIR", help="a dataset")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--plots", metavar="DIR", help="write a PNG of bars for each table there")
    stats.set_defaults(run=_stats)

    validate = verb(
        "validate",
        "is a dataset whole?",
        "Read every byte, decode every image and mask, and check them against what was recorded. Faults are listed, with exit code 2.",
    )
    validate.add_argument("folder", metavar="DIR", help="a dataset")
    validate.add_argument("--workers", type=positive, default=_CPUS, metavar="N", help="processes; default: one a core")
    validate.set_defaults(run=_validate)

    view = verb("view", "look at records", "Draw records: image, masks, prompts, questions and answers; of several, a sheet.")
    view.add_argument("folder", metavar="DIR", help="a dataset")
    view.add_argument("--index", type=_range, default=(0, 0), metavar="N|N-M", help="records of the split, from 0; default: 0")
    view.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    view.add_argument("--out", required=True, metavar="FILE", help="a .png")
    view.set_defaults(run=_view)

    encode = verb(
        "encode",
        "what frozen image encoders give, once for all of training",
        """Write what a checkpoint's CLIP and SAM encoder make of every picture beside the records, in bfloat16. Training that freezes both
takes it with --config.data.features=True, and decodes and encodes no picture. What is there already stays: a job that was stopped
(exit code 75) or killed goes on when the same command is run again.""",
    )
    encode.add_argument("--checkpoint", required=True, metavar="PATH", help="what training starts from, or a run of it")
    encode.add_argument("--base", metavar="DIR", help="where the checkpoint's frozen base lies, if it was moved")
    encode.add_argument("--data", required=True, metavar="DIR", help="a dataset, or a .jsonl manifest")
    encode.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: train")
    encode.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at a time on each device; default: 8")
    share_help = "every Nth picture alone, from the Ith, counted from 0; default: what falls to this one of the processes of a cluster"
    encode.add_argument("--process", type=part, metavar="I/N", help=share_help)
    encode.set_defaults(run=_encode)


def _splitting(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ratios", type=ratios, default=(0.9, 0.05, 0.05), metavar="A,B,C", help="train, val, test; default: 0.9,0.05,0.05"
    )
    command.add_argument("--seed", type=index, default=0, metavar="N", help="of what is drawn at random; default: 0")
    _duplicates(command)


def _duplicates(command: argparse.ArgumentParser) -> None:
    what = "pictures that look alike in different splits: an error, one split for their groups, or those of train (else val) left out"
    command.add_argument("--duplicates", choices=("refuse", "together", "drop"), default="refuse", help=f"{what}; default: refuse")


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a record such as 12, or records such as 0-24")
    return int(first), int(last or first)


# --- what the verbs do


def _phantom(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.phantom_set import build_phantoms

    _print_splits(args.out, build_phantoms(args.out, args.images, args.seed, workers=args.workers))
    return EXIT_OK


def _build(args: argparse.Namespace) -> int:
    from mimo_jax.data.builder.pipeline import REJECTS, build
    from mimo_jax.data.builder.readers import open_reader
    from mimo_jax.data.builder.workers import Beam

    told = {name: value for name in ("dataset", "modality", "licence") if (value := getattr(args, name)) is not None}
    reader = open_reader(args.source, args.source_path, **told, **dict(args.option))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    options = _options(
        args,
        max_rejects=args.max_rejects,
        qa=args.qa,
        llm_cache=args.llm_cache or os.path.join(home, "mimo_jax", "llm"),
        llm_requests=args.llm_requests,
        **({"perspectives": args.perspectives} if args.perspectives else {}),
    )
    info = build(reader, args.out, options, Beam(args.beam) if args.runner == "beam" else args.workers)
    if info is None:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_TEMPFAIL
    _print_splits(args.out, info)
    if empty := [name for name, share in info["ratios"].items() if share and name not in info["splits"]]:
        print(f"  nothing in {', '.join(empty)}: there are too few groups (patients or cases)")
    for note, count in info["notes"].items():
        print(f"  {count} x {note}")
    if info["unknown_entities"]:
        print(f"  names that no table knows, taken as they are: {', '.join(info['unknown_entities'])}")
    if info["rejected"]:
        where = os.path.join(args.out, REJECTS)
        print(f"{info['rejected']} of {info['items']} items have no record; why stands in {where}", file=sys.stderr)
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
        print(f"mimo: error: {args.folder}: {len(faults)} faults; build it again, or copy it again from where it is whole", file=sys.stderr)
        return EXIT_USAGE
    records = sum(split["records"] for split in read_info(args.folder)["splits"].values())
    print(f"{args.folder}: {records} records, all as they were written")
    return EXIT_OK


def _view(args: argparse.Namespace) -> int:
    from mimo_jax.data.loading.view import contact_sheet, draw_record
    from mimo_jax.data.records import open_records

    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: give a name that ends in .png")
    records = open_records(args.folder, args.split)
    first, last = args.index
    if last >= len(records):
        raise UserError(f"--index {last}: split {args.split} of {args.folder} holds {len(records)} records, counted from 0")
    chosen = [records[i] for i in range(first, last + 1)]
    picture = draw_record(chosen[0]) if len(chosen) == 1 else contact_sheet(chosen)
    picture.save(args.out)
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
        made = distributed.gather([done.written, done.before, len(done.failed), done.stopped])
        written, before, failed, stopped = (sum(counts) for counts in zip(*made, strict=True))
        print(f"{args.data} {args.split}: features of {written} images written, {before} were there")
        if stopped:
            print("stopped; run the same command again to go on", file=sys.stderr)
            return EXIT_TEMPFAIL
        if failed:
            where = done.unreadable if len(made) == 1 else done.unreadable.parent
            print(f"{failed} images cannot be read and have none; why stands in {where}", file=sys.stderr)
            return EXIT_PARTIAL
        return EXIT_OK

    return work() if args.process else distributed.run(work)
