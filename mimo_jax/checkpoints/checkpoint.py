"""Run directories: their files, saving and restoring the steps of a run, and finding a checkpoint from its path.

    RUN/config.json       the config
    RUN/tokenizer.json
    RUN/provenance.json   where the weights come from, unless the run was initialised from a seed
    RUN/base.json, base/  the frozen base (`frozen_params`)
    RUN/steps/500/        extra.json   data position and other values of the caller
                          arrays/      written by Orbax: item `state` (trained parameters), item `train` (optimizer, step, …)
                          calibration.json  of the scores, if one was fitted (`infer.answers.calibration`)
                          familiarity.npz  what requests are compared with (`infer.answers.familiarity`), likewise
                          manifest.json  shapes, versions, fingerprint of the base, SHA-256 of every file; written last

A step or a base is complete if it has a manifest: Orbax commits by renaming, and the manifest is written after that. Orbax does not
detect flipped bits, so every file is verified against its SHA-256 before it is read. An import is a run directory with step 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
from orbax.checkpoint import v1 as ocp

from mimo_jax import __version__, distributed, files, pathtree
from mimo_jax.checkpoints import arrays, frozen_params, provenance, storage
from mimo_jax.checkpoints.arrays import CheckpointError, summarize
from mimo_jax.config import Config, ConfigError

# Model settings that change neither the parameters nor their meaning: a run may resume with other values of these.
_MAY_DIFFER = {"dtype", "remat", "unroll", "max_turns", "max_segs"}
CALIBRATION, FAMILIARITY = "calibration.json", "familiarity.npz"  # files of a step that are fitted after it is complete
_TRAIN = "train"  # the Orbax item with everything that is not in `arrays.STATE`


class CheckpointWarning(UserWarning):
    """A damaged step was skipped."""


# --- the run directory


def open_run(workdir: str | os.PathLike, config: Config) -> bool:
    """Create `workdir` if needed; returns whether it contains a run. Raises CheckpointError if that run's config does not fit."""
    workdir = files.absolute(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--workdir {workdir}: cannot be created: {error.strerror}") from error
    if not os.access(workdir, os.W_OK):
        raise CheckpointError(f"--workdir {workdir}: is not writable; choose another, or change its permissions")
    if not (workdir / "config.json").exists():
        return False
    check_config(read_config(workdir), config, str(workdir))
    return True


def start_run(workdir: str | os.PathLike, config: Config, frozen: dict) -> str:
    """Write the frozen base, the provenance and config.json of a new run; returns the fingerprint of the base."""
    workdir = files.absolute(workdir)
    source = run_of(config.init.path) if config.init.path else None
    fingerprint = frozen_params.save(workdir, frozen, source)
    if jax.process_index() == 0:
        with files.disk_errors(workdir / "config.json", CheckpointError):
            if source is not None:
                provenance.copy_to_run(source, workdir, pathtree.flatten(frozen).keys())
            files.write_json(workdir / "config.json", config.to_dict())
    distributed.gather(None)  # no process reads it before it is written
    return fingerprint


def read_config(run: str | os.PathLike) -> Config:
    """The config of a run directory. Raises CheckpointError if this version cannot read it."""
    path = Path(run) / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a config of mimo_jax {__version__} ({error}); use the version that wrote it, or copy it again"
        ) from error


def check_config(saved: Config, wanted: Config, where: str = "the checkpoint") -> None:
    """Raise CheckpointError with a list of the fields that differ, if the parameters of one config cannot be used with the other."""
    old, new = (pathtree.flatten(c.to_dict()["model"]) for c in (saved, wanted))
    differing = [
        f"model.{name.replace('/', '.')} ({old[name]} there, {new[name]} here)"
        for name in new
        if name not in _MAY_DIFFER and old[name] != new[name]
    ]
    if list(saved.trainables.items()) != list(wanted.trainables.items()):
        differing.append("trainables")
    if saved.freeze != wanted.freeze:
        differing.append(f"freeze ({saved.freeze!r} there, {wanted.freeze!r} here)")
    if differing:
        raise CheckpointError(f"{where} has another config: {summarize(differing)}; use its config, or another --workdir")


def tokenizer_path(path: str | os.PathLike) -> Path:
    """The tokenizer.json of a run directory, or of the run that a step belongs to."""
    tokenizer = run_of(path) / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: is missing; copy it from where the run was made")
    return tokenizer


def calibration_path(run: str | os.PathLike, step: int) -> Path:
    """Path of a step's calibration, a file that exists if one was fitted. It is written after the step is complete."""
    return Path(run) / "steps" / str(step) / CALIBRATION


# --- steps


class Checkpoints:
    """The steps of one run. Arrays are copied off the device in `save`; files are written, hashed and pruned in a thread."""

    def __init__(self, workdir: str | os.PathLike, keep_last: int = 2, keep_every: int = 0):
        """keep_last: number of newest complete steps to keep; keep_every: also keep every step that it divides (0: none)."""
        self.workdir = files.absolute(workdir)
        self.keep_last, self.keep_every = max(1, keep_last), keep_every
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._damaged: set[int] = set()

    def latest(self) -> int | None:
        """The newest complete step; None if there is none."""
        steps = self._complete()
        return steps[-1] if steps else None

    def save(self, step: int, state: dict[str, Any], extra: dict) -> None:
        """Start to write `state`, a dict whose "params" are the trained parameters (nested dict) and whose other entries
        are any trees of arrays; `extra` is JSON. An error of the previous save is raised here or in `wait`: CheckpointError,
        with the newest good step, if the disk is full or not writable."""
        self.wait()
        folder = self._folder(step)
        items = {name: tree for name, tree in _items(state).items() if jax.tree.leaves(tree)}
        leaves = {name: arrays.specs(tree) for name, tree in items.items()}
        try:
            if jax.process_index() == 0:
                storage.remove(folder)
                folder.mkdir(parents=True)
                files.write_json(folder / "extra.json", extra)
            response = ocp.save_checkpointables_async(folder / "arrays", items) if items else None
        except Exception as error:
            self._give_up(step, error)
        self._damaged.discard(step)
        self._pending = self._worker.submit(self._finish, step, response, leaves)

    def wait(self) -> None:
        """Wait until the last save is on disk, and raise its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, abstract: dict[str, Any], shardings: Any = None) -> tuple[dict[str, Any], dict]:
        """Returns (state, extra) of `step`; if it is damaged, those of the newest complete and undamaged step before it, with a
        CheckpointWarning.

        abstract: the state's ShapeDtypeStructs, or only some of its entries; shardings: the same tree of shardings, one
        for all, or None for the first device. Raises CheckpointError with a list of the parameters that are missing or have another
        shape. If there are several processes, all must call this; the files are verified by the first one."""
        self.wait()
        found = None
        if jax.process_index() == 0:
            earlier = [s for s in self._complete() if s < step]
            found = _newest_undamaged(self.workdir, [*earlier, step], _items(abstract))
        good, damaged = distributed.gather(found)[0]
        self._damaged.update(damaged)
        return _load_step(self._folder(good), abstract, shardings)

    def _folder(self, step: int) -> Path:
        return self.workdir / "steps" / str(step)

    def _complete(self) -> list[int]:
        return [s for s in _complete_steps(self.workdir) if s not in self._damaged]

    def _finish(self, step: int, response: Any, leaves: dict) -> None:
        try:
            if response is not None:
                response.result()
            if jax.process_index() == 0:
                record = files.read_json(self.workdir / "base.json") or {}
                storage.write_manifest(self._folder(step), {"step": step, "base": record.get("fingerprint"), "leaves": leaves})
        except Exception as error:
            self._give_up(step, error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the next save tries again
                self._prune()

    def _prune(self) -> None:
        """Remove the complete steps that are not kept, and the files of unfinished saves."""
        steps = self._complete()
        kept = {*steps[-self.keep_last :], *(s for s in steps if self.keep_every and s % self.keep_every == 0)}
        for step in _step_folders(self.workdir):
            if step not in kept:
                storage.remove(self._folder(step))

    def _give_up(self, step: int, error: Exception) -> NoReturn:
        """Remove the incomplete step and raise `error`, as CheckpointError if it is a file system error."""
        shutil.rmtree(self._folder(step), ignore_errors=True)
        last = self.latest()
        good = f"step {last} is the last good one" if last is not None else "no step was saved before"
        with files.disk_errors(self._folder(step), CheckpointError, f"{good}; fix that and run the same command to resume"):
            raise error


# --- reading a checkpoint from its path


def resolve(path: str | os.PathLike) -> tuple[Path, int]:
    """(run directory, step) of a path: the newest complete step of a run directory, or the step whose folder it is."""
    run, named = run_of(path), _named_step(path)
    steps = _complete_steps(run)
    if named is None and steps:
        return run, steps[-1]
    if named in steps:
        return run, named
    if named is None:
        raise CheckpointError(f"{run}: has no complete step yet; train it, or give another checkpoint")
    newest = f"the newest complete one is {run / 'steps' / str(steps[-1])}" if steps else "nor is any other of this run"
    raise CheckpointError(f"{path}: this step is not complete (its save did not finish); {newest}")


def origin(run: str | os.PathLike) -> str:
    """The fingerprint of a run's base and the sources of its weights, in one line."""
    return f"base {frozen_params.read_record(Path(run))['fingerprint'][:12]}, {provenance.describe(provenance.read(Path(run)))}"


def verified_step(path: str | os.PathLike) -> tuple[Path, int, dict]:
    """(run directory, step, its manifest) of a path: as in `resolve`, but of a run directory the newest step without damage."""
    run, step = resolve(path)
    candidates = [step] if _named_step(path) is not None else _complete_steps(run)
    step, _ = _newest_undamaged(run, candidates, [arrays.STATE])
    folder = run / "steps" / str(step)
    manifest = files.read_json(folder / storage.MANIFEST)
    if manifest["base"] != frozen_params.read_record(run)["fingerprint"]:
        raise CheckpointError(f"{folder}: was trained on another frozen base than {run / 'base.json'} records")
    return run, step, manifest


def run_of(path: str | os.PathLike) -> Path:
    """The run directory of a path, which is that directory or one of its steps/<n>, or the name of a model (`named`)."""
    from mimo_jax.checkpoints import named  # which writes run directories with this module

    full = named.located(path).resolve()
    run = full.parent.parent if _named_step(path) is not None else full
    if not full.exists():
        names = ", ".join(named.available())
        raise CheckpointError(f"{path}: does not exist; give a run directory, one of its steps/<n>, an import, or a named model: {names}")
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{path}: is not a checkpoint (no config.json); give a run directory, one of its steps/<n>, or an import")
    return run


def _named_step(path: str | os.PathLike) -> int | None:
    full = Path(path).resolve()
    return int(full.name) if full.name.isdecimal() and full.parent.name == "steps" else None


def _step_folders(run: Path) -> list[int]:
    """All steps with a folder, complete or not, in ascending order."""
    steps = run / "steps"
    return sorted(int(f.name) for f in steps.iterdir() if f.name.isdecimal()) if steps.is_dir() else []


def _complete_steps(run: Path) -> list[int]:
    return [s for s in _step_folders(run) if (run / "steps" / str(s) / storage.MANIFEST).is_file()]


def _newest_undamaged(run: Path, steps: list[int], items: Any) -> tuple[int, list[int]]:
    """(the last of `steps` whose `items` are undamaged, the damaged steps after it), with a CheckpointWarning for each of these."""
    damaged = []
    for step in reversed(steps):
        fault = _verify(run / "steps" / str(step), items)
        if fault is None:
            return step, damaged
        damaged.append(step)
        if step != steps[0]:
            warnings.warn(f"{run}: step {step} is skipped: it {fault}", CheckpointWarning, stacklevel=3)
    raise CheckpointError(f"{run}: step {step} {fault}, and there is no earlier complete step; give another checkpoint")


# --- the arrays of a step, as Orbax items


def write_step(run: Path, step: int, leaves: Iterator[tuple[str, Any]], extra: dict) -> dict[str, list]:
    """Write a step without optimizer from an iterator of its trained parameters, (path, array). The base must already be written.
    Returns {path: [dtype, shape, SHA-256]}."""
    folder = run / "steps" / str(step)
    hashes: dict[str, list] = {}
    with files.disk_errors(folder, CheckpointError), files.removed_on_failure(folder):
        folder.mkdir(parents=True)
        files.write_json(folder / "extra.json", extra)
        arrays.write(folder, frozen_params.hashed(leaves, hashes))
        specs = {path: leaf[:2] for path, leaf in hashes.items()}
        about = {"step": step, "base": frozen_params.read_record(run)["fingerprint"], "leaves": {arrays.STATE: specs}}
        storage.write_manifest(folder, about)
    return hashes


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """The state as Orbax items, so that the parameters can be read without the optimizer."""
    rest = {name: tree for name, tree in state.items() if name != "params"}
    return ({arrays.STATE: state["params"]} if "params" in state else {}) | ({_TRAIN: rest} if rest else {})


def _load_step(folder: Path, abstract: dict[str, Any], shardings: Any) -> tuple[dict[str, Any], dict]:
    leaves = files.read_json(folder / storage.MANIFEST)["leaves"]
    items = _items(abstract)
    for name, tree in items.items():
        arrays.compare(leaves.get(name, {}), arrays.specs(tree), folder)
    placed = _items(arrays.with_shardings(abstract, shardings))
    wanted = {name: tree for name, tree in placed.items() if jax.tree.leaves(tree)}
    loaded = placed | (arrays.read(folder, wanted) if wanted else {})
    state = ({"params": loaded[arrays.STATE]} if arrays.STATE in items else {}) | loaded.get(_TRAIN, {})
    return state, files.read_json(folder / "extra.json")


def _verify(folder: Path, items: Iterable[str]) -> str | None:
    """Verify the files of these Orbax items of a step; returns what is wrong with them, None if nothing is."""
    others = tuple(f"arrays/{name}/" for name in (arrays.STATE, _TRAIN) if name not in items)
    return storage.verify(folder, lambda name: not name.startswith(others))
