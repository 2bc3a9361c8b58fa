"""Conversations of more turns than a training sample may have: every turn is trained, as a part of its conversation."""

import dataclasses

import numpy as np
import pytest

from mimo_jax.config import SourceConfig
from mimo_jax.data.conversation import render
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.loading.split_conversations import split_conversations, split_sample, user_turns
from mimo_jax.data.records import Index, RecordFolder, write_records
from mimo_jax.data.schema import Sample, Target, Turn
from tests.data import handmade
from tests.tiny_config import tiny_config


def talk(number: int, turns: int) -> Sample:
    texts = [text for turn in range(turns) for text in (f"Question {turn} of {number}?", f"Answer {turn}.")]
    return Sample(f"talk{number}", "vqa", [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)])


def record(number: int):
    """Conversations of 1, …, 5 turns between ordinary samples."""
    plain = handmade.record(number)
    return dataclasses.replace(plain, samples=[plain.samples[0], talk(number, 1 + number % 5), plain.samples[5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "set"
    write_records(path, [record(i) for i in range(10)], {})
    return path


def test_parts_have_consecutive_turns_with_their_targets():
    turns = [Turn(("user", "assistant")[i % 2], f"the liver {i}", ["l"] if i == 4 else []) for i in range(10)]
    targets = [Target(1, "liver", [4, 9], ["l"]), Target(5, "liver", [4, 9], ["l"]), Target(9, "liver", absent=True)]
    sample = Sample("s", "I", turns, targets)
    parts = split_sample(sample, 2)
    assert [[turn.text for turn in part.turns] for part in parts] == [[t.text for t in turns[i : i + 4]] for i in (0, 4, 8)]
    assert [[target.turn for target in part.targets] for part in parts] == [[1], [1], [1]]
    assert parts[1].turns[0].prompted == ["l"] and parts[2].targets[0].absent
    assert len({part.sample_id for part in parts}) == 3 and {part.perspective for part in parts} == {"I"}
    assert split_sample(sample, 5) == [sample] and split_sample(sample, 9) == [sample]


@pytest.mark.parametrize("max_turns", [1, 2, 3, 5])
def test_the_index_of_the_parts_is_that_of_a_dataset_of_them(folder, tmp_path, max_turns):
    source = split_conversations(RecordFolder(folder, "train"), max_turns)
    parts = [dataclasses.replace(r, samples=[p for s in r.samples for p in split_sample(s, max_turns)]) for r in map(record, range(10))]
    write_records(tmp_path / "parts", parts, {})
    wanted = RecordFolder(tmp_path / "parts", "train")
    for field in dataclasses.fields(Index):
        assert np.array_equal(getattr(source.index, field.name), getattr(wanted.index, field.name)), field.name
    assert [source.samples(i) for i in range(10)] == [wanted.samples(i) for i in range(10)] == source.samples_of(range(10))
    assert source[3].samples == source.samples(3) and len(source) == 10
    assert (source.index.turns <= max_turns).all()


def test_a_source_without_long_conversations_stays_itself(folder):
    source = RecordFolder(folder, "train")
    assert split_conversations(source, 5) is source


def test_turns_are_counted_where_the_index_lacks_them(folder, tmp_path):
    with np.load(folder / "train.index.npz") as columns:
        np.savez(folder / "train.index.npz", **{name: columns[name] for name in columns if name != "turns"})
    source = RecordFolder(folder, "train")
    assert (source.index.turns == -1).all()
    assert user_turns(source).tolist() == [n for i in range(10) for n in (1, 1 + i % 5, 1)]


@pytest.mark.parametrize("max_turns", [1, 2])
def test_every_turn_of_a_conversation_is_trained(folder, tmp_path, max_turns):
    config = tiny_config(max_turns=max_turns)
    sources = {"s": SourceConfig(path=str(folder))}
    config.data = dataclasses.replace(config.data, sources=sources, weights={"vqa": 1.0}, batch_size=2)
    config.data.samples_per_image = config.data.length_grouping = 1
    tokenizer = handmade.tokenizer(tmp_path)
    loader = make_loader(config, tokenizer, open_sources(config, "train"))
    batches = [next(loader) for _ in range(loader.num_samples // 2)]
    loader.close()
    assert not loader.bad and all((batch["sample_weight"] == 1).all() for batch in batches)
    found = sorted(tuple(ids[mask].tolist()) for b in batches for ids, mask in zip(b["input_ids"], b["token_mask"], strict=True))
    parts = [part for number in range(10) for part in split_sample(talk(number, 1 + number % 5), max_turns)]
    assert found == sorted(tuple(render(part, tokenizer, config).input_ids.tolist()) for part in parts)
