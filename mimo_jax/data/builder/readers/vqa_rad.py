"""Reads VQA-RAD: its public JSON list (or trainset.json and testset.json) of {image_name, image_organ, phrase_type, question, answer,
answer_type}. Its splits share images: questions of the training split about images of the test split are left out."""

from __future__ import annotations

from collections.abc import Iterator

from mimo_jax.data.builder.readers.conversations import Conversations, Entry, question, texts
from mimo_jax.data.builder.readers.index_files import entries
from mimo_jax.data.builder.readers.reader import split_of

INDEX = "VQA_RAD Dataset Public.json"
_ORGAN = {"CHEST": "X-ray", "ABD": "CT"}  # images of a head may be CT or MR; their questions tell


class VqaRad(Conversations):
    name = "vqa-rad"
    expected_layout = f"{INDEX}, or trainset.json and testset.json"

    def open(self) -> None:
        named = [self.folder / name for name in (INDEX, "trainset.json", "testset.json")]
        found = [self.path] if self.path.is_file() else [path for path in named if path.is_file()]
        self.indices = found[:1] if found and found[0].name == INDEX else found
        if not self.indices:
            raise self.layout_error()
        self.images = self.find_folder("VQA_RAD Image Folder", "images", "imgs")

    def entries(self) -> Iterator[Entry]:
        for index in self.indices:
            for number, entry in enumerate(entries(index), 1):
                image, asked, answer = texts(f"{index}, entry {number}", entry, "image_name", "question", "answer")
                phrase = str(entry.get("phrase_type") or "")
                split = split_of(index.name) or ("test" if phrase.startswith("test") else "train" if phrase else "")
                sample = question(asked, answer, str(entry.get("answer_type") or ""), str(entry.get("question_type") or ""))
                modality = _ORGAN.get(str(entry.get("image_organ") or "").strip().upper(), "")
                yield Entry(image, str(self.images / image), sample, split=split, modality=modality)
