"""Fill a YAML template: `render.py TEMPLATE NAME=VALUE… [-- COMMAND…]`. `$name` takes its value as it is, `$command` the command's words
as a list. A name too many or too few is an error."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path


def render(template: str, values: dict[str, str]) -> str:
    """The template's text with every `$name` in it filled in; KeyError or ValueError if values and names are not the same."""
    parsed = string.Template(template)
    unused = set(values) - set(parsed.get_identifiers())
    if unused:
        raise ValueError(f"the template has no {', '.join(sorted(unused))}")
    return parsed.substitute(values)


def main(argv: list[str]) -> None:
    end = argv.index("--") if "--" in argv else len(argv)
    values = dict(argument.split("=", 1) for argument in argv[1:end])
    if end < len(argv):
        values["command"] = json.dumps(argv[end + 1 :])
    sys.stdout.write(render(Path(argv[0]).read_text(), values))


if __name__ == "__main__":
    main(sys.argv[1:])
