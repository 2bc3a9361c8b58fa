"""The shape of the tree: what pytest finds, names, lengths of files."""

import ast
import subprocess
import sys
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("mimo_jax", "checkpoints_convert", "configs", "launch", "benchmarks")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_folder_of_tests_is_one_that_pytest_skips(pytestconfig):
    skipped = pytestconfig.getini("norecursedirs")
    for path in sources("tests"):
        folders = path.relative_to(ROOT).parts[:-1]
        assert not [part for part in folders for pattern in skipped if fnmatch(part, pattern)], path


@pytest.mark.slow
def test_every_test_file_is_collected():
    """pytest enters no folder whose name it takes for build output, and says nothing of it."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    on_disk = {str(path.relative_to(ROOT)) for path in sources("tests") if path.name.startswith("test_")}
    assert on_disk - collected == set()


def test_no_class_name_is_used_twice():
    homes = defaultdict(list)
    for path in sources("mimo_jax", "checkpoints_convert"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*CODE)}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
