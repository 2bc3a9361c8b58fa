"""From a command line to a Config: `--config configs/tiny.py --config.train.steps=500`.

Overrides are parsed by ml_collections on a private absl FlagValues. Before that, this module checks every name, so that the
error for a wrong name can suggest the nearest right one, and adds the entries of `data.sources` that the command line
introduces, which ml_collections cannot do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from mimo_jax import pathtree
from mimo_jax.config import PERSPECTIVES, Config, ConfigError, SourceConfig, settings_class
from mimo_jax.model_config import KINDS

PACKAGED = Path(__file__).resolve().parent.parent / "configs"


def load_config(argv: Sequence[str], sources: dict[str, SourceConfig] | None = None) -> Config:
    """The validated config of `--config FILE` and the `--config.path=value` that follow it.

    sources: entries added to `data.sources` before the overrides. Raises ConfigError, in one line, for a file that is missing
    or fails, an unknown name, a value of the wrong type, or a combination that cannot run."""
    path, overrides = _split(argv)
    config = read_config_file(find_config(path))
    config.data.sources.update(sources or {})
    _choose_kinds(config, overrides)
    for name in _names(overrides):
        _check_name(config, name)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=overrides)
    try:
        rest = values(["mimo", *overrides])[1:]
    except flags.Error as error:
        raise ConfigError(str(error).removeprefix("flag ").replace("\n", " ")) from error
    if rest:
        raise ConfigError(f"{rest[0]!r} is not an override; write overrides as --config.train.steps=500")
    config = values.config
    _choose_length(config, _names(overrides))
    config.validate()
    return config


def find_config(path: str) -> Path:
    """The file that `--config` refers to: the path if it exists, else the packaged config of that name."""
    name = Path(path).name
    for candidate in (Path(path), PACKAGED / name, PACKAGED / f"{name}.py"):
        if candidate.is_file():
            return candidate
    packaged = sorted(f.stem for f in PACKAGED.glob("*.py") if not f.stem.startswith("_"))
    near = difflib.get_close_matches(Path(path).stem, packaged, 1)
    raise ConfigError(f"--config {path}: no such file; packaged are {', '.join(packaged)}{f' (did you mean {near[0]}?)' if near else ''}")


def read_config_file(path: Path) -> Config:
    """The Config that the `get_config()` of a config file returns."""
    with as_config_error(path):
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if get_config else None
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: defines no get_config() that returns a mimo_jax.config.Config")
    return config


@contextlib.contextmanager
def as_config_error(path: Path) -> Iterator[None]:
    """Convert every exception of a config file's code to a ConfigError that names the file: it is the user's code."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(path of --config, the other arguments)."""
    rest, path = [], None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    if not path:
        raise ConfigError("--config: is missing; name a config file, such as configs/tiny.py")
    return path, rest


def _names(overrides: Sequence[str]) -> list[str]:
    """The dotted paths that `--config.path`, `--config.path=value` and `--noconfig.path` name."""
    names = [argument.lstrip("-").partition("=")[0] for argument in overrides if argument.startswith("-")]
    names = [name.removeprefix("no") if name.startswith("noconfig.") else name for name in names]
    unknown = [name for name in names if not name.startswith("config.")]
    if unknown:
        raise ConfigError(f"--{unknown[0]}: is unknown; overrides are written as --config.train.steps=500")
    return [name.removeprefix("config.") for name in names]


def _choose_kinds(config: Config, overrides: Sequence[str]) -> None:
    """If an override changes the `kind` of a part to one with another settings class, replace the settings with that class's defaults,
    which further overrides can change."""
    for argument in overrides:
        if found := re.fullmatch(r"--config\.model\.(\w+)\.kind=(.*)", argument):
            section, kind = found.groups()
            if section in KINDS and type(getattr(config.model, section)) is not (settings := settings_class(section, kind)):
                setattr(config.model, section, settings(kind=kind))


def _choose_length(config: Config, names: Sequence[str]) -> None:
    """The length of a run is given in steps or in epochs: what the command line names replaces the other one of the file."""
    if config.train.epochs and "train.steps" in names:
        if "train.epochs" in names:
            raise ConfigError(f"config.train.epochs: is {config.train.epochs:g}, but config.train.steps is given too; give one of them")
        config.train.epochs = 0.0


def _check_name(config: Config, name: str) -> None:
    """Raise ConfigError, with the nearest right name, if `name` is not a field that can be set. Adds entries to `data.sources`."""
    try:
        parts = config_path.split(name)
    except ValueError:
        raise ConfigError(f"config.{name}: is invalid; write a name with a dash or a dot as data.sources['my-data'].path") from None
    holder: Any = config
    where = "config"
    for part in parts:
        if holder is config.data.sources:
            holder.setdefault(part, SourceConfig())
        elif holder is config.data.weights and part in PERSPECTIVES:
            holder.setdefault(part, 0.0)
        known = _entries(holder)
        if part not in known:
            raise ConfigError(f"{where}.{part}: is unknown; {_nearest(config, where, str(part), list(known))}")
        holder, where = known[part], f"{where}.{part}"
    if _entries(holder):
        raise ConfigError(f"{where}: is a group of settings; name one of them, such as {where}.{next(iter(_entries(holder)))}")
    if holder is None or isinstance(holder, dict):
        raise ConfigError(f"{where}: cannot be set from the command line; change it in the config file")


def _entries(holder: Any) -> dict[Any, Any]:
    """The fields of a dataclass or the entries of a dict; empty for a value."""
    if dataclasses.is_dataclass(holder):
        return {f.name: getattr(holder, f.name) for f in dataclasses.fields(holder)}
    return holder if isinstance(holder, dict) else {}


def _nearest(config: Config, where: str, part: str, known: list[str]) -> str:
    """A suggestion for a wrong name: a similar name at `where`, the same name elsewhere, or else all names at `where`."""
    near = difflib.get_close_matches(part, map(str, known), 1)
    if near:
        return f"did you mean {where}.{near[0]}?"
    everywhere = [f"config.{path.replace('/', '.')}" for path in pathtree.flatten(config.to_dict()) if not path.startswith("trainables/")]
    elsewhere = [path for path in everywhere if path.endswith(f".{part}")]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known are {', '.join(map(str, known))}" if known else f"{where} is a single value"
