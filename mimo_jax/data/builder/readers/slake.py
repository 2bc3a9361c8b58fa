"""Reads SLAKE: train.json, validate.json and test.json of {img_name, question, answer, q_lang, modality, answer_type}, with imgs/.
Only questions in English are used."""

from __future__ import annotations

from collections.abc import Iterator

from mimo_jax.data.builder.readers.conversations import Conversations, Entry, question, texts
from mimo_jax.data.builder.readers.index_files import entries
from mimo_jax.data.builder.readers.reader import split_of

_MODALITY = {"ct": "CT", "mri": "MR", "x-ray": "X-ray"}


class Slake(Conversations):
    name = "slake"
    expected_layout = "train.json, validate.json or test.json, and imgs/"

    def open(self) -> None:
        found = [self.path] if self.path.is_file() else sorted(self.folder.glob("*.json"))
        self.indices = [path for path in found if split_of(path.name)]
        self.images = self.find_folder("imgs", "images")
        if not self.indices or self.images == self.folder:
            raise self.layout_error()

    def entries(self) -> Iterator[Entry]:
        for index in self.indices:
            for number, entry in enumerate(entries(index), 1):
                where = f"{index}, entry {number}"
                if entry.get("q_lang") != "en":
                    self.skip(f"{index.name}, entry {number}", "the question is not in English")
                    continue
                image, asked, answer = texts(where, entry, "img_name", "question", "answer")
                sample = question(asked, answer, str(entry.get("answer_type") or ""), str(entry.get("content_type") or ""))
                modality = _MODALITY.get(str(entry.get("modality") or "").casefold(), "")
                case = image.partition("/")[0] if "/" in image else ""  # xmlab102/source.jpg
                yield Entry(image, str(self.images / image), sample, split=split_of(index.name), modality=modality, case=case)
