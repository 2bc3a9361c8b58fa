"""Conversations that are longer than a training sample of the model may be, as several samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.records import Index, IndexBuilder, RecordFolder
from mimo_jax.data.schema import Record, Sample

_READ = 4096  # records whose samples are read at once


def split_conversations(source: RecordFolder | Manifest, max_turns: int) -> RecordFolder | Manifest | SplitConversations:
    """`source`, with every conversation of more than `max_turns` user turns as several samples; itself if there is none."""
    return SplitConversations(source, max_turns) if (user_turns(source) > max_turns).any() else source


def user_turns(source: RecordFolder | Manifest) -> np.ndarray:
    """int32 [m]: the number of user turns of each sample. They are counted once in a dataset whose index does not have them."""
    index = source.index
    if (index.turns < 0).any():
        counts: list[int] = []
        for start in range(0, len(source), _READ):
            records = source.samples_of(range(start, min(start + _READ, len(source))))
            counts += [len(sample.turns) // 2 for samples in records for sample in samples]
        index.turns = np.array(counts, np.int32)
    return index.turns


def split_sample(sample: Sample, max_turns: int) -> list[Sample]:
    """Consecutive parts of a conversation, each of at most `max_turns` user turns with their answers and targets; the sample itself if it
    has no more."""
    starts = range(0, len(sample.turns), 2 * max_turns)
    if len(starts) <= 1:
        return [sample]
    return [
        dataclasses.replace(
            sample,
            sample_id=f"{sample.sample_id}/part{number}",
            turns=sample.turns[start : start + 2 * max_turns],
            targets=[
                dataclasses.replace(target, turn=target.turn - start)
                for target in sample.targets
                if start <= target.turn < start + 2 * max_turns
            ],
        )
        for number, start in enumerate(starts)
    ]


class SplitConversations:
    """The records of `source` with their conversations split, as a source of its own with its own index."""

    def __init__(self, source: RecordFolder | Manifest, max_turns: int):
        self.source, self.max_turns = source, max_turns
        self.path, self.split = source.path, source.split
        self.index = self._index()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Record:
        record = self.source[position]
        return dataclasses.replace(record, samples=self._split(record.samples))

    def samples(self, position: int) -> list[Sample]:
        """The samples of one record, without its image."""
        return self._split(self.source.samples(position))

    def samples_of(self, positions: Sequence[int]) -> list[list[Sample]]:
        """The samples of several records, without their images."""
        return [self._split(samples) for samples in self.source.samples_of(positions)]

    def _split(self, samples: Sequence[Sample]) -> list[Sample]:
        return [part for sample in samples for part in split_sample(sample, self.max_turns)]

    def _index(self) -> Index:
        """The index of the parts. Only records with a conversation that is split are read."""
        whole, turns = self.source.index, user_turns(self.source)
        parts = np.maximum(1, -(-turns // self.max_turns))
        first = np.concatenate([[0], np.cumsum(parts)])[whole.first]
        columns = {name: np.repeat(getattr(whole, name), parts) for name in ("perspective", "words", "text_bytes", "turns")}
        record_of = np.repeat(np.arange(len(self)), np.diff(whole.first))
        records = np.unique(record_of[parts > 1])
        for start in range(0, len(records), _READ):
            chunk = records[start : start + _READ]
            for record, samples in zip(chunk, self.samples_of(chunk), strict=True):
                builder = IndexBuilder()
                builder.add("", "", samples)
                own = builder.build()
                for name, column in columns.items():
                    column[first[record] : first[record + 1]] = getattr(own, name)
        return Index(whole.ids, whole.groups, first, **columns)
