"""Which samples of a dataset are evaluated, and in which windows they are asked. Nothing but the index of the data is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.records import RecordFolder
from mimo_jax.data.schema import Record, Sample

_MAX_BATCHES = 8  # maximum number of batches per window, within which questions are sorted so that similar ones share a batch
_WINDOWS = 32  # number of windows into which few samples are split, so that several processes have work; at least a batch each


class ConcatSource:
    """The concatenation of several sources."""

    def __init__(self, sources: Iterable):
        self.sources = list(sources)
        self.ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Record:
        source, i = self._locate(number)
        return source[i]

    def samples(self, number: int) -> list[Sample]:
        source, i = self._locate(number)
        return source.samples(i)

    def perspectives(self, number: int) -> list[str]:
        """The perspective of each sample of a record, from the index: nothing is read."""
        source, i = self._locate(number)
        return perspectives_of(source, i)

    def group(self, number: int) -> str:
        """The patient or case of a record, from the index."""
        source, i = self._locate(number)
        return group_of(source, i)

    def _locate(self, number: int) -> tuple[RecordFolder | Manifest, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        place = int(np.searchsorted(self.ends, number, side="right"))
        return self.sources[place], number - int(self.ends[place] - len(self.sources[place]))


def perspectives_of(records: Sequence[Record], number: int) -> list[str]:
    """The perspective of each sample of a record of a list or a source; of a source nothing is read."""
    if isinstance(records, list):
        return [sample.perspective for sample in records[number].samples]
    if isinstance(records, ConcatSource):
        return records.perspectives(number)
    first = records.index.first
    return [PERSPECTIVES[kind] for kind in records.index.perspective[first[number] : first[number + 1]]]


def group_of(records: Sequence[Record], number: int) -> str:
    """The patient or case of a record of a list or a source; of a source nothing is read."""
    if isinstance(records, list):
        return records[number].group
    return records.group(number) if isinstance(records, ConcatSource) else records.index.groups[number].decode()


def select_samples(
    records: Sequence[Record], limit: int | None, perspectives: Sequence[str] = PERSPECTIVES, without: Collection[str] = ()
) -> dict[int, list[int]]:
    """Returns record index → indices of its samples to ask. With a limit: one sample per perspective from every image in a fixed random
    order, then a second one, and so on, so that even few samples cover many images and all perspectives. Of a source only the index is
    read, and no more of it than the limit needs. without: patients or cases (groups) whose samples are not asked."""
    rng = np.random.default_rng(0)
    ranked = []
    num_first = 0  # samples that are the first of their perspective in their image
    for position, number in enumerate(rng.permutation(len(records)).tolist()):
        if limit is not None and num_first >= limit:
            break
        if without and group_of(records, number) in without:
            continue
        counts: dict[str, int] = defaultdict(int)
        offered = perspectives_of(records, number)
        for index in rng.permutation(len(offered)).tolist():
            perspective = offered[index]
            if perspective in perspectives:
                ranked.append((counts[perspective], position, PERSPECTIVES.index(perspective), number, index))
                num_first += not counts[perspective]
                counts[perspective] += 1
    chosen: dict[int, list[int]] = defaultdict(list)
    for *_, number, index in sorted(ranked)[:limit]:
        chosen[number].append(index)
    return {number: sorted(chosen[number]) for number in sorted(chosen)}


def windows_of(chosen: dict[int, list[int]], batch_size: int) -> list[dict[int, list[int]]]:
    """Split `chosen` into consecutive parts of about 1 … _MAX_BATCHES batches; the samples of an image stay together."""
    batches = sum(map(len, chosen.values())) // (_WINDOWS * batch_size)
    samples = batch_size * min(max(1, batches), _MAX_BATCHES)
    windows: list[dict[int, list[int]]] = []
    part: dict[int, list[int]] = {}
    for number, indices in chosen.items():
        part[number] = indices
        if sum(map(len, part.values())) >= samples:
            windows.append(part)
            part = {}
    return [*windows, part] if part else windows
