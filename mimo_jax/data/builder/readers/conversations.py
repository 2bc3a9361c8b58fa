"""What sources of questions and answers share: entries of one image become one item, in one split, with its conversations."""

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
_HELD_OUT = ("", "train", "val", "test")  # an image of several splits belongs to the last of them
# What a text says of how an image was made.
_SAYS = {
    "CT": r"ct|cat scan|computed tomograph\w*|hounsfield",
    "MR": r"mri?|magnetic resonance|flair|dwi|t[12]([- ]weighted)?|diffusion[- ]weighted",
    "X-ray": r"x-?rays?|x ray|radiographs?|mammogra\w*|cxr",
    "ultrasound": r"ultrasound\w*|ultrasonogra\w*|sonogra\w*|echocardiogra\w*",
    "fundus": r"fundus|fundoscop\w*|retinal photograph\w*",
    "dermoscopy": r"dermoscop\w*|dermatoscop\w*",
    "endoscopy": r"endoscop\w*|colonoscop\w*|gastroscop\w*|cystoscop\w*|laparoscop\w*",
    "pathology": r"histolog\w*|histopatholog\w*|photomicrograph\w*|microscop\w*|h ?& ?e|immunohistochem\w*|micrographs?",
}
_SAYS = {modality: re.compile(rf"\b({words})(?!\w)", re.IGNORECASE) for modality, words in _SAYS.items()}


@dataclass(frozen=True)
class Entry:
    """One conversation about an image. image: its path; key: what it is called in the source, the same in all its entries."""

    key: str
    image: str
    sample: dict[str, Any]  # as items.Item holds it, `masks` being the places of these masks
    masks: tuple[MaskRef, ...] = ()
    split: str = ""
    modality: str = ""
    dataset: str = ""
    case: str = ""  # without one, the image is a case of its own
    slice_axis: str = ""
    slice_index: int = -1


class Conversations(DatasetReader):
    """A source whose `entries` are gathered by image."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The conversations, in the order of the source."""

    def items(self) -> Iterator[Item]:
        by_image: dict[str, list[Entry]] = {}
        for entry in self.entries():
            if all(turn["text"] for turn in entry.sample["turns"]):
                by_image.setdefault(entry.key, []).append(entry)
            else:
                self.skip(entry.key, "a question or an answer without a word")
        for key, entries in by_image.items():
            split = max((entry.split for entry in entries), key=_HELD_OUT.index)
            for entry in entries:
                if entry.split != split:
                    self.skip(key, f"a question of {entry.split or 'no split'}, whose image is in {split} too")
            entries = [entry for entry in entries if entry.split == split]
            first = entries[0]
            modality = first.modality or self.modality or modality_of([entry.sample for entry in entries])
            if not modality:
                self.skip(key, "nothing says what made the image; --modality says it for all such")
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
    """A sample of plain VQA. answer_type: as the source says it; without, what is answered yes or no is closed."""
    said = answer_type.strip().casefold()
    closed = said == "closed" if said in ("closed", "open") else answer.strip(" .").casefold() in YES_NO
    sample = {
        "perspective": "vqa",
        "turns": [{"role": "user", "text": clean(asked)}, {"role": "assistant", "text": clean(answer)}],
        "answer_type": "closed" if closed else "open",
        "references": [clean(answer)],
    }
    return sample | ({"kind": kind.strip().casefold()} if kind.strip() else {})


def turns_of(where: str, entry: dict) -> list[tuple[str, str]]:
    """[(role, text)] of a conversation as LLaVA writes it, the user first, the assistant last. DataError if it is none."""
    talk = entry.get("conversations", entry.get("conversatons"))
    if not isinstance(talk, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in talk):
        raise DataError(f"{where}: has no conversations [{{from, value}}]")
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    turns = [(roles.get(str(turn.get("from")), ""), turn["value"]) for turn in talk]
    if not turns or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"{where}: its conversation is not human and gpt in turn")
    return turns


def clean(text: str) -> str:
    """Without markers of the image, in single blanks."""
    return " ".join(re.sub(r"<im_start>|<im_end>|<image>", " ", text).split())


def texts(where: str, entry: dict, *names: str) -> list[str]:
    """Fields that must be there, numbers as texts. DataError naming one that is not."""
    values = [entry.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise DataError(f"{where}: {name} is missing or no text")
    return [str(value).strip() for value in values]


def modality_of(samples: list[dict[str, Any]]) -> str:
    """The one modality that questions and answers speak of, but for what is denied; "" if it is none or several."""
    said = []
    for sample in samples:
        spoken = [turn["text"] for turn in sample["turns"]]
        for asked, answer in zip(spoken[::2], spoken[1::2], strict=True):
            said += [] if re.match(r"no\b", answer, re.IGNORECASE) else [asked, answer]
    found = [modality for modality, words in _SAYS.items() if any(words.search(text) for text in said)]
    return found[0] if len(found) == 1 else ""


def _moved(entry: Entry, masks: dict[str, MaskRef]) -> dict[str, Any]:
    """The sample of an entry, its places turned into those of all masks of the image, which it may add to."""
    if not entry.masks:
        return entry.sample
    for mask in entry.masks:
        masks.setdefault(repr(mask), mask)
    places = {name: place for place, name in enumerate(masks)}
    at = [places[repr(mask)] for mask in entry.masks]
    turns = [turn | ({"prompted": [at[i] for i in turn["prompted"]]} if "prompted" in turn else {}) for turn in entry.sample["turns"]]
    targets = [target | {"mask": [at[i] for i in target["mask"]]} for target in entry.sample.get("targets", ())]
    return entry.sample | {"turns": turns, "targets": targets}
