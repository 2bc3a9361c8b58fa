"""SentencePiece-style BPE with byte fallback: the tokenizers of Llama 1 and 2, Vicuna and Mistral, and those of `train_tokenizer`."""

from __future__ import annotations

import json

import tokenizers

from mimo_jax.data.tokenizer_base import Tokenizer, TokenizerError

SPACE = "▁"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ("<unk>", "<s>", "</s>")


class SentencePieceBpe(Tokenizer):
    """Words begin with "▁"; letters that are not in the vocabulary are encoded as bytes `<0x00>` to `<0xFF>`."""

    dummy_prefix = True

    def check_kind(self, ids: dict[str, int]) -> None:
        if missing := [t for t in ("<s>", "</s>", SPACE, *BYTES) if t not in ids]:
            raise TokenizerError(f"{self.path}: lacks {', '.join(missing[:3])}; give a Llama-style BPE with byte fallback")
        self.bos, self.eos = ids["<s>"], ids["</s>"]
        self._space_ids = [ids[BYTES[b]] for b in SPACE.encode()]  # U+2581 itself would be decoded as a space, so it is encoded as bytes
        self._anchor = [ids[SPACE], ids[BYTES[10]]]

    def special(self) -> tuple[str, ...]:
        return SPECIAL

    def token_bytes(self, token: str) -> bytes:
        return bytes([_BYTE_OF[token]]) if token in _BYTE_OF else token.replace(SPACE, " ").encode()

    def build(self, plain: dict, values: dict) -> None:
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
        # A line feed never merges with its neighbours, so text after one is encoded as in the middle of a line.
        if self._backend.encode("\n").ids != self._anchor:
            tokens = self._backend.encode("\n").tokens
            raise TokenizerError(f"{self.path}: a line feed is encoded as {tokens}, but must be one byte after '▁'")

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        first, *rest = text.split(SPACE)
        ids = self._continue(first) if continued else self._backend.encode(first).ids
        if rest and not continued and not first:
            ids = self._anchor[:1]
        for part in rest:
            ids = ids + self._space_ids + self._continue(part)
        return ids

    def _continue(self, text: str) -> list[int]:
        return self._backend.encode("\n" + text).ids[len(self._anchor) :]


_BYTE_OF = {token: value for value, token in enumerate(BYTES)}
