"""Reads MeCoVQA (MedPLIB): [{image, conversations, answer_type}] about images of SA-Med2D-20M. An answer with a mask contains <SEG> and
<mask>masks/….png</mask>; a question with a prompt contains <region>masks/….png</region>."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mimo_jax.data.builder.entities import canonical
from mimo_jax.data.builder.items import MaskRef
from mimo_jax.data.builder.readers.conversations import Conversations, Entry, clean, question, texts, turns_of
from mimo_jax.data.builder.readers.index_files import entries
from mimo_jax.data.builder.readers.reader import split_of
from mimo_jax.data.builder.readers.sa_med2d import CLASSES, Classes, Name
from mimo_jax.data.records import DataError

_MASK, _REGION = re.compile(r"<mask>(.*?)</mask>", re.DOTALL), re.compile(r"<region>(.*?)</region>", re.DOTALL)
_CALLED = re.compile(r"\b(region|area|part|structure|organ|location)\s*<region>.*?</region>", re.IGNORECASE | re.DOTALL)


class MeCoVqa(Conversations):
    name = "mecovqa"
    expected_layout = f"a .json file of conversations, or a folder with some, and SAMed2Dv1/ with {CLASSES}, images/ and masks/"

    def open(self) -> None:
        found = [self.path] if self.path.is_file() else sorted([*self.path.glob("*.json"), *self.path.glob("*/*.json")])
        self.indices = [path for path in found if not path.name.startswith("SAMed2D")]
        places = [place / name for place in (self.folder, *self.folder.resolve().parents[:2]) for name in (".", "SAMed2Dv1")]
        self.root = next((place for place in places if (place / CLASSES).is_file()), None)
        if not self.indices or self.root is None:
            raise self.layout_error()
        self.classes = Classes(self.root / CLASSES, self.mask_threshold)

    def entries(self) -> Iterator[Entry]:
        for index in self.indices:
            for number, entry in enumerate(entries(index), 1):
                where = f"{index}, entry {number}"
                (image,) = texts(where, entry, "image")
                turns = turns_of(where, entry)
                stem = PurePosixPath(image).stem
                name = Name.parse(stem)
                if not isinstance(name, Name):
                    self.skip(*name)
                    continue
                masks: list[MaskRef] = []
                wrong: tuple[str, str] | None = None
                for file in [file.strip() for _, text in turns for file in _MASK.findall(text) + _REGION.findall(text)]:
                    mask = self.classes.mask(PurePosixPath(file).stem, stem, name.dataset, str(self.root / _below(file, "masks")))
                    if isinstance(mask, MaskRef):
                        masks.append(mask)
                    else:
                        wrong = wrong or mask
                if not wrong and any("<SEG>" in text and not _MASK.search(text) for _, text in turns):
                    wrong = image, "its answer has <SEG> but no <mask>"
                if wrong:
                    self.skip(*wrong)
                    continue
                masks = list(dict.fromkeys(masks))
                sample = _sample(where, turns, masks, name, str(entry.get("answer_type") or ""))
                yield Entry(
                    stem, str(self.root / _below(image, "images")), sample, tuple(masks), split_of(index.name), name.modality,
                    name.dataset, name.case, name.axis, name.index,
                )  # fmt: skip


def _below(file: str, folder: str) -> str:
    return file if file.startswith(f"{folder}/") else f"{folder}/{PurePosixPath(file).name}"


def _sample(where: str, turns: list[tuple[str, str]], masks: list[MaskRef], name: Name, answer_type: str) -> dict[str, Any]:
    """The conversation in clean text. A masked entity gets the span where the answer names it; otherwise its name replaces <SEG>."""
    place = {PurePosixPath(mask.file).name: number for number, mask in enumerate(masks)}
    entity = [canonical(mask.class_raw, name.dataset, name.modality).name for mask in masks]
    clean_turns: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for number, (role, text) in enumerate(turns):
        prompted, segmented = ([place[PurePosixPath(file.strip()).name] for file in tag.findall(text)] for tag in (_REGION, _MASK))
        text = _plain(clean(_MASK.sub(" ", _REGION.sub(" the marked region ", _CALLED.sub(r"\1", text)))))
        if segmented:
            if role != "assistant" or "<SEG>" not in text:
                raise DataError(f"{where}: a <mask> is allowed only in an answer with <SEG>")
            text, spans = _spanned(text, list(dict.fromkeys(entity[mask] for mask in segmented)))
            for segmented_entity, span in spans.items():
                mine = [mask for mask in segmented if entity[mask] == segmented_entity]
                targets.append({"turn": number, "entity": segmented_entity, "span": span, "mask": mine})
        clean_turns.append({"role": role, "text": text} | ({"prompted": prompted} if prompted else {}))
    if targets:
        return {"perspective": "II" if any("prompted" in turn for turn in clean_turns) else "I", "turns": clean_turns, "targets": targets}
    plain = question(clean_turns[0]["text"], clean_turns[-1]["text"], answer_type) if len(clean_turns) == 2 else {"perspective": "vqa"}
    return plain | {"turns": clean_turns}


def _spanned(text: str, entities: list[str]) -> tuple[str, dict[str, list[int]]]:
    """(text without <SEG>; entity -> span). The name of an entity that the text does not name replaces its <SEG>."""
    unnamed = [entity for entity in entities if not _named(entity, text)]
    if not unnamed:
        text = re.sub(r"\s*:\s*<SEG>", "<SEG>", re.sub(r"\b(is|are)\s*<SEG>", r"\1 outlined<SEG>", text))
    first, *pieces = re.split(r"\s*<SEG>", text)
    for number, piece in enumerate(pieces, 1):
        here = unnamed if number == len(pieces) else unnamed[:1]
        unnamed = unnamed[len(here) :]
        first = f"{first} {' and '.join(f'the {entity}' for entity in here)}".rstrip() + piece
    text = _plain(first)
    return text, {entity: list(_named(entity, text).span()) for entity in entities}


def _plain(text: str) -> str:
    return re.sub(r"\s+([.,;:?!])", r"\1", " ".join(text.split()))


def _named(entity: str, text: str) -> re.Match | None:
    return re.search(rf"(?<!\w){re.escape(entity)}(?!\w)", text, re.IGNORECASE)
