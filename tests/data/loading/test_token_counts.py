"""Counts of tokens: those of the rendered samples, counted once, kept beside the dataset, and shared among processes."""

import numpy as np
import pytest

from mimo_jax.data import conversation
from mimo_jax.data.conversation import SampleError, render
from mimo_jax.data.loading import token_counts as module
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.loading.token_counts import token_counts, token_overhead
from mimo_jax.data.records import RecordFolder, write_records
from mimo_jax.data.schema import Turn
from tests.data import handmade
from tests.data.loading.test_loader import config_for, long_record

RECORDS = 10


def record(number: int):
    made = long_record(number)
    if number == 5:  # too long for any bucket
        made.samples[8].turns[0] = Turn("user", "liver " * 300)
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return handmade.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORDS", 3)
    write_records(tmp_path / "set", [record(i) for i in range(RECORDS)], {})
    return tmp_path / "set"


@pytest.fixture
def rendered(monkeypatch):
    """The ids of the samples that are rendered, by counting and by making batches."""
    seen = []

    def spy(sample, tokenizer, config):
        seen.append(sample.sample_id)
        return conversation.render(sample, tokenizer, config)

    for name in ("token_counts", "example_builder"):
        monkeypatch.setattr(f"mimo_jax.data.loading.{name}.render", spy)
    return seen


def expected(source, tokenizer, config) -> list[int]:
    counts, at = [], 0
    for number in range(len(source)):
        for sample in source.samples(number):
            bound = int(source.index.text_bytes[at]) + token_overhead(config, tokenizer)
            try:
                counts.append(bound if bound <= config.buckets()[0] else len(render(sample, tokenizer, config).input_ids))
            except SampleError:
                counts.append(1)
            at += 1
    return counts


def test_they_are_those_of_the_rendered_samples_and_counted_once(folder, tokenizer, rendered):
    config, source = config_for(folder), RecordFolder(folder, "train")
    wanted = expected(source, tokenizer, config)
    assert token_counts(source, tokenizer, config).tolist() == wanted
    assert 0 < len(rendered) == len(set(rendered)) < len(wanted)
    rendered.clear()
    assert token_counts(RecordFolder(folder, "train"), tokenizer, config).tolist() == wanted and not rendered
    (kept,) = (folder / "tokens").iterdir()
    files = sorted(kept.iterdir())
    assert len(files) == 4
    files[0].unlink()
    files[1].write_bytes(b"damaged")
    assert token_counts(source, tokenizer, config).tolist() == wanted
    assert {int(name[5:8]) // 3 for name in rendered} == {0, 1}


def test_other_settings_tokenizers_and_samples_are_counted_anew(folder, tokenizer, tmp_path):
    source = RecordFolder(folder, "train")
    for change in ({}, {"system_prompt": "Be brief."}, {"buckets": "80,192"}, {"chat_template": "llava"}):
        config = config_for(folder, **change)
        assert token_counts(source, tokenizer, config).tolist() == expected(source, tokenizer, config)
    (tmp_path / "other").mkdir()
    small = handmade.tokenizer(tmp_path / "other", 500)
    config = config_for(folder)
    config.model.llm.vocab_size = 500
    assert token_counts(source, small, config).tolist() == expected(source, small, config)
    assert len(list((folder / "tokens").iterdir())) == 5


def test_one_bucket_needs_no_counts(folder, tokenizer, rendered):
    token_counts(RecordFolder(folder, "train"), tokenizer, config_for(folder, buckets="192"))
    assert not rendered and not (folder / "tokens").exists()


def test_a_folder_that_cannot_be_written_to_is_counted_in_memory(folder, tokenizer):
    (folder / "tokens").write_text("in the way")
    config, source = config_for(folder), RecordFolder(folder, "train")
    assert token_counts(source, tokenizer, config).tolist() == expected(source, tokenizer, config)


def test_processes_share_the_work(folder, tokenizer, rendered, monkeypatch):
    """Process 0 counts last: what it lacks after its own share, the others have kept."""
    config = config_for(folder)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    counts, own = [], []
    monkeypatch.setattr(module.distributed, "gather", lambda value: own.append(list(rendered)))
    for process in (1, 0):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        rendered.clear()
        counts.append(token_counts(RecordFolder(folder, "train"), tokenizer, config).tolist())
    assert {int(name[5:8]) // 3 for name in own[0]} == {1, 3}
    assert counts[0] == counts[1] == expected(RecordFolder(folder, "train"), tokenizer, config)


def test_a_process_renders_only_its_own_samples(folder, tokenizer, rendered):
    config = config_for(folder, batch_size=8, samples_per_image=1)
    sources = open_sources(config, "train")
    make_loader(config, tokenizer, sources).close()  # counts the tokens
    rendered.clear()
    loader = make_loader(config, tokenizer, sources, range(4, 6))  # the third of four processes
    assert not rendered
    order, own = loader._batches.order, set()
    for _ in range(6):
        next(loader)
    loader.close()
    for number in range(6 + 8):  # and what was made in advance
        own |= {sources["s0"].samples(image.record)[image.samples[0]].sample_id for image in order.batch(number)[1][4:6]}
    assert rendered and set(rendered) <= own


def test_threads_make_a_window_once(folder, tokenizer, monkeypatch):
    config = config_for(folder, length_grouping=16)
    loader = make_loader(config, tokenizer, open_sources(config, "train"))
    order, made = loader._batches.order, []
    window = order._window
    monkeypatch.setattr(order, "_window", lambda at, size: made.append(at) or window(at, size))
    for _ in range(20):
        next(loader)
    loader.close()
    assert len(made) == len(set(made)) >= 2
    assert np.all(np.diff(made) > 0)
