"""Loading all parameters of a checkpoint, trained and frozen, for inference, for conversion, or to start a training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mimo_jax import files, pathtree, quantize, sharding
from mimo_jax.checkpoints import arrays, checkpoint, frozen_params, provenance, storage
from mimo_jax.checkpoints.arrays import CheckpointError
from mimo_jax.config import Config


class Loaded(NamedTuple):
    """A loaded checkpoint. params: all parameters, nested dict; tokenizer: path of its tokenizer.json; extra: the JSON values that
    were saved with the step; origin: step, base and sources in one line; calibration: see `checkpoint.calibration_path`."""

    config: Config
    params: dict
    tokenizer: Path
    extra: dict
    origin: str
    calibration: Path


def load_params(path: str | os.PathLike, base_path: str | os.PathLike | None = None, place: Callable[[dict], Any] | None = None) -> dict:
    """All parameters of a checkpoint, trained and frozen, as one nested dict in the dtypes they were saved in.

    base_path: folder of the frozen base, if it was moved; place: from a nested dict of ShapeDtypeStructs to their shardings;
    None for the first device."""
    return LazyParams(path, base_path, place).load()


def load_for_inference(
    path: str | os.PathLike,
    base_path: str | os.PathLike | None = None,
    allow_untrained: bool = False,
    quantization: str = "",
) -> Loaded:
    """Load a checkpoint without its optimizer. If this process has several devices, the parameters are split over them
    (`sharding.inference_mesh`). quantization: "int8" or "int4", see `LazyParams.load`; it is set in the returned config.

    Raises CheckpointError if some parameters were initialised from a seed and never trained, so that answers are noise, unless
    `allow_untrained`."""
    run = checkpoint.run_of(path)
    config, tokenizer, record = (
        checkpoint.read_config(run).with_quantization(quantization),
        checkpoint.tokenizer_path(run),
        provenance.read(run),
    )
    raw = provenance.untrained(record)
    if raw and not allow_untrained:
        raise CheckpointError(
            f"{path}: parameters were initialised from a seed and never trained: {raw}; train it first (mimo train --init {path}), "
            "or give --allow-untrained to run it nevertheless"
        )
    mesh = sharding.inference_mesh(config.model.llm)
    leaves = LazyParams(path, base_path, partial(sharding.param_shardings, mesh=mesh, unsharded={}) if mesh else None)
    params = leaves.load(quantization)
    extra = files.read_json(run / "steps" / str(leaves.step) / "extra.json")
    origin = f"{run} step {leaves.step}, {checkpoint.origin(run)}{f', language model in {quantization}' if quantization else ''}"
    return Loaded(config, params, tokenizer, extra, origin, checkpoint.calibration_path(run, leaves.step))


def read_shapes(path: str | os.PathLike) -> tuple[Config, dict[str, jax.ShapeDtypeStruct]]:
    """The config of a checkpoint, and {path: shape and dtype} of all its parameters, from its manifests alone: the files of weights
    are neither read nor verified."""
    run, step = checkpoint.resolve(path)
    manifest = files.read_json(run / "steps" / str(step) / storage.MANIFEST)
    leaves = manifest["leaves"].get(arrays.STATE, {}) | frozen_params.read_record(run)["leaves"]
    return checkpoint.read_config(run), pathtree.flatten(arrays.abstract(leaves))


class LazyParams(Mapping[str, np.ndarray]):
    """All parameters of a checkpoint by path, read from disk on access: the small ones together and cached, each large one again on
    every access. run, step, config: those of the checkpoint; shapes: {path: ShapeDtypeStruct}; trained: the paths not in the base.

    base_path: folder of the frozen base, if it was moved; place: the shardings used by `load`, a function from a nested dict of
    ShapeDtypeStructs, None for the first device. With `place`, only the files of the base that this process reads for `load` are
    verified against their hashes."""

    _SMALL = 2**20  # bytes

    def __init__(self, path: str | os.PathLike, base_path: str | os.PathLike | None = None, place: Callable[[dict], Any] | None = None):
        self.run, self.step, manifest = checkpoint.verified_step(path)
        self.config = checkpoint.read_config(self.run)
        trained, frozen = manifest["leaves"].get(arrays.STATE, {}), frozen_params.read_record(self.run)["leaves"]
        self.trained = set(trained)
        self.shapes = pathtree.flatten(arrays.abstract(trained | frozen))
        self._place = place
        self._sources = dict.fromkeys(trained, (self.run / "steps" / str(self.step), trained))
        if frozen:
            wanted = {path: leaf for path, leaf in self._placed(self.shapes).items() if path in frozen} if place else None
            folder = frozen_params.find(self.run, base_path, wanted)
            existing = files.read_json(folder / storage.MANIFEST)["leaves"][arrays.STATE]
            self._sources |= dict.fromkeys(frozen, (folder, existing))
        self._cache: dict[str, Any] = {}

    def load(self, quantization: str = "") -> dict:
        """All parameters on the device, as one nested dict in the dtypes they were saved in.

        quantization: "int8" or "int4" for the matrices of the language model. Each is quantized as soon as it is read, so that the
        device needs memory for the result and the largest unquantized one (all layers of one name); a CPU needs twice the latter."""
        quantized = {}
        for path, leaf in self.shapes.items():
            quantized |= quantize.quantize_param(path, leaf, quantization)
        read, result = self._placed(self.shapes), self._placed(quantized)

        def transform(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
            made = quantize.quantize_param(path, leaf, quantization)
            return jax.block_until_ready({name: jax.device_put(part, result[name].sharding) for name, part in made.items()})

        loaded = {}
        for folder, existing in dict(self._sources.values()).items():
            wanted = {path: read[path] for path, (source, _) in self._sources.items() if source == folder}
            loaded |= arrays.read_parameters(folder, existing, wanted, transform)
        return pathtree.unflatten(loaded)

    def _placed(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        return pathtree.flatten(arrays.with_shardings(pathtree.unflatten(shapes), self._place))

    def __getitem__(self, path: str) -> np.ndarray:
        if not self._is_small(path):
            return np.asarray(self._read(self._sources[path], [path])[path])
        if path not in self._cache:
            small = [other for other, source in self._sources.items() if source == self._sources[path] and self._is_small(other)]
            self._cache |= self._read(self._sources[path], small)
        return np.asarray(self._cache[path])

    def _is_small(self, path: str) -> bool:
        return self.shapes[path].size * self.shapes[path].dtype.itemsize <= self._SMALL

    def _read(self, source: tuple, paths: list[str]) -> dict[str, Any]:
        folder, existing = source
        return arrays.read_parameters(folder, existing, {path: arrays.with_shardings(self.shapes[path], None) for path in paths})

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
