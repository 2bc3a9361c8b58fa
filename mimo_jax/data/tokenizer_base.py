"""The base class of tokenizers: plain text to ids and back, and the grounding tokens after the base vocabulary.

A file has `model.llm.vocab_size` base ids, then the grounding tokens: `<p>`, `</p>`, `<SEG>`, or `<SEG>` alone. Text never
becomes a control token: added tokens are removed from the encoder, so that "<SEG>" or "</s>" in a user's text is encoded as its
letters, and only `conversation.py` inserts control tokens, by id. Every text is preceded by one space, which decoding removes;
`continued=True` encodes text that continues in the middle of a line, without that space.
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
    """A tokenizer file that cannot be used; the message names the file and the remedy."""


class Tokenizer(ABC):
    """Reader of a tokenizer.json with a BPE model; `load_tokenizer` chooses the subclass.

    vocab_size: number V0 of base ids. grounding: names of the ids from V0 on. p_open, p_close (None if they are not among these), seg.
    bos (None if the file has none), eos; pad is 0. control: name -> id of base ids that represent no text. fingerprint:
    SHA-256 of the file. Raises TokenizerError if the file is not of this kind, if the grounding tokens are not at its end, or
    if it does not fit `model`.
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
            self._check_model(model)

        added = [t["content"] for t in values.get("added_tokens", []) if t["content"] not in self.grounding]
        self.control = {token: ids[token] for token in (*self.special(), *added) if token in ids}
        # The bytes of each base id; empty for ids that represent no text.
        self._bytes = [b""] * base
        for token, i in ids.items():
            if i < base and token not in self.control and not token.startswith("<unused_"):
                self._bytes[i] = self.token_bytes(token)
        merges = [merge for merge in values["model"]["merges"] if _merged(merge) not in self.control]
        model_alone = {**values["model"], "merges": merges}  # text must not become a control token by a merge either: "</" and "s>"
        without = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self.build({**values, "model": model_alone, **without}, values)

    @abstractmethod
    def check_kind(self, ids: dict[str, int]) -> None:
        """Raise TokenizerError for a vocabulary (token -> id) that lacks tokens that this kind needs."""

    @abstractmethod
    def special(self) -> tuple[str, ...]:
        """Control tokens of this kind that need not be among a file's added tokens."""

    @abstractmethod
    def token_bytes(self, token: str) -> bytes:
        """The UTF-8 bytes that a token of the vocabulary represents."""

    @abstractmethod
    def build(self, plain: dict, values: dict) -> None:
        """Make the encoder from `plain`, the file's content without added tokens and post-processing, and set bos and eos; values: the
        file's whole content."""

    @abstractmethod
    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of plain text, without control tokens. `decode(encode(x)) == x` for any x without lone surrogates (encoded as "?"), unless
        the file normalises Unicode or lacks bytes of a letter. `continued`: no space is added before the text."""

    def __len__(self) -> int:
        """Total number of ids, including grounding tokens."""
        return self.vocab_size + len(self.grounding)

    def _check_model(self, model: ModelConfig) -> None:
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
        """Id of a control token of the base vocabulary; TokenizerError names the config setting that requires it."""
        if name not in self.control:
            raise TokenizerError(
                f"config.{setting}: {name} is not a control token of the base vocabulary of {self.path}; "
                f"name two of {', '.join(self.control)}, or none"
            )
        return self.control[name]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with grounding tokens written as their names; other control tokens are omitted."""
        return "".join(p if isinstance(p, str) else self.grounding[p - self.vocab_size] for p in self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str | int]:
        """Pieces of text between grounding tokens, and those tokens as ids, so that text that only spells a tag remains text."""
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
        raise TokenizerError(f"{path}: holds a model of type {kind}; give a tokenizer.json with a BPE model")
    return values, raw


def _merged(merge: str | Sequence[str]) -> str:
    """The token that a merge rule makes; files from before tokenizers 0.20 write the rule as one string with a space."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def token_ids(values: dict) -> dict[str, int]:
    return {**values["model"]["vocab"], **{t["content"]: t["id"] for t in values.get("added_tokens", [])}}
