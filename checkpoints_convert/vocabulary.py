"""The tokenizer of a checkpoint as `tokenizer.json`, and the order of its vocabulary's rows.

In this project the base vocabulary comes first, then the grounding tokens in a fixed order. In the originals they are where their
training code added them: LISA's [SEG] is 32000, before <im_start>. So rows are reordered on import, and back on export.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints_convert.gguf_vocabulary import tokenizer_of
from checkpoints_convert.readers import gguf_of
from checkpoints_convert.sentencepiece_vocabulary import VocabularyError, read_sentencepiece
from mimo_jax.data.byte_level_bpe import is_byte_level

# Names of the grounding tokens in other projects.
ALIASES = {"<p>": ("<p>",), "</p>": ("</p>",), "<SEG>": ("<SEG>", "[SEG]")}
FILES = ("tokenizer.model", "tokenizer.json")


class Vocabulary(NamedTuple):
    """tokenizer: content of a tokenizer.json without grounding tokens, with the ids of this project; order: rows of the original's
    tables, base first; grounding: [original name, original row] of the grounding tokens, empty if the original has none."""

    tokenizer: dict
    order: np.ndarray
    grounding: list[list]

    @property
    def base_size(self) -> int:
        return len(self.order) - len(self.grounding)


def find_tokenizer(folders: Sequence[Path]) -> Path:
    """The first of the paths that is a folder with a tokenizer, or a file that may have one; raises VocabularyError if there is none."""
    for folder in folders:
        if folder.is_file() or any((folder / name).is_file() for name in FILES):
            return folder
    places = ", ".join(map(str, folders)) or "no folder was given"
    raise VocabularyError(
        f"no tokenizer was found ({places}): put the checkpoint's tokenizer.model or tokenizer.json there, or name a tokenizer.json "
        "with --config.tokenizer=FILE"
    )


def read_vocabulary(source: Path, rows: int, tokens: Sequence[str]) -> Vocabulary:
    """The vocabulary of a folder with a tokenizer, of a tokenizer.json or of a GGUF file. rows: number of rows of the model's embedding;
    tokens: the grounding tokens of the configuration (`ModelConfig.grounding_tokens`)."""
    values = _tokenizer_of(source)
    ids = {**values["model"]["vocab"], **{token["content"]: token["id"] for token in values["added_tokens"]}}
    grounding = [next(([name, ids[name]] for name in ALIASES[token] if name in ids), None) for token in tokens]
    names = {name for aliases in ALIASES.values() for name in aliases}
    found = [entry for entry in grounding if entry]
    others = sorted(names & ids.keys() - {entry[0] for entry in found})
    if found and (None in grounding or others):
        has = sorted(names & ids.keys())
        place = "bare" if len(has) == 1 else "inside or after"
        raise VocabularyError(
            f"{source}: has the grounding tokens {', '.join(has)}, the configuration has {', '.join(tokens)}; "
            f"set --config.model.seg_position={place}"
        )
    beyond = sorted((i, token) for token, i in ids.items() if i >= rows)
    if beyond:
        shown = ", ".join(f"{token} {i}" for i, token in beyond[:3])
        raise VocabularyError(f"{source}: {shown} exceed the {rows} rows of the embedding; give the tokenizer of this checkpoint")
    last = [entry[1] for entry in found]
    order = np.array([row for row in range(rows) if row not in last] + last)
    new_ids = {row: i for i, row in enumerate(order[: rows - len(last)].tolist())}
    values["model"]["vocab"] = {token: new_ids[i] for token, i in values["model"]["vocab"].items() if i in new_ids}
    values["added_tokens"] = [token | {"id": new_ids[token["id"]]} for token in values["added_tokens"] if token["id"] in new_ids]
    return Vocabulary(values, order, found)


def _tokenizer_of(source: Path) -> dict:
    """Content of a tokenizer.json: made from the sentencepiece model if there is one, with the tokens that were added to it, or from the
    metadata of a GGUF file."""
    if source.is_file():
        return tokenizer_of(source) if gguf_of(source) else _read_json(source)
    if not (source / "tokenizer.model").is_file():
        return _read_json(source / "tokenizer.json")
    added = _added(source)
    return read_sentencepiece(source / "tokenizer.model", added)


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        dict.keys(values["model"]["vocab"])
        # A byte-level file names the token before a text there alone; that of a sentencepiece model is <s>, however the file is made.
        opening = values.get("post_processor") if is_byte_level(values) else None
        return values | {"added_tokens": values.get("added_tokens", []), "post_processor": opening}
    except (ValueError, KeyError, TypeError):
        raise VocabularyError(f"{path}: is not a tokenizer.json with a BPE model; give the checkpoint's own") from None


def _added(folder: Path) -> dict[str, int]:
    """Tokens that were added to a sentencepiece model, as transformers 4 (added_tokens.json) and later ones record them."""
    added: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == "tokenizer_config.json":
                values = {entry["content"]: i for i, entry in values.get("added_tokens_decoder", {}).items()}
            added |= {token: int(i) for token, i in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VocabularyError(f"{folder / name}: is damaged; fetch it again") from None
    return added
