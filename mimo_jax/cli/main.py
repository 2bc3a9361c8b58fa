"""The command `mimo`. Subcommands import their modules only when they run, so that `--help` is fast.

Exit codes: 0 done · 1 internal error · 2 usage error, nothing done · 3 done in part · 75 stopped on request, state saved.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from mimo_jax import __version__, errors
from mimo_jax.cli.arg_types import named_paths, resolve_bucket
from mimo_jax.cli.convert import add_verbs
from mimo_jax.cli.data import add_data
from mimo_jax.cli.evaluate import add_eval
from mimo_jax.cli.fetch import add_fetch
from mimo_jax.cli.infer import add_ask, add_batch, add_chat
from mimo_jax.cli.plugins import import_plugins
from mimo_jax.cli.sweep import add_sweep
from mimo_jax.cli.train import add_compile, add_profile, add_train
from mimo_jax.errors import EXIT_INTERRUPTED, EXIT_USAGE, UserError

_format_warning = warnings.formatwarning


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, with preformatted examples, and with one-line errors."""

    def __init__(self, **kwargs):
        self.flags: list[str] = []  # all spellings of its own flags
        self.commands: dict[str, Parser] = {}
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_argument(self, *args, **kwargs) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.flags += action.option_strings
        return action

    def add_subparsers(self, **kwargs):
        action = super().add_subparsers(**kwargs)
        self.commands = action.choices
        return action

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    top = Parser(
        prog="mimo",
        description="Ask about a medical image and get an answer whose structures are segmented. Research use only.",
        epilog="""examples:
  mimo ask --checkpoint tiny image.png "What is this?" --box 10,12,40,44 --out overlay.png
  mimo data phantom --out data/phantom --images 2000 --seed 0
  mimo train --config configs/tiny.py --data data/phantom --workdir runs/a
  mimo eval --checkpoint runs/a --data data/phantom --split test --out report.json
  mimo ask --checkpoint runs/a image.png "What is this?" --box 10,12,40,44 --out overlay.png
  mimo batch --checkpoint runs/a --in films --question "Segment the lungs." --out answers

exit codes: 0 done, 1 internal error (with a traceback), 2 usage error (one line), 3 done in part, 75 stopped: run it again to resume.
The environment variable MIMO_TRACEBACK=1 adds the traceback of any error.""",
    )
    top.add_argument("--version", action="version", version=f"mimo_jax {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    add_train(commands)
    add_compile(commands)
    add_profile(commands)
    add_sweep(commands)
    add_eval(commands)

    add_ask(commands)
    add_chat(commands)
    add_batch(commands)
    add_fetch(commands)

    add_data(commands)

    convert = commands.add_parser(
        "convert",
        help="convert PyTorch checkpoints to mimo_jax and back",
        description="Convert CLIP, Vicuna, SAM, LoRA and complete LISA checkpoints to a mimo_jax checkpoint, and back.",
    )
    add_verbs(convert)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Internal errors are raised."""
    warnings.formatwarning = _warning_line
    try:
        args = _parse(_join_negative_values([resolve_bucket(word) for word in (sys.argv[1:] if argv is None else argv)]))
        with named_paths(args):
            import_plugins()
            return args.run(args)
    except UserError as error:
        if errors.traceback_wanted():
            traceback.print_exception(error)
        print(f"mimo: error: {errors.user_message(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("mimo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _warning_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
    """A warning to the user as one line; others with their place in the code."""
    return f"mimo: warning: {message}\n" if category is UserWarning else _format_warning(message, category, *where, **line)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of one command; `overrides` are its `--config.…` arguments, if the command takes any."""
    top = parser()
    command = _command(top, argv)
    known = command.flags
    for argument in argv:
        flag = argument.split("=")[0]
        accepts_overrides = command.get_default("overrides") is not None
        if flag[:2] == "--" and flag not in known and not (accepts_overrides and flag.startswith(("--config.", "--noconfig."))):
            near = difflib.get_close_matches(flag, known, 1)
            raise UserError(f"{flag}: is unknown; {f'did you mean {near[0]}?' if near else f'see {command.prog} --help'}")
    args, rest = top.parse_known_args(argv)
    if rest and not hasattr(args, "overrides"):
        raise UserError(f"{rest[0]!r}: is an unexpected argument; see {command.prog} --help")
    args.overrides = rest
    return args


def _command(top: Parser, argv: Sequence[str]) -> Parser:
    """The parser of the command, or of its subcommand, with which a command line starts."""
    for word in argv:
        if word not in top.commands:
            break
        top = top.commands[word]
    return top


def _join_negative_values(argv: Sequence[str]) -> list[str]:
    """Replace `--box -3,4,9,9` by `--box=-3,4,9,9`, since argparse parses a leading minus as a flag."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--point", "--box", "--scribble", "--window") and argument[:1] == "-" and argument[1:2].isdecimal():
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
