"""GGUF files: every kind of tensor against other readers, settings, tokenizers, and what is refused."""

import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert.convert import ImportRequest, import_checkpoint
from checkpoints_convert.export import export_checkpoint
from checkpoints_convert.gguf_file import GgufError, open_gguf
from checkpoints_convert.hf_config_check import check_settings
from checkpoints_convert.readers import open_tensors
from checkpoints_convert.vocabulary import read_vocabulary
from mimo_jax import pathtree
from mimo_jax.checkpoints import loading, provenance
from mimo_jax.cli import main
from mimo_jax.data.tokenizer import add_grounding
from mimo_jax.errors import UserError
from mimo_jax.model_config import GROUNDING_TOKENS, AlignerConfig, LlamaConfig, LoraConfig
from mimo_jax.models import mimo, scan
from tests.checkpoints_convert import gguf_originals, originals
from tests.checkpoints_convert.gguf_originals import byte_level_metadata, model, put, sentencepiece_metadata

# Rows of 256 values are whole blocks of every type; four heads share two of keys and values.
WIDE = LlamaConfig(vocab_size=512, width=256, layers=1, heads=4, kv_heads=2, mlp_width=256, max_length=256, rope_theta=5e4, eps=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def smol(folder):
    return byte_level_metadata(folder / "smol")


def config(chat_template: str = "chatml"):
    """A tiny MIMO whose language model is WIDE; little of it is initialised from the seed, which takes long to compile."""
    made = originals.mimo_config(aligner=AlignerConfig(kind="linear"), lora=LoraConfig(rank=0))
    made.model.llm, made.model.sam.decoder_layers = LlamaConfig(**vars(WIDE)), 1
    made.data.chat_template = chat_template
    return made


@pytest.fixture(scope="module")
def others(folder):
    """The other two sources."""
    return originals.put_three(folder / "others", config())


def request(path, others, out):
    return ImportRequest(config(), {**others, "llm": path}, out, log=lambda line: None)


# --- tensors

PLAIN = [Kind.F32, Kind.F16, Kind.BF16]
QUANTIZED = [Kind[name] for name in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split()]


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED], ids=lambda kind: kind.name)
def test_every_kind_of_tensor_is_read_as_transformers_and_gguf_read_it(folder, smol, kind):
    tensors = model(WIDE, 512)
    path = put(folder / f"{kind.name}.gguf", WIDE, tensors, kind, **smol)
    read = open_tensors(path)
    assert {key: shape for key, (_, shape) in read.kinds.items()} == {key: tuple(value.shape) for key, value in tensors.items()}
    stored = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    for key, (dtype, shape) in read.kinds.items():
        value = read[key]
        assert value.dtype == dtype and value.shape == shape and np.isfinite(value.astype(np.float32)).all()
        if ".q_proj" not in key and ".k_proj" not in key:
            np.testing.assert_array_equal(value.astype(np.float32), stored[gguf_originals.theirs(key)].reshape(shape))
    if kind in (Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_K):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).state_dict()
        for key, value in theirs.items():
            np.testing.assert_allclose(read[key].astype(np.float32), value.numpy(), rtol=1e-6, atol=1e-7, err_msg=key)
    if kind == Kind.F32:
        for key, value in tensors.items():
            np.testing.assert_array_equal(read[key], value.numpy(), err_msg=key)


def test_an_import_and_its_export_compute_what_transformers_does(folder, smol, others, tmp_path):
    """The head is tied: it is the embedding, of which the exported model has a copy of its own."""
    path = put(folder / "tied.gguf", WIDE, model(WIDE, 512, tied=True), Kind.Q8_0, **smol)
    import_checkpoint(request(path, others, tmp_path / "import"))
    params = pathtree.flatten(loading.load_params(tmp_path / "import"))
    np.testing.assert_array_equal(params["lm_head/base"], np.asarray(params["embedding/base"]).T)
    assert provenance.read(tmp_path / "import")["sources"]["llm"]["files"].keys() == {"tied.gguf"}

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="tied.gguf", dtype=torch.float32).eval()
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = theirs(ids).logits.detach().numpy()
    ours = logits(tmp_path / "import", ids.numpy())
    np.testing.assert_allclose(ours[..., :512], wanted, rtol=1e-4, atol=1e-4)

    export_checkpoint(tmp_path / "import", "hf", tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "llm" / "config.json").read_text())
    assert "quantization_config" not in settings and not settings["tie_word_embeddings"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported" / "llm", dtype=torch.float32).eval()
    np.testing.assert_allclose(again(ids).logits.detach().numpy(), ours, rtol=1e-4, atol=1e-4)


def logits(checkpoint, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V + 3] of ids [B, T] from the language model of a checkpoint."""
    lazy = loading.LazyParams(checkpoint)
    graphdef, _ = mimo.abstract(lazy.config)

    @jax.jit
    def run(params, ids):
        made = scan.bind(graphdef, params)
        return made.logits(made.decode(made.embedding(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)))

    return np.asarray(run(loading.load_params(checkpoint), ids))


# --- tokenizers


def test_a_sentencepiece_vocabulary_gives_the_tokenizer_of_its_tokenizer_model(folder):
    """With a token that was added to it, and rows that fill up the model's vocabulary, as in Vicuna's files."""
    values = sentencepiece_metadata(folder / "vicuna")
    values["tokenizer.ggml.tokens"] += ["<pad>", "[PAD421]"]
    values["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    values["tokenizer.ggml.token_type"] += [4, 5]
    path = put(folder / "vicuna.gguf", WIDE, {}, **values)
    (folder / "vicuna" / "added_tokens.json").write_text(json.dumps({"<pad>": 420}))
    made, wanted = (read_vocabulary(source, 422, GROUNDING_TOKENS) for source in (path, folder / "vicuna"))
    assert made.tokenizer["model"]["vocab"].pop("<unused_421>") == 421
    assert made.tokenizer == wanted.tokenizer and made.order.tolist() == wanted.order.tolist()
    ours = add_grounding(made.tokenizer, folder / "vicuna.json", 422)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "vicuna" / "tokenizer.model"))
    assert ours.encode("The left lung  <pad> 12") == theirs.encode("The left lung  <pad> 12") and ours.bos == 1


PARTS = [*" \t\n\r a1é肝🫀½٣Ⅷ'’", "  ", "\r\n", "2024", " 12", "liver", " The liver", "don't", "<|im_end|>", "\u00a0", "\u3000"]
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.sampled_from(PARTS), max_size=20).map("".join))
SPLITS = {
    "gpt-2": None,
    "smollm": [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": None,
}


@pytest.fixture(scope="module", params=SPLITS)
def both(request, folder):
    """Our tokenizer of a file and transformers', which does not know how SmolLM's text is split."""
    made = folder / request.param
    path = put(folder / f"{request.param}.gguf", WIDE, {}, **byte_level_metadata(made, request.param))
    ours = add_grounding(read_vocabulary(path, 512, GROUNDING_TOKENS).tokenizer, made / "ours.json", 512)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    if split := SPLITS[request.param]:
        theirs.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    return ours, theirs


@settings(max_examples=100)
@given(text=TEXT)
def test_every_text_has_the_ids_of_transformers(both, text):
    ours, theirs = both
    if not any(token in text for token in ours.control):  # a text never contains control tokens for ours, unlike for theirs
        ids = ours.encode(text, continued=True)
        assert ids == theirs.encode(text, add_special_tokens=False) and ours.decode([ours.seg, *ids]) == "<SEG>" + text


def test_control_tokens_and_the_first_token_are_those_of_the_file(folder, smol):
    for name, add, bos in (("smollm", None, None), ("smollm", True, 1), ("llama-bpe", None, 1), ("llama-bpe", False, None)):
        path = put(folder / "first.gguf", WIDE, {}, **(smol | {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": add}))
        ours = add_grounding(read_vocabulary(path, 512, GROUNDING_TOKENS).tokenizer, folder / "first.json", 512)
        assert (ours.bos, ours.id_of("<|im_start|>"), ours.id_of("<|im_end|>"), ours.eos) == (bos, 1, 2, 0)


# --- what is refused

KNOWN = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.attention.key_length": 64, "llama.attention.value_length": 64}


def refused(path, others, tmp_path) -> str:
    with pytest.raises(UserError) as error:
        import_checkpoint(request(path, others, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_settings_that_change_nothing_are_known_and_a_chat_template_of_another_kind_is_said(folder, smol):
    path = put(folder / "known.gguf", WIDE, model(WIDE, 512), **(smol | KNOWN | {"tokenizer.chat_template": "[INST] {{ text }} [/INST]"}))
    remark = check_settings("llm", path, {"llama"}, config("vicuna"))
    assert remark == "llm: its chat template is not known; vicuna is used (data.chat_template)"


@pytest.mark.parametrize("change, said", [
    ({"llama.rope.freq_base": 1e6}, "rope_theta is 1000000.0, the configuration has 50000.0: set --config.model.llm.rope_theta=1000000.0"),
    ({"llama.attention.layer_norm_rms_epsilon": 1e-6}, "rms_norm_eps is 1e-06, the configuration has 1e-05: set .*llm.eps=1e-06"),
    ({"llama.attention.head_count_kv": 4}, r"num_key_value_heads is 4, the configuration has 2: set --config.model.llm.kv_heads=4"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "rope_scaling is .*linear.*: such models cannot be"),
    ({"llama.rope.dimension_count": 32}, "partial_rotary_factor is 0.5: such models cannot be converted"),
    ({"llama.attention.value_length": 32, "llama.attention.key_length": 64}, "llama.attention.value_length is 32, an unknown setting"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8, an unknown setting: .* give --ignore-setting llama.expert_count"),
    ({"llama.context_length": 192}, "context_length is 192, the configuration has 256 tokens: set --config.model.llm.max_length=192"),
    ({"llama.attention.sliding_window": 32}, "sliding_window is 32, the configuration has 256 tokens"),
    ({"tokenizer.chat_template": "USER: {{ text }} ASSISTANT:"}, "chat_template is vicuna, .* set --config.data.chat_template=vicuna"),
    ({"general.architecture": "qwen2"}, r"\.gguf: is a model of architecture qwen2; only those of architecture llama can be converted$"),
    ({"split.count": 3}, r"\.gguf: is one part of a split model; join the parts with llama-gguf-split --merge$"),
    ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre is tekken, known are gpt-2, smollm.*; name a tokenizer.json of the same vocab"),
    ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None, known are"),
    ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is t5, known are gpt2, llama; name a tokenizer.json"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for 512 tokens; fetch the file again$"),
])  # fmt: skip
def test_what_would_compute_or_read_something_else_is_refused(folder, smol, others, tmp_path, change, said):
    path = put(folder / "refused.gguf", WIDE, model(WIDE, 512), change=change, **smol)
    assert re.search(said, refused(path, others, tmp_path))


def test_missing_and_additional_tensors_are_listed(folder, smol, others, tmp_path):
    tensors = model(WIDE, 512)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["rope_freqs.weight"] = torch.ones(32)
    message = refused(put(folder / "missing.gguf", WIDE, tensors, **smol), others, tmp_path)
    assert "1 missing:\n  model.layers.0.mlp.up_proj.weight" in message and "1 left over:\n  rope_freqs.weight" in message


@pytest.mark.parametrize("kept", [2, 30, 900, 20_000, -1000], ids=str)
def test_a_truncated_file_is_named_in_one_line(folder, smol, tmp_path, kept, capsys):
    whole = put(folder / "whole.gguf", WIDE, model(WIDE, 512), **smol).read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:kept])
    setting = originals.config_file(tmp_path / "config", config())
    assert main.main(["convert", "import", "--config", setting, "--llm", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(r"cut\.gguf: is not a GGUF file, or is truncated or damaged \(.*\); fetch it again$", said) and "\n" not in said


def test_unsupported_quantization_is_named(folder, smol):
    path = put(folder / "iq.gguf", WIDE, model(WIDE, 512), Kind.TQ1_0, **smol)
    with pytest.raises(GgufError, match=r"iq.gguf: has tensors of type TQ1_0 \(\S+\); give a file of the types F32, F16, BF16, Q4_0"):
        open_gguf(path)


def test_a_folder_is_its_only_file(folder, smol, tmp_path):
    put(tmp_path / "a.gguf", WIDE, {"model.norm.weight": torch.ones(256)}, **smol)
    assert list(open_tensors(tmp_path)) == ["model.norm.weight"]
    put(tmp_path / "b.gguf", WIDE, {"model.norm.weight": torch.ones(256)}, **smol)
    with pytest.raises(UserError, match=r"has 2 GGUF files \(a.gguf, b.gguf\); name one of them"):
        open_tensors(tmp_path)
