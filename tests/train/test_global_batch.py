"""A process's part of a batch becomes global arrays, and bucketed lengths keep the step from being compiled again."""

import jax
import numpy as np
import pytest

from mimo_jax import sharding
from mimo_jax.config import MeshConfig, SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mimo_jax.train import global_batch
from mimo_jax.train.state import TrainSetup
from mimo_jax.train.step import make_step
from tests.tiny_config import quick_config


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


def test_one_process_makes_all_images_and_places_them_as_they_are(mesh):
    assert global_batch.local_images(mesh, 3) == [0, 1, 2]
    batch = {"sam_image": np.arange(6).reshape(3, 2), "input_ids": np.arange(12).reshape(6, 2)}
    placed = global_batch.make_global_batch(mesh, 3, [0, 1, 2], batch)
    for name, value in batch.items():
        assert placed[name].sharding == sharding.batch_sharding(mesh)
        np.testing.assert_array_equal(placed[name], value)


def test_the_step_is_compiled_once_for_each_bucket(mesh, tmp_path):
    build_phantoms(tmp_path / "phantom", 24, seed=5, progress=False)
    config = quick_config()
    config.data.sources = {"phantom": SourceConfig(path=str(tmp_path / "phantom"))}
    config.data.buckets = "56,192"
    sources = open_sources(config, "train")
    texts = [turn.text for i in range(len(sources["phantom"])) for s in sources["phantom"].samples(i) for turn in s.turns]
    train_tokenizer(texts, config.model.llm.vocab_size, tmp_path / "tokenizer.json", config.model.grounding_tokens())
    loader = make_loader(config, load_tokenizer(tmp_path / "tokenizer.json", config.model), sources)
    plan = TrainSetup(config, mesh)
    state, frozen = plan.start(plan.initial_params(jax.random.key(0)))
    step, lengths = make_step(plan), []
    for _ in range(200):
        batch = next(loader)
        lengths.append(batch["input_ids"].shape[1])
        state, _ = step(state, frozen, global_batch.make_global_batch(mesh, config.images(), range(config.images()), batch))
    loader.close()
    assert len(set(lengths)) > 1, "the lengths are to be mixed"
    assert step._cache_size() == len(set(lengths)) <= len(config.buckets())
