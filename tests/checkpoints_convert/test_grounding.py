"""The rows of <p>, </p> and <SEG> that an import adds to a language model: they fit its own rows."""

import numpy as np
import pytest
import torch

from checkpoints_convert.convert import ImportRequest, import_checkpoint
from mimo_jax import pathtree
from mimo_jax.checkpoints import loading
from mimo_jax.config import Config
from mimo_jax.model_config import LlamaConfig
from mimo_jax.models import mimo, scan
from tests.checkpoints_convert import originals, torch_models
from tests.tiny_config import random_params

BAR = 0.8  # share of the energy of <SEG>'s state that varies with the context; with rows of deviation 0.5 it is 0.02 here


@pytest.fixture(scope="module")
def config() -> Config:
    llm = LlamaConfig(vocab_size=originals.PIECES, width=256, layers=4, heads=4, kv_heads=4, mlp_width=688, max_length=64)
    config = originals.mimo_config(llm=llm)
    config.data.buckets = "64"
    return config


@pytest.fixture(scope="module")
def imported(config, tmp_path_factory) -> dict[str, np.ndarray]:
    """The parameters of an import whose language model is as transformers initialises it, but for the head, whose rows have a mean."""
    folder = tmp_path_factory.mktemp("grounding")
    given = originals.put_three(folder, config)
    torch.manual_seed(0)
    llama = torch_models.llama_model(config.model.llm, originals.PIECES)
    assert llama.config.initializer_range == 0.02
    with torch.no_grad():
        llama.lm_head.weight.mul_(torch.linspace(0.5, 4, 256)).add_(torch.linspace(-1, 1, 256))
    llama.save_pretrained(given["llm"])
    import_checkpoint(ImportRequest(config, given, folder / "out", log=lambda line: None))
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(loading.load_params(folder / "out")).items()}


def share_of_context(config: Config, llm: dict[str, np.ndarray]) -> float:
    """1 - |mean h|² / mean |h|² of the states h of <SEG> after 128 random contexts."""
    params = pathtree.flatten(random_params(config)) | llm
    ids = np.random.default_rng(0).integers(3, originals.PIECES, (128, 40))
    ids[:, -1] = originals.PIECES + config.model.grounding_tokens().index("<SEG>")
    model = scan.bind(mimo.abstract(config)[0], pathtree.unflatten(params))
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    states = np.asarray(model.decode(model.embed(ids, np.full_like(ids, -1), np.zeros((128, 1, 1, 256), np.float32)), positions))[:, -1]
    return float(1 - np.square(states.mean(0)).sum() / np.square(states).sum(-1).mean())


def test_the_state_of_seg_depends_on_the_context_before_any_training(config, imported):
    llm = {path: leaf for path, leaf in imported.items() if path.startswith(("llm/", "embedding/"))}
    assert share_of_context(config, llm) >= BAR
    scratch = llm | {"embedding/grounding": 0.5 * np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)}
    assert share_of_context(config, scratch) < 0.3


@pytest.mark.parametrize("path, axis", [("embedding/grounding", 0), ("lm_head/grounding", 1)])
def test_new_rows_have_the_statistics_of_their_own_base(imported, path, axis):
    base, new = imported[path.replace("grounding", "base")], imported[path]
    standard = (new - base.mean(axis, keepdims=True)) / base.std(axis, keepdims=True)
    assert new.shape == ((3, 256) if axis == 0 else (256, 3)) and new.dtype == np.float32
    assert abs(standard.mean()) < 0.12 and abs(standard.std() - 1) < 0.1  # 768 normal values: 3.3 and 3.9 standard errors
    first, second, third = np.moveaxis(standard, axis, 0)
    assert max(abs(np.corrcoef(first, second)[0, 1]), abs(np.corrcoef(second, third)[0, 1])) < 0.25, "the tokens must differ"
