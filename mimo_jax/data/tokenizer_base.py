"""What every tokenizer does: ids of plain text and back, and the grounding tokens behind the base vocabulary.

A file holds `model.llm.vocab_size` base ids, then the grounding tokens: `<p>`, `</p>`, `<SEG>`, or `<SEG>` alone. Text never
becomes a control token: added tokens are taken out of the encoder, so a user who types "<SEG>" or "</s>" is read letter by
letter, and control tokens are put in by `conversation.py` alone, by id. Every text is preceded by one space, which decoding takes
off again; `continued=True` encodes text that goes on in the middle of a line, without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mimo_jax.errors import UserError
from mimo_jax.model_config import GROUNDING_TOKENS, ModelConfig


class TokenizerError(UserError):
    """A tokenizer file that cannot serve; the message names the file and the remedy."""


class Tokenizer(ABC):
    """Reader of a tokenizer.json with a BPE model; `load_tokenizer` chooses the kind.

    vocab_size: base ids V0. grounding: names of the ids from V0 on. p_open, p_close (None where they are not among these), seg.
    bos (None where the file says of none), eos; pad is 0. control: name -> id of the base's ids that carry no text. fingerprint:
    SHA-256 of the file. Raises TokenizerError if the file is not of this kind, if the grounding tokens do not stand at its end, or
    if it is not that of `model`.
    """

    pad = 0
    dummy_prefix: ClassVar[bool]  # whether this kind begins every separate piece of text with a space
    bos: int | None
    eos: int

    def __init__(self, path: str | os.PathLike, model: ModelConfig | None = None):
        self.path = str(path)
        values, raw = read_file(path)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        ids = token_ids(values)
        self.check_kind(ids)
        base = 1 + max(i for token, i in ids.items() if token not in GROUNDING_TOKENS)
        found, all_three, alone = [ids.get(token) for token in GROUNDING_TOKENS], [base, base + 1, base + 2], [None, None, base]
        if found not in (all_three, alone):
            raise TokenizerError(
                f"{path}: {', '.join(GROUNDING_TOKENS)} have the ids {found}, not {all_three} or {alone}, the first after "
                "the base vocabulary; write the file with add_grounding"
            )
        self.vocab_size = base
        self.p_open, self.p_close, self.seg = found
        self.grounding = tuple(token for token in GROUNDING_TOKENS if token in ids)
        if model is not None:
            self._check(model)

        added = [t["content"] for t in values.get("added_tokens", []) if t["content"] not in self.grounding]
        self.control = {token: ids[token] for token in (*self.special(), *added) if token in ids}
        # Bytes of each base id; nothing for ids that carry no text.
        self._bytes = [b""] * base
        for token, i in ids.items():
            if i < base and token not in self.control and not token.startswith("<unused_"):
                self._bytes[i] = self.token_bytes(token)
        merges = [merge for merge in values["model"]["merges"] if _merged(merge) not in self.control]
        model_alone = {**values["model"], "merges": merges}  # nor does text become one by a merge: "</" and "s>"
        without = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self.build({**values, "model": model_alone, **without}, values)

    @abstractmethod
    def check_kind(self, ids: dict[str, int]) -> None:
        """Raise TokenizerError for a vocabulary (token -> id) that lacks what this kind needs."""

    @abstractmethod
    def special(self) -> tuple[str, ...]:
        """Control tokens of this kind that need not be among a file's added tokens."""

    @abstractmethod
    def token_bytes(self, token: str) -> bytes:
        """The UTF-8 bytes that a token of the vocabulary stands for."""

    @abstractmethod
    def build(self, plain: dict, values: dict) -> None:
        """Make the encoder from `plain`, the file without added tokens and post-processing, and set bos and eos; values: the file."""

    @abstractmethod
    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of plain text, never a control token. `decode(encode(x)) == x` for any x without lone surrogates (read as "?"), save
        where the file normalises Unicode. `continued`: no space is put before the text."""

    def __len__(self) -> int:
        """Ids in all, grounding tokens included."""
        return self.vocab_size + len(self.grounding)

    def _check(self, model: ModelConfig) -> None:
        if self.vocab_size != model.llm.vocab_size:
            raise TokenizerError(
                f"{self.path}: has {self.vocab_size} base ids, config.model.llm.vocab_size is {model.llm.vocab_size}; make them equal"
            )
        if self.grounding != model.grounding_tokens():
            remedy = "bare" if self.grounding == ("<SEG>",) else "inside or after"
            raise TokenizerError(
                f"{self.path}: its grounding tokens are {', '.join(self.grounding)}, those of config.model.seg_position="
                f"{model.seg_position} are {', '.join(model.grounding_tokens())}; set config.model.seg_position={remedy}"
            )

    def id_of(self, name: str, setting: str = "data.image_tokens") -> int:
        """Id of a control token of the base vocabulary; TokenizerError blames the setting of the config that asks for it."""
        if name not in self.control:
            raise TokenizerError(
                f"config.{setting}: {name} is no control token of the base vocabulary of {self.path}; "
                f"name two of {', '.join(self.control)}, or none"
            )
        return self.control[name]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with grounding tokens written out where they stand; other control tokens say nothing."""
        return "".join(p if isinstance(p, str) else self.grounding[p - self.vocab_size] for p in self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str | int]:
        """Runs of text between grounding tokens, and those tokens as ids: a text that merely spells a tag stays text."""
        pieces: list[str | int] = []
        run = bytearray()
        for i in ids:
            if i < self.vocab_size:
                run += self._bytes[i]
                continue
            if run:
                pieces.append(run.decode("utf-8", "replace"))
                run = bytearray()
            pieces.append(int(i))
        if run:
            pieces.append(run.decode("utf-8", "replace"))
        if pieces and isinstance(pieces[0], str):
            pieces[0] = pieces[0].removeprefix(" ")
        return pieces


def read_file(path: str | os.PathLike) -> tuple[dict, bytes]:
    try:
        raw = Path(path).read_bytes()
        values = json.loads(raw)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}); give a tokenizer.json") from None
    except ValueError:
        raise TokenizerError(f"{path}: is not JSON; give a tokenizer.json") from None
    kind = values.get("model", {}).get("type") if isinstance(values, dict) else None
    if kind != "BPE":
        raise TokenizerError(f"{path}: holds a model of type {kind}; a tokenizer.json with a BPE model is needed")
    return values, raw


def _merged(merge: str | Sequence[str]) -> str:
    """What a merge rule makes; files of before tokenizers 0.20 write it as one text with a space."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def token_ids(values: dict) -> dict[str, int]:
    return {**values["model"]["vocab"], **{t["content"]: t["id"] for t in values.get("added_tokens", [])}}
