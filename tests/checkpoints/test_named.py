"""Named models: what is packed comes back, is made once, and is refused where it is not what was trained."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mimo_jax.checkpoints import checkpoint, named
from mimo_jax.checkpoints.arrays import CheckpointError
from mimo_jax.checkpoints.loading import LazyParams, load_for_inference
from tests.checkpoints.wheels import put_part
from tests.small_run import begin, flip_bit

CARD = "# demo\n"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(a trained run, the folder with what `pack` makes of it as the model "demo")."""
    folder = tmp_path_factory.mktemp("named")
    begin(folder / "run", steps=(3,))
    (folder / "run" / "steps" / "3" / checkpoint.CALIBRATION).write_text("{}")
    named.pack(folder / "run", folder / "shipped" / "demo", CARD)
    return folder / "run", folder / "shipped"


@pytest.fixture
def demo(shipped, tmp_path, monkeypatch):
    """The same, with its own copy of the packed model, an empty MIMO_HOME, and an empty working folder."""
    shutil.copytree(shipped[1], tmp_path / "shipped")
    monkeypatch.setattr(named, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(named, "NAMED", {"demo": (), "hidden": ()})
    monkeypatch.setenv("MIMO_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shipped[0]


def test_a_name_is_loaded_like_a_path(demo, tmp_path):
    ours, theirs = LazyParams("demo"), LazyParams(demo)
    assert ours.run == named.folder_of("demo") and ours.step == 3 and ours.trained == theirs.trained
    for path, wanted in theirs.items():
        rounded = wanted.astype(jnp.bfloat16).astype(np.float32) if path in theirs.trained else wanted
        assert ours[path].dtype == wanted.dtype and np.array_equal(ours[path], rounded), path
    loaded = load_for_inference("demo")
    assert "from the named model demo of mimo_jax" in loaded.origin and loaded.calibration.read_text() == "{}"
    assert (ours.run / named.CARD).read_text() == CARD
    assert not [path for path in (tmp_path / "home").rglob("*") if "tmp" in path.name or "partial" in path.name]


def test_it_is_made_once(demo):
    run = named.located("demo")
    made = (run / "config.json").stat().st_mtime_ns
    assert named.located("demo") == run and (run / "config.json").stat().st_mtime_ns == made


def test_nothing_of_the_machine_is_packed(demo):
    with zipfile.ZipFile(named.SHIPPED / "demo" / "model.zip") as packed:
        text = b"".join(packed.read(name) for name in packed.namelist())
    assert str(demo.parent).encode() not in text and b"pytest" not in text


def test_a_folder_of_that_name_goes_first(demo, tmp_path):
    os.mkdir("demo")
    with pytest.raises(CheckpointError, match="^demo: is not a checkpoint"):
        checkpoint.run_of("demo")


def test_a_row_without_its_folder_is_no_name(demo):
    assert named.available() == ["demo"]
    with pytest.raises(CheckpointError, match="^hidden: does not exist; give .*, or a named model: demo$"):
        load_for_inference("hidden")


def test_a_model_whose_parts_are_not_fetched(demo, monkeypatch, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"0")
    monkeypatch.setattr(named, "NAMED", {"demo": (put_part(tmp_path / "index", tmp_path / "weights.pth"),)})
    with pytest.raises(CheckpointError, match=r"^demo: is not fetched yet; run mimo fetch demo once \(a download of 0 MB\)$"):
        load_for_inference("demo")


def test_damaged_files_of_the_package(demo):
    flip_bit(named.SHIPPED / "demo")
    with pytest.raises(CheckpointError, match="shipped/demo: is damaged .*; install mimo_jax again"):
        load_for_inference("demo")
    assert not named.folder_of("demo").exists()


def test_parts_that_give_other_parameters(demo, monkeypatch):
    """A frozen parameter that is not in the package, but comes from elsewhere with another value."""
    path = "llm/layers/kernel"
    with named.fetching() as temporary:
        data = named.unpacked("demo", temporary)
        content = load_file(data / "weights.safetensors")
        value = content.pop(path)
        save_file(content, data / "weights.safetensors")
        with pytest.raises(CheckpointError, match=f"^demo: its parts give other parameters .* on: {path}; update mimo_jax"):
            named.make("demo", data, {path: value + 1})
        assert not named.folder_of("demo").exists()
        assert np.array_equal(LazyParams(named.make("demo", data, {path: value}))[path], value)


def test_a_home_that_cannot_be_written(demo, tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CheckpointError, match="home: cannot be written: .*; name another folder with MIMO_HOME"):
        load_for_inference("demo")


def test_a_fine_tuned_model_is_packed_again(demo, tmp_path):
    """Its run has the provenance of the named model that it began with."""
    named.pack("demo", tmp_path / "again", CARD)
    assert (tmp_path / "again" / "model.zip").read_bytes() == (named.SHIPPED / "demo" / "model.zip").read_bytes()


PROGRAM = """
import sys, time
from pathlib import Path
from mimo_jax.checkpoints import named
named.SHIPPED, named.NAMED = Path(sys.argv[1]), {"demo": ()}
if sys.argv[2:]:
    write = named.checkpoint.write_step
    named.checkpoint.write_step = lambda *args: (write(*args), print("half", flush=True), time.sleep(60))
print(named.located("demo"))
"""


@pytest.mark.slow
def test_processes_at_once_and_after_a_kill(demo, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(named.SHIPPED)]
    first = subprocess.Popen([*command, "stop"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "half\n"
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert "waiting for another process" in others[0].stderr.readline() + others[1].stderr.readline()
    assert not named.folder_of("demo").exists()
    first.kill()
    first.wait()
    found = {other.communicate(timeout=120)[0].strip() for other in others}
    assert found == {str(named.folder_of("demo"))}
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["fetch.lock", "models"]
    assert [path.name for path in (tmp_path / "home" / "models").iterdir()] == [Path(*found).name]
    assert load_for_inference("demo").params
