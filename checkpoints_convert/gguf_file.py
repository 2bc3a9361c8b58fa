"""GGUF files of Llama models, as llama.cpp's converter writes them: their tensors under the names of transformers, and their settings
in the terms of transformers' config.json.

file = open_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
file.kinds["model.norm.weight"]              # (dtype, shape), from the header alone
file.read("model.norm.weight")               # an array; quantized tensors are dequantized to float32 when they are read
file.metadata["tokenizer.ggml.model"]        # a value of the file's metadata
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.rows import EMBEDDING_KEY, HEAD_KEY
from mimo_jax.errors import UserError

MAGIC = b"GGUF"  # the first bytes of a file


class GgufError(UserError):
    """A GGUF file that cannot be read or converted; the message names it and the remedy."""


# Name in the file -> name in transformers. Tensors that no row matches keep their names, and are then left over.
_NAMES = (
    (r"^token_embd\.weight$", EMBEDDING_KEY),
    (r"^output\.weight$", HEAD_KEY),
    (r"^output_norm\.", "model.norm."),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.attn_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)
# Tensor types that are read as they are, and those that gguf dequantizes.
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Key of the metadata, after "llama." -> key of config.json. Other keys keep their names and are then unknown settings.
_SETTINGS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}


class GgufFile:
    """One file. kinds: {name in transformers: (dtype, shape)}; metadata: {key: value}. Raises GgufError for a damaged file, an
    architecture other than Llama's, a part of a split model, and tensors of an unsupported type."""

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise GgufError(f"{path}: is a GGUF file, but gguf is not installed; pip install gguf") from None
        try:
            reader = GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # damaged bytes make the reader raise almost any type of exception
            if isinstance(error, MemoryError | OSError):
                raise
            reason = "".join(c for c in f"{type(error).__name__} {error}".splitlines()[0][:120] if c.isprintable())
            raise GgufError(f"{path}: is not a GGUF file, or is truncated or damaged ({reason}); fetch it again") from None
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise GgufError(f"{path}: is a model of architecture {architecture}; only those of architecture llama can be converted")
        if reader.byte_order != "I":
            raise GgufError(f"{path}: is big-endian; fetch the little-endian file")
        if self.metadata.get("split.count", 0) > 1:
            raise GgufError(f"{path}: is one part of a split model; join the parts with llama-gguf-split --merge")
        known = (*_PLAIN, *_QUANTIZED)
        wrong = {tensor.tensor_type.name: tensor.name for tensor in reader.tensors if tensor.tensor_type.name not in known}
        if wrong:
            named = ", ".join(f"{kind} ({name})" for kind, name in sorted(wrong.items()))
            raise GgufError(f"{path}: has tensors of type {named}; give a file of the types {', '.join(known)}")
        self.path = path
        self._tensors = {_renamed(tensor.name): tensor for tensor in reader.tensors}
        self.kinds = {
            key: (np.dtype(_PLAIN.get(tensor.tensor_type.name, np.float32)), tuple(reversed(tensor.shape.tolist())))
            for key, tensor in self._tensors.items()
        }

    def read(self, key: str) -> np.ndarray:
        """A tensor by its name in transformers, in the layout of transformers."""
        from gguf.quants import dequantize

        tensor, (dtype, shape) = self._tensors[key], self.kinds[key]
        plain = tensor.tensor_type.name in _PLAIN
        value = tensor.data.view(dtype).reshape(shape) if plain else dequantize(tensor.data, tensor.tensor_type)
        projection = re.search(r"\.self_attn\.([qk])_proj\.", key)
        return _unpermuted(value, self._heads(projection[1])) if projection else value

    def _heads(self, projection: str) -> int:
        heads = self.metadata["llama.attention.head_count"]
        return heads if projection == "q" else self.metadata.get("llama.attention.head_count_kv", heads)

    def settings(self) -> dict[str, Any]:
        """The settings of the model in the terms of transformers' config.json; unknown ones keep the keys of the metadata."""
        found = {key: value for key, value in self.metadata.items() if key.startswith("llama.")}
        made: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": HEAD_KEY not in self.kinds}
        for key, value in found.items():
            made[_SETTINGS.get(key.removeprefix("llama."), key)] = _shortest(value)
        rotated = made.pop("llama.rope.dimension_count", None)
        if rotated:
            made["partial_rotary_factor"] = rotated * made["num_attention_heads"] / made["hidden_size"]
        values = made.pop("llama.attention.value_length", None)
        if values and values != made.get("head_dim", values):
            made["llama.attention.value_length"] = values
        kind, scale = made.pop("llama.rope.scaling.type", "none"), made.pop("llama.rope.scale_linear", 1.0)
        if kind != "none" or scale != 1.0:
            made["rope_scaling"] = {"type": kind, "factor": made.pop("llama.rope.scaling.factor", scale)}
        return made


@functools.lru_cache(maxsize=2)
def _opened(path: Path, size: int, changed: int) -> GgufFile:
    return GgufFile(path)


def open_gguf(path: Path) -> GgufFile:
    """The file at `path`; its header, which holds the vocabulary, is parsed once for all that reads it."""
    about = path.stat()
    return _opened(path, about.st_size, about.st_mtime_ns)


def is_gguf(path: Path) -> bool:
    """Whether a path is a file in this format, by its first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _unpermuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * K, …] in the order of transformers, in which dimension i of a head is rotated with i + K/2. llama.cpp
    rotates neighbours and its converter has reordered the rows of Llama models so that 2i and 2i + 1 are such a pair."""
    return value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _shortest(value: Any) -> Any:
    """A float32 with as few digits as it needs: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
