"""Byte-level BPE: the tokenizers of GPT-2, Llama 3, Qwen and SmolLM."""

from __future__ import annotations

import json
import re

import tokenizers

from mimo_jax.data.tokenizer_base import Tokenizer, TokenizerError

# Names of the end-of-text token; the first that a file has is used. A chat template may end answers with a different token.
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<|im_end|>")


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: letter -> byte. Printable bytes map to themselves, the others to the letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
# Bytes that a file may lack, as SmolLM's does: control characters, and those of no letter that Unicode has assigned.
_RARE = {*range(32), 127, 0xC0, 0xC1, *range(0xF1, 256)} - set(b"\t\n\r")


class ByteLevelBpe(Tokenizer):
    """Text is split into words by the file's pattern, and bytes are merged within words. A letter with a byte that the file lacks is
    encoded as U+FFFD."""

    dummy_prefix = False

    def check_kind(self, ids: dict[str, int]) -> None:
        missing = {byte: letter for letter, byte in _BYTE_OF.items() if letter not in ids}
        if wrong := [letter for byte, letter in missing.items() if byte not in _RARE]:
            raise TokenizerError(f"{self.path}: lacks the bytes {', '.join(wrong[:3])}; give a byte-level BPE with all of them")
        planes = [f"{chr(i << 18)}-{chr(min((i << 18) + 0x3FFFF, 0x10FFFF))}" for i in range(1, 5) if 0xF0 + i in missing]
        lost = "".join([*(re.escape(chr(byte)) for byte in missing if byte < 128), *planes])
        self._lost = re.compile(f"[{lost}]" if lost else r"(?!)")
        self.eos = next((ids[name] for name in _ENDS if name in ids), -1)
        if self.eos < 0:
            raise TokenizerError(f"{self.path}: has no end-of-text token; one of {', '.join(_ENDS)} must be among its tokens")

    def special(self) -> tuple[str, ...]:
        return _ENDS

    def token_bytes(self, token: str) -> bytes:
        if unknown := next((letter for letter in token if letter not in _BYTE_OF), ""):
            raise TokenizerError(f"{self.path}: token {token} has {unknown}, which is not a byte; list it among added_tokens")
        return bytes(_BYTE_OF[letter] for letter in token)

    def build(self, plain: dict, values: dict) -> None:
        self.bos = self.control.get(_opening(values.get("post_processor") or {}))
        # If the file ignores merges, a control token in the vocabulary would be matched as a whole.
        vocab = {token: i for token, i in plain["model"]["vocab"].items() if token not in self.control}
        model = {**plain["model"], "vocab": vocab, "unk_token": None}
        self._backend = tokenizers.Tokenizer.from_str(
            json.dumps({**plain, "model": model, "pre_tokenizer": _without_prefix_space(plain["pre_tokenizer"])})
        )

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        text = self._lost.sub("\ufffd", text.encode("utf-8", "replace").decode())
        return self._backend.encode(text if continued else f" {text}").ids


def is_byte_level(values: dict) -> bool:
    """Whether the content of a tokenizer.json is byte-level, by its pre-tokenizer or decoder."""

    def named(part: dict | None) -> bool:
        if not part:
            return False
        return part.get("type") == "ByteLevel" or any(map(named, [*part.get("pretokenizers", ()), *part.get("decoders", ())]))

    return named(values.get("pre_tokenizer")) or named(values.get("decoder"))


def _opening(processor: dict) -> str:
    """The token that a file's post-processor adds before a text; "" if it adds none."""
    first = next(iter(processor.get("single", ())), {})
    return first.get("SpecialToken", {}).get("id", "") or next(filter(None, map(_opening, processor.get("processors", ()))), "")


def _without_prefix_space(part: dict) -> dict:
    """The pre-tokenizer without its prefix space, which `encode` adds instead."""
    inner = {"pretokenizers": [*map(_without_prefix_space, part["pretokenizers"])]} if "pretokenizers" in part else {}
    return {**part, **inner, **({"add_prefix_space": False} if part["type"] == "ByteLevel" else {})}
