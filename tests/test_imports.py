"""The layers of the code: who may import whom, read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The layers of mimo_jax from the lowest to the highest; a module belongs to the longest name here that it is, or lies below.
# It may import modules of its own layer and of lower ones. Modules and packages of one row know nothing of each other's order.
LAYERS = [
    ["errors", "files", "pathtree", "jax_internals", "process"],
    ["chat_templates", "geometry", "model_config", "preemption"],
    ["config", "distributed"],
    ["config_flags", "parameters", "quantize", "sharding"],
    ["models"],
    ["checkpoints"],
    ["data"],  # schema, records, transforms, prompts, text
    ["data.images"],
    ["data.prompt_files", "data.overlay"],
    ["data.builder"],
    ["data.loading"],
    ["analysis"],
    ["infer.answers"],
    ["infer.engine"],
    ["infer"],  # the predictor
    ["infer.batch"],
    ["eval"],
    ["train"],
    ["sweep"],
    ["cli"],
]
# What folders beside the package may import of it: a layer, or a module.
OUTSIDE = {
    "configs": ["config", "model_config"],
    "checkpoints_convert": [
        *("errors", "files", "pathtree", "chat_templates", "config", "model_config", "parameters"),
        *("models", "checkpoints", "data.tokenizer", "data.byte_level_bpe"),
    ],
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


def layer(name: str) -> int:
    """The number of a module's layer."""
    rows = [(len(part), number) for number, row in enumerate(LAYERS) for part in row if below(name, part)]
    assert rows, f"{name} has no layer: give it a place in LAYERS"
    return max(rows)[1]


@pytest.mark.parametrize("path", [p for p in sources("mimo_jax") if p != ROOT / "mimo_jax" / "__init__.py"], ids=module_name)
def test_imports_point_downwards(path):
    """Also those inside functions; the package itself, which gives `Mimo` when it is asked for, is the one exception."""
    name = module_name(path)
    upward = sorted(imported for imported in own(imports(path)) if layer(imported) > layer(name))
    assert not upward, f"{name} may not import {', '.join(upward)}"


def test_models_and_data_do_not_know_each_other():
    """But for what runs the frozen encoders over a dataset."""
    for path in sources("mimo_jax/models"):
        assert not [name for name in own(imports(path)) if below(name, "data")], path
    for path in sources("mimo_jax/data"):
        models = [name for name in own(imports(path)) if below(name, "models")]
        assert not models or path.name == "encode_features.py", f"{path} imports {models}"


@pytest.mark.parametrize("folder", OUTSIDE)
def test_folders_beside_the_package_import_only_their_layers(folder):
    for path in sources(folder):
        wrong = sorted(name for name in own(imports(path)) if not any(below(name, allowed) for allowed in OUTSIDE[folder]))
        assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"


def test_only_the_command_line_imports_the_converter():
    users = [p for p in sources("mimo_jax") if any(below(name, "checkpoints_convert") for name in imports(p))]
    assert users and all((ROOT / "mimo_jax" / "cli") in path.parents for path in users)


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
    names |= {"tensorflow_datasets": "tensorflow-datasets", "rouge_score": "rouge-score"}
    later = core | medical | {"jaxlib", "wandb"}  # what runs later may come with an extra
    for deep, declared in ((False, core | {"jaxlib"}), (True, later)):
        imported = {name.split(".")[0] for path in sources("mimo_jax") for name in imports(path, deep)}
        libraries = {names.get(name, name) for name in imported - sys.stdlib_module_names - {"mimo_jax", "configs", "checkpoints_convert"}}
        assert libraries <= declared, f"not in setup.py: {', '.join(sorted(libraries - declared))}"
