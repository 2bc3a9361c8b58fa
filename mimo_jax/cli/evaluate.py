"""The command `mimo eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mimo_jax.cli.arg_types import InputPath, OutputPath, positive
from mimo_jax.cli.infer import checkpoint_flags
from mimo_jax.config import QUANTIZATIONS
from mimo_jax.errors import EXIT_OK, UserError


def add_eval(commands) -> None:
    """Add the parser of `mimo eval`."""
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model on a dataset, or compare two evaluations",
        description="Answer every question of a split by free-running generation; write a report and print a table.",
        epilog="""examples:
  mimo eval --checkpoint runs/a --data data/phantom --split test --out report.json
  mimo eval --checkpoint runs/a/steps/500 --data my.jsonl --split val --limit 200 --overlays overlays --out report.json
  mimo eval --checkpoint runs/a --data data/held_out --baselines-from data/phantom --out report.json
  mimo eval --checkpoint runs/a --data data/phantom --split val --calibrate
  mimo eval --checkpoint IMPORT --allow-untrained --data data/phantom --sam-box --out sam.json
  mimo eval compare a.json b.json""",
    )
    checkpoint_flags(evaluate, required=False)
    evaluate.add_argument("--data", type=InputPath, metavar="DIR", help="a dataset written by `mimo data`, or a .jsonl manifest")
    evaluate.add_argument("--split", choices=("train", "val", "test"), help="default: test; with --calibrate: val")
    out_help = "write the report there, as JSON, and the results by sample beside it, as FILE.samples.jsonl without the .json"
    evaluate.add_argument("--out", type=OutputPath, metavar="FILE", help=out_help)
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N samples")
    evaluate.add_argument("--quantize", choices=QUANTIZATIONS, default="", help="store the language model as integers")
    evaluate.add_argument("--overlays", type=OutputPath, metavar="DIR", help="write overlays of answers there")
    from_help = "dataset whose training split the trivial baselines are fitted on (default: --data, if it has one)"
    evaluate.add_argument("--baselines-from", type=InputPath, metavar="DIR", help=from_help)
    box_help = "ask nothing; segment the structures of prompted questions from their true boxes with the checkpoint's SAM alone"
    evaluate.add_argument("--sam-box", action="store_true", help=box_help)
    calibrate_help = "instead of writing a report, fit the confidence calibration and save it with the checkpoint"
    evaluate.add_argument("--calibrate", action="store_true", help=calibrate_help)
    evaluate.set_defaults(run=_eval)

    verbs = evaluate.add_subparsers(dest="verb", metavar="compare")
    compare = verbs.add_parser(
        "compare",
        help="compare two evaluations of the same samples",
        description="Print the difference of every metric that is a ratio of sums, paired by sample, with its interval by patient or case.",
        epilog="""examples:
  mimo eval compare a.json b.json""",
    )
    compare.add_argument("a", type=InputPath, metavar="A.json", help="a report; its A.samples.jsonl must be beside it")
    compare.add_argument("b", type=InputPath, metavar="B.json", help="a report of the same samples, by another model")
    compare.set_defaults(run=_compare)


def _eval(args: argparse.Namespace) -> int:
    for name in ("checkpoint", "data"):
        if not getattr(args, name):
            raise UserError(f"--{name}: is missing (see mimo eval --help)")
    options = {"limit": args.limit, "base": args.base, "allow_untrained": args.allow_untrained}
    if args.calibrate:
        for flag in ("out", "overlays", "quantize", "baselines_from", "sam_box"):
            if getattr(args, flag):
                name = flag.replace("_", "-")
                raise UserError(f"--{name}: --calibrate writes no report; omit it, and run mimo eval again without --calibrate")
        from mimo_jax.eval.calibrate import calibrate_checkpoint

        calibrate_checkpoint(args.checkpoint, args.data, args.split or "val", **options)
        return EXIT_OK
    if not args.out:
        raise UserError("--out: is missing; name the file of the report, such as --out report.json")
    if args.sam_box:
        for flag in ("overlays", "quantize", "baselines_from"):
            if getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')}: does not apply to --sam-box; omit it")
        from mimo_jax.eval.sam_box import evaluate_sam_box

        evaluate_sam_box(args.checkpoint, args.data, args.split or "test", args.out, **options)
        return EXIT_OK
    from mimo_jax.eval.evaluate import evaluate_checkpoint

    options |= {"overlays": args.overlays, "quantization": args.quantize, "baselines_from": args.baselines_from}
    evaluate_checkpoint(args.checkpoint, args.data, args.split or "test", args.out, **options)
    return EXIT_OK


def _compare(args: argparse.Namespace) -> int:
    from mimo_jax.eval.compare import compare_reports, table

    print(table(Path(args.a), Path(args.b), compare_reports(Path(args.a), Path(args.b))))
    return EXIT_OK
