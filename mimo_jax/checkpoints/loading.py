"""The parameters of a checkpoint, trained and frozen together, for whoever answers, converts or begins a training with them."""

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
    """A checkpoint ready to use. params: all parameters, nested dict; tokenizer: path of its tokenizer.json; extra: JSON that
    was saved with the step; origin: step, base and sources in one line; calibration: see `checkpoint.calibration_path`."""

    config: Config
    params: dict
    tokenizer: Path
    extra: dict
    origin: str
    calibration: Path


def load_params(path: str | os.PathLike, base_path: str | os.PathLike | None = None, place: Callable[[dict], Any] | None = None) -> dict:
    """All parameters of a checkpoint, trained and frozen, as one nested dict in the dtypes they were saved in.

    base_at: where the frozen base lies, if it was moved; place: from a nested dict of ShapeDtypeStructs to their shardings;
    None for the first device."""
    return LazyParams(path, base_path, place).load()


def load_for_inference(
    path: str | os.PathLike,
    base_at: str | os.PathLike | None = None,
    allow_untrained: bool = False,
    quantization: str = "",
) -> Loaded:
    """A checkpoint without its optimizer. CheckpointError for one whose parameters are in part as a seed drew them, which
    answers with noise, unless `allow_untrained`. quantization: "int8" or "int4", see `LazyParams.load`; the config then says so. Where
    this process has several devices, the parameters are split over them (`sharding.inference_mesh`)."""
    run = checkpoint.run_of(path)
    config, tokenizer, record = (
        checkpoint.read_config(run).with_quantization(quantization),
        checkpoint.tokenizer_path(run),
        provenance.read(run),
    )
    raw = provenance.untrained(record)
    if raw and not allow_untrained:
        raise CheckpointError(
            f"{path}: parameters were drawn from a seed and never trained: {raw}; train it first (mimo train --init {path}), "
            "or give --allow-untrained to see what comes out"
        )
    mesh = sharding.inference_mesh(config.model.llm)
    leaves = LazyParams(path, base_at, partial(sharding.param_shardings, mesh=mesh, unsharded={}) if mesh else None)
    params = leaves.load(quantization)
    extra = files.read_json(run / "steps" / str(leaves.step) / "extra.json")
    origin = f"{run} step {leaves.step}, {checkpoint.origin(run)}{f', language model in {quantization}' if quantization else ''}"
    return Loaded(config, params, tokenizer, extra, origin, checkpoint.calibration_path(run, leaves.step))


def read_shapes(path: str | os.PathLike) -> tuple[Config, dict[str, jax.ShapeDtypeStruct]]:
    """The config of a checkpoint, and {path: shape and dtype} of all its parameters, from its manifests alone: no file of weights
    is read, nor held to its hash."""
    run, step = checkpoint.resolve(path)
    manifest = files.read_json(run / "steps" / str(step) / storage.MANIFEST)
    leaves = manifest["leaves"].get(arrays.STATE, {}) | frozen_params.read_record(run)["leaves"]
    return checkpoint.read_config(run), pathtree.flatten(arrays.abstract(leaves))


class LazyParams(Mapping[str, np.ndarray]):
    """All parameters of a checkpoint by path, read from the disk when they are asked for: the small ones together and kept, each
    large one anew. run, step, config: whose they are; shapes: {path: ShapeDtypeStruct}; trained: the paths not in the base.

    place: where `load` puts them, from a nested dict of ShapeDtypeStructs to their shardings, None for the first device; where it is
    given, only those files of the base are held to their hashes that this process reads for that."""

    _SMALL = 2**20  # bytes

    def __init__(self, path: str | os.PathLike, base_path: str | os.PathLike | None = None, place: Callable[[dict], Any] | None = None):
        self.run, self.step, manifest = checkpoint.whole_step(path)
        self.config = checkpoint.read_config(self.run)
        trained, frozen = manifest["leaves"].get(arrays.STATE, {}), frozen_params.read_record(self.run)["leaves"]
        self.trained = set(trained)
        self.shapes = pathtree.flatten(arrays.abstract(trained | frozen))
        self._place = place
        self._places = dict.fromkeys(trained, (self.run / "steps" / str(self.step), trained))
        if frozen:
            wanted = {path: leaf for path, leaf in self._placed(self.shapes).items() if path in frozen} if place else None
            folder = frozen_params.find(self.run, base_path, wanted)
            there = files.read_json(folder / storage.MANIFEST)["leaves"][arrays.STATE]
            self._places |= dict.fromkeys(frozen, (folder, there))
        self._kept: dict[str, Any] = {}

    def load(self, quantization: str = "") -> dict:
        """All of them on the device, as one nested dict in the dtypes they were saved in.

        quantization: "int8" or "int4" to hold the language model's matrices so, each quantized as it is read: the device holds the
        result and the largest of them (all layers of one name), a CPU that twice."""
        held = {}
        for path, leaf in self.shapes.items():
            held |= quantize.quantize_param(path, leaf, quantization)
        read, kept = self._placed(self.shapes), self._placed(held)

        def then(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
            made = quantize.quantize_param(path, leaf, quantization)
            return jax.block_until_ready({name: jax.device_put(part, kept[name].sharding) for name, part in made.items()})

        loaded = {}
        for folder, there in dict(self._places.values()).items():
            wanted = {path: read[path] for path, (home, _) in self._places.items() if home == folder}
            loaded |= arrays.read_parameters(folder, there, wanted, then)
        return pathtree.unflatten(loaded)

    def _placed(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        return pathtree.flatten(arrays.placed(pathtree.unflatten(shapes), self._place))

    def __getitem__(self, path: str) -> np.ndarray:
        if not self._is_small(path):
            return np.asarray(self._read(self._places[path], [path])[path])
        if path not in self._kept:
            small = [other for other, place in self._places.items() if place == self._places[path] and self._is_small(other)]
            self._kept |= self._read(self._places[path], small)
        return np.asarray(self._kept[path])

    def _is_small(self, path: str) -> bool:
        return self.shapes[path].size * self.shapes[path].dtype.itemsize <= self._SMALL

    def _read(self, place: tuple, paths: list[str]) -> dict[str, Any]:
        folder, there = place
        return arrays.read_parameters(folder, there, {path: arrays.placed(self.shapes[path], None) for path in paths})

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
