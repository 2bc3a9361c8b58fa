"""Reads SA-Med2D-20M, and the layout of the SAM-Med2D demo, which others use for their own data.

SAMed2D_v1.json                     {image: [masks]}, named images/MODALITY--DATASET--CASE--SLICE.png and
                                    masks/<image>--CCCC_III.png, CCCC the class (0000 is also a class), III the instance
SAMed2D_v1_class_mapping_id.json    {dataset: {class: id}}: a class id is valid only within its data set
image2label_train.json              {image: [masks]}, or label2image_test.json {mask: image}; masks/<image>_CLASS_III.png
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mimo_jax.data.builder.entities import canonical, is_nameless, is_union
from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers.index_files import pairs, read
from mimo_jax.data.builder.readers.reader import DatasetReader, case_of, split_of
from mimo_jax.data.records import DataError

INDEX, CLASSES = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
MODALITY = {
    **dict.fromkeys(("ct_00", "ct_cbf", "ct_cbv", "ct_mtt", "ct_tmax"), "CT"),
    **dict.fromkeys(
        (
            "mr_00", "mr_adc", "mr_cbf", "mr_cbv", "mr_cmr", "mr_dwi", "mr_flair", "mr_hbv", "mr_lge", "mr_mprage", "mr_mtt", "mr_pd",
            "mr_rcbf", "mr_rcbv", "mr_t1", "mr_t1c", "mr_t1ce", "mr_t1gd", "mr_t1w", "mr_t2", "mr_t2w", "mr_tmax", "mr_ttp",
        ),
        "MR",
    ),
    "x_ray": "X-ray", "ultrasound_00": "ultrasound", "fundus_photography": "fundus", "dermoscopy_00": "dermoscopy",
    "endoscopy_00": "endoscopy", "pet_00": "",
}  # fmt: skip
EXCLUDED = dict.fromkeys(("brain-growth", "Brain_PTM"), "the images of this data set are masks")
UNION_CLASS = "is a union of classes and not a known structure"
INVERTED = {"ichallenge_adam_task2"}  # in its masks the background is nonzero
_SLICE = re.compile(r"([xyz])_(\d+)")
_LABEL = re.compile(r"(\d{4})_(\d+)")


@dataclass(frozen=True)
class Name:
    """The parts of the name of an image."""

    modality: str
    dataset: str
    case: str
    axis: str  # "x", "y", "z"; "" for a two-dimensional image
    index: int  # of the slice; -1 for a two-dimensional image

    @staticmethod
    def parse(stem: str) -> Name | tuple[str, str]:
        """The name's parts, or (what, reason) if it is skipped."""
        parts = stem.split("--")
        if len(parts) < 4:
            return stem, "its name is not MODALITY--DATASET--CASE--SLICE"
        token, dataset, *case, place = parts
        if token not in MODALITY:
            return f"{dataset}, modality {token}", "is unknown"
        if dataset in EXCLUDED:
            return dataset, EXCLUDED[dataset]
        if not MODALITY[token]:
            return f"{dataset}, modality {token}", "is not a modality of records"
        where = _SLICE.fullmatch(place)
        return Name(MODALITY[token], dataset, "--".join(case), where[1] if where else "", int(where[2]) if where else -1)


class Classes:
    """The class names by data set and id."""

    def __init__(self, path: Path, threshold: float | None):
        """threshold: of all masks."""
        self.threshold = threshold
        mapping = read(path)
        if not isinstance(mapping, dict) or not all(isinstance(classes, dict) for classes in mapping.values()):
            raise DataError(f"{path}: is not {{dataset: {{class: id}}}}")
        try:
            self.of = {dataset: {int(str(number)): name for name, number in classes.items()} for dataset, classes in mapping.items()}
        except (TypeError, ValueError):
            raise DataError(f"{path}: is not {{dataset: {{class: id}}}}, an id is not a whole number") from None

    def mask(self, file: str, image: str, dataset: str, path: str) -> MaskRef | tuple[str, str]:
        """The mask of an image in a file, by their names, or (what, reason) if it is skipped."""
        label = _LABEL.fullmatch(file.removeprefix(f"{image}--"))
        if label is None:
            return path, "its name is not IMAGE--CLASS_INSTANCE"
        name = self.of.get(dataset, {}).get(int(label[1]))
        if name is None:
            return f"{dataset}, class {label[1]}", f"has no name in {CLASSES}"
        if is_nameless(name, dataset):
            return f"{dataset}, class {name}", "does not name a structure"
        if is_union(name) and not canonical(name, dataset).known:
            return f"{dataset}, class {name}", UNION_CLASS
        return MaskRef(name, path, instance=int(label[2]), inverted=dataset in INVERTED, threshold=self.threshold)


class SaMed2d(DatasetReader):
    name = "sa-med2d"
    expected_layout = f"{INDEX} and {CLASSES}, or image2label_*.json or label2image_*.json"

    def open(self) -> None:
        self.folder = next((f for f in (self.folder, self.folder / "SAMed2Dv1") if (f / INDEX).is_file()), self.folder)
        named = [self.path] if self.path.is_file() else sorted(self.folder.glob("*.json"))
        self.indices = [path for path in named if path.name.startswith(("image2label", "label2image"))]
        self.is_full = (self.folder / INDEX).is_file() and not (self.path.is_file() and self.indices)
        if self.is_full:
            if not (self.folder / CLASSES).is_file():
                raise DataError(f"{self.folder / CLASSES}: no such file; it maps class ids to names")
            self.classes = Classes(self.folder / CLASSES, self.mask_threshold)
        elif self.indices:
            self.required_modality()
        else:
            raise self.layout_error()

    def items(self) -> Iterator[Item]:
        return self._full_items() if self.is_full else self._demo_items()

    def _full_items(self) -> Iterator[Item]:
        index, root = self.folder / INDEX, f"{self.folder}/"
        for image, files in pairs(index):
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise DataError(f"{index}: {image} has no list of masks")
            stem = _stem(image)
            name = Name.parse(stem)
            if not isinstance(name, Name):
                self.skip(*name)
                continue
            masks, complete = [], True
            for file in files:
                mask = self.classes.mask(_stem(file), stem, name.dataset, root + file)
                if isinstance(mask, MaskRef):
                    masks.append(mask)
                else:
                    self.skip(*mask)
                    complete &= mask[1] == UNION_CLASS
            yield Item(
                id=stem, image=root + image, modality=name.modality, dataset=name.dataset, group=f"{name.dataset}/{name.case}",
                masks=tuple(masks), slice_axis=name.axis, slice_index=name.index, complete=complete, licence=self.licence,
            )  # fmt: skip

    def _demo_items(self) -> Iterator[Item]:
        index_of: dict[str, str] = {}
        for index in self.indices:
            masks_of: dict[str, list[str]] = defaultdict(list)
            for key, value in pairs(index):
                inverse = isinstance(value, str)
                for mask in [key] if inverse else value if isinstance(value, list) else [None]:
                    if not isinstance(mask, str):
                        raise DataError(f"{index}: {key} names neither an image nor a list of masks")
                    masks_of[value if inverse else key].append(mask)
            for image, files in masks_of.items():
                stem = PurePosixPath(image).stem
                if stem in index_of:
                    self.skip(image, f"is also in {index_of[stem]}")
                    continue
                index_of[stem] = index.name
                masks = []
                for file in files:
                    label = re.fullmatch(rf"{re.escape(stem)}_(.+?)(?:_(\d{{3}}))?", PurePosixPath(file).stem)
                    if label is None:
                        self.skip(file, "its name is not IMAGE_CLASS_INSTANCE")
                        continue
                    masks.append(MaskRef(label[1], self._at(file), instance=int(label[2] or 0), threshold=self.mask_threshold))
                yield Item(
                    id=stem, image=self._at(image), modality=self.modality, dataset=self.dataset, 
                    group=f"{self.dataset}/{case_of(stem)}",
                    masks=tuple(masks), split=split_of(index.name), complete=False, licence=self.licence,
                )  # fmt: skip

    def _at(self, file: str) -> str:
        """The path of a file of the index, which may begin with the name of the index's folder."""
        first = file.partition("/")[0]
        return str((self.folder.parent if first == self.folder.resolve().name else self.folder) / file)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rsplit(".", 1)[0]
