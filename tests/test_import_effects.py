"""Importing the package changes nothing of the process outside itself."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import contextlib, csv, importlib, json, logging, os, signal, sys, warnings
import jax

def handlers():
    return [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())]

def state():
    loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio", "jax")]
    return {
        "environment": dict(os.environ),
        "signal handlers": handlers(),
        "warnings": [repr(warnings.filters), repr(warnings.formatwarning), repr(warnings.showwarning)],
        "csv": csv.field_size_limit(),
        "hooks": [repr(hook) for hook in (sys.unraisablehook, sys.excepthook, sys.stdout, sys.stderr)],
        "hidden modules": sorted(name for name, module in sys.modules.items() if module is None),
        "logging": [[logger.level, repr(logger.filters), repr(logger.handlers)] for logger in loggers],
        "jax": {name: repr(value) for name, value in jax.config.values.items()},
    }

modules, libraries = json.loads(sys.argv[1])
for name in libraries:
    with contextlib.suppress(ImportError):  # some are made by their parents, and are no files
        importlib.import_module(name)
before = state()
for name in modules:
    importlib.import_module(name)
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


def test_importing_every_module_changes_nothing_of_the_process():
    paths = sorted((ROOT / "mimo_jax").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    # What the libraries change as they are imported, their submodules too (scipy.special sets a filter of warnings), does not count.
    find = "import importlib, json, sys\nfor name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
    find += "print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(_run(find, json.dumps(names)))
    libraries = [name for name in loaded if name.split(".")[0] not in ("mimo_jax", "configs", "checkpoints_convert", "__main__")]
    assert _run(PROGRAM, json.dumps([names, libraries])) == "{}\n"


def _run(program: str, argument: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
