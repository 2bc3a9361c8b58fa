"""The one command, `mimo`. Subcommands import what they need when they run, so that `--help` is quick.

Exit codes: 0 done · 1 our fault · 2 the user's fault, nothing done · 3 done in part · 75 stopped on request, state saved.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mimo_jax import __version__, errors
from mimo_jax.cli.arg_types import mounted, positive
from mimo_jax.cli.convert import add_verbs
from mimo_jax.cli.data import add_data
from mimo_jax.cli.infer import add_ask, add_batch, add_chat, checkpoint_flags
from mimo_jax.cli.sweep import add_sweep
from mimo_jax.cli.train import add_compile, add_profile, add_train
from mimo_jax.config import QUANTIZATIONS
from mimo_jax.errors import UserError

EXIT_DONE, EXIT_OURS, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, examples kept as they are typed, and errors of one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    top = Parser(
        prog="mimo",
        description="Ask about a medical image and get an answer whose structures are painted. Research use only.",
        epilog="""examples:
  mimo data phantom --out data/phantom --images 2000 --seed 0
  mimo train --config configs/tiny.py --data data/phantom --workdir runs/a
  mimo eval --checkpoint runs/a --data data/phantom --split test --out report.json
  mimo ask --checkpoint runs/a image.png "What is this?" --box 10,12,40,44 --out overlay.png
  mimo batch --checkpoint runs/a --in films --question "Segment the lungs." --out answers""",
    )
    top.add_argument("--version", action="version", version=f"mimo_jax {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    add_train(commands)
    add_compile(commands)
    add_profile(commands)
    add_sweep(commands)

    evaluate = commands.add_parser(
        "eval",
        help="measure a model on a dataset",
        description="Answer every question of a split by free-running generation; write a report and print a table.",
        epilog="""examples:
  mimo eval --checkpoint runs/a --data data/phantom --split test --out report.json
  mimo eval --checkpoint runs/a/steps/500 --data my.jsonl --split val --limit 200 --overlays overlays --out report.json
  mimo eval --checkpoint runs/a --data data/phantom --split val --calibrate""",
    )
    checkpoint_flags(evaluate)
    evaluate.add_argument("--data", required=True, metavar="DIR", help="a folder that `mimo data` wrote, or a .jsonl manifest")
    evaluate.add_argument("--split", choices=("train", "val", "test"), help="default: test; with --calibrate: val")
    evaluate.add_argument("--out", metavar="FILE", help="where the report goes, as JSON")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N samples")
    evaluate.add_argument("--quantize", choices=QUANTIZATIONS, default="", help="hold the language model in integers")
    evaluate.add_argument("--overlays", metavar="DIR", help="write pictures of answers there")
    calibrate_help = "instead of a report: fit the scores to the IoU found, and keep that with the checkpoint"
    evaluate.add_argument("--calibrate", action="store_true", help=calibrate_help)
    evaluate.set_defaults(run=_eval)

    add_ask(commands)
    add_chat(commands)
    add_batch(commands)

    add_data(commands)

    convert = commands.add_parser(
        "convert",
        help="PyTorch checkpoints to mimo_jax and back",
        description="Turn CLIP, Vicuna, SAM, LoRA and whole LISA checkpoints into a mimo_jax checkpoint, and back.",
    )
    add_verbs(convert)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors that are ours are raised."""
    if argv is None and sys.argv[1:2] == ["train"]:
        _ask_for_huge_pages()
    warnings.formatwarning = lambda message, category, *_, **__: f"mimo: warning: {message}\n"
    # Compiled programs outlive the process: a second `ask` starts in seconds.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "mimo_jax" / "jax"))
    try:
        args = _parse(_negatives_joined([mounted(word) for word in (sys.argv[1:] if argv is None else argv)]))
        return args.run(args)
    except (UserError, OSError) as error:
        line = errors.line(error)
        if line is None:
            raise
        print(f"mimo: error: {line}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("mimo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _ask_for_huge_pages() -> None:
    """Start this process anew with huge pages for big arrays, which the C library takes up only as it starts: on a CPU a step takes
    a tenth less time, or more (benchmarks/RESULTS.md). Where it does not know the setting, nothing changes."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of one command; its `overrides` are the `--config.…` arguments, of those commands that take any."""
    top = parser()
    command = _command(top, argv)
    known = [flag for action in command._actions for flag in action.option_strings]
    for argument in argv:
        flag = argument.split("=")[0]
        takes_overrides = command.get_default("overrides") is not None
        if flag[:2] == "--" and flag not in known and not (takes_overrides and flag.startswith(("--config.", "--noconfig."))):
            near = difflib.get_close_matches(flag, known, 1)
            raise UserError(f"{flag}: is unknown; {f'did you mean {near[0]}?' if near else f'see {command.prog} --help'}")
    args, rest = top.parse_known_args(argv)
    if rest and not hasattr(args, "overrides"):
        raise UserError(f"{rest[0]!r}: is one argument too many; see {command.prog} --help")
    args.overrides = rest
    return args


def _command(top: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that a line begins with, or of its verb."""
    for word in argv:
        choices = [action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction)]
        if not choices or word not in choices[0]:
            break
        top = choices[0][word]
    return top


def _negatives_joined(argv: Sequence[str]) -> list[str]:
    """`--box -3,4,9,9` as `--box=-3,4,9,9`: argparse takes a leading minus for a flag."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--point", "--box", "--scribble", "--window") and argument[:1] == "-" and argument[1:2].isdecimal():
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


# --- what the commands do


def _eval(args: argparse.Namespace) -> int:
    options = {"limit": args.limit, "base": args.base, "allow_untrained": args.allow_untrained}
    if args.calibrate:
        for flag in ("out", "overlays", "quantize"):
            if getattr(args, flag):
                raise UserError(f"--{flag}: --calibrate writes no report; leave it away, and run mimo eval again without --calibrate")
        from mimo_jax.eval.calibrate import calibrate_checkpoint

        calibrate_checkpoint(args.checkpoint, args.data, args.split or "val", **options)
        return EXIT_DONE
    if not args.out:
        raise UserError("--out: is missing; say where the report goes, as --out report.json")
    from mimo_jax.eval.evaluate import evaluate_checkpoint

    options |= {"overlays": args.overlays, "quantization": args.quantize}
    evaluate_checkpoint(args.checkpoint, args.data, args.split or "test", args.out, **options)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
