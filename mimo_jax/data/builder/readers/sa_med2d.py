"""SA-Med2D-20M, and the layout of the SAM-Med2D demo, which others use for data of their own.

SAMed2D_v1.json                     {image: [masks]}, names that say it all: images/MODALITY--DATASET--CASE--SLICE.png and
                                    masks/<image>--CCCC_III.png, CCCC the class (0000 is one too), III the instance
SAMed2D_v1_class_mapping_id.json    {dataset: {class: id}}: a class id means something in its data set alone
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
BAD = dict.fromkeys(("brain-growth", "Brain_PTM"), "the images of this data set are masks")
UNITES = "unites other classes, and no structure is known by its name"
INVERTED = {"ichallenge_adam_task2"}  # in its masks the background is set
_SLICE = re.compile(r"([xyz])_(\d+)")
_LABEL = re.compile(r"(\d{4})_(\d+)")


@dataclass(frozen=True)
class Name:
    """What the name of an image says."""

    modality: str
    dataset: str
    case: str
    axis: str  # "x", "y", "z"; "" for what was taken in two dimensions
    index: int  # of the slice; -1

    @staticmethod
    def of(stem: str) -> Name | tuple[str, str]:
        """The name's parts, or (what, why) is passed over."""
        parts = stem.split("--")
        if len(parts) < 4:
            return stem, "its name is not MODALITY--DATASET--CASE--SLICE"
        token, dataset, *case, place = parts
        if token not in MODALITY:
            return f"{dataset}, modality {token}", "is unknown"
        if dataset in BAD:
            return dataset, BAD[dataset]
        if not MODALITY[token]:
            return f"{dataset}, modality {token}", "is none that a record may have"
        where = _SLICE.fullmatch(place)
        return Name(MODALITY[token], dataset, "--".join(case), where[1] if where else "", int(where[2]) if where else -1)


class Classes:
    """The classes that ids stand for."""

    def __init__(self, path: Path):
        mapping = read(path)
        if not isinstance(mapping, dict) or not all(isinstance(classes, dict) for classes in mapping.values()):
            raise DataError(f"{path}: is not {{dataset: {{class: id}}}}")
        try:
            self.of = {dataset: {int(number): name for name, number in classes.items()} for dataset, classes in mapping.items()}
        except (TypeError, ValueError):
            raise DataError(f"{path}: is not {{dataset: {{class: id}}}}, an id is no whole number") from None

    def mask(self, file: str, image: str, dataset: str, path: str) -> MaskRef | tuple[str, str]:
        """The mask that a file holds of an image, both by their names, or (what, why) is passed over."""
        label = _LABEL.fullmatch(file.removeprefix(f"{image}--"))
        if label is None:
            return path, "its name is not that of its image and --CLASS_INSTANCE"
        name = self.of.get(dataset, {}).get(int(label[1]))
        if name is None:
            return f"{dataset}, class {label[1]}", f"has no name in {CLASSES}"
        if is_nameless(name, dataset):
            return f"{dataset}, class {name}", "names nothing that could be asked for"
        if is_union(name) and not canonical(name, dataset).known:
            return f"{dataset}, class {name}", UNITES
        return MaskRef(name, path, instance=int(label[2]), inverted=dataset in INVERTED)


class SaMed2d(DatasetReader):
    name = "sa-med2d"
    expected_layout = f"{INDEX} and {CLASSES}, or image2label_*.json or label2image_*.json"

    def open(self) -> None:
        self.folder = next((f for f in (self.folder, self.folder / "SAMed2Dv1") if (f / INDEX).is_file()), self.folder)
        named = [self.path] if self.path.is_file() else sorted(self.folder.glob("*.json"))
        self.indices = [path for path in named if path.name.startswith(("image2label", "label2image"))]
        self.whole = (self.folder / INDEX).is_file() and not (self.path.is_file() and self.indices)
        if self.whole:
            if not (self.folder / CLASSES).is_file():
                raise DataError(f"{self.folder / CLASSES}: no such file; without it class ids have no names")
            self.classes = Classes(self.folder / CLASSES)
        elif self.indices:
            self.needs_modality()
        else:
            raise self.layout_error()

    def items(self) -> Iterator[Item]:
        return self._whole() if self.whole else self._demo()

    def _whole(self) -> Iterator[Item]:
        index, root = self.folder / INDEX, f"{self.folder}/"
        for image, files in pairs(index):
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise DataError(f"{index}: {image} has no list of masks")
            stem = _stem(image)
            name = Name.of(stem)
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
                    complete &= mask[1] == UNITES
            yield Item(
                id=stem, image=root + image, modality=name.modality, dataset=name.dataset, group=f"{name.dataset}/{name.case}",
                masks=tuple(masks), slice_axis=name.axis, slice_index=name.index, complete=complete, licence=self.licence,
            )  # fmt: skip

    def _demo(self) -> Iterator[Item]:
        seen: dict[str, str] = {}
        for index in self.indices:
            masks_of: dict[str, list[str]] = defaultdict(list)
            for key, value in pairs(index):
                turned = isinstance(value, str)
                for mask in [key] if turned else value if isinstance(value, list) else [None]:
                    if not isinstance(mask, str):
                        raise DataError(f"{index}: {key} names neither an image nor a list of masks")
                    masks_of[value if turned else key].append(mask)
            for image, files in masks_of.items():
                stem = PurePosixPath(image).stem
                if stem in seen:
                    self.skip(image, f"stands in {seen[stem]} too")
                    continue
                seen[stem] = index.name
                masks = []
                for file in files:
                    label = re.fullmatch(rf"{re.escape(stem)}_(.+?)(?:_(\d{{3}}))?", PurePosixPath(file).stem)
                    if label is None:
                        self.skip(file, "its name is not that of its image and _CLASS_INSTANCE")
                        continue
                    masks.append(MaskRef(label[1], self._at(file), instance=int(label[2] or 0)))
                yield Item(
                    id=stem, image=self._at(image), modality=self.modality, dataset=self.dataset, 
                    group=f"{self.dataset}/{case_of(stem)}",
                    masks=tuple(masks), split=split_of(index.name), complete=False, licence=self.licence,
                )  # fmt: skip

    def _at(self, file: str) -> str:
        """A path of the index, which may begin with the name of its own folder."""
        first = file.partition("/")[0]
        return str((self.folder.parent if first == self.folder.resolve().name else self.folder) / file)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rsplit(".", 1)[0]
