"""Reads one JSON line per image: {id, image, masks: [{file, entity, annotation}], modality, group}, and optionally
dataset (or source_repo), split, licence, source_path, pixel_spacing_mm, absent_entities, complete, flags, mask_threshold. A mask of several
things may name a picture of their numbers: {file, entity, instances, n_instances}. Paths are relative to the file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers.index_files import lines
from mimo_jax.data.builder.readers.reader import SPLITS, DatasetReader
from mimo_jax.data.records import DataError

MANIFEST = "manifest.jsonl"


def manifest_lines(path: Path) -> Iterator[dict]:
    """The lines of a manifest, checked. Raises DataError naming the first wrong line, and for a manifest without any."""
    line_of: dict[str, int] = {}
    for number, line in lines(path):
        if wrong := _wrong(line):
            raise DataError(f"{path}, line {number}: {wrong}")
        if line["id"] in line_of:
            raise DataError(f"{path}, line {number}: id {line['id']} is also in line {line_of[line['id']]}")
        line_of[line["id"]] = number
        yield line
    if not line_of:
        raise DataError(f"{path}: has no record")


def _wrong(line: object) -> str:
    """Returns what is wrong with a line; "" if it is valid."""
    if not isinstance(line, dict):
        return "is not a JSON object"
    missing = [key for key in ("id", "image", "masks", "modality", "group") if key not in line]
    masks = line.get("masks")
    if missing or not isinstance(masks, list) or not all(isinstance(m, dict) and "file" in m and "entity" in m for m in masks):
        return f"lacks {', '.join(missing) or 'file or entity of a mask'}"
    texts = [line["id"], line["image"], line["group"], *(mask[key] for mask in masks for key in ("file", "entity"))]
    if not all(isinstance(text, str) and text for text in texts):
        return "id, image, group, and file and entity of a mask must be texts"
    for mask in masks:
        if "instances" in mask and not (isinstance(mask["instances"], str) and _is_count(mask.get("n_instances"))):
            return "instances of a mask must be a file, and n_instances its largest number"
    if line["modality"] not in MODALITIES:
        return f"modality {line['modality']!r}; use one of {', '.join(MODALITIES)}"
    optional = [(line, key) for key in ("dataset", "source_repo", "split", "licence", "source_path")]
    for holder, key in [*optional, *((mask, "annotation") for mask in masks)]:
        if not isinstance(holder.get(key), str | None):
            return f"{key} is not a text"
    if line.get("split") and line["split"] not in SPLITS:
        return f"split {line['split']!r}; use train, val or test, or omit it"
    threshold = line.get("mask_threshold")
    if threshold is not None and not (isinstance(threshold, int | float) and not isinstance(threshold, bool) and threshold > 0):
        return "mask_threshold is not a number above 0"
    for key in ("absent_entities", "flags"):
        texts = line.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"{key} is not a list of texts"
    if not isinstance(line.get("complete", False), bool):
        return "complete is neither true nor false"
    spacing = line.get("pixel_spacing_mm")
    numbers = isinstance(spacing, list) and len(spacing) == 2 and all(isinstance(mm, int | float) and mm > 0 for mm in spacing)
    return "" if spacing is None or numbers else "pixel_spacing_mm is not [row, column] in mm"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class ManifestReader(DatasetReader):
    """Options: exclude_flags, flags separated by commas: lines with one of them are left out. square, "DATASET:SIDE" separated by commas:
    images of these data sets are resized to SIDE x SIDE pixels without their black borders, so that size and padding say nothing."""

    name = "manifest"
    expected_layout = f"a .jsonl file, or {MANIFEST} in the folder"
    options = {"window": None, "exclude_flags": "", "square": ""}

    def open(self) -> None:
        self.index = self.path / MANIFEST if self.path.is_dir() else self.path
        if self.index.suffix != ".jsonl" or not self.index.is_file():
            raise self.layout_error()
        self.excluded = frozenset(flag.strip() for flag in self.values["exclude_flags"].split(",") if flag.strip())
        self.sides = dict(_side(part) for part in self.values["square"].split(",") if part.strip())
        if self.excluded or self.sides:
            self._check_named()

    def _check_named(self) -> None:
        """Raise DataError for a flag or data set of an option that no line has: a misspelt licence must not let images through."""
        flags, datasets = set(), set()
        for line in manifest_lines(self.index):
            flags.update(line.get("flags") or ())
            datasets.add(self._dataset_of(line))
        for option, named, found in (("exclude-flags", self.excluded, flags), ("square", self.sides, datasets)):
            if unknown := sorted(set(named) - found):
                others = ", ".join(sorted(found)) or "none"
                raise DataError(f"option {option}: no line of {self.index} has {unknown[0]}; they have {others}")

    def _dataset_of(self, line: dict) -> str:
        return self.values["dataset"] or line.get("dataset") or line.get("source_repo") or self.dataset

    def items(self) -> Iterator[Item]:
        missing = 0  # pictures of instances
        for line in manifest_lines(self.index):
            flags = tuple(line.get("flags") or ())
            if self.excluded.intersection(flags):
                continue
            dataset = self._dataset_of(line)
            count: Counter[str] = Counter()
            masks = []
            for mask in line["masks"]:
                numbered = "instances" in mask and Path(self._at(mask["instances"])).is_file()
                missing += "instances" in mask and not numbered
                refs = self._instances(mask) if numbered else [self._whole(mask, line.get("mask_threshold"))]
                for ref in refs:
                    masks.append(replace(ref, instance=count[mask["entity"]]))
                    count[mask["entity"]] += 1
            spacing = line.get("pixel_spacing_mm")
            # Labels of a manifest are rarely complete: unless it says so, only the entities listed as absent are known to be absent.
            yield Item(
                id=line["id"], image=self._at(line["image"]), modality=line["modality"], dataset=dataset,
                group=f"{dataset}/{line['group']}", masks=tuple(masks), split=SPLITS.get(line.get("split") or "", ""),
                pixel_spacing_mm=tuple(spacing) if spacing else None, window=self.values["window"],
                complete=line.get("complete", False), absent=tuple(line.get("absent_entities") or ()),
                licence=line.get("licence") or self.licence, source=line.get("source_path") or "", flags=flags,
                square=self.sides.get(dataset, 0),
            )  # fmt: skip
        if missing:
            warnings.warn(f"{self.index}: {missing} pictures of instances are missing; their masks are taken whole", stacklevel=2)

    def _whole(self, mask: dict, threshold: float | None) -> MaskRef:
        annotation = mask.get("annotation") or ""
        return MaskRef(mask["entity"], self._at(mask["file"]), annotation=annotation, threshold=threshold or self.mask_threshold)

    def _instances(self, mask: dict) -> list[MaskRef]:
        """The things that a mask consists of, one by one; questions about all of them unite their masks again."""
        file, numbers = self._at(mask["instances"]), tuple(range(1, mask["n_instances"] + 1))
        annotation = mask.get("annotation") or ""
        return [MaskRef(mask["entity"], file, value=number, labels=numbers, annotation=annotation) for number in numbers]

    def _at(self, file: str) -> str:
        return str(self.index.parent / file)


def _side(text: str) -> tuple[str, int]:
    """(data set, side in pixels) of "DATASET:SIDE"."""
    dataset, _, side = text.strip().rpartition(":")
    if not dataset or not side.isdecimal() or not 16 <= int(side) <= 4096:
        raise DataError(f"option square={text.strip()}: is not DATASET:SIDE with a side of 16 to 4096 pixels, such as busi:256")
    return dataset, int(side)
