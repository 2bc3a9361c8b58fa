"""`mimo ask`: its flags, and what it calls when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys

from mimo_jax.errors import UserError
from mimo_jax.flag_values import box, index, point, positive, scribble, window


def checkpoint_flags(command: argparse.ArgumentParser) -> None:
    """Which checkpoint a command reads."""
    what = "a run directory (its newest whole step), one step, or an import"
    command.add_argument("--checkpoint", required=True, metavar="PATH", help=what)
    command.add_argument("--base", metavar="DIR", help="where the frozen base lies, if it was moved")
    command.add_argument("--allow-untrained", action="store_true", help="take a checkpoint in which parameters are as a seed drew them")


def add_ask(commands) -> None:
    """The parser of `mimo ask` among those of the other commands."""
    ask = commands.add_parser(
        "ask",
        help="ask about one image",
        description="Ask about one image. Coordinates are pixels of the image: x right, y down, integers are pixel centres.",
        epilog="""examples:
  mimo ask --checkpoint runs/a image.png "Segment the liver." --out overlay.png
  mimo ask --checkpoint runs/a image.png "What is this?" --box 10,12,40,44 --json
  mimo ask --checkpoint runs/a image.png "What is this?" --point 31,40,1 --point 5,5,0 --scribble "20,30 24,33 29,31"
  mimo ask --checkpoint runs/a ct.dcm "Segment the liver." --window soft --out overlay.png --out liver.dcm
  mimo ask --checkpoint runs/a cine.dcm "What is this?" --frame 12 --point 31,40,1 --out overlay.png
  mimo ask --checkpoint runs/a ct.nii.gz "Segment the liver." --slice axial:30 --window -160,240 --out liver.nii.gz""",
    )
    checkpoint_flags(ask)
    ask.add_argument("image", metavar="IMAGE", help="an image file: PNG, JPEG, TIFF, BMP, DICOM or NIfTI")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--point", type=point, action="append", default=[], metavar="X,Y,LABEL", help="label 1: in, 0: out; repeatable")
    ask.add_argument("--box", type=box, action="append", default=[], metavar="X0,Y0,X1,Y1", help="x1 and y1 are outside; repeatable")
    ask.add_argument("--scribble", type=scribble, action="append", default=[], metavar='"X,Y X,Y …"', help="a stroke; repeatable")
    ask.add_argument("--frame", type=index, metavar="N", help="of a DICOM of several frames, from 0; such as 12")
    slice_help = "of a NIfTI volume; AXIS axial, coronal, sagittal, or the file's i, j, k; INDEX along it, from 0; such as axial:30"
    ask.add_argument("--slice", metavar="AXIS:INDEX", help=slice_help)
    window_help = "values that become black and white, such as -160,240; or, in HU, lung, bone, soft, brain, abdomen or mediastinum"
    ask.add_argument("--window", type=window, metavar="LOW,HIGH|NAME", help=window_help)
    out_help = "write the overlay (.png), the answer (.json), the masks (.npy), or on the input's own grid .nii, .nii.gz, .dcm; repeatable"
    ask.add_argument("--out", action="append", default=[], metavar="FILE", help=out_help)
    ask.add_argument("--json", action="store_true", help="print the answer as JSON, masks as COCO RLE")
    ask.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer, in tokens")
    ask.set_defaults(run=_ask)


def _ask(args: argparse.Namespace) -> int:
    from mimo_jax.data.medical import open_picture
    from mimo_jax.infer.answer import check_outputs
    from mimo_jax.infer.predictor import Mimo

    # A big model takes minutes to load: what is wrong with the image or the outputs is said before.
    picture = open_picture(args.image, frame=args.frame, slice=args.slice, window=args.window)
    check_outputs(*args.out, grid=picture.grid)
    for out in args.out:
        if os.path.exists(out) and os.path.samefile(out, args.image):
            raise UserError(f"--out {out}: is the image itself; choose another name")
    mimo = Mimo.load(args.checkpoint, args.base, args.allow_untrained)
    print(mimo.origin, file=sys.stderr)
    chat = mimo.open(picture)
    answer = chat.ask(args.question, points=args.point, boxes=args.box, scribbles=args.scribble, max_new_tokens=args.max_new_tokens)
    if args.json:
        print(json.dumps(answer.to_json(), ensure_ascii=False))
    else:
        print(answer.describe())
        for entity in answer.entities:
            doubt = ", uncertain" if entity.uncertain else ""
            area = f"{entity.area_px} px" if entity.area_mm2 is None else f"{entity.area_px} px, {entity.area_mm2:.1f} mm²"
            print(f"  {entity.phrase or 'unnamed'}: {area}, box {entity.box_xyxy}, score {entity.score:.2f}{doubt}")
    if args.out:
        answer.save(*args.out)
        print(f"written to {', '.join(args.out)}", file=sys.stderr)
    return 0
