"""`mimo data encode`: processes share the pictures, a stopped one goes on, and training with features has the same loss."""

import dataclasses
import itertools
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from mimo_jax import pathtree, sharding
from mimo_jax.checkpoints import checkpoint
from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.cli import main
from mimo_jax.config import ConfigError, MeshConfig, SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading import encode_features
from mimo_jax.data.loading.features import FeatureFolder, FeatureWriter, feature_folder
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.records import DataError, open_records, write_records
from mimo_jax.model_config import LoraConfig
from mimo_jax.models import mimo, scan
from mimo_jax.train import loop, losses
from mimo_jax.train.state import TrainSetup
from tests.tiny_config import frozen_config, random_params, tiny_config

LORA_TABLE = {r"lora_[ab]$|/grounding$": 1.0, r"^(aligner|prompt|seg_projection|sam_decoder)/": 1.0, r".": None}
IMAGES = 11


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run at step 0 with frozen encoders, dataset without features)."""
    home = tmp_path_factory.mktemp("encode")
    build_phantoms(home / "all", 24, seed=5, progress=False)
    source = open_records(home / "all", "train")
    write_records(home / "set", (source[i] for i in range(IMAGES)), {})
    config = config_for(home / "set")
    plan = TrainSetup(config, sharding.make_mesh(MeshConfig()))
    state, frozen = plan.start(random_params(config))
    (home / "run").mkdir()
    loop._tokenizer(config, home / "run", open_sources(config, "train"))
    checkpoint.start_run(home / "run", config, frozen)
    checkpoints = Checkpoints(home / "run")
    checkpoints.save(0, state, {})
    checkpoints.wait()
    return home / "run", home / "set"


@pytest.fixture
def run(made):
    return made[0]


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "set")


def config_for(data, **fields):
    config = tiny_config(lora=LoraConfig(rank=2, alpha=4.0, targets="q,v"))
    config.trainables = dict(LORA_TABLE)
    config.train.steps = 1
    config.data = dataclasses.replace(config.data, sources={"set": SourceConfig(path=str(data))}, **fields)
    return config


def test_processes_share_the_pictures_and_what_is_there_stays(run, data):
    one, two = (encode_features.encode_checkpoint(run, data, batch=2, process_index=i, process_count=2) for i in (0, 1))
    assert (one.written, two.written, one.existing, one.stopped) == (6, 5, 0, False)
    (folder,) = (data / "features").iterdir()
    files = {path.name: path.read_bytes() for path in folder.glob("*.*.npy")}
    again = encode_features.encode_checkpoint(run, data, batch=8)
    assert (again.written, again.existing) == (0, IMAGES)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*.npy")} == files
    source = open_records(data, "train")
    features = FeatureFolder(folder, mimo.feature_shapes(frozen_config()))
    assert all(
        np.isfinite(features.read(source[i])["x_img"].astype(np.uint32).__lshift__(16).view(np.float32)).all() for i in range(IMAGES)
    )


def test_a_stopped_job_keeps_what_it_has_and_goes_on_to_the_same_features(run, data, monkeypatch):
    whole = shutil.copytree(data, data.parent / "whole")
    encode_features.encode_checkpoint(run, whole, batch=2)
    add, added = FeatureWriter.add, []

    def add_and_stop(self, record, features):
        add(self, record, features)
        added.append(record.id)
        if len(added) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(FeatureWriter, "add", add_and_stop)
    stopped = encode_features.encode_checkpoint(run, data, batch=2)
    assert stopped.stopped and stopped.written == 4
    rest = encode_features.encode_checkpoint(run, data, batch=2, process_index=0, process_count=1)
    assert not rest.stopped and (rest.written, rest.existing) == (IMAGES - 4, 4)
    source = open_records(data, "train")
    one, other = (FeatureFolder(next((path / "features").iterdir()), mimo.feature_shapes(frozen_config())) for path in (whole, data))
    for record in map(source.__getitem__, range(IMAGES)):
        assert all(np.array_equal(values, other.read(record)[key]) for key, values in one.read(record).items())


def test_an_unreadable_picture_costs_the_others_nothing(run, made, tmp_path):
    source = open_records(made[1], "train")
    records = [source[i] for i in range(4)]
    records[2] = dataclasses.replace(records[2], image=records[2].image[:50])
    write_records(tmp_path / "b", records, {})
    done = encode_features.encode_checkpoint(run, tmp_path / "b", batch=4)
    assert done.written == 3 and [name for name, _ in done.failed] == [records[2].id]
    assert json.loads(done.unreadable.read_text())["record"] == records[2].id


def test_the_loss_is_that_with_pictures(data):
    """Bar: 1e-3 relative, features being bf16. The parameters are wild ones, so that every part of the model matters."""
    config = config_for(data, batch_size=8)
    plan = TrainSetup(config, sharding.make_mesh(MeshConfig()))
    params = random_params(config)
    flat = pathtree.flatten(params)
    source = open_records(data, "train")
    encoders = {path: leaf for path, leaf in flat.items() if path.startswith(encode_features.ENCODERS)}
    mark = encode_features.fingerprint(config, flat)
    encode_features.write_features(config, encoders, source, feature_folder(source, mark), batch=4)
    tokenizer = loop._tokenizer(config, data.parent, open_sources(config, "train"))

    @jax.jit
    def loss(params, batch):
        sums = losses.batch_sums(scan.bind(plan.graphdef, params), batch, 256)
        return losses.combine(sums, config.train.loss, losses.normalizers(batch))

    found = []
    for features in (False, True):
        loader = make_loader(config, tokenizer, open_sources(config, "train"))
        if features:
            loader.use_features(mark, mimo.feature_shapes(frozen_config()))
        found.append([float(loss(params, batch)) for batch in itertools.islice(loader, 3)])
        loader.close()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)
    assert found[0] != found[1]  # features are rounded


def test_the_fingerprint_is_that_of_weights_and_settings_not_of_their_dtype():
    config = frozen_config()
    flat = pathtree.flatten(random_params(config))
    mark = encode_features.fingerprint(config, flat)
    assert mark == encode_features.fingerprint(config, {path: leaf.astype("bfloat16") for path, leaf in flat.items()})
    assert mark == encode_features.fingerprint(config, {**flat, "llm/norm/scale": flat["llm/norm/scale"] + 1})
    path = next(path for path in flat if path.startswith("sam_encoder/"))
    assert mark != encode_features.fingerprint(config, {**flat, path: flat[path] * 1.5})
    for part, name, value in ((config.model.sam, "pixel_norm", "minmax"), (config.model.vision, "resample", "bicubic")):
        setattr(part, name, value)
        assert mark != (mark := encode_features.fingerprint(config, flat))


def test_training_takes_features_by_one_field_and_goes_on(run, data, tmp_path, capsys):
    assert main.main(["data", "encode", "--checkpoint", str(run), "--data", str(data), "--process", "0/2"]) == 0
    assert main.main(["data", "encode", "--checkpoint", str(run), "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "features of 6 images written, 0 existed already" in out and "features of 5 images written, 6 existed already" in out
    config = config_for(data, features=True)
    config.init.path = str(run)
    config.train = dataclasses.replace(config.train, steps=2, checkpoint_every=1)

    def losses() -> dict[int, float]:
        rows = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows}

    assert loop.train(config, tmp_path / "new") == 0
    first = losses()
    shutil.rmtree(tmp_path / "new" / "steps" / "2")
    assert loop.train(config, tmp_path / "new") == 0
    assert losses() == first and first.keys() == {1, 2} and first[1] != first[2]
    assert not (tmp_path / "new" / "bad_samples.jsonl").exists()


def test_what_features_cannot_serve_is_refused_before_a_run_begins(run, data, tmp_path):
    config = config_for(data, features=True)
    config.init.path = str(run)
    with pytest.raises(DataError, match="has no features of this run's encoders; write them with mimo data encode --checkpoint"):
        loop.train(config, tmp_path / "new")
    config.trainables = {r"^sam_encoder/": 0.1, **LORA_TABLE}
    with pytest.raises(ConfigError, match="config.data.features: .* sam_encoder/.* trains; freeze sam_encoder/"):
        loop.train(config, tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()
