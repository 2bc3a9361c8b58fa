"""Tokenizers: loading a tokenizer.json of any kind, training one on a corpus, and adding grounding tokens to one that lacks them."""

from __future__ import annotations

import copy
import json
import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mimo_jax import files
from mimo_jax.data.byte_level_bpe import ByteLevelBpe, is_byte_level
from mimo_jax.data.sentencepiece_bpe import BYTES, SPACE, SPECIAL, SentencePieceBpe
from mimo_jax.data.tokenizer_base import Tokenizer, TokenizerError, read_file, token_ids
from mimo_jax.model_config import GROUNDING_TOKENS, ModelConfig

__all__ = ["Tokenizer", "TokenizerError", "add_grounding", "load_tokenizer", "train_tokenizer"]

_ALPHABET = string.ascii_letters + string.digits + string.punctuation + SPACE


def load_tokenizer(path: str | os.PathLike, model: ModelConfig | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json, whose content determines the class. Raises TokenizerError as `Tokenizer` does."""
    kind = ByteLevelBpe if is_byte_level(read_file(path)[0]) else SentencePieceBpe
    return kind(path, model)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike, tokens: Sequence[str] = GROUNDING_TOKENS) -> Tokenizer:
    """Train a BPE tokenizer with exactly `vocab_size` base ids on `texts` and write it, with the grounding `tokens`, to `path`.

    Words are split at spaces and around punctuation and digits; a word keeps the space before it, so that a common word is
    one token. Other letters are encoded as bytes. Ids that the corpus does not fill are padded with `<unused_i>`.
    """
    special = [*SPECIAL, *BYTES]
    min_size = len(special) + len(_ALPHABET)
    if vocab_size < min_size:
        raise TokenizerError(f"{path}: a vocabulary of {vocab_size} is too small; config.model.llm.vocab_size must be at least {min_size}")
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # Llama's normalizer; letters outside ASCII would use up a small vocabulary, and control characters must not merge.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=list(_ALPHABET),
        limit_alphabet=len(_ALPHABET),
        show_progress=False,
    )
    backend.train_from_iterator((" ".join("".join(c if c.isprintable() else " " for c in t).split()) for t in texts), trainer)
    values = json.loads(backend.to_str())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in SPECIAL]
    return _write(values, vocab_size, path, tokens)


def add_grounding(
    source: str | os.PathLike | dict, path: str | os.PathLike, vocab_size: int, tokens: Sequence[str] = GROUNDING_TOKENS
) -> Tokenizer:
    """Write the tokenizer.json `source`, a file or its content, to `path`, padded to `vocab_size` base ids and followed by the
    grounding `tokens` (`ModelConfig.grounding_tokens`). Grounding tokens that it already has are moved or removed. Raises
    TokenizerError for any other id from `vocab_size` on."""
    values = copy.deepcopy(source) if isinstance(source, dict) else read_file(source)[0]
    values["added_tokens"] = [t for t in values.get("added_tokens", []) if t["content"] not in GROUNDING_TOKENS]
    return _write(values, vocab_size, path, tokens)


def _write(values: dict, vocab_size: int, path: str | os.PathLike, tokens: Sequence[str]) -> Tokenizer:
    ids = token_ids(values)
    beyond = sorted((i, token) for token, i in ids.items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{token} {i}" for i, token in beyond[:3])
        raise TokenizerError(f"{path}: ids {named} exceed a base vocabulary of {vocab_size}; raise config.model.llm.vocab_size")
    taken = set(ids.values())
    vocab = values["model"]["vocab"]
    vocab.update((f"<unused_{i}>", i) for i in range(vocab_size) if i not in taken)
    values["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda kv: kv[1]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for i, token in enumerate(tokens):
        values["added_tokens"].append({"id": vocab_size + i, "content": token, **flags})
    path = Path(path)
    with files.atomic_write(path) as part:
        part.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    return load_tokenizer(path)
