"""Llama against transformers' LlamaForCausalLM with random weights, and the cache against no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from checkpoints_convert import name_map, rows
from mimo_jax import pathtree
from mimo_jax.model_config import LlamaConfig, LoraConfig, ModelConfig
from mimo_jax.models import scan
from mimo_jax.models.llama import LanguageHead, Llama, TokenEmbedding

TINY = LlamaConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=4, mlp_width=56, eps=1e-5, max_length=64)
NO_LORA = LoraConfig(rank=0)
GROUPED = LlamaConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, mlp_width=56, eps=1e-6, max_length=64)


class Language(nnx.Module):
    """Embedding, layers and head together, as they lie in a whole model."""

    def __init__(self, cfg, lora=NO_LORA, targets=(), *, rngs):
        self.embedding = TokenEmbedding(cfg, rngs=rngs)
        self.llm = Llama(cfg, lora, targets, rngs=rngs)
        self.lm_head = LanguageHead(cfg, rngs=rngs)

    def __call__(self, ids, positions, cache=None):
        out = self.llm(self.embedding(ids), positions, cache)
        return self.lm_head(out) if cache is None else (self.lm_head(out[0]), out[1])


def torch_llama(cfg: LlamaConfig) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size + 3, hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, rms_norm_eps=cfg.eps, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def convert(model, cfg, shapes) -> dict:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    indices = name_map.layer_indices(ModelConfig(llm=cfg))
    return pathtree.unflatten(name_map.import_state(state, rows.LLAMA, indices, pathtree.flatten(shapes), rows.LLAMA_IGNORED))


@pytest.fixture(params=[TINY, GROUPED], ids=["full", "grouped"])
def pair(request):
    cfg = request.param
    model = torch_llama(cfg)
    graphdef, shapes = scan.abstract(lambda rngs: Language(cfg, rngs=rngs))
    params = convert(model, cfg, shapes)
    assert {p: v.shape for p, v in pathtree.flatten(params).items()} == {p: v.shape for p, v in pathtree.flatten(shapes).items()}
    return cfg, model, graphdef, jax.tree.map(jnp.asarray, params)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_logits_equal_transformers(pair):
    cfg, model, graphdef, params = pair
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size + 3, (2, 17))
    positions = jnp.broadcast_to(jnp.arange(17), (2, 17))
    got = jax.jit(lambda p, i: scan.bind(graphdef, p)(i, positions))(params, jnp.asarray(ids))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    assert relative(got, want) <= 1e-5


def test_cached_decoding_of_ragged_rows_equals_whole_rows(pair):
    """Rows of 5 and 9 tokens, right-padded to 9, then four steps each: the logits of whole rows without a cache."""
    cfg, _, graphdef, params = pair
    model = scan.bind(graphdef, params)
    rng = np.random.default_rng(1)
    whole = rng.integers(0, cfg.vocab_size, (2, 13))
    lengths = np.asarray([5, 9])
    prompt = np.where(np.arange(9) < lengths[:, None], whole[:, :9], 7)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    logits, cache = model(jnp.asarray(prompt), positions, model.llm.new_cache(2, 13))
    plain = model(jnp.asarray(whole), jnp.broadcast_to(jnp.arange(13), (2, 13)))
    for row, length in enumerate(lengths):
        assert relative(logits[row, :length], plain[row, :length]) <= 1e-5
    for step in range(4):
        at = lengths + step
        logits, cache = model(jnp.asarray(whole[np.arange(2), at][:, None]), jnp.asarray(at)[:, None], cache)
        assert relative(logits[:, 0], plain[np.arange(2), at]) <= 1e-5


def test_lora_starts_at_the_base_and_reaches_only_its_targets():
    base_graph, _ = scan.abstract(lambda rngs: Language(TINY, rngs=rngs))
    lora_graph, shapes = scan.abstract(lambda rngs: Language(TINY, LoraConfig(rank=2), ("q", "v"), rngs=rngs))
    adapted = {p for p in pathtree.flatten(shapes) if "lora" in p}
    assert adapted == {f"llm/layers/block/{t}/lora_{x}" for t in "qv" for x in "ab"}
    params = scan.init_params(lambda rngs: Language(TINY, LoraConfig(rank=2), ("q", "v"), rngs=rngs), jax.random.key(0))
    base, _ = pathtree.partition(params, lambda p: "lora" not in p)
    ids, positions = jnp.arange(6)[None], jnp.arange(6)[None]
    np.testing.assert_array_equal(scan.bind(lora_graph, params)(ids, positions), scan.bind(base_graph, base)(ids, positions))


def test_grounding_rows_stand_apart_from_the_base():
    """Gradients reach the grounding rows without touching the base's, which are frozen under LoRA."""
    graphdef, _ = scan.abstract(lambda rngs: TokenEmbedding(TINY, rngs=rngs))
    params = scan.init_params(lambda rngs: TokenEmbedding(TINY, rngs=rngs), jax.random.key(0))
    ids = jnp.asarray([[3, 50, 52]])
    out = scan.bind(graphdef, params)(ids)
    np.testing.assert_array_equal(out[0, 0], params["base"][3])
    np.testing.assert_array_equal(out[0, 1], params["grounding"][0])
    np.testing.assert_array_equal(out[0, 2], params["grounding"][2])
    grads = jax.grad(lambda p: scan.bind(graphdef, p)(ids[:, 1:]).sum())(params)
    assert np.abs(grads["base"]).max() == 0 and np.abs(grads["grounding"][1]).max() == 0 and np.abs(grads["grounding"][2]).min() > 0


def test_a_vocabulary_with_one_grounding_token():
    embedding, head = TokenEmbedding(TINY, grounding=1, rngs=nnx.Rngs(0)), LanguageHead(TINY, grounding=1, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(embedding(jnp.asarray([49, 50])), jnp.stack([embedding.base[49], embedding.grounding[0]]))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.float32)
    assert head(hidden).shape == (2, 51)
    np.testing.assert_allclose(head(hidden)[:, 50], hidden @ head.grounding[:, 0], rtol=1e-5)


def test_full_size_counts_its_parameters():
    """Vicuna-7B: 6.738 B with 32,000 words, the three grounding rows apart."""
    _, shapes = scan.abstract(lambda rngs: Language(LlamaConfig(), rngs=rngs))
    flat = pathtree.flatten(shapes)
    base = sum(int(np.prod(v.shape)) for p, v in flat.items() if not p.endswith("/grounding"))
    assert base == 6_738_415_616


def test_logits_in_bfloat16_are_summed_in_float32():
    """Rounded sums would be equal at the top in several percent of the rows. Gradients stay those of the parameters' dtypes."""
    cfg = LlamaConfig(vocab_size=4000, width=64, layers=1, heads=2, kv_heads=2)
    head = LanguageHead(cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(1), (256, 64), jnp.bfloat16)
    logits = head(hidden)
    assert logits.dtype == jnp.float32
    wide = [np.asarray(x, np.float32) for x in (hidden, head.base[...], head.grounding[...].astype(jnp.bfloat16))]
    np.testing.assert_allclose(logits, wide[0] @ np.concatenate(wide[1:], axis=1), rtol=1e-4, atol=1e-4)
    assert ((logits == logits.max(-1, keepdims=True)).sum(-1) == 1).all()
    grads = jax.grad(lambda x: jax.nn.log_softmax(head(x)).max(-1).sum())(hidden)
    assert grads.dtype == jnp.bfloat16 and np.isfinite(np.asarray(grads, np.float32)).all()
