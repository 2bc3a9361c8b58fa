"""The checks that a launcher makes in Python before anything is rented: the config parses with its overrides, and the report of
`mimo compile`, if there is one, is for this accelerator and says that the run fits. Otherwise it prints one line and exits with 2."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

from mimo_jax.config_flags import load_config
from mimo_jax.errors import UserError

TPU = re.compile(r"v\w+:\d+(x\d+)+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--report", default="")
    parser.add_argument("--accelerator", default="")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("extra", nargs="*", help="further arguments of `mimo train`")
    args = parser.parse_args()
    try:
        load_config(["--config", args.config, *(word for word in args.extra if word.startswith(("--config.", "--noconfig.")))])
        if args.report:
            check_report(Path(args.report), args.accelerator, args.nodes)
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2
    return 0


def check_report(path: Path, accelerator: str, slices: int) -> None:
    """Raises UserError for a report that cannot be read, is for another machine, or says that the run does not fit."""
    if not TPU.fullmatch(accelerator):
        raise UserError(f"--report {path}: is for TPU slices, but --accelerator {accelerator} is not one; omit it")
    try:
        report = json.loads(path.read_text())
        found, chips, fits = report["topology"], report["chips"], report["fits"]
        remedies = " or ".join(report["remedies"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--report {path}: is not a report of mimo compile ({error!r}); make one with mimo compile --out {path}") from error
    wanted = math.prod(int(size) for size in accelerator.split(":")[1].split("x")) * slices
    if (found, chips) != (accelerator, wanted):
        again = f"mimo compile --topology {accelerator}" + (f" --slices {slices}" if slices > 1 else "")
        raise UserError(f"--report {path}: is for {found}, {chips} chips, not for {accelerator}, {wanted} chips; run {again}")
    if not fits:
        raise UserError(f"--report {path}: the run does not fit; {remedies or 'lower the batch size, shard more or use larger chips'}")


if __name__ == "__main__":
    sys.exit(main())
