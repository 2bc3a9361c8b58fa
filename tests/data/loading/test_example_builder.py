"""What makes examples: its cache stays in the process that filled it."""

import pickle

import numpy as np

from mimo_jax.data.loading.example_builder import ExampleBuilder, SampledImage
from mimo_jax.data.records import RecordFolder, write_records
from tests.data import handmade
from tests.tiny_config import tiny_config


def test_a_pickled_builder_has_an_empty_cache_and_its_whole_budget(tmp_path):
    write_records(tmp_path / "set", [handmade.record(i) for i in range(3)], {})
    builder = ExampleBuilder(tiny_config(), handmade.tokenizer(tmp_path), [RecordFolder(tmp_path / "set", "train")])
    fresh, budget = len(pickle.dumps(builder)), builder._free
    made = builder.build(SampledImage(0, 1, (0, 1), 7), [])
    assert builder._cache and builder._free < budget
    data = pickle.dumps(builder)
    assert len(data) <= fresh + 1024
    copy = pickle.loads(data)
    assert not copy._cache and copy._free == budget
    again = copy.build(SampledImage(0, 1, (0, 1), 7), [])
    assert np.array_equal(again["sam_image"], made["sam_image"]) and builder._cache
