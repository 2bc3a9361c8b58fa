"""Reads BiomedParse: train/NAME_MODALITY_SITE.png with train_mask/NAME_MODALITY_SITE_TARGET.png, and the same for test; + is a space."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers.reader import SPLITS, DatasetReader, case_of, image_files

_MODALITY = (
    (r"ct", "CT"), (r"mri?(-.*)?", "MR"), (r"x-?ray", "X-ray"), (r"ultrasound|us", "ultrasound"), (r"fundus.*", "fundus"),
    (r"dermoscop.*", "dermoscopy"), (r"(endo|colono)scop.*", "endoscopy"), (r"patholog.*|histolog.*", "pathology"),
)  # fmt: skip


class BiomedParse(DatasetReader):
    name = "biomedparse"
    expected_layout = "train/ and train_mask/, or test/ and test_mask/"

    def open(self) -> None:
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name in SPLITS)
        self.parts = [path for path in folders if (self.folder / f"{path.name}_mask").is_dir()]
        if not self.parts:
            raise self.layout_error()

    def items(self) -> Iterator[Item]:
        for part in self.parts:
            images = {file.rsplit(".", 1)[0]: file for file in image_files(part)}
            masks: dict[str, list[MaskRef]] = defaultdict(list)
            for file in image_files(self.folder / f"{part.name}_mask"):
                full_stem = file.rsplit(".", 1)[0]
                stem = full_stem.rpartition("_")[0]
                while stem and stem not in images:  # a target may contain _
                    stem = stem.rpartition("_")[0]
                if not stem:
                    self.skip(f"{part.name}_mask/{file}", "belongs to no image")
                    continue
                target = full_stem[len(stem) + 1 :].replace("+", " ")
                path = f"{self.folder}/{part.name}_mask/{file}"
                instance = sum(mask.class_raw == target for mask in masks[stem])
                masks[stem].append(MaskRef(target, path, instance=instance, threshold=self.mask_threshold))
            for stem, file in images.items():
                name, *suffix = stem.rsplit("_", 2)
                modality = next(
                    (kind for pattern, kind in _MODALITY if suffix and re.fullmatch(pattern, suffix[0].casefold())), self.modality
                )
                if len(suffix) < 2 or not modality:
                    self.skip(f"{part.name}/{file}", "its name is not NAME_MODALITY_SITE with a modality of records")
                    continue
                case = case_of(name) if modality in ("CT", "MR") else name
                yield Item(
                    id=f"{part.name}/{stem}", image=f"{part}/{file}", modality=modality, dataset=self.dataset,
                    group=f"{self.dataset}/{case}", masks=tuple(masks.pop(stem, ())), split=SPLITS[part.name], complete=False,
                    licence=self.licence,
                )  # fmt: skip
