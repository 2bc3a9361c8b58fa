"""Reads NIfTI volumes with labels on their grid, as slices. Layouts, of which the first that fits is used:

CASE/ct.nii.gz (or mri.nii.gz) with CASE/segmentations/NAME.nii.gz    TotalSegmentator; meta.csv may give the split of a case
dataset.json, imagesTr/, labelsTr/                                  Medical Segmentation Decathlon and nnU-Net
images/ and labels/ with equal file names, and the option labels     other data
IMAGE.nii.gz, with the options label=LABELS.nii.gz and labels
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers.index_files import read
from mimo_jax.data.builder.readers.label_tables import label_table, parse_table
from mimo_jax.data.builder.readers.reader import SPLITS, DatasetReader
from mimo_jax.data.images.image import import_medical, nearest_axes
from mimo_jax.data.images.orientation import PLANES
from mimo_jax.data.label_values import LabelValueError, check_labels, whole_labels
from mimo_jax.data.records import DataError
from mimo_jax.errors import UserError

_SCANS = {"ct.nii.gz": "CT", "mri.nii.gz": "MR", "mr.nii.gz": "MR"}
_SAME_MM = 0.1  # tolerance for voxel positions of two files with the same grid


@dataclass(frozen=True)
class _Volume:
    """labels: file -> value -> structure, None for one that is left out; the value None stands for all nonzero values."""

    case: str
    image: Path
    labels: dict[Path, dict[int | None, str | None]]
    modality: str
    split: str = ""


class Nifti(DatasetReader):
    """Options: axis, the plane or file axis of the slices; every, use every nth slice; min_area, number of pixels below which a slice
    does not show a structure; window, a name of `WINDOWS` or (low, high), by default the one that `open_image` chooses."""

    name = "nifti"
    expected_layout = (
        "CASE/ct.nii.gz and CASE/segmentations/, dataset.json and labelsTr/, images/ and labels/, or one volume with the option label"
    )
    options = {"axis": "axial", "every": 1, "min_area": 100, "window": None, "label": "", "labels": ""}

    def open(self) -> None:
        self.axis, self.every, self.min_area = (self.values[name] for name in ("axis", "every", "min_area"))
        if self.axis not in (*PLANES, "i", "j", "k"):
            raise DataError(f"axis {self.axis}: give i, j, k, {', '.join(reversed(PLANES))}")
        if self.every < 1 or self.min_area < 1:
            raise DataError(f"every {self.every}, min_area {self.min_area}: must be 1 or more")
        import_medical("nibabel")
        self.table = label_table(self.values["labels"]) if self.values["labels"] else {}
        self.volumes = [*self._found()]
        if not self.volumes:
            raise self.layout_error()

    def items(self) -> Iterator[Item]:
        for volume in self.volumes:
            try:
                areas, slices = self._areas(volume)
            except LabelValueError:  # reading its masks says what is wrong with them, so that the volume is counted among the rejects
                yield self._item(volume, 0, [self._mask(volume, *key) for key in _named(volume)], True)
                continue
            except UserError as error:
                self.skip(volume.case, str(error))
                continue
            for index in range(0, slices, self.every):
                masks = []
                small = False
                for (file, value, name), counts in areas.items():
                    if counts[index] >= self.min_area:
                        masks.append(self._mask(volume, file, value, name))
                    small |= 0 < counts[index] < self.min_area
                if masks:
                    yield self._item(volume, index, masks, not small)

    def _item(self, volume: _Volume, index: int, masks: list[MaskRef], complete: bool) -> Item:
        return Item(
            id=f"{volume.case}/{self.axis}_{index:04d}", image=str(volume.image), modality=volume.modality, dataset=self.dataset,
            group=f"{self.dataset}/{volume.case}", masks=tuple(masks), split=volume.split, slice=f"{self.axis}:{index}",
            window=self.values["window"], slice_axis=self.axis, slice_index=index, complete=complete, licence=self.licence,
        )  # fmt: skip

    def _mask(self, volume: _Volume, file: Path, value: int | None, name: str) -> MaskRef:
        table = () if value is None else tuple(volume.labels[file])
        return MaskRef(name, str(file), value=value, labels=table, threshold=self.mask_threshold)

    def _found(self) -> Iterator[_Volume]:
        if self.path.is_file():
            label = Path(self.values["label"])
            if not self.values["label"] or not label.is_file() or not self.table:
                raise DataError(f"{self.path}: give label=VOLUME, its labels, and labels=NAMES, a JSON of their names or totalsegmentator")
            yield _Volume(_stem(self.path), self.path, {label: dict(self.table)}, self.required_modality())
            return
        if self.values["label"]:
            raise DataError(f"{self.path}: is a folder; the option label belongs to one volume")
        cases = [path.parent.resolve() for path in sorted(self.folder.glob("**/segmentations")) if path.is_dir()]
        if cases:
            yield from self._total_segmentator(cases)
        elif (self.folder / "dataset.json").is_file():
            yield from self._decathlon(read(self.folder / "dataset.json"))
        elif (self.folder / "images").is_dir() and (self.folder / "labels").is_dir():
            if not self.table:
                raise DataError(f"{self.folder}: give labels=NAMES, a JSON of the labels' names or totalsegmentator")
            yield from self._pairs("images", "labels", self.table, self.required_modality(), "")

    def _total_segmentator(self, cases: list[Path]) -> Iterator[_Volume]:
        splits = _meta(self.folder / "meta.csv")
        for case in cases:
            scan = next((case / name for name in _SCANS if (case / name).is_file()), None)
            if scan is None:
                self.skip(case.name, f"has none of {', '.join(_SCANS)}")
                continue
            files = sorted((case / "segmentations").glob("*.nii.gz"))
            split = splits.get(case.name, "")
            yield _Volume(case.name, scan, {file: {None: _stem(file)} for file in files}, _SCANS[scan.name], split)

    def _decathlon(self, content: object) -> Iterator[_Volume]:
        where = str(self.folder / "dataset.json")
        if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
            raise DataError(f"{where}: has no labels")
        single = {key: value for key, value in content["labels"].items() if not isinstance(value, list)}  # nnU-Net may also list unions
        table = self.table or parse_table(where, single)
        if not self.table:  # what only unions contain has no name of its own
            unions = [value for value in content["labels"].values() if isinstance(value, list)]
            table |= {value: None for union in unions for value in union if isinstance(value, int) and value and value not in table}
            table |= {value: None for value, name in table.items() if name and name.casefold() == "ignore"}
        channels = content.get("modality") or content.get("channel_names") or {}
        first = str(next(iter(channels.values()), "")) if isinstance(channels, dict) else ""
        kind = "CT" if first.casefold() == "ct" else "MR" if re.match(r"(mr|t1|t2|flair|adc|dwi|lge)", first, re.IGNORECASE) else ""
        for part, split in (("Tr", "train"), ("Ts", "test")):
            if (self.folder / f"labels{part}").is_dir():
                yield from self._pairs(f"images{part}", f"labels{part}", table, kind or self.required_modality(), split)

    def _pairs(self, images: str, labels: str, table: dict[int, str | None], modality: str, split: str) -> Iterator[_Volume]:
        for label in sorted((self.folder / labels).glob("[!.]*.nii*")):
            case = _stem(label)
            names = [f"{case}{channel}{end}" for channel in ("", "_0000") for end in (".nii.gz", ".nii")]
            image = next((path for name in names if (path := self.folder / images / name).is_file()), None)
            if image is None:
                self.skip(f"{labels}/{label.name}", "has no image of the same name")
                continue
            yield _Volume(case, image, {label: dict(table)}, modality, split)

    def _areas(self, volume: _Volume) -> tuple[dict[tuple[Path, int | None, str], np.ndarray], int]:
        """((file, value, name) -> number of pixels of that structure in each slice; number of slices). Raises UserError for files that
        cannot be read, are not a single volume, or have different grids."""
        nibabel = import_medical("nibabel")
        areas: dict[tuple[Path, int | None, str], np.ndarray] = {}
        try:
            image = nibabel.load(volume.image)
            shape = (*image.shape, 1, 1)[:3]
            if any(n > 1 for n in image.shape[3:]) or 0 in image.shape:
                raise UserError(f"is {len(image.shape)}-D {list(image.shape)}; save one volume of it as a 3-D file")
            nearest = [int(world) for world in nearest_axes(image.affine)[:, 0]]
            axis = nearest.index(PLANES[self.axis]) if self.axis in PLANES else "ijk".index(self.axis)
            corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
            for file, names in volume.labels.items():
                label = nibabel.load(file)
                if (*label.shape, 1, 1)[:3] != shape or np.abs((label.affine - image.affine) @ corners).max() > _SAME_MM:
                    raise UserError(f"{file.name} is not on the grid of its image; resample the labels onto it")
                stored = np.moveaxis(np.asarray(label.dataobj).reshape(shape), axis, 0)
                if None in names:
                    whole = whole_labels(stored, file.name) if self.mask_threshold is None else stored >= self.mask_threshold
                    areas[file, None, names[None]] = (whole != 0).reshape(len(stored), -1).sum(1)
                    continue
                counts = np.zeros((len(stored), max(names) + 1), np.int64)
                for index, plane in enumerate(stored):
                    values = whole_labels(plane, file.name)
                    check_labels(values, names, file.name)
                    counts[index] = np.bincount(values.ravel(), minlength=max(names) + 1)
                areas.update({key: counts[:, key[1]] for key in _named(volume) if key[0] == file and counts[:, key[1]].any()})
        except UserError:
            raise
        except Exception as error:  # nibabel, gzip and numpy raise various errors
            raise UserError(f"a damaged or truncated NIfTI file ({type(error).__name__})") from None
        return areas, shape[axis]


def _named(volume: _Volume) -> Iterator[tuple[Path, int | None, str]]:
    """(file, value, name) of the structures that are not left out."""
    return ((file, value, name) for file, names in volume.labels.items() for value, name in names.items() if name is not None)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _meta(path: Path) -> dict[str, str]:
    """Case -> split from TotalSegmentator's meta.csv; empty if there is no such file."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=";")
        return {row["image_id"]: SPLITS.get(str(row.get("split")), "") for row in rows if row.get("image_id")}
