"""The questions of each record: those of its source, those from templates, or, for III and IV, those of a language model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from mimo_jax.data.builder.label_stats import LabelStats
from mimo_jax.data.builder.llm_client import ChatClient
from mimo_jax.data.builder.llm_questions import describe, llm_samples
from mimo_jax.data.builder.questions import ask, record_rng
from mimo_jax.data.builder.templates import FULL
from mimo_jax.data.schema import Record, Sample

_LLM_PERSPECTIVES = ("III", "IV")
_BLOCK = 64  # records whose questions are requested concurrently


@dataclass(frozen=True)
class QuestionGeneration:
    """The inputs on which questions depend in addition to the record.

    counts: number of records in each batch. model: the endpoint's model that writes III and IV, "" if templates write all questions. Its
    replies are cached in llm_cache; each process sends at most llm_requests requests."""

    label_stats: LabelStats
    seed: int
    perspectives: tuple[str, ...]
    counts: list[int]
    model: str = ""
    llm_cache: str = ""
    llm_requests: int = 0

    def generate(self, records: Iterable[tuple[Record, bool, Sequence[str]]]) -> Iterator[tuple[Record, Counter[str]]]:
        """Each record of (record, complete, absent) with its samples, in the same order, and how many questions written by a language
        model were rejected, by reason. Raises EndpointError."""
        if not self.model:
            for record, complete, absent in records:
                record.samples = self._kept(self._templates(record, complete, absent))
                yield record, Counter()
            return
        records = iter(records)
        with ThreadPoolExecutor(_client(self.llm_cache, self.llm_requests).concurrency) as threads:
            while block := list(itertools.islice(records, _BLOCK)):
                yield from threads.map(lambda entry: self._written(*entry), block)

    def _templates(self, record: Record, complete: bool, absent: Sequence[str]) -> list[Sample]:
        """The conversations of the record's source if it has any, else questions generated from its masks."""
        for number, sample in enumerate(record.samples):
            sample.sample_id = f"{record.id}/{number}"
        if record.samples:
            return record.samples
        known_absent = self.label_stats.known_absent(record, absent, complete)
        return ask(record, record_rng(self.seed, record.id), self.label_stats, known_absent, FULL, complete)

    def _written(self, record: Record, complete: bool, absent: Sequence[str]) -> tuple[Record, Counter[str]]:
        rejects: Counter[str] = Counter()
        has_samples = bool(record.samples)
        samples = self._templates(record, complete, absent)
        if not has_samples and {*_LLM_PERSPECTIVES} & {*self.perspectives}:
            client = _client(self.llm_cache, self.llm_requests)
            written = llm_samples(record, describe(record), client, self.seed, rejects)
            # The endpoint writes III and IV about what is shown; templates ask about what is absent or not marked.
            samples = [s for s in samples if s.perspective not in _LLM_PERSPECTIVES or s.kind in ("absent", "unmarked")] + written
        record.samples = self._kept(samples)
        return record, rejects

    def _kept(self, samples: Iterable[Sample]) -> list[Sample]:
        return [sample for sample in samples if sample.perspective in self.perspectives]


@lru_cache(maxsize=1)
def _client(cache: str, requests: int) -> ChatClient:
    return ChatClient.from_environment(cache, max_requests=requests)
