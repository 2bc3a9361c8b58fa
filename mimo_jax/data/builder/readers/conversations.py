"""The base of readers of questions and answers: all entries of one image become one item with its conversations, in one split."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers.reader import DatasetReader
from mimo_jax.data.records import DataError

YES_NO = ("yes", "no")
_SPLIT_PRIORITY = ("", "train", "val", "test")  # an image in several splits is assigned to the last of them
# Words by which a text reveals the modality of its image.
_MODALITY_WORDS = {
    "CT": r"ct|cat scan|computed tomograph\w*|hounsfield",
    "MR": r"mri?|magnetic resonance|flair|dwi|t[12]([- ]weighted)?|diffusion[- ]weighted",
    "X-ray": r"x-?rays?|x ray|radiographs?|mammogra\w*|cxr",
    "ultrasound": r"ultrasound\w*|ultrasonogra\w*|sonogra\w*|echocardiogra\w*",
    "fundus": r"fundus|fundoscop\w*|retinal photograph\w*",
    "dermoscopy": r"dermoscop\w*|dermatoscop\w*",
    "endoscopy": r"endoscop\w*|colonoscop\w*|gastroscop\w*|cystoscop\w*|laparoscop\w*",
    "pathology": r"histolog\w*|histopatholog\w*|photomicrograph\w*|microscop\w*|h ?& ?e|immunohistochem\w*|micrographs?",
}
_MODALITY_WORDS = {modality: re.compile(rf"\b({words})(?!\w)", re.IGNORECASE) for modality, words in _MODALITY_WORDS.items()}


@dataclass(frozen=True)
class Entry:
    """One conversation about an image. key: the name of the image in the source, equal in all its entries. image: its path."""

    key: str
    image: str
    sample: dict[str, Any]  # as in items.Item, with indices into `masks`
    masks: tuple[MaskRef, ...] = ()
    split: str = ""
    modality: str = ""
    dataset: str = ""
    case: str = ""  # if empty, the image is its own case
    slice_axis: str = ""
    slice_index: int = -1


class Conversations(DatasetReader):
    """A source whose `entries` are grouped by image."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The conversations, in the order of the source."""

    def items(self) -> Iterator[Item]:
        by_image: dict[str, list[Entry]] = {}
        for entry in self.entries():
            if all(turn["text"] for turn in entry.sample["turns"]):
                by_image.setdefault(entry.key, []).append(entry)
            else:
                self.skip(entry.key, "an empty question or answer")
        for key, entries in by_image.items():
            split = max((entry.split for entry in entries), key=_SPLIT_PRIORITY.index)
            for entry in entries:
                if entry.split != split:
                    self.skip(key, f"a question of {entry.split or 'no split'} whose image is also in {split}")
            entries = [entry for entry in entries if entry.split == split]
            first = entries[0]
            modality = first.modality or self.modality or modality_of([entry.sample for entry in entries])
            if not modality:
                self.skip(key, "the modality is unknown; --modality sets it for all such images")
                continue
            masks: dict[str, MaskRef] = {}
            samples = [_moved(entry, masks) for entry in entries]
            dataset = first.dataset or self.dataset
            yield Item(
                id=key, image=first.image, modality=modality, dataset=dataset, group=f"{dataset}/{first.case or Path(key).stem}",
                masks=tuple(masks.values()), split=split, samples=tuple(samples), complete=False, licence=self.licence,
                slice_axis=first.slice_axis, slice_index=first.slice_index,
            )  # fmt: skip


def question(asked: str, answer: str, answer_type: str = "", kind: str = "") -> dict[str, Any]:
    """A sample of vqa. answer_type: as in the source; without it, a question answered by yes or no is closed."""
    kind_of_answer = answer_type.strip().casefold()
    closed = kind_of_answer == "closed" if kind_of_answer in ("closed", "open") else answer.strip(" .").casefold() in YES_NO
    sample = {
        "perspective": "vqa",
        "turns": [{"role": "user", "text": clean(asked)}, {"role": "assistant", "text": clean(answer)}],
        "answer_type": "closed" if closed else "open",
        "references": [clean(answer)],
    }
    return sample | ({"kind": kind.strip().casefold()} if kind.strip() else {})


def turns_of(where: str, entry: dict) -> list[tuple[str, str]]:
    """[(role, text)] of a conversation in LLaVA's format, the user first, the assistant last. Raises DataError for anything else."""
    conversation = entry.get("conversations", entry.get("conversatons"))
    if not isinstance(conversation, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in conversation):
        raise DataError(f"{where}: has no conversations [{{from, value}}]")
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    turns = [(roles.get(str(turn.get("from")), ""), turn["value"]) for turn in conversation]
    if not turns or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"{where}: its conversation does not alternate between human and gpt")
    return turns


def clean(text: str) -> str:
    """The text without image markers, with single blanks."""
    return " ".join(re.sub(r"<im_start>|<im_end>|<image>", " ", text).split())


def texts(where: str, entry: dict, *names: str) -> list[str]:
    """The values of required fields, numbers as texts. Raises DataError naming a field that is missing."""
    values = [entry.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise DataError(f"{where}: {name} is missing or not a text")
    return [str(value).strip() for value in values]


def modality_of(samples: list[dict[str, Any]]) -> str:
    """The only modality that questions and answers mention, except denied ones; "" if there is none or several."""
    mentioned = []
    for sample in samples:
        turns = [turn["text"] for turn in sample["turns"]]
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            mentioned += [] if re.match(r"no\b", answer, re.IGNORECASE) else [asked, answer]
    found = [modality for modality, words in _MODALITY_WORDS.items() if any(words.search(text) for text in mentioned)]
    return found[0] if len(found) == 1 else ""


def _moved(entry: Entry, masks: dict[str, MaskRef]) -> dict[str, Any]:
    """The sample of an entry with its mask indices changed to those of `masks`, all masks of the image; adds missing ones to it."""
    if not entry.masks:
        return entry.sample
    for mask in entry.masks:
        masks.setdefault(repr(mask), mask)
    places = {name: place for place, name in enumerate(masks)}
    index = [places[repr(mask)] for mask in entry.masks]
    turns = [turn | ({"prompted": [index[i] for i in turn["prompted"]]} if "prompted" in turn else {}) for turn in entry.sample["turns"]]
    targets = [target | {"mask": [index[i] for i in target["mask"]]} for target in entry.sample.get("targets", ())]
    return entry.sample | {"turns": turns, "targets": targets}
