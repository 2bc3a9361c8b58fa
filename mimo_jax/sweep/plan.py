"""The runs of a sweep: groups of variants of one base config, each variant with every seed, each run in its own directory.

WORKDIR/base-s0-5f3a9c21/            the output of `mimo train`, and test.json, the report of `mimo eval`
WORKDIR/aligner-none-s0-d09e1b77/    named by group, variant, seed, and the hash of the overrides including the seed
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
_REPORT, SPLIT = "test.json", "test"


class SweepError(UserError):
    """A sweep that cannot be run; the message names the file, group or directory and the remedy."""


@dataclass(frozen=True)
class SharedSettings:
    """Settings that are the same for every run."""

    base: str  # config file
    data: tuple[str, ...]  # values of `--data`
    shared: tuple[str, ...]  # `--config.…` flags
    test: str  # the dataset whose test split is evaluated
    limit: int | None  # maximum number of test samples


@dataclass(frozen=True)
class SweepRun:
    """One training run and its evaluation. overrides: `--config.…` flags in addition to the shared ones."""

    name: str
    folder: Path
    overrides: tuple[str, ...]
    config: Config
    common: SharedSettings

    def train(self) -> list[str]:
        """The arguments of `mimo` that train this run."""
        data = [word for value in self.common.data for word in ("--data", value)]
        return ["train", "--config", self.common.base, *data, "--workdir", str(self.folder), *self.common.shared, *self.overrides]

    def eval(self) -> list[str]:
        """The arguments of `mimo` that evaluate this run."""
        limit = ["--limit", str(self.common.limit)] if self.common.limit else []
        report = str(self.folder / _REPORT)
        return ["eval", "--checkpoint", str(self.folder), "--data", self.common.test, "--split", SPLIT, *limit, "--out", report]

    def remaining(self) -> list[list[str]]:
        """Those of the two commands that still have to run, in order."""
        if self.report() is not None:
            return []
        trained = checkpoint.Checkpoints(self.folder).latest() == self.config.train.steps
        return [self.eval()] if trained else [self.train(), self.eval()]

    def report(self) -> dict | None:
        """The report of the finished training on the requested test data; None if it does not exist yet."""
        report = files.read_json(self.folder / _REPORT) or {}
        expected = {"data": self.common.test, "split": SPLIT, "limit": self.common.limit}
        return report if report and all(report.get(key) == value for key, value in expected.items()) else None


@dataclass(frozen=True)
class Sweep:
    """runs: every run once, ordered by seed, the baseline first. groups: group → variant → the names of its runs, one per seed; the
    baseline is the first variant of every group."""

    runs: list[SweepRun]
    groups: dict[str, dict[str, list[str]]]


def base_config(ablations: str) -> str:
    """The path of the base config that a file such as configs/ablations.py varies."""
    return _load_ablations(ablations)["BASE"]


def make_sweep(
    ablations: str,
    workdir: Path,
    sources: dict[str, SourceConfig],
    common: SharedSettings,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
) -> Sweep:
    """Make every run with its validated config.

    ablations: a file such as configs/ablations.py; sources: the datasets of `common.data`; only: names of groups, empty for all. Raises
    UserError for a file, a group or a config that cannot be used."""

    def load(overrides: Sequence[str]) -> Config:
        entries = {name: dataclasses.replace(source) for name, source in sources.items()}
        return config_flags.load_config(["--config", common.base, *common.shared, *overrides], entries)

    plain = load(())
    with config_flags.as_config_error(config_flags.find_config(ablations)):
        groups = _load_ablations(ablations)["get_ablations"](plain)
    if unknown := [name for name in only if name not in groups]:
        raise SweepError(f"--only {unknown[0]}: is not a group of {ablations}; its groups are {', '.join(groups)}")

    values = pathtree.flatten(plain.to_dict())
    labels: dict[tuple[str, ...], str] = {(): BASELINE}  # set of overrides -> the first name that it has
    variants: dict[str, dict[str, tuple[str, ...]]] = {}
    for group in (name for name in groups if not only or name in only):
        named = {name: _overrides(changes, values) for name, changes in groups[group].items()}
        first = next((name for name, overrides in named.items() if not overrides), BASELINE)
        variants[group] = {first: ()} | named
        for name, overrides in named.items():
            labels.setdefault(overrides, f"{group}-{name}")
    runs = {(key, seed): _make_run(label, workdir, seed, key, common, load) for seed in seeds for key, label in labels.items()}
    names = {group: {name: [runs[key, s].name for s in seeds] for name, key in named.items()} for group, named in variants.items()}
    return Sweep(list(runs.values()), names)


def _load_ablations(ablations: str) -> dict:
    """Run the file and return its global names."""
    file = config_flags.find_config(ablations)
    with config_flags.as_config_error(file):
        defined = runpy.run_path(str(file))
    if not {"BASE", "get_ablations"} <= defined.keys():
        raise SweepError(f"{file}: does not define BASE and get_ablations(base); see configs/ablations.py")
    return defined


def _overrides(changes: dict, values: dict) -> tuple[str, ...]:
    """The changes as sorted flags, without those that equal the base config."""
    return tuple(f"--config.{path}={new}" for path, new in sorted(changes.items()) if values.get(path.replace(".", "/")) != new)


def _make_run(
    label: str, workdir: Path, seed: int, overrides: tuple[str, ...], common: SharedSettings, load: Callable[[Sequence[str]], Config]
) -> SweepRun:
    overrides = (*overrides, f"--config.data.seed={seed}", f"--config.train.seed={seed}")
    digest = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]
    name = f"{re.sub('[^a-z0-9]+', '-', label.lower())}-s{seed}-{digest}"
    return SweepRun(name, workdir / name, overrides, load(overrides), common)


def check_folders(runs: Sequence[SweepRun]) -> None:
    """Raises SweepError if a directory contains a run with another config; names the fields that differ."""
    for run in runs:
        if not (run.folder / "config.json").exists():
            continue
        existing, new = (pathtree.flatten(c.to_dict()) for c in (checkpoint.read_config(run.folder), run.config))
        differing = [
            f"config.{name.replace('/', '.')} ({existing.get(name)!r} there, {new.get(name)!r} here)"
            for name in sorted(existing.keys() | new.keys())
            if existing.get(name) != new.get(name) and not (name == "train/steps" and new["train/epochs"])  # these follow from the data
        ]
        if differing:
            raise SweepError(f"{run.folder}: has another config: {', '.join(differing)}; give the same flags, or another --workdir")
