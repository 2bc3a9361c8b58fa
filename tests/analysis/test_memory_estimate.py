"""What the plan says against what a loaded model takes."""

import re
import shutil

import jax
import pytest

from mimo_jax import parameters, pathtree, quantize
from mimo_jax.analysis import memory_estimate
from mimo_jax.checkpoints import checkpoint, loading
from mimo_jax.config import ConfigError
from mimo_jax.config_flags import find_config, read_config_file
from mimo_jax.errors import UserError
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.lower_conversation import lower_conversation
from mimo_jax.model_config import LoraConfig
from mimo_jax.models import mimo
from tests.data.handmade import tokenizer
from tests.tiny_config import random_batch, random_params, tiny_config

IMAGES = ("vision_image", "vision_size", "sam_image", "sam_size")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(lora=LoraConfig(rank=2))
    tokenizer(folder)
    checkpoint.open_run(folder, config)
    checkpoint.start_run(folder, config, random_params(config))
    checkpoint.write_step(folder, 0, iter(()), {})
    return folder


@pytest.fixture(scope="module")
def made(run):
    return memory_estimate.estimate_checkpoint_memory(run, lower_conversation, "int8")


def test_the_plan_is_what_a_loaded_model_takes(run, made):
    config, params, *_ = loading.load_for_inference(run, quantization="int8")
    assert sum(part["bytes"] for part in made["parameters"].values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert made["parameters"]["language model"]["dtypes"] == ["float32", "int8"]
    lora = [leaf.nbytes for path, leaf in pathtree.flatten(params).items() if "lora" in path]
    assert made["parameters"]["LoRA"]["bytes"] == sum(lora) > 0

    engine = Engine(config, params, eos_id=2)
    cache = engine.new_cache(1, made["slots"])
    assert made["slots"] == config.model.llm.max_length and made["cache"] == sum(leaf.nbytes for leaf in cache.values())
    batch = random_batch(config)
    image = engine.encode({name: batch[name][:1] for name in IMAGES}, 1)
    assert made["features"] == sum(leaf.nbytes for leaf in image)
    assert len(made["temporaries"]) == 5 and min(made["temporaries"].values()) > 0
    assert made["temporaries"]["encode the image"] > made["features"], "what it returns is counted"


def test_no_weight_is_read(run, made, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=lambda folder, names: {"arrays"} & set(names))
    assert memory_estimate.estimate_checkpoint_memory(tmp_path / "run", lower_conversation, "int8")["parameters"] == made["parameters"]


def test_the_table_says_whether_it_fits_and_what_would(made):
    assert memory_estimate.table(made | {"fits": True}).endswith("it fits")
    less = {"other": {"int4": 5 * 10**9}, "available": 6 * 10**9, "fits": False}
    assert "it does not fit: --quantize int4 needs 5.00 GB" in memory_estimate.table(made | less)
    assert "use a device with more memory, or several devices" in memory_estimate.table(made | less | {"available": 10**9})
    reason = "4 does not divide an axis of size 511 of parameter embedding/base"
    assert f"not split over the devices: {reason}" in memory_estimate.table(made | {"unsharded": {"embedding/base": reason}})
    assert re.search(r"KV cache of one conversation +[\d.]+ MB  256 tokens", memory_estimate.table(made))


def test_what_is_no_checkpoint_or_no_kind_of_weights_is_named(run, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        memory_estimate.estimate_checkpoint_memory(tmp_path / "gone", lower_conversation)
    with pytest.raises(ConfigError, match="quantization: is 'int3'"):
        memory_estimate.estimate_checkpoint_memory(run, lower_conversation, "int3")


@pytest.mark.parametrize(("weights", "total", "language"), [("", 16.45, 12.95), ("int8", 9.97, 6.48), ("int4", 7.13, 3.64)])
def test_at_full_size(weights, total, language):
    config = read_config_file(find_config("configs/mimo_7b.py"))
    held = {}
    for path, leaf in pathtree.flatten(parameters.with_dtypes(config, mimo.abstract(config)[1])).items():
        held |= quantize.quantize_param(path, leaf, weights)
    parts = memory_estimate.parameters(held)
    assert set(parts) == set(memory_estimate.PARTS.values())
    assert sum(part["bytes"] for part in parts.values()) / memory_estimate.GB == pytest.approx(total, abs=0.02)
    assert parts["language model"]["bytes"] / memory_estimate.GB == pytest.approx(language, abs=0.02)
