"""Sentencepiece models like Llama's, from a tokenizer.model or from a GGUF file, as content of a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mimo_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, UNUSED, _BYTE = 1, 2, 3, 5, 6  # types of pieces
SPECIAL_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # of added tokens


class VocabularyError(UserError):
    """A tokenizer that is missing, that cannot be converted, or that does not fit the rows of its model."""


class Piece(NamedTuple):
    """One entry of a vocabulary."""

    id: int
    text: str
    score: float
    type: int


def read_sentencepiece(path: Path, added: Mapping[str, int]) -> dict:
    """A tokenizer.model as content of a tokenizer.json; see `from_pieces`. Raises VocabularyError for one that is not like Llama's."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        proto = SentencePieceExtractor(str(path)).proto
    except Exception as error:  # protobuf has its own error types
        raise VocabularyError(f"{path}: is not a sentencepiece model ({type(error).__name__}); fetch it again") from None
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    like_llama = (
        trainer.model_type == 2
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and normalizer.name == "identity"
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
    )
    pieces = [Piece(i, piece.piece, piece.score, piece.type) for i, piece in enumerate(proto.pieces)]
    return from_pieces(path, pieces, added, like_llama)


def from_pieces(path: Path, pieces: Sequence[Piece], added: Mapping[str, int], like_llama: bool) -> dict:
    """Content of a tokenizer.json that encodes every text to the same ids as sentencepiece does with these pieces. added: {token: id} of
    further tokens, which text must not become. like_llama: whether the settings of the model are those of Llama's; if not, or if the
    pieces are of another kind, VocabularyError is raised, which names `path`.

    Spaces become "▁", one is added before the text, and nothing else is normalised. Neighbours are merged in the order of the scores of
    the pieces that they form, highest first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {f"<unused_{piece.id}>" if piece.type == UNUSED else piece.text: piece.id for piece in pieces}
    normal = {piece.text: piece.score for piece in pieces if piece.type == _NORMAL and piece.text not in added}
    pairs = [(text[:i], text[i:]) for text in normal for i in range(1, len(text)) if text[:i] in normal and text[i:] in normal]
    merged = {left + right for left, right in pairs}
    kinds = {piece.type for piece in pieces}
    if not like_llama or not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, UNUSED, _BYTE} or len({normal[text] for text in merged}) != len(merged):
        raise VocabularyError(
            f"{path}: is not a sentencepiece model like Llama's (BPE with byte fallback, a distinct score for every piece, identity "
            "normalisation, a space before the text, spaces kept unchanged); name a tokenizer.json of the same vocabulary with "
            "--config.tokenizer=FILE"
        )
    pairs.sort(key=lambda pair: (-normal["".join(pair)], len(pair[0])))
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([piece.text for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)])
    values = json.loads(backend.to_str())
    known = {token["content"] for token in values["added_tokens"]}
    for content, i in added.items():
        if content not in known:
            values["model"]["vocab"].pop(content, None)
            values["added_tokens"].append({"id": i, "content": content, **SPECIAL_FLAGS})
    return values
