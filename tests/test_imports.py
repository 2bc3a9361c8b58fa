"""The layers of the code: who may import whom (DESIGN's "May import"), read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each part of the code -> the parts of mimo_jax (a module, or a package and all in it) that it may import beside itself.
# What a row names, may be named more narrowly: "data.prompts".
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "process": set(),
    "jax_internals": set(),
    "typing": set(),
    "pathtree": set(),
    "config": {"data.chat_templates", "errors"},
    "geometry": {"errors"},
    "hardware": set(),
    "sharding": {"config", "errors", "hardware", "pathtree"},
    "quantize": set(),
    "parameters": {"config", "errors", "pathtree"},
    "flops": {"config", "models", "parameters", "pathtree"},
    "storage": set(),
    "stopping": set(),
    "distributed": {"errors", "stopping"},
    "arrays": {"errors", "pathtree", "storage"},
    "provenance": {"errors", "storage"},
    "base": {"arrays", "distributed", "errors", "pathtree", "storage"},
    "flag_values": {"errors"},
    "flags": {"config", "errors", "pathtree"},
    "checkpoint": {"arrays", "base", "config", "distributed", "errors", "pathtree", "provenance", "storage"},
    "loading": {"arrays", "base", "checkpoint", "config", "errors", "pathtree", "provenance", "quantize", "sharding", "storage"},
    "models": {"config", "errors", "geometry", "pathtree", "quantize", "sharding", "typing"},
    "data": {"config", "errors", "geometry", "typing"},
    "data.build": {"config", "errors", "geometry", "stopping", "typing"},
    "data.command": {"distributed", "errors", "eval.view", "flag_values", "train.encode"},
    "data.loader": {"config", "errors", "geometry", "typing", "sharding"},
    "infer": {
        *("checkpoint", "config", "errors", "geometry", "models", "pathtree", "quantize", "sharding", "storage", "typing"),
        *("flag_values", "loading", "stopping"),
        *("data.transforms", "data.picture", "data.dicom", "data.medical", "data.volume"),
        *("data.tokenizer", "data.conversation", "data.prompts", "data.prompt_files", "data.schema"),
    },
    "eval": {"config", "data", "errors", "geometry", "infer", "pathtree", "typing"},
    "train": {
        *("arrays", "base", "checkpoint", "config", "data", "distributed", "errors", "eval", "flag_values", "flags", "flops", "geometry"),
        *("hardware", "loading", "models", "parameters", "pathtree", "sharding", "stopping", "storage", "typing"),
    },
    "sweep": {"checkpoint", "config", "errors", "flag_values", "flags", "pathtree", "stopping", "storage", "train.command"},
    "cli": {
        "config",
        "data.command",
        "errors",
        "flag_values",
        "infer.command",
        "train.command",
        "sweep.command",
    },  # when it is imported; commands import theirs when they run
}
MAY_IMPORT_OUTSIDE = {
    "configs": {"config"},
    "checkpoints_convert": {
        *("arrays", "base", "checkpoint", "config", "data.tokenizer", "errors", "flags", "loading", "models", "parameters", "pathtree"),
        *("provenance", "sharding", "storage"),
    },
}
HEAVY = {"torch", "transformers", "peft", "tensorflow"}


def imports(path: Path, deep: bool = True) -> set[str]:
    """Dotted names that a file imports; without `deep`, only those that run when it is itself imported."""
    found = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def own(names: set[str]) -> set[str]:
    """`mimo_jax.data.prompts.Prompts` as "data.prompts.Prompts"; the package itself and its version are everyone's."""
    return {name.removeprefix("mimo_jax.") for name in names if name.startswith("mimo_jax.") and name != "mimo_jax.__version__"}


def below(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "mimo_jax").with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [p for p in sources("mimo_jax") if p != ROOT / "mimo_jax" / "__init__.py"], ids=module_name)
def test_imports_point_downwards(path):
    name = module_name(path)
    parts = [part for part in MAY_IMPORT if below(name, part)]
    assert parts, f"{name} has no row in MAY_IMPORT: say what it may import"
    part = max(parts, key=len)
    home = part.split(".")[0]
    imported = own(imports(path, deep=part != "cli"))
    wrong = sorted(i for i in imported if not below(i, home) and not any(below(i, allowed) for allowed in MAY_IMPORT[part]))
    assert not wrong, f"mimo_jax/{path.relative_to(ROOT / 'mimo_jax')} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("folder", MAY_IMPORT_OUTSIDE)
def test_folders_beside_the_package_import_only_their_layers(folder):
    for path in sources(folder):
        wrong = sorted(i for i in own(imports(path)) if not any(below(i, allowed) for allowed in MAY_IMPORT_OUTSIDE[folder]))
        assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"


def test_only_the_command_line_imports_the_converter():
    users = [p for p in sources("mimo_jax") if any(below(name, "checkpoints_convert") for name in imports(p))]
    assert set(users) <= {ROOT / "mimo_jax" / "cli.py"}


def test_no_file_names_torch_or_transformers():
    for path in [*sources("mimo_jax"), *sources("configs")]:
        heavy = {name.split(".")[0] for name in imports(path)} & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {', '.join(heavy)}"


def test_running_imports_load_neither_torch_nor_transformers():
    modules = [f"mimo_jax.{module_name(path)}" for path in sources("mimo_jax") if path.name != "__init__.py"]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_library_that_the_package_imports_is_declared():
    """A stranger's `pip install` brings all that `import mimo_jax…` needs."""
    setup = (ROOT / "setup.py").read_text()
    core, medical = (set(re.findall(r'"([\w-]+)>=', setup.split(start)[1].split("]")[0])) for start in ("CORE = [", '"medical": ['))
    names = {"PIL": "pillow", "orbax": "orbax-checkpoint", "ml_collections": "ml-collections", "absl": "absl-py", "google": "protobuf"}
    names["tensorflow_datasets"] = "tensorflow-datasets"
    later = core | medical | {"jaxlib", "wandb"}  # what runs later may come with an extra
    for deep, declared in ((False, core | {"jaxlib"}), (True, later)):
        imported = {name.split(".")[0] for path in sources("mimo_jax") for name in imports(path, deep)}
        libraries = {names.get(name, name) for name in imported - sys.stdlib_module_names - {"mimo_jax", "configs", "checkpoints_convert"}}
        assert libraries <= declared, f"not in setup.py: {', '.join(sorted(libraries - declared))}"
