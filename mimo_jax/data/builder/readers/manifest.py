"""Reads one JSON line per image: {id, image, masks: [{file, entity, annotation}], modality, group}, and optionally
dataset (or source_repo), split, licence, source_path, pixel_spacing_mm, absent_entities, mask_threshold. Paths are relative to the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
    absent, spacing = line.get("absent_entities") or [], line.get("pixel_spacing_mm")
    if not isinstance(absent, list) or not all(isinstance(entity, str) for entity in absent):
        return "absent_entities is not a list of texts"
    numbers = isinstance(spacing, list) and len(spacing) == 2 and all(isinstance(mm, int | float) and mm > 0 for mm in spacing)
    return "" if spacing is None or numbers else "pixel_spacing_mm is not [row, column] in mm"


class ManifestReader(DatasetReader):
    name = "manifest"
    expected_layout = f"a .jsonl file, or {MANIFEST} in the folder"
    options = {"window": None}

    def open(self) -> None:
        self.index = self.path / MANIFEST if self.path.is_dir() else self.path
        if self.index.suffix != ".jsonl" or not self.index.is_file():
            raise self.layout_error()

    def items(self) -> Iterator[Item]:
        for line in manifest_lines(self.index):
            dataset = self.values["dataset"] or line.get("dataset") or line.get("source_repo") or self.dataset
            count: Counter[str] = Counter()
            masks = []
            for mask in line["masks"]:
                entity = mask["entity"]
                masks.append(
                    MaskRef(
                        entity, self._at(mask["file"]), instance=count[entity], annotation=mask.get("annotation") or "",
                        threshold=line.get("mask_threshold") or self.mask_threshold,
                    )
                )  # fmt: skip
                count[entity] += 1
            spacing = line.get("pixel_spacing_mm")
            # Labels of a manifest are rarely complete: only the entities listed as absent are known to be absent.
            yield Item(
                id=line["id"], image=self._at(line["image"]), modality=line["modality"], dataset=dataset,
                group=f"{dataset}/{line['group']}", masks=tuple(masks), split=SPLITS.get(line.get("split") or "", ""),
                pixel_spacing_mm=tuple(spacing) if spacing else None, window=self.values["window"],
                complete=False, absent=tuple(line.get("absent_entities") or ()), licence=line.get("licence") or self.licence,
                source=line.get("source_path") or "",
            )  # fmt: skip

    def _at(self, file: str) -> str:
        return str(self.index.parent / file)
