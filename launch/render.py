"""Fill a YAML template: `render.py TEMPLATE NAME=VALUE… [-- COMMAND…]`. `$name` is replaced by its value, `$command` by the words of the
command as a list. A missing or unused name is an error."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path


def render(template: str, values: dict[str, str]) -> str:
    """The text of the template with every `$name` replaced; raises KeyError for a missing value and ValueError for an unused one."""
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
