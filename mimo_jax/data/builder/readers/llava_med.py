"""Reads LLaVA-Med: [{id, image, conversations (also spelt conversatons) [{from, value}], answer_type, domain {ct_scan: true, …}}]."""

from __future__ import annotations

from collections.abc import Iterator

from mimo_jax.data.builder.readers.conversations import Conversations, Entry, clean, question, texts, turns_of
from mimo_jax.data.builder.readers.index_files import entries
from mimo_jax.data.builder.readers.reader import split_of

_DOMAIN = {"chest_xray": "X-ray", "mri": "MR", "ct_scan": "CT", "histology": "pathology", "gross": "pathology"}


class LlavaMed(Conversations):
    name = "llava-med"
    expected_layout = "a .json or .jsonl file of conversations, or a folder with some"

    def open(self) -> None:
        self.indices = [self.path] if self.path.is_file() else sorted([*self.path.glob("*.json"), *self.path.glob("*.jsonl")])
        if not self.indices or self.indices[0].suffix not in (".json", ".jsonl"):
            raise self.layout_error()
        self.images = self.find_folder("images", "imgs")

    def entries(self) -> Iterator[Entry]:
        for index in self.indices:
            for number, entry in enumerate(entries(index), 1):
                where = f"{index}, entry {number}"
                if not entry.get("image"):
                    self.skip(f"{index.name}, entry {number}", "has no image")
                    continue
                (image,) = texts(where, entry, "image")
                turns = turns_of(where, entry)
                if len(turns) == 2:
                    sample = question(turns[0][1], turns[1][1], str(entry.get("answer_type") or ""))
                else:
                    sample = {"perspective": "vqa", "turns": [{"role": role, "text": clean(text)} for role, text in turns]}
                domain = entry.get("domain") or {}
                modality = next((kind for name, kind in _DOMAIN.items() if isinstance(domain, dict) and domain.get(name)), "")
                yield Entry(image, str(self.images / image), sample, split=split_of(index.name), modality=modality)
