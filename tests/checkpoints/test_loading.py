"""The parameters of a checkpoint as whoever answers gets them."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from mimo_jax import pathtree, quantize
from mimo_jax.checkpoints import checkpoint, loading
from mimo_jax.checkpoints.checkpoint import CheckpointError
from mimo_jax.config import ConfigError
from tests.small_run import assert_same, begin, frozen_tree, train_state
from tests.tiny_config import tiny_config


def test_inference_reads_config_tokenizer_and_all_parameters(tmp_path):
    begin(tmp_path, steps=(3,))
    config, params, tokenizer, extra, *_ = loading.load_for_inference(tmp_path)
    assert config == tiny_config()
    assert_same(params, pathtree.merge(frozen_tree(), train_state(3)["params"]))
    assert tokenizer == tmp_path / "tokenizer.json" and extra == {"position": 3}
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json: is missing"):
        loading.load_for_inference(tmp_path)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_matrices_of_the_language_model_are_read_into_integers(tmp_path, weights):
    """Whether they lie in the base or trained; all else comes as it is."""
    kernel = jax.random.normal(jax.random.key(5), (2, 128, 6), jnp.bfloat16)
    frozen = {
        "llm": {"layers": {"block": {"q": {"kernel": kernel}, "norm": {"scale": jnp.ones((2, 6))}}}},
        "vision": {"q": {"kernel": kernel}},
    }
    checkpoints = begin(tmp_path, frozen=frozen)
    checkpoints.save(1, {"params": {"llm": {"layers": {"block": {"up": {"kernel": kernel.astype(jnp.float32)}}}}}}, {})
    checkpoints.wait()
    loaded = loading.load_for_inference(tmp_path, quantization=weights)
    want = {}
    for path, leaf in pathtree.flatten(loading.load_params(tmp_path)).items():
        want |= quantize.quantize_param(path, leaf, weights)
    assert_same(loaded.params, pathtree.unflatten(want))
    assert loaded.params["vision"]["q"]["kernel"].dtype == jnp.bfloat16
    assert set(loaded.params["llm"]["layers"]["block"]["up"]) == {f"kernel_{weights}", "kernel_scale"}
    assert loaded.config.model.llm.quantization == weights and loaded.origin.endswith(f"language model in {weights}")
    assert checkpoint.read_config(tmp_path).model.llm.quantization == "", "what is on disk stays as it is"


def test_other_weights_are_refused_before_anything_is_read(tmp_path):
    begin(tmp_path, steps=(1,))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match="quantization: is 'fp4'; use one of int8, int4"):
        loading.load_for_inference(tmp_path, quantization="fp4")
