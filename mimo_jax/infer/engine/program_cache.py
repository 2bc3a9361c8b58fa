"""Compiled programs on disk, so that a new process neither traces nor compiles: for a small model that takes most of the time of the
first answer.

A program is stored next to jax's own cache of compiled programs (`jax_compilation_cache_dir`, which the `mimo` command sets), under a
name that is the hash of everything it depends on: the source of the model, the versions of jax and jaxlib, jax's settings, the device, the
model's settings, and the shapes of the parameters and arguments. Without such a folder, on several devices, and for parts of a model that
are not this package's own, nothing is stored and jax compiles as usual.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from mimo_jax import files
from mimo_jax.config import Config
from mimo_jax.model_config import KINDS

progress = logging.getLogger("mimo_jax.progress")  # what a user may have to wait for
_FOLDER = "mimo_programs"
_UNUSED_SECONDS = 30 * 24 * 3600  # programs that were not used for so long are removed
_PACKAGE = Path(__file__).resolve().parents[2]
SOURCES = ("*.py", "models/*.py", "infer/engine/*.py")  # of the package: every file that a program is made from


class ProgramCache:
    """The programs of one model with one shape of parameters. Errors of the disk, and damaged files, are as if nothing were stored."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._loaded: dict[str, Callable] = {}

    @staticmethod
    def of(config: Config, params: dict, eos_id: int) -> ProgramCache | None:
        """The cache for a model with these parameters (arrays); None if its programs cannot be stored."""
        root, device = jax.config.jax_compilation_cache_dir, jax.local_devices()[0]
        own_parts = all(type(getattr(config.model, section)).__module__ == "mimo_jax.model_config" for section in KINDS)
        here = all(leaf.sharding == SingleDeviceSharding(device) for leaf in jax.tree.leaves(params))
        if not root or not own_parts or not here or jax.process_count() > 1 or not jax.config.jax_enable_compilation_cache:
            return None
        parts = [config.model_json(), eos_id, _shapes(params), _environment()]
        return _opened(Path(root) / _FOLDER / _digest(parts)[:32])

    def is_known(self) -> bool:
        """Whether `add` has stored a program of this model, whose parameters were therefore found to be those of its config."""
        return self.folder.is_dir()

    def call(self, name: str, function: Callable[[], jax.stages.Wrapped], params: dict, *args: Any, **static: Any) -> Any:
        """The result of function()(params, *args, **static). function: returns the jitted function that has this `name`; it is called only
        if its program for arguments of these shapes has yet to be compiled."""
        # Attributes, where there are any, are what a context manager of jax has changed for its block and thread.
        values = sorted((setting, value) for setting, value in jax.config.values.items() if "cache" not in setting)
        settings = [(setting, getattr(jax.config, setting, value)) for setting, value in values]
        key = _digest([name, sorted(static.items()), _shapes(args), settings])[:32]
        if key not in self._loaded:
            path = self.folder / f"{name}-{key}"
            self._loaded[key] = self._load(path) or self._compile(path, name, function, params, *args, **static)
        return self._loaded[key](params, *args)

    def _load(self, path: Path) -> Callable | None:
        try:
            stored = path.read_bytes()
            digest, content = stored[:32], stored[32:]
            if hashlib.sha256(content).digest() != digest:
                return None
            with contextlib.suppress(OSError):
                os.utime(path)
            return serialize_executable.deserialize_and_load(*pickle.loads(content))
        except Exception:  # such as a damaged file, or a device whose driver has changed: each backend has errors of its own
            return None

    def _compile(self, path: Path, name: str, function: Callable[[], jax.stages.Wrapped], *args: Any, **static: Any) -> Callable:
        """Compile a program and store it, if its backend can."""
        progress.info("compiling %s (stored for the next time)", name)
        lowered = function().lower(*args, **static)
        with _without_jax_cache():
            program = lowered.compile()
        with contextlib.suppress(Exception):
            content = pickle.dumps(serialize_executable.serialize(program))
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(path) as part:
                part.write_bytes(hashlib.sha256(content).digest() + content)
            _remove_unused(self.folder.parent)
        return program


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    """Compile in the block without jax's own cache: a program of the CPU backend that was read from there cannot be stored again, since
    it lacks some of its functions."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at the setting only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@lru_cache(maxsize=4)
def _opened(folder: Path) -> ProgramCache:
    return ProgramCache(folder)


def _digest(values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _shapes(tree: Any) -> str:
    """Structure, shapes and dtypes of a tree of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return f"{structure} {[(leaf.shape, str(leaf.dtype), getattr(leaf, 'weak_type', False)) for leaf in leaves]}"


@cache
def _environment() -> str:
    """Everything outside the model that a program depends on, as a hash."""
    source = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in _PACKAGE.glob(pattern)):
        source.update(f"{path.relative_to(_PACKAGE)} ".encode() + path.read_bytes())
    device = jax.local_devices()[0]
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    versions = (platform.python_version(), jax.__version__, jaxlib.__version__, device.client.platform_version)
    return _digest([source.hexdigest(), versions, device.platform, device.device_kind, device.id, _processor(), flags])


def _processor() -> str:
    """The instructions of this machine's processor, for which programs of the CPU backend are compiled."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _remove_unused(root: Path) -> None:
    """Remove the programs that were not used for a month, such as those of earlier versions of the source."""
    for folder in root.iterdir():
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > _UNUSED_SECONDS:
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
