"""`mimo data encode`: computes the features of the frozen image encoders once for every image of a dataset, for training to read.

Axis letters: N images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from mimo_jax import pathtree
from mimo_jax.checkpoints import loading, storage
from mimo_jax.config import Config, ConfigError
from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.loading.features import FeatureFolder, FeatureWriter, feature_folder
from mimo_jax.data.loading.sources import Manifest, open_source
from mimo_jax.data.records import RecordFolder
from mimo_jax.data.schema import Record
from mimo_jax.data.transforms import preprocess
from mimo_jax.errors import UserError
from mimo_jax.models import mimo, scan
from mimo_jax.preemption import StopSignal

_SAM = "sam_encoder/"
ENCODERS = ("vision/", _SAM)
_DECODER_FIELDS = ("pe_dtype", "decoder_layers", "decoder_heads", "decoder_mlp_width", "iou_head_width")  # do not affect the encoder
_VERSION = 1  # version of the way from a file to features: increment it when that changes


class EncodeResult(NamedTuple):
    """Counts for the images of one process. written: encoded now; existing: encoded before; failed: (id, reason) of those that cannot be
    read; unreadable: the file that lists these, one JSON object per line; stopped: whether a signal stopped the process early."""

    written: int
    existing: int
    failed: list[tuple[str, str]]
    unreadable: Path
    stopped: bool


def fingerprint(config: Config, params: Mapping[str, jax.Array | np.ndarray]) -> str:
    """SHA-256 of everything that determines the stored features of an image (`mimo.feature_shapes`): the settings, and the encoders'
    parameters (by path; others are ignored) in bfloat16, the dtype of the features, independently of the dtype in which a run stores
    them."""
    sam = {name: value for name, value in dataclasses.asdict(config.model.sam).items() if name not in _DECODER_FIELDS}
    has_vision = not mimo.feature_shapes(config).keys().isdisjoint(("x_img", "sam_stages"))
    about = {"version": _VERSION, "vision": dataclasses.asdict(config.model.vision) if has_vision else None, "sam": sam}
    encoders = ENCODERS if has_vision else (_SAM,)
    hashes = {path: storage.hash_array(leaf.astype(jnp.bfloat16)) for path, leaf in sorted(params.items()) if path.startswith(encoders)}
    return hashlib.sha256(json.dumps([about, hashes], sort_keys=True).encode()).hexdigest()


def check_frozen(trained: Iterable[str]) -> None:
    """Raise ConfigError if features depend on one of the `trained` parameters (paths). A vision tower may train: it reads pictures."""
    moving = [path for path in trained if path.startswith(_SAM)]
    if moving:
        raise ConfigError(
            f"config.data.features: features need a frozen encoder, but {moving[0]} trains; freeze sam_encoder/ in config.trainables, "
            "or set config.data.features=False"
        )


def encode_checkpoint(
    path: str | os.PathLike,
    data: str | os.PathLike,
    split: str = "train",
    batch: int = 8,
    process_index: int = 0,
    process_count: int = 1,
    base: str | os.PathLike | None = None,
) -> EncodeResult:
    """Write the features of this process's part of the images next to the records; existing features are kept. Only the encoders of the
    checkpoint are read. batch: images per device and call. UserErrors are raised before any work."""
    source = open_source(data, split)
    leaves = loading.LazyParams(path, base)
    params = {name: leaves[name] for name in leaves if name.startswith(ENCODERS)}
    folder = feature_folder(source, fingerprint(leaves.config, params))
    return write_features(leaves.config, params, source, folder, batch, process_index, process_count)


def write_features(
    config: Config,
    params: Mapping[str, np.ndarray],
    source: RecordFolder | Manifest,
    folder: Path,
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> EncodeResult:
    """`encode_checkpoint` with the encoders' parameters {path: array} already loaded."""
    writer = FeatureWriter(folder)
    existing = FeatureFolder(folder, mimo.feature_shapes(config))
    local = range(process_index, len(source), process_count)
    todo = [number for number in local if source.index.ids[number].decode() not in existing]
    encode, size = _encoder(config, params, batch)
    written, failed, stopped = 0, [], False
    with StopSignal() as stop, tqdm(total=len(local), initial=len(local) - len(todo), desc="encode", unit="image", disable=None) as bar:
        for group in _read_groups(config, source, todo, size):
            good = [(record, views) for record, views in group if not isinstance(views, str)]
            failed += [(record, reason) for record, reason in group if isinstance(reason, str)]
            if good:
                features = encode([views for _, views in good])
                for at, (record, _) in enumerate(good):
                    writer.add(record, {key: values[at] for key, values in features.items()})
            written += len(good)
            bar.update(len(group))
            if stop.received and written + len(failed) < len(todo):
                stopped = True
                break
        writer.flush()
    unreadable = folder / f"unreadable-{process_index}-of-{process_count}.jsonl"
    unreadable.unlink(missing_ok=True)
    if failed:
        unreadable.write_text("".join(json.dumps({"record": name, "reason": reason}) + "\n" for name, reason in failed))
    return EncodeResult(written, len(local) - len(todo), failed, unreadable, stopped)


def _encoder(config: Config, params: Mapping[str, np.ndarray], batch: int) -> tuple[Callable, int]:
    """(function from the views of at most N images to their features by name in a batch, each uint16 [N, …]; N), on all devices of this
    process."""
    graphdef, shapes = mimo.abstract(config)
    rest = {path: leaf for path, leaf in pathtree.flatten(shapes).items() if path not in params}
    stored = mimo.feature_shapes(config)
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split, size = NamedSharding(mesh, P("data")), batch * len(devices)
    placed = jax.device_put(dict(params), NamedSharding(mesh, P()))

    @jax.jit
    def encode(params, views):
        unused = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in rest.items()}  # XLA removes them
        model = scan.bind(graphdef, pathtree.unflatten({**params, **unused}))
        features = {name: array for name, array in model.image_features(views).items() if name in stored}
        return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16), features)

    def run(views: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        padded = views + [views[-1]] * (size - len(views))
        stacked = {name: np.stack([one[name] for one in padded]) for name in views[0]}
        return jax.device_get(encode(placed, jax.device_put(stacked, split)))

    return run, size


def _read_groups(
    config: Config, source: RecordFolder | Manifest, numbers: list[int], size: int
) -> Iterator[list[tuple[Record, dict[str, np.ndarray]] | tuple[str, str]]]:
    """Groups of `size` results: (record, views), or (id, reason why it cannot be read). The next groups are read in the background."""

    def read(number: int):
        try:
            record = source[number]
            return record, preprocess(record_image(record), config.model)
        except UserError as error:
            return source.index.ids[number].decode(), str(error)

    groups = [numbers[at : at + size] for at in range(0, len(numbers), size)]
    with ThreadPoolExecutor() as pool:
        ahead: deque[list[Future]] = deque()
        for group in groups[:2]:
            ahead.append([pool.submit(read, number) for number in group])
        for at in range(len(groups)):
            made = [future.result() for future in ahead.popleft()]
            if at + 2 < len(groups):
                ahead.append([pool.submit(read, number) for number in groups[at + 2]])
            yield made
