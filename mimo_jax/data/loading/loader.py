"""From sources to batches: the global order of samples, and the Grain pipeline that makes batches.

Axis letters: B samples of the global batch, K samples that share one image, N = B / K images, m samples of a source.

The images, samples, bucket and prompts of a batch are a pure function of (config, sources, tokenizer, number of the global batch).
So the state of the iterator is one integer, the same in all processes, every process uses the same bucket, and a different number of
processes resumes with the same global sequence: each process makes only its own part of a batch's images 0 … N-1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags

from mimo_jax.config import PERSPECTIVES, Config
from mimo_jax.data.loading.collate import smallest_bucket, stack_batch
from mimo_jax.data.loading.example_builder import ExampleBuilder, SampledImage
from mimo_jax.data.loading.features import open_features
from mimo_jax.data.loading.fill import filled_share, mix_weights
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.loading.split_conversations import split_conversations
from mimo_jax.data.loading.token_counts import token_counts
from mimo_jax.data.records import DataError, RecordFolder
from mimo_jax.data.tokenizer import Tokenizer

_REPORT = "unusable"  # key of a batch under which the process that made it reports unusable samples
_IMAGES_AHEAD = 64  # maximum number of images that are made in advance


def make_loader(
    config: Config, tokenizer: Tokenizer, sources: dict[str, RecordFolder | Manifest], local_images: Sequence[int] | None = None
) -> Loader:
    """An endless iterator of batches. sources: by name, from `open_sources`; local_images: the indices, ascending, of those of the N images
    of every global batch that this process makes; None: all.

    Conversations of more than `model.max_turns` user turns become several samples. Raises DataError for a perspective with a weight that
    no source has."""
    sources = {name: split_conversations(source, config.model.max_turns) for name, source in sources.items()}
    order = GlobalOrder(config, tokenizer, sources)
    builder = ExampleBuilder(config, tokenizer, list(sources.values()))
    return Loader(_BatchSource(order, builder, range(order.images) if local_images is None else local_images))


class Loader:
    """Iterator of batches (dicts of arrays, with K samples of each image that this process makes).

    state() -> {"batch": number of the next global batch}; restore(state) resumes there, bit-identically.
    bad: {"record", "sample", "reason"} of every unusable sample that this process met so far; its place in a batch is filled with padding
    of weight 0.
    """

    def __init__(self, batches: _BatchSource):
        self._batches = batches
        self._next = 0
        self._iterator: grain.DatasetIterator | None = None
        self._bad: dict[str, dict] = {}

    def use_features(self, fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make batches with the features of `FeatureFolder.read` instead of images from now on. shapes: see `FeatureFolder`.
        Raises DataError for a source without features of the encoders with that fingerprint."""
        order, maker = self._batches.order, self._batches.builder
        maker.features = [open_features(source, fingerprint, shapes) for source in order.sources]

    @property
    def bad(self) -> list[dict]:
        return list(self._bad.values())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            with _absl_flags_readable():
                self._iterator = self._start()
                batch = next(self._iterator)
        else:
            batch = next(self._iterator)
        self._next += 1
        self._bad.update((row["sample"], row) for row in json.loads(batch.pop(_REPORT).tobytes()))
        return batch

    def state(self) -> dict[str, int]:
        return {"batch": self._next}

    @property
    def num_samples(self) -> int:
        """The number of samples that the batches are drawn from."""
        return self._batches.order.total

    def tokens_per_sample(self, batches: int = 8) -> tuple[float, float]:
        """Mean tokens of a sample, without and with the padding to its bucket, in the first global batches."""
        made = [self._batches.order.batch(number) for number in range(batches)]
        counts = [count for _, images in made for image in images for count in self._batches.order.token_counts(image)]
        return float(np.mean(counts)), float(np.mean([bucket for bucket, _ in made]))

    def records(self, number: int) -> list[str]:
        """Ids of the records of a global batch, for all processes."""
        order = self._batches.order
        return [order.sources[image.source].index.ids[image.record].decode() for image in order.batch(number)[1]]

    def restore(self, state: dict[str, int]) -> None:
        self.close()
        self._next = int(state["batch"])

    def close(self) -> None:
        """Stop the threads and worker processes; iterating starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self) -> grain.DatasetIterator:
        config = self._batches.order.config
        ahead = max(1, min(8, _IMAGES_AHEAD // len(self._batches.local_images)))
        threads = min(ahead, 4, os.cpu_count() or 1)
        if config.data.workers:
            ahead = threads = 1  # within each worker, which itself makes one batch in advance
        batches = grain.MapDataset.source(self._batches)[self._next :]
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        if config.data.workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
        return iter(batches)


@contextlib.contextmanager
def _absl_flags_readable() -> Iterator[None]:
    """Grain's worker pool reads absl flags when it starts; in a program that does not parse them, use their defaults in the meantime."""
    unparsed = not flags.FLAGS.is_parsed()
    if unparsed:
        flags.FLAGS.mark_as_parsed()
    try:
        yield
    finally:
        if unparsed:
            flags.FLAGS.unparse_flags()


class GlobalOrder:
    """The endless global sequence of images, divided into batches of one bucket each."""

    def __init__(self, config: Config, tokenizer: Tokenizer, sources: dict[str, RecordFolder | Manifest]):
        self.config = config
        self.sources = list(sources.values())
        self.images = config.data.batch_size // config.data.samples_per_image
        self.sequence, self.total = _mixture(config, sources)
        self._lengths = [token_counts(source, tokenizer, config) for source in self.sources]
        self._windows: dict[int, list[tuple[int, list[SampledImage]]]] = {}
        self._lock = threading.Lock()  # held while a window is made, so that several threads make it once

    def batch(self, number: int) -> tuple[int, list[SampledImage]]:
        """(bucket, N images) of a global batch.

        Within a window of `data.length_grouping` batches, images are sorted by the bucket that they need (with a stable sort, so that
        they stay mixed), and the batches are shuffled: the images are the same, but few batches need a long bucket."""
        window = self.config.data.length_grouping if len(self.config.buckets()) > 1 else 1
        at, within = divmod(number, window)
        with self._lock:
            if at not in self._windows:
                made = self._window(at, window)
                self._windows = {key: value for key, value in self._windows.items() if abs(key - at) < 4} | {at: made}
            return self._windows[at][within]

    def _window(self, at: int, window: int) -> list[tuple[int, list[SampledImage]]]:
        size = window * self.images
        sampled = [self.sequence[i] for i in range(at * size, (at + 1) * size)]
        needs = np.array([self._bucket(image) for image in sampled])
        rows = np.argsort(needs, kind="stable").reshape(window, self.images)
        rows = rows[np.random.default_rng([self.config.data.seed, at]).permutation(window)]
        return [(int(needs[row].max()), [sampled[i] for i in row]) for row in rows]

    def _bucket(self, image: SampledImage) -> int:
        """The smallest bucket for its samples."""
        buckets = self.config.buckets()
        return smallest_bucket(int(self.token_counts(image).max()), buckets) if len(buckets) > 1 else buckets[0]

    def token_counts(self, image: SampledImage) -> np.ndarray:
        """Tokens of each of its K samples, int [K]."""
        return self._lengths[image.source][self.sources[image.source].index.first[image.record] + np.array(image.samples)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_windows", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _windows={}, _lock=threading.Lock())


def _mixture(config: Config, sources: dict[str, RecordFolder | Manifest]) -> tuple[grain.MapDataset, int]:
    """(endless random-access sequence of SampledImage, number of samples that it is drawn from).

    There is one endless dataset, reshuffled each epoch, for each perspective of each source. Perspectives are mixed in proportion to
    `data.weights`, and the sources of a perspective in proportion to their weights. An image with fewer than K samples of a perspective
    is filled up with others of its samples as often as these proportions allow."""
    samples_per_image = config.data.samples_per_image
    fraction_masks = {name: _fraction_mask(source, config.data.fraction) for name, source in sources.items()}
    leaves: list[tuple[int, str, np.ndarray]] = []  # perspective, source, groups
    weights, total = [], 0
    for perspective, weight in config.data.weights.items():
        if weight < 0:
            raise DataError(f"config.data.weights.{perspective}: is {weight}; must be 0 or more")
        if not weight:
            continue
        groups = {}
        for number, (name, source) in enumerate(sources.items()):
            asked = [p.strip() for p in config.data.sources[name].perspectives.split(",")]
            selected = fraction_masks[name] & (source.index.perspective == PERSPECTIVES.index(perspective)) & (perspective in asked)
            if selected.any():
                groups[name] = _groups(source, selected, number, samples_per_image)
                total += int(selected.sum())
        if not groups:
            portion = f" (config.data.fraction {config.data.fraction:g})" if config.data.fraction < 1 else ""
            raise DataError(
                f"config.data.weights.{perspective}: is {weight:g}, but no source ({', '.join(sources)}) has a sample of "
                f"{perspective} in split {config.data.split}{portion}; set it to 0 or add a source"
            )
        total_weight = sum(config.data.sources[name].weight for name in groups)
        for name, rows in groups.items():
            leaves.append((PERSPECTIVES.index(perspective), name, rows))
            weights.append(weight * config.data.sources[name].weight / total_weight)
    if not leaves:
        raise DataError("config.data.weights: all are 0; give at least one perspective a weight")
    weights, fills = mix_weights(np.array(weights) / sum(weights), _filled_shares(leaves, sources, samples_per_image))
    datasets = []
    for (perspective, name, rows), fill in zip(leaves, fills.tolist(), strict=True):
        seed = zlib.crc32(f"{config.data.seed}/{PERSPECTIVES[perspective]}/{name}".encode())
        others = {other for other, source, _ in leaves if source == name} - {perspective}
        pick = _SampleGroup(sources[name], perspective, samples_per_image, others, fill)
        datasets.append(grain.MapDataset.source(_Epochs(rows, seed)).seed(seed).random_map(pick))
    return grain.MapDataset.mix(datasets, weights.tolist()), total


def _filled_shares(
    leaves: Sequence[tuple[int, str, np.ndarray]], sources: Mapping[str, RecordFolder | Manifest], group_size: int
) -> np.ndarray:
    """float [L, L]: row i has the share of each leaf's samples in the groups of leaf i, if short ones are filled up."""
    shares = np.zeros((len(leaves), len(leaves)))
    for name, source in sources.items():
        local = [i for i, leaf in enumerate(leaves) if leaf[1] == name]
        index, record_of = source.index, np.repeat(np.arange(len(source)), np.diff(source.index.first))
        counts = np.zeros((len(source), len(local)), np.int64)
        for column, i in enumerate(local):
            drawn = np.isin(np.arange(len(source)), leaves[i][2][:, 1])
            counts[:, column] = np.bincount(record_of[index.perspective == leaves[i][0]], minlength=len(source)) * drawn
        for column, i in enumerate(local):
            shares[i, local] = filled_share(counts, column, group_size)
    return shares


def _fraction_mask(source: RecordFolder | Manifest, fraction: float) -> np.ndarray:
    """bool [m]: whether each sample is of a patient or case within `data.fraction`. That depends only on the group's name, so a larger
    fraction contains all groups of a smaller one."""
    index = source.index
    names, group_ids = np.unique(index.groups, return_inverse=True)
    quantiles = np.array([int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64 for name in names.tolist()])
    return np.repeat((quantiles < fraction)[group_ids], np.diff(index.first))


def _groups(source: RecordFolder | Manifest, selected: np.ndarray, number: int, group_size: int) -> np.ndarray:
    """int [n, 3]: (source, record, number of a group of at most `group_size` selected samples of the record). selected: bool [m]."""
    record_ids = np.repeat(np.arange(len(source)), np.diff(source.index.first))[selected]
    records, counts = np.unique(record_ids, return_counts=True)
    groups = -(-counts // group_size)
    within = np.arange(groups.sum()) - np.repeat(np.cumsum(groups) - groups, groups)
    return np.column_stack([np.full(groups.sum(), number), np.repeat(records, groups), within])


class _Epochs:
    """Endless rows, in a new order each epoch, like Grain's `shuffle().repeat()`, whose index_shuffle needs 9 ms per
    element for 3 rows and 0.2 ms for 200 (grain 0.2.18)."""

    def __init__(self, rows: np.ndarray, seed: int):
        self.rows, self.seed = rows, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> np.ndarray:
        epoch, within = divmod(int(place), len(self.rows))
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._orders = {key: value for key, value in self._orders.items() if key == epoch - 1} | {epoch: order}
        return self.rows[order[within]]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_orders": {}}


class _SampleGroup(grain.transforms.RandomMap):
    """(source, record, group) -> SampledImage. If a record has fewer than K samples of the perspective, the share `fill` of its groups gets
    random samples of the perspectives `others`; what is still missing, and the end of a last group, are its first samples again."""

    def __init__(self, source: RecordFolder | Manifest, perspective: int, group_size: int, others: set[int], fill: float):
        self.first, self.perspectives = source.index.first, source.index.perspective
        self.perspective, self.group_size, self.others, self.fill = perspective, group_size, sorted(others), fill

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> SampledImage:
        source, record, group = (int(v) for v in element)
        perspectives = self.perspectives[self.first[record] : self.first[record + 1]]
        own, seed = np.flatnonzero(perspectives == self.perspective), int(rng.integers(2**62))
        if len(own) < self.group_size and self.fill and rng.random() < self.fill:
            others = np.flatnonzero(np.isin(perspectives, self.others))
            own = np.concatenate([own, rng.permutation(others)[: self.group_size - len(own)]])
        picked = own[(group * self.group_size + np.arange(self.group_size)) % len(own)]
        return SampledImage(source, record, tuple(picked.tolist()), seed)


class _BatchSource:
    """Random access to this process's part of every global batch; Grain reads it from threads or worker processes."""

    def __init__(self, order: GlobalOrder, maker: ExampleBuilder, mine: Sequence[int]):
        self.order, self.builder, self.local_images = order, maker, mine

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        bucket, sampled = self.order.batch(int(number))
        report: list[dict] = []
        examples = [self.builder.build(sampled[i], report) for i in self.local_images]
        batch = stack_batch(examples, bucket)
        batch[_REPORT] = np.frombuffer(json.dumps(report).encode(), np.uint8)
        return batch
