"""Runs on disk: what is written, what makes it whole, and how it is found again.

    RUN/config.json       the config
    RUN/tokenizer.json
    RUN/base.json         the frozen base: fingerprint, where it lies, and every parameter's SHA-256
    RUN/base/             its arrays, unless they already lie in another run's base
    RUN/steps/500/        extra.json   data position and whatever else the caller adds, as JSON
                          arrays/      by orbax: item `params` (trained), item `train` (optimizer, step, …)
                          manifest.json  shapes, versions, fingerprint of the base, SHA-256 of every file; written last

A step, or a base, is whole if its manifest stands: orbax commits by renaming, the manifest follows. Orbax loads a flipped
bit without a word, so every file that is read is held to its SHA-256 first. An import is a run directory with step 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mimo_jax import __version__, pathtree, storage
from mimo_jax.config import Config, ConfigError
from mimo_jax.errors import UserError

# Model settings that change neither a parameter nor what it means: a run may go on with others.
_FREE = {"dtype", "remat", "unroll", "turns_max", "seg_max"}
_PARAMS, _TRAIN, _BASE = "params", "train", "base"  # orbax items
_LISTED = 6  # differences that a message spells out


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model, or cannot be written; one line that names it."""


class CheckpointWarning(UserWarning):
    """A damaged step was passed over."""


# --- the run directory


def open_run(workdir: str | os.PathLike, config: Config) -> bool:
    """Make `workdir` ready; true if a run was begun there, whose config must then fit (CheckpointError if not)."""
    workdir = storage.absolute(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--workdir {workdir}: cannot be made: {error.strerror}") from error
    if not os.access(workdir, os.W_OK):
        raise CheckpointError(f"--workdir {workdir}: may not be written to; choose another, or change its permissions")
    if not (workdir / "config.json").exists():
        return False
    check_config(read_config(workdir), config, str(workdir))
    return True


def start_run(workdir: str | os.PathLike, config: Config, frozen: dict) -> str:
    """Write config.json and the frozen base of a new run; returns the base's fingerprint."""
    workdir = storage.absolute(workdir)
    fingerprint = save_base(workdir, frozen, source=config.init.path or None)
    if jax.process_index() == 0:
        with _writing(workdir / "config.json"):
            storage.write_json(workdir / "config.json", config.to_dict())
    return fingerprint


def read_config(run: str | os.PathLike) -> Config:
    """The config of a run directory; CheckpointError if this version cannot read it."""
    path = Path(run) / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a config of mimo_jax {__version__}: {error}") from error


def check_config(saved: Config, wanted: Config, where: str = "the checkpoint") -> None:
    """CheckpointError that lists the fields in which two configs differ so that one's parameters cannot serve the other."""
    there, here = (pathtree.flatten(c.to_dict()["model"]) for c in (saved, wanted))
    differing = [
        f"model.{name.replace('/', '.')} ({there[name]} there, {here[name]} here)"
        for name in here
        if name not in _FREE and there[name] != here[name]
    ]
    if list(saved.trainables.items()) != list(wanted.trainables.items()):
        differing.append("trainables")
    if differing:
        raise CheckpointError(f"{where} is of another config: {_some(differing)}; use its config, or another --workdir")


def tokenizer_path(path: str | os.PathLike) -> Path:
    """The tokenizer.json of a run directory, or of the run that a step belongs to."""
    tokenizer = _run_of(path) / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: is missing; copy it from where the run was made")
    return tokenizer


# --- steps


class Checkpoints:
    """The steps of one run. Arrays are copied off the device in `save`; files are written, hashed and pruned in a thread."""

    def __init__(self, workdir: str | os.PathLike, keep_last: int = 2, keep_every: int = 0):
        """keep_last: newest whole steps to keep; keep_every: beside them, every step that it divides (0: none)."""
        self.workdir = storage.absolute(workdir)
        self.keep_last, self.keep_every = max(1, keep_last), keep_every
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._damaged: set[int] = set()

    def latest(self) -> int | None:
        """The newest whole step."""
        whole = self._whole()
        return whole[-1] if whole else None

    def save(self, step: int, state: dict[str, Any], extra: dict) -> None:
        """Begin to write `state`, a dict whose "params" are the trained parameters (nested dict) and whose other entries
        are any trees of arrays; `extra` is JSON. Raises here, or in `wait`, what the save before it met: CheckpointError,
        naming the newest good step, where the disk is full or may not be written."""
        self.wait()
        folder = self._folder(step)
        items = {name: tree for name, tree in _items(state).items() if jax.tree.leaves(tree)}
        leaves = {name: _leaves(tree) for name, tree in items.items()}
        try:
            if jax.process_index() == 0:
                storage.remove(folder)
                folder.mkdir(parents=True)
                storage.write_json(folder / "extra.json", extra)
            response = ocp.save_checkpointables_async(folder / "arrays", items) if items else None
        except Exception as error:
            self._give_up(step, error)
        self._damaged.discard(step)
        self._pending = self._worker.submit(self._finish, step, response, leaves)

    def wait(self) -> None:
        """Until the last save is on disk; raises what it met."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, abstract: dict[str, Any], shardings: Any = None) -> tuple[dict[str, Any], dict]:
        """(state, extra) of `step`, or with a CheckpointWarning of the newest earlier step that is whole and undamaged.

        abstract: the state's ShapeDtypeStructs, or only some of its entries; shardings: the same tree of shardings, one
        for all, or None for the first device. CheckpointError lists parameters that are missing or of another shape."""
        self.wait()
        earlier = [s for s in self._whole() if s < step]
        good, damaged = _newest_undamaged(self.workdir, [*earlier, step], _items(abstract))
        self._damaged.update(damaged)
        return _load_step(self._folder(good), abstract, shardings)

    def _folder(self, step: int) -> Path:
        return self.workdir / "steps" / str(step)

    def _whole(self) -> list[int]:
        return [s for s in _whole_steps(self.workdir) if s not in self._damaged]

    def _finish(self, step: int, response: Any, leaves: dict) -> None:
        try:
            if response is not None:
                response.result()
            if jax.process_index() == 0:
                base = storage.read_json(self.workdir / "base.json") or {}
                storage.write_manifest(self._folder(step), {"step": step, "base": base.get("fingerprint"), "leaves": leaves})
        except Exception as error:
            self._give_up(step, error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # what could not be removed now, is by the next save
                self._prune()

    def _prune(self) -> None:
        """Remove whole steps that are not to be kept, and what unfinished saves left behind."""
        whole = self._whole()
        kept = {*whole[-self.keep_last :], *(s for s in whole if self.keep_every and s % self.keep_every == 0)}
        for step in _step_folders(self.workdir):
            if step not in kept:
                storage.remove(self._folder(step))

    def _give_up(self, step: int, error: Exception) -> NoReturn:
        """Remove what was half written and raise: as CheckpointError where the disk is at fault."""
        shutil.rmtree(self._folder(step), ignore_errors=True)
        reason = storage.disk_fault(error)
        if reason is None:
            raise error
        last = self.latest()
        good = f"step {last} is the last good one" if last is not None else "no step was saved before"
        raise CheckpointError(
            f"{self._folder(step)}: cannot be written: {reason}; {good}; mend that and run the same command to go on"
        ) from error


# --- the frozen base


def save_base(workdir: str | os.PathLike, frozen: dict, source: str | os.PathLike | None = None) -> str:
    """Write the frozen parameters (nested dict) of a run, once; returns their fingerprint, a SHA-256 over names, dtypes,
    shapes and values. Where the base of `source`, another checkpoint, holds them all, only a reference is written."""
    workdir = storage.absolute(workdir)
    leaves = {path: [*_kind(leaf), storage.hash_array(leaf)] for path, leaf in pathtree.flatten(frozen).items()}
    fingerprint = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()
    saved = storage.read_json(workdir / "base.json")
    if saved and saved["fingerprint"] == fingerprint:
        return fingerprint
    if saved and _whole_steps(workdir):
        raise CheckpointError(f"{workdir}: its steps were trained on another frozen base; use another --workdir")
    folder = _lender(source, leaves) or workdir / "base"
    if leaves and folder == workdir / "base":
        with _writing(folder):
            if jax.process_index() == 0:
                storage.remove(folder)
                folder.mkdir(parents=True)
            ocp.save_checkpointables(folder / "arrays", {_BASE: frozen})
            if jax.process_index() == 0:
                storage.write_manifest(folder, {"leaves": {_BASE: leaves}})
    if jax.process_index() == 0:
        relative = os.path.relpath(folder, workdir)
        with _writing(workdir / "base.json"):
            record = {"fingerprint": fingerprint, "path": str(folder), "relative": relative, "leaves": leaves}
            storage.write_json(workdir / "base.json", record)
    return fingerprint


def load_base(path: str | os.PathLike, abstract: dict | None = None, shardings: Any = None, base: str | os.PathLike | None = None) -> dict:
    """The frozen parameters of a checkpoint, as a nested dict. Looked for where the checkpoint says, then relative to it,
    then in `base` (a base folder, or the run that holds it); always held to the recorded hashes.

    abstract: what is expected (CheckpointError lists what differs), None for whatever there is; shardings as in
    `Checkpoints.restore`, or a function from the abstract tree to them."""
    run = _run_of(path)
    record = storage.read_json(run / "base.json")
    if record is None:
        raise CheckpointError(f"{run / 'base.json'}: is missing or damaged, so the frozen base cannot be told")
    leaves = record["leaves"]
    kinds = {p: leaf[:2] for p, leaf in leaves.items()}
    if abstract is None:
        abstract = _abstract(kinds)
    _compare(kinds, _leaves(abstract), run / "base.json")
    if not leaves:
        return {}
    places = [Path(record["path"]), run / record["relative"]]
    if base is not None:
        places += [Path(base) / "base" if (Path(base) / "base").is_dir() else Path(base)]
    tried = {}
    for folder in dict.fromkeys(Path(os.path.abspath(p)) for p in places):
        tried[folder] = _unfit(folder, leaves)
        if tried[folder] is None:
            there = pathtree.flatten(_abstract(storage.read_json(folder / storage.MANIFEST)["leaves"][_BASE]))
            wanted = pathtree.flatten(_placed(abstract, shardings))
            tree = pathtree.unflatten({p: wanted.get(p, ocp.PLACEHOLDER) for p in there})
            loaded = pathtree.flatten(ocp.load_checkpointables(folder / "arrays", {_BASE: tree})[_BASE])
            return pathtree.unflatten({p: loaded[p] for p in wanted})
    reasons = "; ".join(f"{folder} {why}" for folder, why in tried.items())
    raise CheckpointError(f"{run}: its frozen base {record['fingerprint'][:12]} is not found: {reasons}; name its folder with --base DIR")


def _lender(source: str | os.PathLike | None, leaves: dict) -> Path | None:
    """The base folder behind another checkpoint, if it holds all these parameters."""
    if source is None:
        return None
    run = _run_of(source)
    record = storage.read_json(run / "base.json") or {"path": "", "relative": "base"}
    for folder in (Path(record["path"]), Path(os.path.abspath(run / record["relative"]))):
        if _unfit(folder, leaves) is None:
            return folder
    return None


def _unfit(folder: Path, leaves: dict) -> str | None:
    """Why a base folder cannot give these parameters; None if it can."""
    manifest = storage.read_json(folder / storage.MANIFEST)
    if manifest is None or _BASE not in manifest.get("leaves", {}):
        return "holds no whole base"
    there = manifest["leaves"][_BASE]
    differing = [path for path, leaf in leaves.items() if there.get(path) != leaf]
    if differing:
        return f"is another base: {_some(differing)}"
    return _damage(folder, [_BASE])


# --- reading a checkpoint from its path


def resolve(path: str | os.PathLike) -> tuple[Path, int]:
    """(run directory, step) that PATH means: a run directory's newest whole step, or the one step that it names."""
    run, named = _run_of(path), _named_step(path)
    whole = _whole_steps(run)
    if named is None and whole:
        return run, whole[-1]
    if named in whole:
        return run, named
    if named is None:
        raise CheckpointError(f"{run}: holds no whole step yet; train it, or give another checkpoint")
    newest = f"the newest whole one is {run / 'steps' / str(whole[-1])}" if whole else "nor is any other of this run"
    raise CheckpointError(f"{path}: this step is not whole (its save did not finish); {newest}")


def load_params(path: str | os.PathLike, base: str | os.PathLike | None = None, place: Callable[[dict], Any] | None = None) -> dict:
    """All parameters of a checkpoint, trained and frozen, as one nested dict in the dtypes they were saved in.

    place: from a nested dict of ShapeDtypeStructs to their shardings; None for the first device."""
    return _load_params(path, base, place)[0]


def load_for_inference(
    path: str | os.PathLike, base: str | os.PathLike | None = None, place: Callable[[dict], Any] | None = None
) -> tuple[Config, dict, Path, dict]:
    """(config, all parameters, path of tokenizer.json, extra) of a checkpoint; the optimizer is not read."""
    run = _run_of(path)
    config, tokenizer = read_config(run), tokenizer_path(run)
    params, extra = _load_params(path, base, place)
    return config, params, tokenizer, extra


def _load_params(path, base, place) -> tuple[dict, dict]:
    run, step = resolve(path)
    candidates = [step] if _named_step(path) is not None else _whole_steps(run)
    step, _ = _newest_undamaged(run, candidates, [_PARAMS])
    folder = run / "steps" / str(step)
    manifest, record = storage.read_json(folder / storage.MANIFEST), storage.read_json(run / "base.json") or {}
    if manifest["base"] != record.get("fingerprint"):
        raise CheckpointError(f"{folder}: was trained on another frozen base than {run / 'base.json'} records")
    abstract = _abstract(manifest["leaves"].get(_PARAMS, {}))
    state, extra = _load_step(folder, {_PARAMS: abstract}, {_PARAMS: place(abstract)} if place else None)
    return pathtree.merge(load_base(run, None, place, base), state[_PARAMS]), extra


def _run_of(path: str | os.PathLike) -> Path:
    """The run directory that PATH is, or lies in as steps/<n>."""
    full = Path(path).resolve()
    run = full.parent.parent if _named_step(path) is not None else full
    if not full.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{path}: is not a checkpoint (no config.json); give a run directory, one of its steps/<n>, or an import")
    return run


def _named_step(path: str | os.PathLike) -> int | None:
    full = Path(path).resolve()
    return int(full.name) if full.name.isdecimal() and full.parent.name == "steps" else None


def _step_folders(run: Path) -> list[int]:
    """Every step of which anything is there, ascending."""
    steps = run / "steps"
    return sorted(int(f.name) for f in steps.iterdir() if f.name.isdecimal()) if steps.is_dir() else []


def _whole_steps(run: Path) -> list[int]:
    return [s for s in _step_folders(run) if (run / "steps" / str(s) / storage.MANIFEST).is_file()]


def _newest_undamaged(run: Path, steps: list[int], items: Any) -> tuple[int, list[int]]:
    """(the last of `steps` whose `items` are as they were written, the damaged ones after it), with a warning for each of those."""
    damaged = []
    for step in reversed(steps):
        damage = _damage(run / "steps" / str(step), items)
        if damage is None:
            return step, damaged
        damaged.append(step)
        if step != steps[0]:
            warnings.warn(f"{run}: step {step} is passed over: it {damage}", CheckpointWarning, stacklevel=3)
    raise CheckpointError(f"{run}: step {step} {damage}, and no earlier whole step is there; give another checkpoint")


# --- trees of arrays, in orbax and by name


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """The state as orbax items, so that parameters can be read without the optimizer."""
    rest = {name: tree for name, tree in state.items() if name != _PARAMS}
    return ({_PARAMS: state[_PARAMS]} if _PARAMS in state else {}) | ({_TRAIN: rest} if rest else {})


def _load_step(folder: Path, abstract: dict[str, Any], shardings: Any) -> tuple[dict[str, Any], dict]:
    leaves = storage.read_json(folder / storage.MANIFEST)["leaves"]
    items = _items(abstract)
    for name, tree in items.items():
        _compare(leaves.get(name, {}), _leaves(tree), folder)
    placed = _items(_placed(abstract, shardings))
    wanted = {name: tree for name, tree in placed.items() if jax.tree.leaves(tree)}
    loaded = placed | (ocp.load_checkpointables(folder / "arrays", wanted) if wanted else {})
    state = ({_PARAMS: loaded[_PARAMS]} if _PARAMS in items else {}) | loaded.get(_TRAIN, {})
    return state, storage.read_json(folder / "extra.json")


def _leaves(tree: Any) -> dict[str, list]:
    """Any tree of arrays or shapes as {"a/b/c": [dtype, shape]}."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _kind(leaf) for path, leaf in flat}


def _kind(leaf: Any) -> list:
    return [str(np.dtype(leaf.dtype)), list(leaf.shape)]


def _abstract(leaves: dict[str, list]) -> dict:
    """Nested dict of ShapeDtypeStructs from what `_leaves` recorded."""
    return pathtree.unflatten({path: jax.ShapeDtypeStruct(tuple(leaf[1]), jax.numpy.dtype(leaf[0])) for path, leaf in leaves.items()})


def _placed(abstract: Any, shardings: Any) -> Any:
    """The abstract tree with a sharding on every leaf."""
    if callable(shardings):
        shardings = shardings(abstract)
    if shardings is None:
        shardings = SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)


def _compare(there: dict[str, list], wanted: dict[str, list], where: Path) -> None:
    """CheckpointError that lists parameters which are missing, left over, or of another dtype or shape."""
    differing = [f"lacks {path}" for path in sorted(wanted.keys() - there.keys())]
    differing += [f"also has {path}" for path in sorted(there.keys() - wanted.keys())]
    differing += [
        f"{path} is {there[path][0]}{there[path][1]}, the config needs {kind[0]}{kind[1]}"
        for path, kind in sorted(wanted.items())
        if path in there and there[path] != kind
    ]
    if differing:
        raise CheckpointError(f"{where} does not fit the config: {_some(differing)}")


def _damage(folder: Path, items: Iterable[str]) -> str | None:
    """What is wrong with the files of these orbax items of a step or base; None if nothing."""
    others = tuple(f"arrays/{name}/" for name in (_PARAMS, _TRAIN, _BASE) if name not in items)
    return storage.damage(folder, lambda name: not name.startswith(others))


def _some(rows: list[str]) -> str:
    return ", ".join(rows[:_LISTED]) + (f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else "")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into CheckpointError; what was half written under `path` goes."""
    try:
        yield
    except Exception as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        reason = storage.disk_fault(error)
        if reason is None:
            raise
        raise CheckpointError(f"{path}: cannot be written: {reason}; mend that and run the same command again") from error
