"""The number of tokens of every sample of a source, which the order of batches needs; counted once, and kept next to the records.

DATA/tokens/KEY/SPLIT-00000.npy   int32: tokens of those samples of records 0 … 4095 that may not fit the first bucket;
                                  1 for a sample that cannot be rendered

Axis letters: m samples of a source.

KEY is a hash of the samples, the tokenizer and every setting that determines a sequence. The processes of a run share the files that are
missing. A process reads those of the others if they share a file system, and otherwise counts these samples itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mimo_jax import distributed, files
from mimo_jax.chat_templates import CHAT_TEMPLATES
from mimo_jax.config import Config
from mimo_jax.data.conversation import encode_user_turn, render
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.loading.split_conversations import SplitConversations
from mimo_jax.data.records import RecordFolder, samples_digest
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError

Source = RecordFolder | Manifest | SplitConversations
RECORDS = 4096  # of a file
_VERSION = 1  # of the way from a sample to its tokens: increment it when that changes


def token_counts(source: Source, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """int32 [m]: the tokens of each sample; for one that fits the first of `config.data.buckets` even with one token per byte of its
    texts, that upper bound. If there are several processes, all must call it."""
    index = source.index
    counts = (index.text_bytes + token_overhead(config, tokenizer)).astype(np.int32)
    long = counts > config.buckets()[0]
    if len(config.buckets()) == 1 or not long.any():
        return counts
    folder = _folder(source, tokenizer, config)
    numbers = np.unique(np.repeat(np.arange(len(source)), np.diff(index.first))[long] // RECORDS).tolist()
    parts = {number: slice(index.first[number * RECORDS], index.first[min((number + 1) * RECORDS, len(source))]) for number in numbers}
    found: dict[int, np.ndarray] = {}

    def read() -> list[int]:
        """Read the files that exist; returns the numbers of those that are missing."""
        for number in numbers:
            if number not in found and (values := _load(folder, source, number, np.count_nonzero(long[parts[number]]))) is not None:
                found[number] = values
        return [number for number in numbers if number not in found]

    def count(wanted: Sequence[int]) -> None:
        for number in tqdm(wanted, desc=f"count the tokens of {source.path}", unit_scale=RECORDS, unit=" images", disable=None):
            found[number] = _count(source, tokenizer, config, long, number)
            _save(folder, source, number, found[number])

    count(read()[jax.process_index() :: jax.process_count()])
    distributed.gather(None)
    count(read())  # of other processes that do not write to the same file system
    for number, part in parts.items():
        counts[part][long[part]] = found[number]
    return counts


def token_overhead(config: Config, tokenizer: Tokenizer) -> int:
    """Upper bound on the tokens of a sample in addition to one per byte of its texts."""
    # A question of one letter is used, because after an image token the "▁" before the question is a separate token.
    turns = [len(encode_user_turn(tokenizer, config, "?", turn, turn == 0)[0]) for turn in range(config.model.max_turns)]
    grounding = len(config.model.grounding_tokens()) * config.model.max_segs
    return sum(turns) + 2 * len(turns) + grounding  # "▁" and </s> of each answer


def _count(source: Source, tokenizer: Tokenizer, config: Config, long: np.ndarray, number: int) -> np.ndarray:
    """int32: the tokens of the `long` samples (bool [m]) of the records of a file."""
    records = range(number * RECORDS, min((number + 1) * RECORDS, len(source)))
    first, counts = source.index.first, []
    for record, samples in zip(records, source.samples_of(records), strict=True):
        for sample, wanted in zip(samples, long[first[record] : first[record + 1]], strict=True):
            if wanted:
                try:
                    counts.append(len(render(sample, tokenizer, config).input_ids))
                except UserError:  # the sample will be replaced by padding
                    counts.append(1)
    return np.array(counts, np.int32)


def _folder(source: Source, tokenizer: Tokenizer, config: Config) -> Path | None:
    """Where the counts are kept; None for a manifest, whose samples are made when it is opened."""
    if not source.path.is_dir():
        return None
    model, data, index = config.model, config.data, source.index
    sequence = [model.max_turns, model.max_segs, model.seg_position, model.query_tokens(), config.buckets()[0], config.buckets()[-1]]
    template = [dataclasses.asdict(CHAT_TEMPLATES[data.chat_template]), config.system_prompt(), data.image_tokens]
    about = json.dumps([_VERSION, tokenizer.fingerprint, *sequence, *template, samples_digest(source.path, source.split)])
    samples = b"".join(column.tobytes() for column in (index.ids, index.first, index.text_bytes))
    return source.path / "tokens" / hashlib.sha256(about.encode() + samples).hexdigest()[:16]


def _file(folder: Path, source: RecordFolder | SplitConversations, number: int) -> Path:
    return folder / f"{source.split}-{number:05d}.npy"


def _load(folder: Path | None, source: Source, number: int, size: int) -> np.ndarray | None:
    """The counts of a file; None if it is missing, damaged, or has another number of samples."""
    if folder is None:
        return None
    try:
        values = np.load(_file(folder, source, number), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (size,) and values.dtype == np.int32 else None


def _save(folder: Path | None, source: Source, number: int, values: np.ndarray) -> None:
    """Keep counts for the next run, if the folder of the dataset can be written to."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(_file(folder, source, number)) as part, open(part, "wb") as out:
            np.save(out, values)
