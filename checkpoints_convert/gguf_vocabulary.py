"""The tokenizer in the metadata of a GGUF file, as content of a tokenizer.json that encodes every text to the same ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.gguf_file import open_gguf
from checkpoints_convert.sentencepiece_vocabulary import SPECIAL_FLAGS, Piece, VocabularyError, from_pieces

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # token types, those of sentencepiece

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
# Value of tokenizer.ggml.pre -> how text is split into words within which bytes are merged: as in GPT-2, the same with single digits, or
# as in Llama 3, which also takes a whole word that is in the vocabulary without merging.
_PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2",), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
}


def tokenizer_of(path: Path) -> dict:
    """Content of a tokenizer.json for the GGUF file at `path`. Raises VocabularyError for a model or pre-tokenizer that is not known."""
    metadata = open_gguf(path).metadata
    model = metadata.get("tokenizer.ggml.model")
    if model not in _BUILDERS:
        raise VocabularyError(
            f"{path}: tokenizer.ggml.model is {model}, known are {', '.join(_BUILDERS)}; name a tokenizer.json of the same vocabulary with "
            "--config.tokenizer=FILE"
        )
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type", [])
    if not tokens or len(types) != len(tokens):
        raise VocabularyError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens; fetch the file again")
    return _BUILDERS[model](path, metadata, tokens, types)


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict:
    """Byte-level BPE. Tokens of control and of the user's definition represent no text; unused ones are left out."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS:
        raise VocabularyError(
            f"{path}: tokenizer.ggml.pre is {name}, known are {', '.join(_PRE_TOKENIZERS)}; name a tokenizer.json of the same vocabulary "
            "with --config.tokenizer=FILE"
        )
    splits = _PRE_TOKENIZERS[name]
    added = {i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    opens = metadata.get("tokenizer.ggml.add_bos_token", splits is _LLAMA3) and bos is not None
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **SPECIAL_FLAGS} for i in sorted(added)],
        "normalizer": None,
        "pre_tokenizer": splits,
        "post_processor": _opened_by(tokens[bos], bos) if opens else None,
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", [])],
            "ignore_merges": splits is _LLAMA3,
        },
    }


def _opened_by(token: str, number: int) -> dict:
    """The post-processor that puts a token before every text."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}}]
    text = [[{"Sequence": {"id": name, "type_id": kind}}] for kind, name in enumerate("AB")]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": first + text[0], "pair": first + text[0] + first + text[1], "special_tokens": special}


def _sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict:
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise VocabularyError(f"{path}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens; fetch the file again")
    added = {tokens[i]: i for i, kind in enumerate(types) if kind == _USER_DEFINED}
    pieces = [Piece(i, text, scores[i], types[i]) for i, text in enumerate(tokens) if types[i] != _USER_DEFINED]
    spaces = metadata.get("tokenizer.ggml.add_space_prefix", True) and not metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    return from_pieces(path, pieces, added, like_llama=spaces)


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
