"""The choice of samples and their windows: from the index alone, and the same whatever else is read."""

from collections import defaultdict

import numpy as np
import pytest

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.records import RecordFolder, write_records
from mimo_jax.eval.selection import ConcatSource, group_of, select_samples, windows_of
from tests.data import handmade


class IndexOnly(RecordFolder):
    """A source that is never read."""

    def __getitem__(self, position):
        raise AssertionError("a record was read")

    def samples(self, position):
        raise AssertionError("samples were read")


def ranked_by_reading_all(records, limit, perspectives):
    """The order as it is defined: of all samples, the n-th of its perspective in its image, the image's place, the perspective."""
    rng = np.random.default_rng(0)
    ranked = []
    for position, number in enumerate(rng.permutation(len(records)).tolist()):
        counts = defaultdict(int)
        for index in rng.permutation(len(records[number].samples)).tolist():
            perspective = records[number].samples[index].perspective
            if perspective in perspectives:
                ranked.append((counts[perspective], position, PERSPECTIVES.index(perspective), number, index))
                counts[perspective] += 1
    chosen = defaultdict(list)
    for *_, number, index in sorted(ranked)[:limit]:
        chosen[number].append(index)
    return {number: sorted(chosen[number]) for number in sorted(chosen)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    write_records(folder / "a", [handmade.record(i, "val") for i in range(9)], {"name": "a"})
    write_records(folder / "b", [handmade.record(i, "val") for i in range(9, 14)], {"name": "b"})
    return [folder / "a", folder / "b"]


@pytest.mark.parametrize("limit", [1, 7, 23, 64, 1000, None])
@pytest.mark.parametrize("perspectives", [PERSPECTIVES, ("II",), ("I", "IV")])
def test_the_choice_needs_the_index_alone_and_no_more_of_it_than_the_limit(folders, limit, perspectives):
    records = [record for folder in folders for record in RecordFolder(folder, "val")]
    source = ConcatSource(IndexOnly(folder, "val") for folder in folders)
    expected = ranked_by_reading_all(records, limit, perspectives)
    assert select_samples(source, limit, perspectives) == expected == select_samples(records, limit, perspectives)


def test_several_sources_are_one(folders):
    sources = [RecordFolder(folder, "val") for folder in folders]
    joined = ConcatSource(sources)
    flat = [record for source in sources for record in source]
    assert len(joined) == len(flat) == 14
    assert [record.id for record in joined] == [record.id for record in flat]
    assert [group_of(joined, i) for i in range(14)] == [record.group for record in flat] == [group_of(flat, i) for i in range(14)]
    assert [s.sample_id for s in joined.samples(10)] == [s.sample_id for s in flat[10].samples]


def test_few_samples_make_windows_of_a_batch_and_many_of_eight():
    few, many = ({number: [0, 1] for number in range(images)} for images in (32, 4000))
    assert [sum(map(len, window.values())) for window in windows_of(few, 16)] == [16] * 4
    assert {sum(map(len, window.values())) for window in windows_of(many, 16)[:-1]} == {128}
    for chosen in (few, many, {}):
        assert {number: indices for window in windows_of(chosen, 16) for number, indices in window.items()} == chosen
