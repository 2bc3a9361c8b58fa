"""Reads GLaMM's grounded captions: [{file_name, caption, groundings: {phrase: {token_positives, rle_masks}}}], spans in characters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pycocotools import mask as coco

from mimo_jax.data.builder.entities import canonical
from mimo_jax.data.builder.items import MaskRef
from mimo_jax.data.builder.readers.conversations import Conversations, Entry, texts
from mimo_jax.data.builder.readers.index_files import entries
from mimo_jax.data.builder.readers.reader import split_of
from mimo_jax.data.records import DataError

ASKED = "Describe the image, and outline what you name."


class Gcg(Conversations):
    name = "gcg"
    expected_layout = "a .json or .jsonl file of captions with groundings, or a folder with some"

    def open(self) -> None:
        self.indices = [self.path] if self.path.is_file() else sorted([*self.path.glob("*.json"), *self.path.glob("*.jsonl")])
        if not self.indices or self.indices[0].suffix not in (".json", ".jsonl"):
            raise self.layout_error()
        self.required_modality()
        self.images = self.find_folder("images", "imgs")

    def entries(self) -> Iterator[Entry]:
        for index in self.indices:
            for number, entry in enumerate(entries(index), 1):
                where = f"{index}, entry {number}"
                file, caption = texts(where, entry, "file_name", "caption")
                groundings = entry.get("groundings")
                if not isinstance(groundings, dict):
                    raise DataError(f"{where}: has no groundings {{phrase: {{token_positives, rle_masks}}}}")
                caption = caption.strip('"').strip()
                masks: list[MaskRef] = []
                targets: list[dict[str, Any]] = []
                for phrase, grounding in groundings.items():
                    spans, rles = _grounding(f"{where}, {phrase!r}", grounding)
                    span = _span(caption, phrase, spans)
                    if span is None:
                        self.skip(file, "a grounded phrase that is not in its caption")
                        continue
                    if any(span[0] < t["span"][1] and t["span"][0] < span[1] for t in targets):
                        self.skip(file, "a grounded phrase that overlaps another one")
                        continue
                    places = list(range(len(masks), len(masks) + len(rles)))
                    masks += [MaskRef(phrase, rle=rle, instance=i) for i, rle in enumerate(rles)]
                    targets.append({"turn": 1, "entity": self._entity(phrase), "span": span, "mask": places})
                if not targets:
                    self.skip(file, "its caption has no grounded phrase")
                    continue
                turns = [{"role": "user", "text": ASKED}, {"role": "assistant", "text": caption}]
                sample = {"perspective": "III", "turns": turns, "targets": targets}
                yield Entry(file, str(self.images / file), sample, tuple(masks), split_of(index.name), self.modality)

    def _entity(self, phrase: str) -> str:
        return canonical(phrase, self.dataset, self.modality).name


def _grounding(where: str, grounding: Any) -> tuple[list[list[int]], list[dict]]:
    """(spans, compressed RLEs). A single span need not be in a list."""
    try:
        spans, rles = grounding["token_positives"], grounding["rle_masks"]
        spans = [spans] if spans and isinstance(spans[0], int) else list(spans)
        spans = [[int(str(start)), int(str(end))] for start, end in spans]  # not 1.5
        for place, rle in enumerate(rles):
            if isinstance(rle["counts"], list):
                rle = coco.frPyObjects(rle, *rle["size"])
                rles[place] = {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}
        return spans, [{"size": rle["size"], "counts": rle["counts"]} for rle in rles]
    except (KeyError, TypeError, ValueError, IndexError):
        raise DataError(f"{where}: has no token_positives [start, end] and rle_masks [{{size, counts}}]") from None


def _span(caption: str, phrase: str, spans: list[list[int]]) -> list[int] | None:
    """The position of the phrase in the caption: the given span if it is right, else its first occurrence; None if there is none."""
    wanted = phrase.strip('" ').casefold()
    for start, end in spans:
        if 0 <= start < end <= len(caption) and caption[start:end].casefold().strip() == wanted:
            return [start, end]
    found = re.search(re.escape(phrase.strip('" ')), caption, re.IGNORECASE)
    return [found.start(), found.end()] if found and wanted else None
