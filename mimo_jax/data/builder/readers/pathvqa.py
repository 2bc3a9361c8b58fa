"""Reads PathVQA: qas/train/train_qa.pkl with images/train/NAME.jpg, and the same for val and test; or JSON lists of the same
{image, question, answer}. Questions answered by yes or no are closed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mimo_jax.data.builder.readers.conversations import Conversations, Entry, question, texts
from mimo_jax.data.builder.readers.index_files import entries, pickled
from mimo_jax.data.builder.readers.reader import split_of
from mimo_jax.data.records import DataError


class PathVqa(Conversations):
    name = "pathvqa"
    expected_layout = "qas/train/train_qa.pkl or train.json (or of val, test), and images/"

    def open(self) -> None:
        if self.path.is_file():
            found = [self.path]
        else:
            places = [self.folder, self.folder / "qas", *(self.folder / "qas" / split for split in ("train", "val", "test"))]
            names = [f"{split}{end}" for split in ("train", "val", "test") for end in ("_qa.pkl", "_qa.json", ".json", ".jsonl")]
            found = [place / name for name in names for place in places if (place / name).is_file()]
        self.indices = [path for path in found if path.suffix in (".pkl", ".json", ".jsonl")]
        root = next((place for place in (self.folder, *self.folder.parents[:3]) if (place / "images").is_dir()), None)
        if not self.indices or root is None:
            raise self.layout_error()
        self.images = root / "images"

    def entries(self) -> Iterator[Entry]:
        for index in self.indices:
            split = split_of(index.name.replace("_qa", ""))
            for number, entry in enumerate(_listed(index), 1):
                image, asked, answer = texts(f"{index}, entry {number}", entry, "image", "question", "answer")
                file = image if Path(image).suffix else f"{image}.jpg"
                folder = self.images / split if (self.images / split).is_dir() else self.images
                yield Entry(file, str(folder / file), question(asked, answer), split=split, modality=self.modality or "pathology")


def _listed(index: Path) -> Iterable[dict]:
    if index.suffix != ".pkl":
        return entries(index)
    listed = pickled(index)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{index}: is not a list of {{image, question, answer}}")
    return listed
