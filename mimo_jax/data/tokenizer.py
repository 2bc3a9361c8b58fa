"""Text to ids and back: a Llama-style tokenizer.json, and one learnt from a corpus.

A file holds `model.llm.vocab_size` base ids, then the grounding tokens: `<p>`, `</p>`, `<SEG>`, or `<SEG>` alone. Text never
becomes a control token: added tokens are taken out of the encoder, so a user who types "<SEG>" or "</s>" is read letter by
letter, and control tokens are put in by `conversation.py` alone, by id. Every text is preceded by one space ("▁"), as Llama's
is, which decoding takes off again; `continued=True` encodes text that goes on in the middle of a line, without it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mimo_jax.config import GROUNDING_TOKENS, ModelConfig
from mimo_jax.errors import UserError

_SPACE = "▁"
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_SPECIAL = ("<unk>", "<s>", "</s>")
_ALPHABET = string.ascii_letters + string.digits + string.punctuation + _SPACE


class TokenizerError(UserError):
    """A tokenizer file that cannot serve; the message names the file and the remedy."""


class Tokenizer:
    """Reader of a tokenizer.json.

    vocab_size: base ids V0. grounding: names of the ids from V0 on. p_open, p_close (None where they are not among these), seg.
    bos, eos; pad is 0. control: name -> id of the base's ids that carry no text. fingerprint: SHA-256 of the file.
    Raises TokenizerError if the file is not Llama-style byte-fallback BPE, if the grounding tokens do not stand at its end, or
    if it is not that of `model`.
    """

    pad = 0

    def __init__(self, path: str | os.PathLike, model: ModelConfig | None = None):
        self.path = str(path)
        values, raw = _read(path)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        ids = _ids(values)
        missing = [t for t in ("<s>", "</s>", _SPACE, *_BYTES) if t not in ids]
        if missing:
            raise TokenizerError(f"{path}: lacks {', '.join(missing[:3])}; a Llama-style BPE with byte fallback is needed")
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
        self.bos, self.eos = ids["<s>"], ids["</s>"]

        # Bytes of each base id; nothing for ids that carry no text.
        added = [t["content"] for t in values.get("added_tokens", []) if t["content"] not in self.grounding]
        self.control = {token: ids[token] for token in (*_SPECIAL, *added) if token in ids}
        self._bytes = [b""] * base
        for token, i in ids.items():
            if i < base and token not in self.control and not token.startswith("<unused_"):
                self._bytes[i] = token.replace(_SPACE, " ").encode()
        for i, token in enumerate(_BYTES):
            self._bytes[ids[token]] = bytes([i])
        # U+2581 itself would come back as a space, so it is spelt in bytes.
        self._space_ids = [ids[_BYTES[b]] for b in _SPACE.encode()]

        merges = [merge for merge in values["model"]["merges"] if _merged(merge) not in self.control]
        model_alone = {**values["model"], "merges": merges}  # nor does text become one by a merge: "</" and "s>"
        plain = {**values, "model": model_alone, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
        # A line feed never merges with its neighbours, so what follows one is encoded as in the middle of a line.
        self._anchor = [ids[_SPACE], ids[_BYTES[10]]]
        if self._backend.encode("\n").ids != self._anchor:
            raise TokenizerError(f"{path}: a line feed is encoded as {self._backend.encode(chr(10)).tokens}, not as one byte after '▁'")

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
                f"{self.path}: its grounding tokens are {', '.join(self.grounding)}, those of config.model.seg_place={model.seg_position} "
                f"are {', '.join(model.grounding_tokens())}; set config.model.seg_place={remedy}"
            )

    def id_of(self, name: str) -> int:
        """Id of a control token of the base vocabulary, one of `config.data.image_tokens`."""
        if name not in self.control:
            raise TokenizerError(
                f"config.data.image_tokens: {name} is no control token of the base vocabulary of {self.path}; "
                f"name two of {', '.join(self.control)}, or none"
            )
        return self.control[name]

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of plain text, never a control token. `decode(encode(x)) == x` for any x without lone surrogates (read as "?").
        `continued`: no space is put before the text."""
        text = text.encode("utf-8", "replace").decode()
        first, *rest = text.split(_SPACE)
        ids = self._continue(first) if continued else self._backend.encode(first).ids
        if rest and not continued and not first:
            ids = self._anchor[:1]
        for part in rest:
            ids = ids + self._space_ids + self._continue(part)
        return ids

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

    def _continue(self, text: str) -> list[int]:
        return self._backend.encode("\n" + text).ids[len(self._anchor) :]


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike, tokens: Sequence[str] = GROUNDING_TOKENS) -> Tokenizer:
    """Learn a BPE tokenizer of exactly `vocab_size` base ids from `texts` and write it, with the grounding `tokens`, to `path`.

    Words are split at spaces and around punctuation and digits, a word keeps the space before it, so that a common word is
    one token. Bytes stand in for any other letter. What the corpus does not fill is padded with `<unused_i>`.
    """
    special = [*_SPECIAL, *_BYTES]
    least = len(special) + len(_ALPHABET)
    if vocab_size < least:
        raise TokenizerError(f"{path}: a vocabulary of {vocab_size} is too small; config.model.llm.vocab_size must be at least {least}")
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # Llama's normalizer; letters outside ASCII would use up a small vocabulary, and control characters must not merge.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
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
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in _SPECIAL]
    return _write(values, vocab_size, path, tokens)


def add_grounding(
    source: str | os.PathLike | dict, path: str | os.PathLike, vocab_size: int, tokens: Sequence[str] = GROUNDING_TOKENS
) -> Tokenizer:
    """Write the tokenizer.json `source`, a file or its content, to `path`, padded to `vocab_size` base ids and followed by the
    grounding `tokens` (`ModelConfig.grounding_tokens`). Any that it already has are moved or taken out; another id from
    `vocab_size` on is an error."""
    values = copy.deepcopy(source) if isinstance(source, dict) else _read(source)[0]
    values["added_tokens"] = [t for t in values.get("added_tokens", []) if t["content"] not in GROUNDING_TOKENS]
    return _write(values, vocab_size, path, tokens)


def _write(values: dict, vocab_size: int, path: str | os.PathLike, tokens: Sequence[str]) -> Tokenizer:
    ids = _ids(values)
    beyond = sorted((i, token) for token, i in ids.items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{token} {i}" for i, token in beyond[:3])
        raise TokenizerError(f"{path}: ids {named} lie beyond a base vocabulary of {vocab_size}; raise config.model.llm.vocab_size")
    taken = set(ids.values())
    vocab = values["model"]["vocab"]
    vocab.update((f"<unused_{i}>", i) for i in range(vocab_size) if i not in taken)
    values["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda kv: kv[1]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for i, token in enumerate(tokens):
        values["added_tokens"].append({"id": vocab_size + i, "content": token, **flags})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    return Tokenizer(path)


def _read(path: str | os.PathLike) -> tuple[dict, bytes]:
    try:
        raw = Path(path).read_bytes()
        values = json.loads(raw)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise TokenizerError(f"{path}: is not JSON; give a tokenizer.json") from None
    kind = values.get("model", {}).get("type") if isinstance(values, dict) else None
    if kind != "BPE":
        raise TokenizerError(f"{path}: holds a model of type {kind}; a tokenizer.json with a BPE model is needed")
    return values, raw


def _merged(merge: str | Sequence[str]) -> str:
    """What a merge rule makes; files of before tokenizers 0.20 write it as one text with a space."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _ids(values: dict) -> dict[str, int]:
    return {**values["model"]["vocab"], **{t["content"]: t["id"] for t in values.get("added_tokens", [])}}
