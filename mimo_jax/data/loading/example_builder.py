"""From sampled images to examples: decodes, resizes, renders, samples prompts, and caches what fits in memory."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from mimo_jax.config import Config
from mimo_jax.data.conversation import Rendered, render
from mimo_jax.data.flips import flip, free_flips
from mimo_jax.data.loading.collate import (
    feature_views,
    needs_image,
    padding_features,
    padding_image,
    padding_sample,
    record_image,
    required_mask_ids,
    sample_arrays,
)
from mimo_jax.data.loading.features import FeatureFolder
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.records import RecordFolder
from mimo_jax.data.schema import Record
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.data.transforms import augment, preprocess
from mimo_jax.errors import UserError


class SampledImage(NamedTuple):
    """One image of the global sequence."""

    source: int
    record: int
    samples: tuple[int, ...]  # K indices into the record's samples
    seed: int  # of prompts and augmentation


@dataclasses.dataclass
class _CachedRecord:
    """The data of a record that are cached between its uses."""

    record: Record  # without image bytes
    image: np.ndarray | None  # the decoded image, with augmentation only
    views: dict[str, np.ndarray] | None  # the resized images or the features, without augmentation only
    rendered: dict[int, Rendered]  # by sample
    targets: dict[tuple, np.ndarray]  # targets at mask resolution, by mask ids and side


class ExampleBuilder:
    """Makes examples of sampled images: decodes, resizes, renders, samples prompts. Records are cached until `data.cache_mb` is full, and
    are never evicted: with a dataset that does not fit, evicting the oldest would give no cache hits at all."""

    def __init__(self, config: Config, tokenizer: Tokenizer, sources: list[RecordFolder | Manifest]):
        self.config, self.tokenizer, self.sources = config, tokenizer, sources
        self.features: list[FeatureFolder] = []  # one per source, if features replace images
        self._cache: dict[tuple[int, int], _CachedRecord] = {}
        self._free = self._budget()

    def _budget(self) -> int:
        """Bytes that the cache of one process may take."""
        return (self.config.data.cache_mb << 20) // max(1, self.config.data.workers)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}, "_free": self._budget()}

    def build(self, sampled: SampledImage, report: list[dict]) -> dict:
        """One image with its K samples, as input of `collate.stack_batch`. Unusable samples are replaced by padding of weight 0, and
        {"record", "sample", "reason"} of each is appended to `report`."""
        source, model = self.sources[sampled.source], self.config.model
        record_id = source.index.ids[sampled.record].decode()
        try:
            cached = self._load(sampled.source, sampled.record)
            image, masks = self._augmented(cached, sampled)
        except UserError as error:
            report += [{"record": record_id, "sample": f"{record_id}#{n}", "reason": str(error)} for n in sorted(set(sampled.samples))]
            blank = padding_features(self.features[sampled.source].padding(), model) if self.features else padding_image(model)
            return {**blank, "samples": [padding_sample(self.config)] * len(sampled.samples)}
        samples = []
        for place, number in enumerate(sampled.samples):
            sample = cached.record.samples[number]
            targets = cached.targets if cached.image is None else {}
            rng = np.random.default_rng([sampled.seed, place])
            try:
                rendered = self._rendered(cached, number)
                size = (cached.record.height, cached.record.width)
                samples.append(sample_arrays(sample.sample_id, rendered, masks, size, self.config, rng, targets))
            except UserError as error:
                report.append({"record": record_id, "sample": f"{record_id}#{number}", "reason": str(error)})
                samples.append(padding_sample(self.config))
        return {**image, "samples": samples}

    def _load(self, source: int, number: int) -> _CachedRecord:
        if (source, number) in self._cache:
            return self._cache[source, number]
        record = self.sources[source][number]
        augmented = self.config.data.augment
        stored = self.features[source].shapes if self.features else ()
        image = record_image(record) if not self.features or needs_image(self.config.model, stored) else None
        cached = _CachedRecord(
            record=dataclasses.replace(record, image=b""),
            image=image if augmented else None,
            views=None if augmented else self._views(source, record, image),
            rendered={},
            targets={},
        )
        size = len(cached.record.to_bytes()) + 4096 * len(record.samples)
        size += image.nbytes if augmented else sum(v.nbytes for v in cached.views.values())
        size += 0 if augmented else len(record.masks) * self.config.target_side() ** 2
        if size <= self._free:
            self._free -= size
            self._cache[source, number] = cached
        return cached

    def _views(self, source: int, record: Record, image: np.ndarray | None) -> dict[str, np.ndarray]:
        if not self.features:
            return preprocess(image, self.config.model)
        return feature_views(self.features[source].read(record), (record.height, record.width), image, self.config.model)

    def _rendered(self, cached: _CachedRecord, number: int) -> Rendered:
        if number not in cached.rendered:
            cached.rendered[number] = render(cached.record.samples[number], self.tokenizer, self.config)
        return cached.rendered[number]

    def _augmented(self, cached: _CachedRecord, sampled: SampledImage) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(views, masks by id) of a sampled image, augmented if `data.augment`."""
        masks = _LazyMasks(cached.record)
        if cached.image is None:
            return cached.views, masks
        wanted: dict[str, np.ndarray] = {}
        for number in sampled.samples:
            try:
                wanted |= {mask_id: masks[mask_id] for mask_id in required_mask_ids(self._rendered(cached, number))}
            except UserError:  # reported when the sample is made
                continue
        rng = np.random.default_rng([sampled.seed, len(sampled.samples)])
        image, moved = augment(cached.image, list(wanted.values()), rng)
        record = cached.record
        texts = [turn.text for number in sampled.samples for turn in record.samples[number].turns]
        image, moved = flip(image, moved, free_flips(record.modality, {mask.entity for mask in record.masks}, texts), rng)
        return preprocess(image, self.config.model), dict(zip(wanted, moved, strict=True))


class _LazyMasks(dict):
    """The masks of a record by id, decoded on first access."""

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __missing__(self, mask_id: str) -> np.ndarray:
        self[mask_id] = self.record.mask(mask_id).decode()
        return self[mask_id]
