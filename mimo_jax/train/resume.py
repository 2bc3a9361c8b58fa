"""What a run takes over from its first start when it resumes: the number of its steps, and the data that its batches are made of.

RUN/data.json holds a fingerprint of the samples of each source. Batches are a function of the config, the sources and the tokenizer, so a
run whose data settings or samples have changed cannot go on with the sequence that it began.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from mimo_jax import files, pathtree
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import Config, ConfigError
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.records import RecordFolder

DATA = "data.json"
# Settings of `config.data` that change neither the samples of a batch nor what is drawn for them; the fingerprints stand for the paths.
_MAY_DIFFER = ("workers", "cache_mb", "features")


def resolve_steps(config: Config, num_samples: int, saved: Config | None) -> Config:
    """The config with `train.steps` for its `train.epochs`, if these are set. num_samples: samples that the batches are drawn from; saved:
    the config of the run that is resumed, whose steps are kept if its epochs are the same."""
    epochs = config.train.epochs
    if not epochs:
        return config
    resolved = copy.deepcopy(config)
    known = saved is not None and saved.train.epochs == epochs
    resolved.train.steps = saved.train.steps if known else max(1, math.ceil(epochs * num_samples / config.data.batch_size))
    return resolved


def check_data(config: Config, sources: Mapping[str, RecordFolder | Manifest], run: Path) -> None:
    """Raises ConfigError if the batches of the config and sources are not those that the run was trained on so far."""
    saved = checkpoint.read_config(run)
    old, new = _settings(saved), _settings(config)
    differing = [
        f"config.data.{name.replace('/', '.')} ({old.get(name, 'absent')} there, {new.get(name, 'absent')} here)"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    fingerprints = files.read_json(run / DATA) or {}
    differing += [
        f"the samples of config.data.sources.{name} ({sources[name].path})"
        for name, fingerprint in fingerprints.items()
        if name in sources and fingerprint != _fingerprint(sources[name])
    ]
    if differing:
        raise ConfigError(
            f"{run}: was trained on other batches: {', '.join(differing)} changed; give the same as before, or start a new run from it "
            f"with --init {run} and another --workdir"
        )


def write_fingerprints(sources: Mapping[str, RecordFolder | Manifest], run: Path) -> None:
    files.write_json(run / DATA, {name: _fingerprint(source) for name, source in sources.items()})


def _settings(config: Config) -> dict:
    flat = pathtree.flatten(config.to_dict()["data"])
    return {
        name: value for name, value in flat.items() if name not in _MAY_DIFFER and not (name[:8] == "sources/" and name[-5:] == "/path")
    }


def _fingerprint(source: RecordFolder | Manifest) -> str:
    """SHA-256 of the ids of a source's records and of the perspective and length of each of their samples."""
    digest = hashlib.sha256()
    for name in ("ids", "groups", "first", "perspective", "words", "text_bytes"):
        column = getattr(source.index, name)
        digest.update(f"{name} {column.dtype} {column.shape}".encode() + column.tobytes())
    return digest.hexdigest()
