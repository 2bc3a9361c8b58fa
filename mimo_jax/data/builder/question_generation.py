"""What is asked of each record: by its source, by templates, or, of III and IV, by a language model."""

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

_WRITTEN = ("III", "IV")
_BLOCK = 64  # records whose questions are awaited together


@dataclass(frozen=True)
class QuestionGeneration:
    """What questions depend on beside the record. counts: records of each part. model: of the endpoint that writes III and IV, ""
    for templates alone; its replies are kept in llm_cache, and of a process, it is asked llm_requests times at most."""

    census: LabelStats
    seed: int
    perspectives: tuple[str, ...]
    counts: list[int]
    model: str = ""
    llm_cache: str = ""
    llm_requests: int = 0

    def asked(self, records: Iterable[tuple[Record, bool, Sequence[str]]]) -> Iterator[tuple[Record, Counter[str]]]:
        """Each (record, complete, absent) with its samples, in the same order; and what a language model wrote and was of no use,
        counted by its reason. Raises EndpointError."""
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
        """The conversations that its source brought, or else questions made of its masks."""
        for number, sample in enumerate(record.samples):
            sample.sample_id = f"{record.id}/{number}"
        if record.samples:
            return record.samples
        lacking = self.census.lacking(record, absent, complete)
        return ask(record, record_rng(self.seed, record.id), self.census, lacking, FULL)

    def _written(self, record: Record, complete: bool, absent: Sequence[str]) -> tuple[Record, Counter[str]]:
        rejects: Counter[str] = Counter()
        brought = bool(record.samples)
        samples = self._templates(record, complete, absent)
        if not brought and {*_WRITTEN} & {*self.perspectives}:
            client = _client(self.llm_cache, self.llm_requests)
            written = llm_samples(record, describe(record), client, self.seed, rejects)
            # Of III and IV the endpoint writes what is there; what is not there, or not marked, is asked from templates.
            samples = [s for s in samples if s.perspective not in _WRITTEN or s.kind in ("absent", "unmarked")] + written
        record.samples = self._kept(samples)
        return record, rejects

    def _kept(self, samples: Iterable[Sample]) -> list[Sample]:
        return [sample for sample in samples if sample.perspective in self.perspectives]


@lru_cache(maxsize=1)
def _client(cache: str, requests: int) -> ChatClient:
    return ChatClient.from_environment(cache, max_requests=requests)
