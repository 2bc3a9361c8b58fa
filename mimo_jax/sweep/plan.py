"""Which runs a sweep is made of: groups of variants of one base config, each with every seed, each in a directory of its own.

WORKDIR/base-s0-5f3a9c21/            what `mimo train` writes, and test.json, the report of `mimo eval`
WORKDIR/aligner-none-s0-d09e1b77/    group, variant, seed, and the hash of the overrides with the seed
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_jax import config_flags, files, pathtree
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import Config, SourceConfig
from mimo_jax.errors import UserError

BASELINE = "base"
_REPORT, _SPLIT = "test.json", "test"


class SweepError(UserError):
    """A sweep that cannot be run; the message names the file, group or directory and the remedy."""


@dataclass(frozen=True)
class Common:
    """What is the same for every run."""

    base: str  # config file
    data: tuple[str, ...]  # values of `--data`
    shared: tuple[str, ...]  # `--config.…` flags
    test: str  # the data whose test split is asked
    limit: int | None  # at most so many samples of it


@dataclass(frozen=True)
class Run:
    """One training and its evaluation. overrides: `--config.…` flags beside the common ones."""

    name: str
    folder: Path
    overrides: tuple[str, ...]
    config: Config
    common: Common

    def train(self) -> list[str]:
        """`mimo train`, as words after `mimo`."""
        data = [word for value in self.common.data for word in ("--data", value)]
        return ["train", "--config", self.common.base, *data, "--workdir", str(self.folder), *self.common.shared, *self.overrides]

    def eval(self) -> list[str]:
        limit = ["--limit", str(self.common.limit)] if self.common.limit else []
        report = str(self.folder / _REPORT)
        return ["eval", "--checkpoint", str(self.folder), "--data", self.common.test, "--split", _SPLIT, *limit, "--out", report]

    def due(self) -> list[list[str]]:
        """What is left of the two, in order."""
        if self.report() is not None:
            return []
        trained = checkpoint.Checkpoints(self.folder).latest() == self.config.train.steps
        return [self.eval()] if trained else [self.train(), self.eval()]

    def report(self) -> dict | None:
        """That of the whole training on the data that are asked for; None before it is there."""
        report = files.read_json(self.folder / _REPORT) or {}
        asked = {"data": self.common.test, "split": _SPLIT, "limit": self.common.limit}
        return report if report and all(report.get(key) == value for key, value in asked.items()) else None


@dataclass(frozen=True)
class Sweep:
    """runs: each once, all of the first seed before any of the second, the baseline first. groups: group → variant → the names of
    its runs, one a seed; the baseline is the first variant of every group."""

    runs: list[Run]
    groups: dict[str, dict[str, list[str]]]


def base_of(ablations: str) -> str:
    """The config that a file such as configs/ablations.py varies."""
    return _defined(ablations)["BASE"]


def make_sweep(
    ablations: str,
    workdir: Path,
    sources: dict[str, SourceConfig],
    common: Common,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
) -> Sweep:
    """Every run with its config, validated.

    ablations: a file such as configs/ablations.py; sources: what `common.data` names; only: names of groups, none for all. UserError
    for a file, a group or a config that cannot be used."""

    def load(overrides: Sequence[str]) -> Config:
        entries = {name: dataclasses.replace(source) for name, source in sources.items()}
        return config_flags.load_config(["--config", common.base, *common.shared, *overrides], entries)

    plain = load(())
    with config_flags.blamed_on(config_flags.find_config(ablations)):
        groups = _defined(ablations)["get_ablations"](plain)
    if unknown := [name for name in only if name not in groups]:
        raise SweepError(f"--only {unknown[0]}: is no group of {ablations}; it has {', '.join(groups)}")

    values = pathtree.flatten(plain.to_dict())
    labels: dict[tuple[str, ...], str] = {(): BASELINE}  # of every set of overrides, the first name that it goes by
    variants: dict[str, dict[str, tuple[str, ...]]] = {}
    for group in (name for name in groups if not only or name in only):
        named = {name: _overrides(changes, values) for name, changes in groups[group].items()}
        first = next((name for name, overrides in named.items() if not overrides), BASELINE)
        variants[group] = {first: ()} | named
        for name, overrides in named.items():
            labels.setdefault(overrides, f"{group}-{name}")
    made = {(key, seed): _run(label, workdir, seed, key, common, load) for seed in seeds for key, label in labels.items()}
    names = {group: {name: [made[key, s].name for s in seeds] for name, key in named.items()} for group, named in variants.items()}
    return Sweep(list(made.values()), names)


def _defined(ablations: str) -> dict:
    """What the file defines."""
    file = config_flags.find_config(ablations)
    with config_flags.blamed_on(file):
        defined = runpy.run_path(str(file))
    if not {"BASE", "get_ablations"} <= defined.keys():
        raise SweepError(f"{file}: defines no BASE and get_ablations(base); see configs/ablations.py")
    return defined


def _overrides(changes: dict, values: dict) -> tuple[str, ...]:
    """As flags, sorted, without those that say what the base says."""
    return tuple(f"--config.{path}={new}" for path, new in sorted(changes.items()) if values.get(path.replace(".", "/")) != new)


def _run(label: str, workdir: Path, seed: int, overrides: tuple[str, ...], common: Common, load: Callable[[Sequence[str]], Config]) -> Run:
    overrides = (*overrides, f"--config.data.seed={seed}", f"--config.train.seed={seed}")
    digest = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]
    name = f"{re.sub('[^a-z0-9]+', '-', label.lower())}-s{seed}-{digest}"
    return Run(name, workdir / name, overrides, load(overrides), common)


def check_folders(runs: Sequence[Run]) -> None:
    """SweepError where a directory holds a run of another config, naming the fields that differ."""
    for run in runs:
        if not (run.folder / "config.json").exists():
            continue
        there, here = (pathtree.flatten(c.to_dict()) for c in (checkpoint.read_config(run.folder), run.config))
        differing = [
            f"config.{name.replace('/', '.')} ({there.get(name)!r} there, {here.get(name)!r} here)"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise SweepError(f"{run.folder}: is of another config: {', '.join(differing)}; give the same flags, or another --workdir")
