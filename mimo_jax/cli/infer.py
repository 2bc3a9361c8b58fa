"""The commands `mimo ask`, `mimo chat` and `mimo batch`."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import InputPath, OutputPath, box, endings, index, index_or_all, point, positive, scribble, threshold, window
from mimo_jax.config import QUANTIZATIONS
from mimo_jax.errors import EXIT_OK, EXIT_PARTIAL, EXIT_TEMPFAIL, UserError

if TYPE_CHECKING:
    from mimo_jax.data.images.image import Volume
    from mimo_jax.infer.predictor import Mimo


def checkpoint_flags(command: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flags that select a checkpoint."""
    what = "a run directory (its newest complete step), one step, an import, or a named model (mimo fetch --list)"
    command.add_argument("--checkpoint", type=InputPath, required=required, metavar="PATH", help=what)
    command.add_argument("--base", type=InputPath, metavar="DIR", help="folder of the frozen base, if it was moved")
    command.add_argument("--allow-untrained", action="store_true", help="accept a checkpoint with randomly initialised parameters")


def _model_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags for quantization and mask decoding."""
    quantize_help = "store the language model as integers, with a half (int8) or a quarter (int4) of the memory of bf16"
    command.add_argument("--quantize", choices=QUANTIZATIONS, default="", help=quantize_help)
    command.add_argument("--refine", action="store_true", help="decode each mask twice, with the first mask as input of SAM's decoder")
    command.add_argument("--zoom", action="store_true", help="decode small masks again, on a crop of the image around them")
    command.add_argument("--sam-prompts", action="store_true", help="also give points, boxes and scribbles to SAM's prompt encoder")


def _load(args: argparse.Namespace) -> Mimo:
    """Load the model; what takes long is said on stderr, also later when a program has to be compiled."""
    if sys.stderr.isatty():  # elsewhere a checkpoint that cannot be loaded is answered with one line
        _say(f"loading {args.checkpoint}")
    import jax

    from mimo_jax.infer.engine.program_cache import progress
    from mimo_jax.infer.predictor import Mimo

    progress.setLevel(logging.INFO)
    progress.propagate = False
    progress.addHandler(_ToStderr())
    mimo = Mimo.load(args.checkpoint, args.base, args.allow_untrained, args.quantize)
    mimo.config = copy.deepcopy(mimo.config)
    for name in ("refine", "zoom", "sam_prompts"):
        if getattr(args, name):
            setattr(mimo.config.generate, name, True)
            mimo.origin += f", {name}"
    _say(mimo.origin)
    _say(f"device: {jax.device_count()} × {jax.devices()[0].device_kind}")
    return mimo


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _ToStderr(logging.Handler):
    """Prints messages on what stderr is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def add_ask(commands) -> None:
    """Add the parser of `mimo ask`."""
    ask = commands.add_parser(
        "ask",
        help="ask about one image, or about every slice of a scan",
        description="""Ask about one image. Coordinates are pixels of the image: x right, y down, integers are pixel centres.

For a scan (a folder of DICOM files, --slice axial:all, --frame all), the question is asked about every slice. Masks with the same name
become one structure, and --out writes one label map or DICOM SEG for all slices, or a sheet of segmented ones (.png). Points, boxes and
scribbles need a single slice.""",
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
        "image",
        type=InputPath,
        metavar="IMAGE",
        nargs="?",
        help="an image file (PNG, JPEG, TIFF, BMP, DICOM, NIfTI), or a folder of DICOM files",
    )
    ask.add_argument("question", metavar="QUESTION", nargs="?")
    point_help = "a pixel of the displayed image; label 1: inside, 0: outside; repeatable"
    ask.add_argument("--point", type=point, action="append", default=[], metavar="X,Y,LABEL", help=point_help)
    ask.add_argument("--box", type=box, action="append", default=[], metavar="X0,Y0,X1,Y1", help="x1 and y1 are exclusive; repeatable")
    ask.add_argument("--scribble", type=scribble, action="append", default=[], metavar='"X,Y X,Y …"', help="a stroke; repeatable")
    prompts_help = "a mask image, or JSON of points, boxes, scribbles, masks (COCO RLE), or a COCO annotation; repeatable"
    ask.add_argument("--prompts", type=InputPath, action="append", default=[], metavar="FILE", help=prompts_help)
    _picture_flags(ask, scans=True)
    out_help = "write the overlay (.png), the answer (.json), or the masks (.npy; .nii, .nii.gz, .dcm on the input's grid); repeatable"
    ask.add_argument("--out", type=OutputPath, action="append", default=[], metavar="FILE", help=out_help)
    ask.add_argument("--json", action="store_true", help="print the answer as JSON, masks as COCO RLE")
    ask.add_argument(
        "--estimate-memory", action="store_true", help="ask nothing; print how much memory the model needs, and whether it fits this device"
    )
    ask.set_defaults(run=_ask)


def _picture_flags(command: argparse.ArgumentParser, scans: bool = False) -> None:
    """Add the flags that select an image from a file (with `scans`, also all slices of it), and the length of an answer."""
    frame_help = "frame of a multi-frame DICOM file, from 0, such as 12" + "; or all" * scans
    command.add_argument("--frame", type=index_or_all if scans else index, metavar="N|all" if scans else "N", help=frame_help)
    slice_help = "slice of a NIfTI volume, such as axial:30; AXIS is axial, coronal, sagittal, or the file's i, j, k; INDEX starts at 0"
    slice_help += "; or axial:all; for a folder only INDEX, from 0 along the normal of its slices" * scans
    command.add_argument("--slice", metavar="AXIS:INDEX", help=slice_help)
    if scans:
        command.add_argument(
            "--series", type=positive, metavar="N", help="number of the series in a folder with several; if it is missing, they are listed"
        )
    window_help = "values shown as black and white, such as -160,240; or a CT window: lung, bone, soft, brain, abdomen or mediastinum; "
    window_help += "default: that of the file, else the 0.5 and 99.5 percentiles of the whole scan"
    command.add_argument("--window", type=window, metavar="LOW,HIGH|NAME", help=window_help)
    threshold_help = "least value in the mask of a prompt's mask image, such as 1 for ids or 128 for soft edges; default: decided for each"
    command.add_argument("--mask-threshold", type=threshold, metavar="VALUE", help=threshold_help)
    command.add_argument("--max-new-tokens", type=positive, metavar="N", help="maximum length of an answer, in tokens")


def _ask(args: argparse.Namespace) -> int:
    if args.estimate_memory:
        from mimo_jax.analysis.memory_estimate import estimate_checkpoint_memory, table
        from mimo_jax.infer.engine.lower_conversation import lower_conversation

        print(table(estimate_checkpoint_memory(args.checkpoint, lower_conversation, args.quantize)))
        return EXIT_OK
    if args.question is None:
        raise UserError("IMAGE and QUESTION are missing; give them, such as image.png 'Segment the liver.' (see mimo ask --help)")
    from mimo_jax.data.conversation import check_question
    from mimo_jax.data.images.image import Volume
    from mimo_jax.data.images.volume import open_scan
    from mimo_jax.data.prompt_files import join_prompts, read_prompts
    from mimo_jax.infer.answers.answer import check_outputs

    # A large model takes minutes to load, so the question, the image and the outputs are checked first.
    check_question(args.question)
    picture = open_scan(args.image, frame=args.frame, slice=args.slice, series=args.series, window=args.window)
    check_outputs(*args.out, grid=picture.grids if isinstance(picture, Volume) else picture.grid)
    for out in filter(os.path.exists, args.out):
        if os.path.samefile(out, args.image):
            raise UserError(f"--out {out}: is the image itself; choose another name")
        if os.path.samefile(os.path.dirname(out) or ".", args.image):
            raise UserError(f"--out {out}: is in the folder of the images; choose another folder")
    if isinstance(picture, Volume):
        return _ask_volume(args, picture)
    flags = {"points": args.point, "boxes": args.box, "scribbles": args.scribble}
    size = picture.pixels.shape[:2]
    in_files = [read_prompts(file, *size, mask_threshold=args.mask_threshold) for file in args.prompts]
    prompts = join_prompts([read_prompts(flags, *size), *in_files])
    mimo = _load(args)
    _say("answering")
    chat = mimo.open(picture)
    prompt_fields = {"points": prompts.points, "boxes": prompts.boxes, "scribbles": prompts.scribbles}
    answer = chat.ask(args.question, **prompt_fields, max_new_tokens=args.max_new_tokens)
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
        raise UserError("--point, --box, --scribble and --prompts need a single slice; choose one, such as --slice 30 or --frame 12")
    from mimo_jax.infer.volume import ask_volume

    answer = ask_volume(_load(args), volume, args.question, max_new_tokens=args.max_new_tokens)
    print(json.dumps(answer.to_json(), ensure_ascii=False) if args.json else answer.describe())
    if args.out:
        answer.save(*args.out)
        print(f"written to {', '.join(args.out)}", file=sys.stderr)
    return EXIT_OK


def add_chat(commands) -> None:
    """Add the parser of `mimo chat`."""
    chat = commands.add_parser(
        "chat",
        help="a conversation about one image",
        description="""A conversation about one image: one line per question, from the keyboard or a pipe. The image is encoded
once, and earlier turns are kept. Lines that start with / are commands: /help lists them.""",
        epilog="""examples:
  mimo chat --checkpoint runs/a image.png
  mimo chat --checkpoint runs/a ct.nii.gz --slice axial:30 --window soft
  mimo chat --checkpoint runs/a image.png --temperature 0.7 --seed 3 < questions.txt""",
    )
    checkpoint_flags(chat)
    _model_flags(chat)
    chat.add_argument(
        "image", type=InputPath, metavar="IMAGE", help="an image file: PNG, JPEG, TIFF, BMP, DICOM or NIfTI; or a folder of DICOM files"
    )
    _picture_flags(chat, scans=True)
    temperature_help = "sampling temperature; default: 0 (greedy)"
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T", help=temperature_help)
    chat.add_argument("--seed", type=index, default=0, metavar="N", help="seed of the sampling; default: 0")
    chat.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from mimo_jax.cli.chat import run_chat
    from mimo_jax.infer.engine.requests import Sampling
    from mimo_jax.infer.predictor import read_image

    Sampling(args.temperature, seed=args.seed).check()
    picture = read_image(args.image, frame=args.frame, slice=args.slice, series=args.series, window=args.window)
    mimo = _load(args)
    if sys.stdin.isatty():
        mimo.warm_up(progress=True)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed", "mask_threshold")}
    failed = run_chat(mimo.open(picture), **options)
    return EXIT_PARTIAL if failed and not sys.stdin.isatty() else EXIT_OK


def add_batch(commands) -> None:
    """Add the parser of `mimo batch`."""
    batch = commands.add_parser(
        "batch",
        help="ask about many images",
        description="""Ask one question about every image of a folder, or the requests of a file. OUT/answers.jsonl gets one line per
answer (masks as COCO RLE), OUT/failed.jsonl one line, with the reason, per request that could not be asked or file that could not be
saved, and OUT/summary.csv one row per segmented structure.

requests.jsonl has one JSON object per line, requests.csv the same names in its header (cells that start with [ or { are JSON):
  image             path of an image, relative to the file
  question          a text, or a list of texts: the turns of one conversation
  id                name of the answer's files; default: the running number and the image's name
  points, boxes, scribbles, mask, prompts    prompts of the first turn; mask and prompts: a file as in `mimo ask --prompts`, or an object
  frame, slice, series, window, mask_threshold, max_new_tokens    like the flags, which are the defaults

A scan is asked about slice by slice: with --volumes, every NIfTI file and every folder of DICOM files below the folder is a scan; in a
file of requests, a scan is a folder of DICOM files, or has slice axial:all or frame all.

A job that was stopped (Ctrl-C, SIGTERM: exit code 75) or killed resumes if --resume is added to the same command; its output is then
the same as that of an uninterrupted job. Without --resume, the folder OUT must be new or empty.""",
        epilog="""examples:
  mimo batch --checkpoint runs/a --in films --question "Segment the lungs." --out answers
  mimo batch --checkpoint runs/a --in films --question "Segment the lungs." --out answers --save .png,.dcm --window soft
  mimo batch --checkpoint runs/a --in scans --volumes --question "Segment the liver." --save .nii.gz --window soft --out answers
  mimo batch --checkpoint runs/a --in requests.jsonl --out answers --resume""",
    )
    checkpoint_flags(batch)
    _model_flags(batch)
    in_help = "a folder of images (searched recursively, without hidden files), or a .jsonl or .csv file of requests"
    batch.add_argument("--in", type=InputPath, required=True, metavar="PATH", dest="source", help=in_help)
    batch.add_argument("--question", metavar="TEXT", help="question about all images of a folder, or for requests without their own")
    batch.add_argument("--out", type=OutputPath, required=True, metavar="DIR", help="folder of the answers")
    save_help = "files to save for each answer, as OUT/ID.png and so on; comma-separated: .png, .npy, .nii, .nii.gz, .dcm"
    batch.add_argument("--save", type=endings, default=[], metavar="ENDINGS", help=save_help)
    batch.add_argument("--volumes", action="store_true", help="ask about every slice of NIfTI files and folders of DICOM files")
    batch.add_argument("--resume", action="store_true", help="resume the same job in OUT, if it was started")
    _picture_flags(batch, scans=True)
    batch.set_defaults(run=_batch)


def _batch(args: argparse.Namespace) -> int:
    from mimo_jax.infer.batch.job import FAILED, SUMMARY, WARNINGS
    from mimo_jax.infer.batch.run_batch import run_batch

    names = ("frame", "slice", "series", "window", "mask_threshold", "max_new_tokens", "save", "volumes", "resume")
    chosen = {name: getattr(args, name) for name in names}
    done = run_batch(lambda: _load(args), args.source, args.out, args.question, **chosen)
    if done.burned_in:
        print(f"mimo: warning: {done.burned_in} images may contain burned-in text, such as a patient's name", file=sys.stderr)
    for choice, count in done.choices.items():
        print(f"mimo: warning: {count} images: {choice}; see {os.path.join(args.out, WARNINGS)}", file=sys.stderr)
    if done.failed:
        print(f"{done.failed} requests failed at least in part; see the reasons in {os.path.join(args.out, FAILED)}", file=sys.stderr)
    if done.stopped:
        print(f"stopped after {done.done} requests; run the same command with --resume to continue", file=sys.stderr)
        return EXIT_TEMPFAIL
    print(f"{done.answered} answers in {args.out}; a table in {os.path.join(args.out, SUMMARY)}")
    return EXIT_PARTIAL if done.failed else EXIT_OK
