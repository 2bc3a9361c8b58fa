"""Usage errors and internal errors of complete commands: exit codes and tracebacks."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_jax.cli import main
from mimo_jax.cli.arg_types import InputPath, OutputPath, named_paths
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading import encode_features, example_builder
from mimo_jax.errors import UserError, user_path
from mimo_jax.eval import evaluate

CONFIG = """from tests.tiny_config import quick_config


def get_config():
    config = quick_config()
    config.train.steps = 1
    return config
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The home of a dataset `data`, a config `config.py` and a run `run` of one step."""
    home = tmp_path_factory.mktemp("home")
    build_phantoms(home / "data", 24, seed=5, progress=False)
    (home / "config.py").write_text(CONFIG)
    assert main.main(train_line(home, home / "run")) == 0
    return home


def train_line(home: Path, workdir: Path) -> list[str]:
    return ["train", "--config", str(home / "config.py"), "--data", f"phantom={home / 'data'}", "--workdir", str(workdir)]


def broken(*args, **kwargs):
    raise ValueError("operands could not be broadcast together")


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        (example_builder, "preprocess", "train"),
        (example_builder, "sample_arrays", "train"),
        (evaluate, "record_image", "eval --checkpoint run --data data --split test --out report.json --allow-untrained"),
        (encode_features, "preprocess", "data encode --checkpoint run --data data"),
    ],
)
def test_a_bug_of_ours_is_not_taken_for_a_bad_sample(trained, tmp_path, monkeypatch, module, name, words):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(module, name, broken)
    line = train_line(trained, tmp_path / "run") if words == "train" else words.split()
    with pytest.raises(ValueError, match="broadcast"):  # the interpreter prints the traceback and exits with 1
        main.main(line)


def test_a_process_ends_with_1_and_a_traceback_where_a_transform_has_a_bug(trained, tmp_path):
    code = """if 1:
        import sys
        from mimo_jax.cli import main
        from mimo_jax.data.loading import example_builder
        def broken(*args):
            raise ValueError("operands could not be broadcast together")
        example_builder.preprocess = broken
        sys.exit(main.main(sys.argv[1:]))"""
    line = [sys.executable, "-c", code, *train_line(trained, tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: operands" in done.stderr, done.stderr
    assert not list((tmp_path / "run").glob("steps/*"))


def test_user_path_tells_what_was_named_from_what_is_ours(tmp_path):
    def outcome(path, *named, **options):
        try:
            with user_path(*named, **options):
                open(path)
        except Exception as error:
            return type(error)

    data = tmp_path / "data"
    data.mkdir()
    assert outcome(tmp_path / "gone", tmp_path / "gone") is UserError
    assert outcome(tmp_path / "gone", tmp_path / "gone" / "report.json") is UserError
    assert outcome(data / "gone", data, contents=True) is UserError
    assert outcome(data / "gone", data) is FileNotFoundError
    assert outcome(tmp_path / "template.txt", data, contents=True) is FileNotFoundError
    with pytest.raises(UserError, match="^No space left on device; make room$"), user_path():
        raise OSError(28, "No space left on device")
    with pytest.raises(TimeoutError), user_path(data, contents=True):
        raise TimeoutError("no answer")


def test_the_type_of_an_argument_decides_whether_it_is_a_path(tmp_path, monkeypatch):
    """A text that looks like a path is none, and a file missing within an output is an internal error."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(image=InputPath("gone.png"), data=[InputPath("a=gone")], question="what.txt", out=[OutputPath("out")])
    for path, error in (
        ("gone.png", UserError),
        ("gone/info.json", UserError),
        ("what.txt", FileNotFoundError),
        ("out/x", FileNotFoundError),
    ):
        with pytest.raises(error), named_paths(args):
            open(path)


def test_every_path_argument_has_a_path_type():
    def arguments(parser):
        for command in parser.commands.values():
            yield from arguments(command)
        yield from parser._actions

    paths = [a for a in arguments(main.parser()) if a.metavar in ("PATH", "FILE", "DIR", "[NAME=]DIR", "IMAGE")]
    assert len(paths) > 40 and [a.dest for a in paths if a.type not in (InputPath, OutputPath)] == []


def test_mimo_traceback_shows_where_a_mistake_was_found():
    line = [sys.executable, "-m", "mimo_jax.cli", "train", "--config", "gone.py", "--workdir", "w"]
    quiet, shown = (
        subprocess.run(line, capture_output=True, text=True, timeout=120, env=os.environ | {"MIMO_TRACEBACK": told}) for told in ("0", "1")
    )
    assert quiet.returncode == shown.returncode == 2
    assert quiet.stderr.startswith("mimo: error: --config gone.py") and quiet.stderr.count("\n") == 1
    assert shown.stderr.startswith("Traceback") and shown.stderr.endswith(quiet.stderr)
