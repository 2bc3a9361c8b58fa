"""What the documentation says: commands parse, configs and overrides exist, Python examples fit the code, links and paths lead somewhere.

Under the marker `slow` (`make test-all`), the README's quick start and its Python example run for real, at tiny size.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_jax.cli import main
from mimo_jax.cli.train import sources_of
from mimo_jax.config import Config
from mimo_jax.config_flags import load_config
from mimo_jax.errors import UserError
from mimo_jax.sweep.plan import base_config
from tests.example_types import Types

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    ROOT / "launch" / "README.md",
    ROOT / "benchmarks" / "RESULTS.md",
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
FOLDERS = ("mimo_jax", "configs", "launch", "benchmarks", "tests", "checkpoints_convert", "docs")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_CODE = re.compile(r"`([^`\n]+)`")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [text for name, text in _FENCE.findall(page.read_text()) if name == language]


def indented(page: Path) -> list[str]:
    """The lines of a page that stand in an indented block."""
    return [line.strip() for line in _FENCE.sub("", page.read_text()).splitlines() if line.startswith("    ")]


def command_lines(page: Path) -> list[str]:
    """The commands of a page, continued lines joined; also those of an indented block."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += [line for line in indented(page) if re.match(r"(mimo|make|python|pip|launch/\S+) ", line)]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def inline(page: Path) -> list[str]:
    """The code spans in the text of a page."""
    return _CODE.findall(_FENCE.sub("", page.read_text()))


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- commands


def check_mimo(arguments: list[str]) -> None:
    """Raise what `mimo` would for these arguments before it runs; nothing is read but config files."""
    args = main._parse(main._join_negative_values(arguments))
    if args.overrides or hasattr(args, "workdir") and hasattr(args, "config"):
        config = args.config
        if args.command == "sweep":
            config = args.base_config or base_config(str(ROOT / config))
        data = args.data if args.command in ("train", "sweep") else []
        load_config(["--config", config, *args.overrides], sources_of(data))
    if getattr(args, "config", None):
        assert (ROOT / args.config).is_file(), f"{args.config} does not exist"


def check_command(line: str) -> None:
    program, *arguments = words(line)
    while "=" in program:  # a variable of the environment before the command
        program, *arguments = arguments
    if program == "mimo":
        check_mimo(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets, f"the Makefile has no target {arguments[0]}"
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} does not exist"
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", line)
        declared = importlib.metadata.metadata("mimo_jax").get_all("Provides-Extra")
        assert all(extra in declared for group in extras for extra in group.split(",")), f"{line}: no such extra"
    elif program.startswith("launch/"):
        check_launcher(program, arguments)
    else:
        assert program in ("python3.11", "source"), f"this test does not know how to check: {line}"


def check_launcher(program: str, arguments: list[str]) -> None:
    done = subprocess.run(["bash", program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{program} --help: {done.stderr}"
    for flag in arguments:
        assert not flag.startswith("--") or flag in done.stdout, f"{program} --help does not name {flag}"


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_commands_are_understood(page):
    for line in command_lines(page):
        try:
            check_command(line)
        except Exception as error:
            raise AssertionError(f"{name(page)}: {line}\n{error}") from error


@pytest.mark.parametrize(
    "line",
    [
        "mimo ask --checkpoint runs/a image.png Hello --no-such-flag",
        "mimo paint image.png",
        "mimo train --config configs/tiny.py --workdir w --config.train.no_such_field=1",
        "mimo train --config configs/no_such_config.py --workdir w",
        "make no-such-target",
        "python benchmarks/no_such_file.py",
        'pip install -e ".[no_such_extra]"',
        "launch/local.sh --no-such-flag",
        "rm -rf runs",
    ],
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((UserError, AssertionError)):
        check_command(line)


def all_flags(command: argparse.ArgumentParser) -> set[str]:
    """The flags of a command and of all below it."""
    flags = set()
    for action in command._actions:
        flags |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            flags = flags.union(*(all_flags(below) for below in action.choices.values()))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_and_fields_in_the_text_exist(page):
    """`--flag`, `--config.path=value`, `config.path` and `mimo …` in the text; a `mimo` command there need not be complete."""
    known = all_flags(main.parser()) | {"--implicit-dirs"}
    for span in inline(page):
        if match := re.match(r"(?:--)?config\.([a-z_.]+)", span):
            field = Config()
            for part in match[1].rstrip(".").split("."):
                assert hasattr(field, part), f"{name(page)}: {span} is no field of the config"
                field = getattr(field, part)
        elif match := re.match(r"--[a-z-]+", span):
            assert match[0] in known or match[0] in launcher_flags(), f"{name(page)}: no command has {span}"
        elif re.match(r"mimo [a-z]", span) and "COMMAND" not in span:
            command = main._command(main.parser(), words(span)[1:])
            verbs = [word for word in words(span)[1:] if re.fullmatch(r"[a-z]+", word)]
            assert command.prog.split()[-1] in verbs, f"{name(page)}: {span} is no command"
            wrong = {word.split("=")[0] for word in words(span) if word.startswith("--") and not word.startswith("--config.")}
            assert wrong <= all_flags(command), f"{name(page)}: {span} has an unknown flag"


def launcher_flags() -> set[str]:
    return {flag for path in (ROOT / "launch").rglob("*.sh") for flag in re.findall(r"--[a-z-]+", path.read_text())}


def test_the_readme_shows_both_targets():
    lines = command_lines(ROOT / "README.md")
    assert any(line.startswith("make demo") for line in lines) and any(line.startswith("make test ") for line in lines)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# --- Python


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_fit_the_code(page):
    for number, example in enumerate(blocks(page, "python"), 1):
        where = f"{name(page)}, Python example {number}"
        compile(example, where, "exec")
        Types(where).read(ast.parse(example))


@pytest.mark.parametrize(
    "line",
    [
        "from mimo_jax import Nothing",
        "mimo.nothing",
        "mimo.load('a', nothing=1)",
        "mimo.open('a').nothing",
        "mimo.open('a').ask('b').nothing",
    ],
)
def test_a_wrong_python_example_is_noticed(line):
    with pytest.raises((AssertionError, ImportError)):
        Types("example").read(ast.parse(f"from mimo_jax import Mimo\nmimo = Mimo.load('runs/a')\n{line}"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_dotted_names_in_the_text_exist(page):
    for span in inline(page):
        if re.fullmatch(r"mimo_jax(\.\w+)+", span):
            module, _, symbol = span.rpartition(".")
            assert hasattr(importlib.import_module(module), symbol), f"{name(page)}: {span} does not exist"


# --- links and paths


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_the_text_exist(page):
    for span in inline(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", span):
            assert (ROOT / span).exists(), f"{name(page)}: {span} does not exist"


def test_names_of_code_in_architecture_stand_in_the_file_named_with_them():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for symbol, path in (
        ("RULES", "mimo_jax/sharding.py"),
        ("AXES", "mimo_jax/sharding.py"),
        ("LOGICAL_AXES", "mimo_jax/sharding.py"),
        ("make_mesh", "mimo_jax/sharding.py"),
        ("inference_mesh", "mimo_jax/sharding.py"),
        ("MeshConfig", "mimo_jax/config.py"),
        ("register_reader", "mimo_jax/data/builder/readers/__init__.py"),
        ("DatasetReader", "mimo_jax/data/builder/readers/reader.py"),
        ("Conversations", "mimo_jax/data/builder/readers/conversations.py"),
        ("OPS", "checkpoints_convert/ops.py"),
        ("Component", "checkpoints_convert/layouts.py"),
        ("register_component", "checkpoints_convert/layouts.py"),
        ("VisionConfig", "mimo_jax/model_config.py"),
        ("LlmConfig", "mimo_jax/model_config.py"),
        ("KINDS", "mimo_jax/model_config.py"),
        ("register_vision_tower", "mimo_jax/models/registry.py"),
        ("register_language_model", "mimo_jax/models/registry.py"),
        ("register_mask_encoder", "mimo_jax/models/registry.py"),
        ("register_aligner", "mimo_jax/models/registry.py"),
        ("MatmulCounts", "mimo_jax/models/counts.py"),
        ("MaskDecoder", "mimo_jax/models/sam_decoder.py"),
    ):
        assert f"`{symbol}`" in page and path in page
        assert re.search(rf"^(def |class )?{symbol}\b", (ROOT / path).read_text(), re.M), f"{path} has no {symbol}"


# --- for real

# Part of a command in the README -> what is run instead: a small model and little data.
SMALL = {
    "--images 2000": "--images 40 --workers 1",
    "--config configs/tiny.py": "--config configs/tiny.py --config.data.batch_size=8 --config.model.llm.vocab_size=512",
    "--config.train.steps=500": "--config.train.steps=3 --config.train.eval_samples=4 --config.train.calibrate_samples=8",
    "--split test": "--split test --limit 4",
    "mimo ask": "mimo ask --max-new-tokens 8",
    "mimo chat": "mimo chat --max-new-tokens 8",
    "mimo batch": "mimo batch --max-new-tokens 8",
}
# Part of a Python example -> what is run instead: a phantom is smaller than a film, and a PNG has no grid for .dcm and .nii.gz.
SMALL_PYTHON = {
    "chest.dcm": "image.png",
    "[10, 12, 200, 220]": "[10, 12, 60, 70]",
    ', "seg.dcm", "masks.nii.gz"': "",
    '"a.png"': '"image.png"',
    '"b.png"': '"image.png"',
}
# Commands of docs/data.md that run on the phantoms of the quick start, with these paths.
SMALL_DATA = {"data/sa ": "data/phantom ", "data/sa\n": "data/phantom\n", "0-24": "0-3"}


def replaced(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def run(line: str, cwd: Path, stdin: str = "") -> str:
    """Run a `mimo` command as the console script does; returns its standard output."""
    argv = [sys.executable, "-m", "mimo_jax.cli", *words(line)[1:]]
    done = subprocess.run(argv, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def quick_start() -> list[str]:
    """The README's `mimo` commands, in order, at tiny size."""
    return [replaced(line, SMALL) for line in command_lines(ROOT / "README.md") if line.startswith("mimo ")]


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path):
    """The README's commands and Python examples, and the commands of docs/data.md that look at a dataset, in one folder."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = []
    for line in quick_start():
        out = run(line, tmp_path, stdin="What is this?\n" if line.startswith("mimo chat") else "")
        done.append(words(line)[1])
        if line.startswith("mimo data phantom"):
            show_an_image(tmp_path)
        elif line.startswith("mimo ask") and "--json" in line:
            assert '"entities"' in out and (tmp_path / "overlay.png").is_file()
    assert done == ["data", "train", "eval", "ask", "chat", "batch", "ask"]
    assert (tmp_path / "tiny.png").is_file()
    assert (tmp_path / "report.json").is_file() and (tmp_path / "answers" / "answers.jsonl").is_file()

    for page in ("README.md", "docs/inference.md"):
        for example in blocks(ROOT / page, "python"):
            subprocess.run([sys.executable, "-c", replaced(example, SMALL_PYTHON)], cwd=tmp_path, check=True, timeout=900)
    assert (tmp_path / "answer.json").is_file()

    looks = [line for line in command_lines(ROOT / "docs" / "data.md") if re.match(r"mimo data (validate|stats|view) ", line)]
    assert len(looks) == 3
    for line in looks:
        run(replaced(f"{line}\n", SMALL_DATA), tmp_path)
    assert (tmp_path / "sheet.png").is_file() and list((tmp_path / "plots").glob("*.png"))


def show_an_image(folder: Path) -> None:
    """image.png and films/, which the commands after `mimo data phantom` name, from a phantom of the test split."""
    from mimo_jax.data.records import RecordFolder

    record = RecordFolder(folder / "data" / "phantom", "test")[0]
    (folder / "image.png").write_bytes(record.image)
    (folder / "films").mkdir()
    shutil.copy(folder / "image.png", folder / "films" / "1.png")


@pytest.mark.slow
def test_every_command_shows_its_help(tmp_path):
    top = main.parser()
    commands = next(action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction))
    for line in ("mimo --help", *(f"mimo {command} --help" for command in commands)):
        assert "usage: mimo" in run(line, tmp_path)
