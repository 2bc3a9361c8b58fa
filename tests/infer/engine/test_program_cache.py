import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mimo_jax.infer.engine import program_cache
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.program_cache import ProgramCache
from tests.test_imports import ROOT, imports, module_name, own
from tests.tiny_config import random_params, tiny_config

# In a process of its own: encodes one image, and says what was compiled and whether the model was traced.
PROGRAM = """
import logging, sys
import jax, numpy as np
from mimo_jax import pathtree
from mimo_jax.infer.engine import compiled
from mimo_jax.infer.engine.program_cache import progress
from tests.tiny_config import tiny_config

logging.basicConfig(stream=sys.stdout, format="%(message)s")
progress.setLevel(logging.INFO)
config = tiny_config()
params = pathtree.unflatten({path: jax.numpy.asarray(leaf) for path, leaf in np.load(sys.argv[1]).items()})
engine = compiled.Engine(config, params, eos_id=2)
m = config.model
sides = {"vision": m.vision.image_size, "sam": m.sam.image_size}
images = {f"{name}_image": np.full((1, side, side, 3), 99, np.uint8) for name, side in sides.items()}
x_img, features = engine.encode(images | {f"{name}_size": np.full((1, 2), 16, np.int32) for name in sides}, 1)
print(compiled.functions.cache_info().misses > 0, float(np.abs(x_img).sum() + np.abs(features).sum()))
"""


def test_a_second_process_neither_compiles_nor_traces_the_model(tmp_path):
    from mimo_jax import pathtree

    np.savez(tmp_path / "params.npz", **{path: np.asarray(leaf) for path, leaf in pathtree.flatten(random_params(tiny_config())).items()})

    def run():
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "params.npz")], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    compiling = "compiling encode (stored for the next time)"
    first = run()
    assert first[0] == compiling and first[1].startswith("True ")
    assert run() == [first[1].replace("True", "False")]
    (stored,) = (tmp_path / "cache").glob("mimo_programs/*/encode-*")
    damaged = bytearray(stored.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    stored.write_bytes(damaged)
    assert run() == first, "a damaged program is compiled again"
    assert run() == [first[1].replace("True", "False")], "also after jax's own cache had it"


def on_device(params):
    return jax.tree.map(jax.numpy.asarray, params)


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    program_cache._opened.cache_clear()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_depend_on_shapes_static_arguments_and_settings_of_jax(folder):
    config, params = tiny_config(), on_device(random_params(tiny_config()))
    programs = ProgramCache.of(config, params, 2)
    made = []
    jitted = jax.jit(lambda params, x, times: x * times, static_argnames="times")

    def function():
        made.append(1)
        return jitted

    x = np.arange(3, dtype=np.float32)
    assert programs.call("scale", function, params, x, times=2).tolist() == [0, 2, 4] and len(made) == 1
    assert programs.call("scale", function, params, x + 1, times=2).tolist() == [2, 4, 6] and len(made) == 1
    assert programs.call("scale", function, params, x, times=3).tolist() == [0, 3, 6] and len(made) == 2
    assert programs.call("scale", function, params, x[:2], times=3).tolist() == [0, 3] and len(made) == 3
    with jax.default_matmul_precision("highest"):
        programs.call("scale", function, params, x, times=2)
    assert len(made) == 4
    other = ProgramCache.of(config, params, 3)
    assert programs.is_known() and not other.is_known() and ProgramCache.of(config, params, 2) is programs


def test_parameters_of_another_shape_are_still_refused(folder):
    config, params = tiny_config(), on_device(random_params(tiny_config()))
    Engine(config, params, 2)
    params["seg_projection"]["out"]["kernel"] = params["seg_projection"]["out"]["kernel"][:-1]
    with pytest.raises(Exception, match="seg_projection/out/kernel"):
        Engine(config, params, 2)


def test_without_a_folder_nothing_is_stored(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    assert ProgramCache.of(tiny_config(), on_device(random_params(tiny_config())), 2) is None


def test_unused_programs_are_removed(tmp_path):
    for name, age in (("old/a", 40), ("new/a", 40), ("new/b", 1)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        then = path.stat().st_mtime - age * 24 * 3600
        os.utime(path, (then, then))
    program_cache._remove_unused(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["new", "new/b"]


def test_the_hashed_sources_are_all_that_a_program_is_made_from():
    """Everything of this package that the model and the engine's functions import."""
    package = ROOT / "mimo_jax"
    hashed = {module_name(path) for pattern in program_cache.SOURCES for path in package.glob(pattern)}
    used, todo = set(), ["infer.engine.compiled", "infer.engine.generate", "models.mimo"]
    while todo:
        name = todo.pop()
        if name in used:
            continue
        used.add(name)
        path = package / f"{name.replace('.', '/')}.py"
        for imported in own(imports(path)):
            parts = imported.split(".")
            names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
            todo += [name for name in names if (package / f"{name.replace('.', '/')}.py").is_file()]
    assert used <= hashed, sorted(used - hashed)
