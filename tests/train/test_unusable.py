"""Unusable samples: counted over all processes, listed as they are met, and too many of them stop the run."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest

from mimo_jax.config import TrainConfig
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import DataError, write_records
from mimo_jax.train.hooks import StepInfo
from mimo_jax.train.unusable import UnusableSamples
from tests.data import handmade
from tests.data.loading.test_loader import config_for

PROCESSES, RECORDS = 4, 48


def vqa_record(number: int):
    """One sample; every sixth image is damaged."""
    record = handmade.record(number)
    return dataclasses.replace(record, samples=record.samples[-1:], image=record.image[:60] if number % 6 == 0 else record.image)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, tokenizer, sources) of a dataset of which an eighth is unusable, once an epoch of 6 batches."""
    folder = tmp_path_factory.mktemp("unusable")
    write_records(folder / "set", [vqa_record(i) for i in range(RECORDS)], {})
    config = config_for(folder / "set", batch_size=8, samples_per_image=1)
    config.data.weights = {"vqa": 1.0}
    return config, handmade.tokenizer(folder), open_sources(config, "train")


class Processes:
    """`distributed.gather` of several threads that stand for processes, each with its own rank."""

    def __init__(self, count: int):
        self.barrier, self.values, self.local = threading.Barrier(count), [None] * count, threading.local()

    def gather(self, value):
        self.values[self.local.rank] = json.loads(json.dumps(value))
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered


def steps_of_four(monkeypatch, run, path, bound: float, steps: int, every: int = 2) -> list[tuple[list, Exception | None]]:
    """Of each process: (its own unusable samples, the error that ended it)."""
    config, tokenizer, sources = run
    world, ended = Processes(PROCESSES), [None] * PROCESSES
    monkeypatch.setattr("mimo_jax.distributed.gather", world.gather)
    monkeypatch.setattr("jax.process_index", lambda: world.local.rank)
    loaders = []
    world.local.rank = 0
    for rank in range(PROCESSES):  # made one after the other, as the counts of tokens are waited for
        loaders.append(make_loader(config, tokenizer, sources, range(2 * rank, 2 * rank + 2)))

    def work(rank):
        world.local.rank, error = rank, None
        hook = UnusableSamples(TrainConfig(max_bad_samples=bound, log_every=every), loaders[rank], path)
        try:
            for step in range(1, steps + 1):
                next(loaders[rank])
                hook(StepInfo(step, {}, {}, 8, step == steps, dict))
        except DataError as raised:
            error = raised
        loaders[rank].close()
        ended[rank] = loaders[rank].bad, error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


@pytest.fixture(autouse=True)
def one_bucket(run):
    run[0].data.buckets = "192"  # no tokens are counted


def test_the_bound_is_that_of_all_processes(monkeypatch, tmp_path, run):
    """8 of 48 are unusable; no process alone meets more than 10 % of the samples as such in one epoch."""
    ended = steps_of_four(monkeypatch, run, tmp_path / "bad.jsonl", 0.1, 6)
    assert all(len(own) <= 0.1 * RECORDS for own, _ in ended)
    assert all(error is not None for _, error in ended) and len({str(error) for _, error in ended}) == 1
    assert "of 48 samples are unusable, more than config.train.max_bad_samples (0.1), such as record image0" in str(ended[0][1])


def test_they_are_listed_once_by_all_processes_and_starts(monkeypatch, tmp_path, run):
    path = tmp_path / "bad.jsonl"
    for _ in range(2):
        ended = steps_of_four(monkeypatch, run, path, 0.5, 7)
        assert not any(error for _, error in ended)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(row["sample"] for row in rows) == [f"image{number:03d}#0" for number in range(0, RECORDS, 6)]
        assert all("record image" in row["reason"] for row in rows)


def test_they_are_listed_while_the_run_goes_on(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    loader = SimpleNamespace(bad=[], num_samples=100)
    hook = UnusableSamples(TrainConfig(max_bad_samples=0.5, log_every=5), loader, path)
    for step in range(1, 11):
        loader.bad.append({"record": "r", "sample": f"r#{step}", "reason": "damaged"})
        hook(StepInfo(step, {}, {}, 8, False, dict))
        listed = path.read_text().count("\n") if path.exists() else 0
        assert listed == step // 5 * 5
    hook.close()
    assert capsys.readouterr().err == f"10 samples could not be used; listed in {path}\n"
