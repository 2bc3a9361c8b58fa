"""Features beside the records: what is written comes back, of the right picture, or an error says what to do; loaders take them."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from mimo_jax.config import ConfigError, SourceConfig
from mimo_jax.data.loading.features import FeatureFolder, FeatureWriter, feature_folder
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import DataError, write_records
from mimo_jax.models import mimo
from tests.data import handmade
from tests.tiny_config import frozen_config, tiny_config

FINGERPRINT = "ab" * 32
SHAPES = mimo.feature_shapes(frozen_config())


def features_of(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {key: rng.integers(0, 2**16, shape).astype(np.uint16) for key, shape in SHAPES.items()}


def written(path, numbers):
    writer = FeatureWriter(path)
    for number in numbers:
        writer.add(handmade.record(number), features_of(number))
    return writer


def test_what_is_written_comes_back_and_what_is_not_flushed_is_not_there(tmp_path):
    written(tmp_path, range(3)).flush()
    written(tmp_path, range(3, 5)).flush()
    written(tmp_path, range(5, 7))
    folder = pickle.loads(pickle.dumps(FeatureFolder(tmp_path, SHAPES)))
    assert len(folder) == 5 and "image004" in folder and "image005" not in folder
    for number in range(5):
        found = folder.read(handmade.record(number))
        assert found.keys() == features_of(number).keys()
        assert all(np.array_equal(found[key], values) for key, values in features_of(number).items())
    with pytest.raises(DataError, match="record image005: has no features in .*; run mimo data encode again"):
        folder.read(handmade.record(5))


def test_a_shard_without_its_json_counts_for_nothing_and_is_written_again(tmp_path):
    written(tmp_path, range(2)).flush()
    (about,) = tmp_path.glob("*.json")
    whole = about.read_bytes()
    about.unlink()  # killed before the rename
    assert len(FeatureFolder(tmp_path, SHAPES)) == 0
    written(tmp_path, range(2)).flush()
    assert about.read_bytes() == whole and len(list(tmp_path.iterdir())) == 3


def test_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("mimo_jax.data.loading.features.SHARD_BYTES", 2 * sum(values.nbytes for values in features_of(0).values()))
    writer = written(tmp_path, range(5))
    assert len(list(tmp_path.glob("*.json"))) == 2
    writer.flush()
    assert len(FeatureFolder(tmp_path, SHAPES)) == 5


@pytest.mark.parametrize("name", ["vision", "sam"])
def test_a_flipped_bit_and_another_picture_are_found(tmp_path, name):
    written(tmp_path, range(2)).flush()
    (file,) = tmp_path.glob(f"*.{name}.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    folder = FeatureFolder(tmp_path, SHAPES)
    folder.read(handmade.record(0))
    with pytest.raises(DataError, match=f"{file.name}, row 1: is damaged; remove .*json and run mimo data encode again"):
        folder.read(handmade.record(1))
    for other in ({"image": handmade.record(1).image}, {"window": [0.0, 1.0]}):
        with pytest.raises(DataError, match="record image000: its features are of another image"):
            folder.read(dataclasses.replace(handmade.record(0), **other))
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{file.name}: cannot be read"):
        FeatureFolder(tmp_path, SHAPES).read(handmade.record(0))
    next(tmp_path.glob("*.json")).write_text("[{}]")
    with pytest.raises(DataError, match="json: cannot be read"):
        FeatureFolder(tmp_path, SHAPES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return handmade.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(tmp_path):
    write_records(tmp_path / "set", [handmade.record(i) for i in range(4)], {})
    config = tiny_config()
    config.data = dataclasses.replace(config.data, sources={"s": SourceConfig(path=str(tmp_path / "set"))}, features=True, workers=0)
    return config


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_with_features_differs_in_nothing_else(config, tokenizer, workers):
    sources = open_sources(config, "train")
    plain = make_loader(config, tokenizer, sources)
    expected = [next(plain) for _ in range(4)]
    plain.close()
    written(feature_folder(sources["s"], FINGERPRINT), range(4)).flush()
    config.data.workers = workers
    loader = make_loader(config, tokenizer, sources)
    loader.use_features(FINGERPRINT, SHAPES)
    made = [next(loader) for _ in range(4)]
    loader.close()
    known = {handmade.record(i).id: features_of(i) for i in range(4)}
    for batch, pictures in zip(made, expected, strict=True):
        views = {"vision_image", "sam_image"}
        assert batch.keys() == (pictures.keys() - views) | {"x_img", "sam_features"}
        assert all(np.array_equal(batch[key], pictures[key]) for key in pictures.keys() - views)
        for x_img, sam_features in zip(batch["x_img"], batch["sam_features"], strict=True):
            (one,) = (f for f in known.values() if np.array_equal(f["x_img"], x_img))
            assert np.array_equal(one["sam_features"], sam_features)


def test_pictures_without_features_are_placeholders_and_sources_without_any_are_refused(config, tokenizer):
    sources = open_sources(config, "train")
    loader = make_loader(config, tokenizer, sources)
    with pytest.raises(DataError, match="config.data.features: .*set has no features of this run's encoders; write them with mimo data"):
        loader.use_features(FINGERPRINT, SHAPES)
    written(feature_folder(sources["s"], FINGERPRINT), range(3)).flush()
    with pytest.raises(DataError, match="only those of other weights or settings"):
        loader.use_features("cd" * 32, SHAPES)
    config.train.max_bad_samples = 0.5
    loader.use_features(FINGERPRINT, SHAPES)
    weights = np.concatenate([next(loader)["sample_weight"] for _ in range(12)])
    loader.close()
    assert 0 < (weights == 0).sum() < 24 and {row["record"] for row in loader.bad} == {"image003"}


def test_features_and_augmentation_are_refused(config):
    config.data.augment = True
    with pytest.raises(ConfigError, match="config.data.features: .*set data.augment=False, or data.features=False"):
        config.validate()


def test_a_million_images_take_little_memory(tmp_path):
    """A tenth of the shards of a million images."""
    ids = [f"dataset/patient{number:07d}/slice" for number in range(100_000)]
    for shard in range(0, len(ids), 1000):
        rows = [{"id": name, "picture": 32 * "f", "crc32": dict.fromkeys(SHAPES, 7)} for name in ids[shard : shard + 1000]]
        (tmp_path / f"{shard:016x}.json").write_text(json.dumps(rows))
    folder = FeatureFolder(tmp_path, SHAPES)
    assert len(folder) == len(ids) and ids[0] in folder and ids[-1] in folder and "dataset/patient" not in folder
    assert len(pickle.dumps(folder)) < 100 * len(ids)  # bytes; a dict of tuples takes six times as many


def test_of_two_shards_with_an_image_one_is_used(tmp_path):
    for values in ([0, 1], [1, 2]):
        written(tmp_path, values).flush()
    folder = FeatureFolder(tmp_path, SHAPES)
    assert len(folder) == 3 and all(np.array_equal(folder.read(handmade.record(1))[key], features_of(1)[key]) for key in SHAPES)
