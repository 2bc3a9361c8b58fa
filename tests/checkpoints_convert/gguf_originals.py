"""Small GGUF files as llama.cpp's converter would have written them, with random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from mimo_jax.model_config import LlamaConfig
from tests.checkpoints_convert import originals, torch_models
from tests.data import handmade
from tests.models.oracles import randomised

_NAMES = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def model(cfg: LlamaConfig, rows: int, tied: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a random model, without its head if it is tied."""
    made = randomised(torch_models.llama_model(cfg, rows), 2).state_dict()
    return {key: value for key, value in made.items() if not (tied and key == "lm_head.weight")}


def theirs(name: str) -> str:
    """A name of transformers in llama.cpp's terms."""
    name = re.sub(r"^model\.layers\.(\d+)\.", r"blk.\1.", name)
    for ours, their in _NAMES.items():
        name = name.replace(ours + ".", their + ".")
    return name


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """What convert_hf_to_gguf.py does to q and k of Llama models, so that neighbours are rotated."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def blocks(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a type that gguf cannot quantize to, whose scales (float16, wherever a block has them) are finite."""
    rows = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    return rng.integers(0, 0x38, rows, dtype=np.uint8)  # no byte is the upper half of a float16 that is 0.5 or more


def put(path: Path, cfg: LlamaConfig, tensors: dict[str, torch.Tensor], kind: Kind = Kind.F32, change=None, **metadata) -> Path:
    """Write a file. kind: of the matrices; change: edits {key of the metadata: value}, None to leave one out."""
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "llama.block_count": cfg.layers, "llama.context_length": cfg.max_length, "llama.embedding_length": cfg.width,
        "llama.feed_forward_length": cfg.mlp_width, "llama.attention.head_count": cfg.heads,
        "llama.attention.head_count_kv": cfg.kv_heads, "llama.rope.dimension_count": cfg.width // cfg.heads,
        "llama.rope.freq_base": float(cfg.rope_theta), "llama.attention.layer_norm_rms_epsilon": float(cfg.eps),
    } | metadata | (change or {})  # fmt: skip
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        elif value is not None:
            add[type(value)](key, value)
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        value = tensor.numpy()
        if (heads := {"q": cfg.heads, "k": cfg.kv_heads}.get((re.findall(r"attn\.([qk])_proj", name) or " ")[0])) is not None:
            value = permuted(value, heads)
        if value.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(theirs(name), np.ascontiguousarray(value))
        elif kind.name.endswith("_K"):
            writer.add_tensor(theirs(name), blocks(kind, value.shape, rng), raw_dtype=kind)
        else:
            writer.add_tensor(theirs(name), gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_metadata(folder: Path) -> dict:
    """The tokenizer of `originals.put_tokenizer`, as in Vicuna's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(originals.sentencepiece_model())
    pieces = SentencePieceExtractor(str(folder / "tokenizer.model")).proto.pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def byte_level_metadata(folder: Path, pre: str = "smollm") -> dict:
    """The tokenizer of `handmade.byte_level_tokenizer`, with ChatML, as in SmolLM2's files."""
    folder.mkdir(parents=True, exist_ok=True)
    handmade.byte_level_tokenizer(folder)
    values = json.loads((folder / "base.json").read_text())
    tokens = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), 512)],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * (512 - len(tokens)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in values["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
