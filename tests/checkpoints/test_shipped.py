"""The models that this package ships: whole, small, described, in the wheel, and of use."""

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimo_jax.checkpoints import checkpoint, named, storage
from mimo_jax.checkpoints.loading import LazyParams
from mimo_jax.data.builder.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"tiny": 6e6, "lite": 20e6}  # bytes


@pytest.mark.parametrize("name", named.available())
def test_whole_small_and_described(name):
    folder = named.SHIPPED / name
    assert storage.verify(folder) is None
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LIMITS[name]
    card = (folder / named.CARD).read_text()
    assert card.startswith(f"# {name}\n") and "Research use only" in card
    assert all(f"\n## {heading}\n" in card for heading in ("Figures", "Limits")) and "trained on" in card


def test_tiny_is_there_and_reads():
    assert "tiny" in named.available()
    leaves = LazyParams("tiny")
    assert all(np.isfinite(value).all() for value in leaves.values())
    assert checkpoint.calibration_path(leaves.run, leaves.step).is_file()


@pytest.mark.slow
def test_tiny_finds_organs_of_new_phantoms():
    from mimo_jax import Mimo

    mimo, found = Mimo.load("tiny"), []
    for index in range(6):
        record = make_phantom(1234, index)
        mask = max(record.masks, key=lambda mask: mask.area_px)
        answer = mimo.open(np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"))).ask(f"Segment the {mask.entity}.")
        masks = [entity.mask for entity in answer.entities if entity.phrase == mask.entity]
        true = mask.decode()
        found.append(max(((one & true).sum() / (one | true).sum() for one in masks), default=0))
    assert np.mean(found) > 0.5


@pytest.mark.slow
def test_the_wheel_has_them(tmp_path):
    for name in ("mimo_jax", "checkpoints_convert", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(command, cwd=tmp_path / "source", check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "installed")
    program = "from mimo_jax.checkpoints import named, loading; print(named.__file__); print(len(loading.LazyParams('tiny')))"
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "MIMO_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    place, count = done.stdout.split()
    assert place.startswith(str(tmp_path)) and int(count) == len(LazyParams("tiny")), done.stderr
