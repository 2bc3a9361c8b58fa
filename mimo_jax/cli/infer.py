"""`mimo ask`, `mimo chat` and `mimo batch`: their flags, and what they call when they run."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import box, endings, index, index_or_all, point, positive, scribble, window
from mimo_jax.config import QUANTIZATIONS
from mimo_jax.errors import EXIT_OK, EXIT_PARTIAL, EXIT_TEMPFAIL, UserError

if TYPE_CHECKING:
    from mimo_jax.data.images.image import Volume
    from mimo_jax.infer.predictor import Mimo


def checkpoint_flags(command: argparse.ArgumentParser) -> None:
    """Which checkpoint a command reads."""
    what = "a run directory (its newest whole step), one step, or an import"
    command.add_argument("--checkpoint", required=True, metavar="PATH", help=what)
    command.add_argument("--base", metavar="DIR", help="where the frozen base lies, if it was moved")
    command.add_argument("--allow-untrained", action="store_true", help="take a checkpoint in which parameters are as a seed drew them")


def _model_flags(command: argparse.ArgumentParser) -> None:
    """How the model is held, and how it paints."""
    weights_help = "hold the language model in integers: a half (int8) or a quarter (int4) of the memory of bf16"
    command.add_argument("--quantize", choices=QUANTIZATIONS, default="", help=weights_help)
    command.add_argument("--refine", action="store_true", help="paint twice: SAM's decoder sees its own mask again")
    command.add_argument("--sam-prompts", action="store_true", help="give points, boxes and scribbles to SAM's prompt encoder too")


def _load(args: argparse.Namespace) -> Mimo:
    from mimo_jax.infer.predictor import Mimo

    mimo = Mimo.load(args.checkpoint, args.base, args.allow_untrained, args.quantize)
    mimo.config = copy.deepcopy(mimo.config)
    for name in ("refine", "sam_prompts"):
        if getattr(args, name):
            setattr(mimo.config.generate, name, True)
            mimo.origin += f", {name}"
    print(mimo.origin, file=sys.stderr)
    return mimo


def add_ask(commands) -> None:
    """The parser of `mimo ask` among those of the other commands."""
    ask = commands.add_parser(
        "ask",
        help="ask about one image, or every slice of a scan",
        description="""Ask about one image. Coordinates are pixels of the image: x right, y down, integers are pixel centres.

Of a scan (a folder of DICOM files, --slice axial:all, --frame all) every slice is asked the same; what goes by one name becomes one
structure, and --out writes one label map or DICOM SEG for all slices, or a sheet of painted ones (.png). Points, boxes and scribbles
mark one slice: choose it.""",
        epilog="""examples:
  mimo ask --checkpoint runs/a image.png "Segment the liver." --out overlay.png
  mimo ask --checkpoint runs/a image.png "What is this?" --box 10,12,40,44 --json
  mimo ask --checkpoint runs/a image.png "What is this?" --point 31,40,1 --point 5,5,0 --scribble "20,30 24,33 29,31"
  mimo ask --checkpoint runs/a image.png "What is this?" --prompts liver_mask.png --prompts more.json
  mimo ask --checkpoint runs/a ct.dcm "Segment the liver." --window soft --out overlay.png --out liver.dcm
  mimo ask --checkpoint runs/a cine.dcm "What is this?" --frame 12 --point 31,40,1 --out overlay.png
  mimo ask --checkpoint runs/a ct.nii.gz "Segment the liver." --slice axial:30 --window -160,240 --out liver.nii.gz
  mimo ask --checkpoint runs/a ct.nii.gz "Segment the liver." --slice axial:all --window soft --out liver.nii.gz --out sheet.png
  mimo ask --checkpoint runs/a series "Segment the liver." --out liver.dcm
  mimo ask --checkpoint runs/a series "What is this?" --series 2 --slice 30 --box 10,12,40,44
  mimo ask --checkpoint runs/a --estimate-memory --quantize int8""",
    )
    checkpoint_flags(ask)
    _model_flags(ask)
    ask.add_argument(
        "image", metavar="IMAGE", nargs="?", help="an image file (PNG, JPEG, TIFF, BMP, DICOM, NIfTI), or a folder of DICOM files"
    )
    ask.add_argument("question", metavar="QUESTION", nargs="?")
    ask.add_argument("--point", type=point, action="append", default=[], metavar="X,Y,LABEL", help="label 1: in, 0: out; repeatable")
    ask.add_argument("--box", type=box, action="append", default=[], metavar="X0,Y0,X1,Y1", help="x1 and y1 are outside; repeatable")
    ask.add_argument("--scribble", type=scribble, action="append", default=[], metavar='"X,Y X,Y …"', help="a stroke; repeatable")
    prompts_help = "a mask image, or JSON of points, boxes, scribbles, masks (COCO RLE), or a COCO annotation; repeatable"
    ask.add_argument("--prompts", action="append", default=[], metavar="FILE", help=prompts_help)
    _picture_flags(ask, scans=True)
    out_help = "write the overlay (.png), the answer (.json), the masks (.npy), or on the input's own grid .nii, .nii.gz, .dcm; repeatable"
    ask.add_argument("--out", action="append", default=[], metavar="FILE", help=out_help)
    ask.add_argument("--json", action="store_true", help="print the answer as JSON, masks as COCO RLE")
    ask.add_argument(
        "--estimate-memory", action="store_true", help="ask nothing; say what memory the model takes, and whether it fits here"
    )
    ask.set_defaults(run=_ask)


def _picture_flags(command: argparse.ArgumentParser, scans: bool = False) -> None:
    """What to show of a file (or, of `scans`, of a folder, and all of it), and how long an answer may be."""
    frame_help = "of a DICOM of several frames, from 0; such as 12" + ", or all" * scans
    command.add_argument("--frame", type=index_or_all if scans else index, metavar="N|all" if scans else "N", help=frame_help)
    slice_help = "of a NIfTI volume; AXIS axial, coronal, sagittal, or the file's i, j, k; INDEX along it, from 0; such as axial:30"
    slice_help += ", or axial:all; of a folder, INDEX alone, from 0 in the direction of its slices' normal" * scans
    command.add_argument("--slice", metavar="AXIS:INDEX", help=slice_help)
    if scans:
        command.add_argument("--series", type=positive, metavar="N", help="of a folder of several series; without it they are listed")
    window_help = "values that become black and white, such as -160,240; or, in HU, lung, bone, soft, brain, abdomen or mediastinum"
    command.add_argument("--window", type=window, metavar="LOW,HIGH|NAME", help=window_help)
    command.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer, in tokens")


def _ask(args: argparse.Namespace) -> int:
    if args.estimate_memory:
        from mimo_jax.analysis.memory_estimate import estimate_checkpoint_memory, table
        from mimo_jax.infer.engine.lower_conversation import lower_conversation

        print(table(estimate_checkpoint_memory(args.checkpoint, lower_conversation, args.quantize)))
        return EXIT_OK
    if args.question is None:
        raise UserError("IMAGE and QUESTION are needed, such as: image.png 'Segment the liver.' (see mimo ask --help)")
    from mimo_jax.data.images.image import Volume
    from mimo_jax.data.images.volume import open_scan
    from mimo_jax.data.prompt_files import join_prompts, read_prompts
    from mimo_jax.infer.answers.answer import check_outputs

    # A big model takes minutes to load: what is wrong with the image or the outputs is said before.
    picture = open_scan(args.image, frame=args.frame, slice=args.slice, series=args.series, window=args.window)
    check_outputs(*args.out, grid=picture.grids if isinstance(picture, Volume) else picture.grid)
    for out in filter(os.path.exists, args.out):
        if os.path.samefile(out, args.image):
            raise UserError(f"--out {out}: is the image itself; choose another name")
        if os.path.samefile(os.path.dirname(out) or ".", args.image):
            raise UserError(f"--out {out}: is a file of the folder asked about; choose another name")
    if isinstance(picture, Volume):
        return _ask_volume(args, picture)
    flags = {"points": args.point, "boxes": args.box, "scribbles": args.scribble}
    size = picture.pixels.shape[:2]
    prompts = join_prompts([read_prompts(flags, *size), *[read_prompts(file, *size) for file in args.prompts]])
    chat = _load(args).open(picture)
    marked = {"points": prompts.points, "boxes": prompts.boxes, "scribbles": prompts.scribbles}
    answer = chat.ask(args.question, **marked, max_new_tokens=args.max_new_tokens)
    if args.json:
        print(json.dumps(answer.to_json(), ensure_ascii=False))
    else:
        print(answer.describe())
        for entity in answer.entities:
            print(f"  {entity.describe()}")
    if args.out:
        answer.save(*args.out)
        print(f"written to {', '.join(args.out)}", file=sys.stderr)
    return EXIT_OK


def _ask_volume(args: argparse.Namespace, volume: Volume) -> int:
    if args.point or args.box or args.scribble or args.prompts:
        raise UserError("--point, --box, --scribble and --prompts mark one slice; choose it, as --slice 30 or --frame 12")
    from mimo_jax.infer.volume import ask_volume

    answer = ask_volume(_load(args), volume, args.question, max_new_tokens=args.max_new_tokens)
    print(json.dumps(answer.to_json(), ensure_ascii=False) if args.json else answer.describe())
    if args.out:
        answer.save(*args.out)
        print(f"written to {', '.join(args.out)}", file=sys.stderr)
    return EXIT_OK


def add_chat(commands) -> None:
    """The parser of `mimo chat` among those of the other commands."""
    chat = commands.add_parser(
        "chat",
        help="a conversation about one image",
        description="""A conversation about one image: a line for each question, from the keyboard or a pipe. The image is
encoded once, earlier turns are kept. Lines that begin with / mark, save or end: /help lists them.""",
        epilog="""examples:
  mimo chat --checkpoint runs/a image.png
  mimo chat --checkpoint runs/a ct.nii.gz --slice axial:30 --window soft
  mimo chat --checkpoint runs/a image.png --temperature 0.7 --seed 3 < questions.txt""",
    )
    checkpoint_flags(chat)
    _model_flags(chat)
    chat.add_argument("image", metavar="IMAGE", help="an image file: PNG, JPEG, TIFF, BMP, DICOM or NIfTI; or a folder of DICOM files")
    _picture_flags(chat, scans=True)
    temperature_help = "0, the default: the likeliest words; 1: drawn as they come"
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T", help=temperature_help)
    chat.add_argument("--seed", type=index, default=0, metavar="N", help="of what is drawn; default: 0")
    chat.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from mimo_jax.cli.chat import converse
    from mimo_jax.infer.engine.requests import Sampling
    from mimo_jax.infer.predictor import read_image

    Sampling(args.temperature, seed=args.seed).check()
    picture = read_image(args.image, frame=args.frame, slice=args.slice, series=args.series, window=args.window)
    mimo = _load(args)
    if sys.stdin.isatty():
        mimo.warm_up(progress=True)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    failed = converse(mimo.open(picture), **options)
    return EXIT_PARTIAL if failed and not sys.stdin.isatty() else EXIT_OK


def add_batch(commands) -> None:
    """The parser of `mimo batch` among those of the other commands."""
    batch = commands.add_parser(
        "batch",
        help="ask about many images",
        description="""Ask one question about every picture of a folder, or the requests of a file. OUT/answers.jsonl gets a line for
each answer (masks as COCO RLE), OUT/failed.jsonl one for each request that could not be asked, or file that could not be
saved, with the reason, and OUT/summary.csv a row for each painted structure.

requests.jsonl holds an object on each line, requests.csv has the same names in its header (cells that begin with [ or { are JSON):
  image             path of a picture, relative to the file
  question          a text, or a list of texts: the turns of one conversation
  id                name of the answer's files; without it the running number and the picture's name
  points, boxes, scribbles, mask, prompts    of the first turn; mask and prompts: a file as of `mimo ask --prompts`, or an object
  frame, slice, series, window, max_new_tokens    as the flags, which count for requests that do not say theirs

Scans are asked whole, slice by slice: --volumes takes every NIfTI file below a folder, and every folder of DICOM files, for one; a
request names a folder of DICOM files, or says slice axial:all or frame all.

A job that was stopped (Ctrl-C, SIGTERM: exit code 75) or killed goes on when --resume is added to the same command, and ends as
if it had not been. Without --resume the folder OUT must be new or empty.""",
        epilog="""examples:
  mimo batch --checkpoint runs/a --in films --question "Segment the lungs." --out answers
  mimo batch --checkpoint runs/a --in films --question "Segment the lungs." --out answers --save .png,.dcm --window soft
  mimo batch --checkpoint runs/a --in scans --volumes --question "Segment the liver." --save .nii.gz --window soft --out answers
  mimo batch --checkpoint runs/a --in requests.jsonl --out answers --resume""",
    )
    checkpoint_flags(batch)
    _model_flags(batch)
    in_help = "a folder of pictures (and of folders; hidden files are left out), a .jsonl or a .csv of requests"
    batch.add_argument("--in", required=True, metavar="PATH", dest="source", help=in_help)
    batch.add_argument("--question", metavar="TEXT", help="of all pictures of a folder, or of requests without their own")
    batch.add_argument("--out", required=True, metavar="DIR", help="where the answers go")
    save_help = "files for each answer, OUT/ID.png and so on: .png, .npy, on the input's own grid .nii, .nii.gz, .dcm; with commas"
    batch.add_argument("--save", type=endings, default=[], metavar="ENDINGS", help=save_help)
    batch.add_argument("--volumes", action="store_true", help="ask whole scans: NIfTI files and folders of DICOM files")
    batch.add_argument("--resume", action="store_true", help="go on with the same job in OUT, if it was begun")
    _picture_flags(batch, scans=True)
    batch.set_defaults(run=_batch)


def _batch(args: argparse.Namespace) -> int:
    from mimo_jax.infer.batch.job import FAILED, SUMMARY
    from mimo_jax.infer.batch.run_batch import run_batch

    chosen = {name: getattr(args, name) for name in ("frame", "slice", "series", "window", "max_new_tokens", "save", "volumes", "resume")}
    done = run_batch(lambda: _load(args), args.source, args.out, args.question, **chosen)
    if done.burned_in:
        print(f"mimo: warning: {done.burned_in} pictures may contain burned-in text, such as a patient's name", file=sys.stderr)
    if done.failed:
        print(f"{done.failed} requests failed in whole or in part; why stands in {os.path.join(args.out, FAILED)}", file=sys.stderr)
    if done.stopped:
        print(f"stopped after {done.done} requests; run the same command with --resume to go on", file=sys.stderr)
        return EXIT_TEMPFAIL
    print(f"{done.answered} answers in {args.out}; a table in {os.path.join(args.out, SUMMARY)}")
    return EXIT_PARTIAL if done.failed else EXIT_OK
