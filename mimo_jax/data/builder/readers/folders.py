"""Reads images/x.png with masks/ENTITY/x.png, or with masks/x.png that shows one entity (option entity) or whose values a table names
(option labels, a JSON such as {"1": "liver", "2": null}; null leaves a label out). A folder in between, images/CASE/x.png, groups the
images of one patient or case. The option window says which values of more than 8 bits are black and white."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers.label_tables import label_table
from mimo_jax.data.builder.readers.reader import DatasetReader, image_files
from mimo_jax.data.records import DataError


class Folders(DatasetReader):
    name = "folders"
    expected_layout = "images/ and masks/"
    options = {"entity": "", "labels": "", "window": None}

    def open(self) -> None:
        self.images, self.masks = self.folder / "images", self.folder / "masks"
        if not (self.images.is_dir() and self.masks.is_dir()):
            raise self.layout_error()
        self.required_modality()
        self.table = label_table(self.values["labels"]) if self.values["labels"] else {}
        if self.values["entity"] and self.table:
            raise DataError(f"{self.masks}: give the option entity or labels, not both")

    def items(self) -> Iterator[Item]:
        masks: dict[str, list[MaskRef]] = defaultdict(list)
        images = {file.rsplit(".", 1)[0]: file for file in image_files(self.images)}
        for file in image_files(self.masks):
            place = file.rsplit(".", 1)[0]
            entity, _, within = place.partition("/")
            if place in images:
                masks[place] += self._unnamed(f"{self.masks}/{file}")
            elif within in images:
                masks[within].append(MaskRef(entity, f"{self.masks}/{file}", threshold=self.mask_threshold))
            else:
                self.skip(f"masks/{file}", "belongs to no image")
        for place, file in images.items():
            case = place.partition("/")[0]
            yield Item(
                id=place, image=f"{self.images}/{file}", modality=self.modality, dataset=self.dataset, group=f"{self.dataset}/{case}",
                masks=tuple(masks.pop(place, ())), window=self.values["window"], complete=False, licence=self.licence,
            )  # fmt: skip

    def _unnamed(self, file: str) -> list[MaskRef]:
        if self.values["entity"]:
            return [MaskRef(self.values["entity"], file, threshold=self.mask_threshold)]
        if not self.table:
            raise DataError(
                f"{self.masks}: does not say what its masks show; move them to masks/ENTITY/, or give entity=NAME or labels=TABLE"
            )
        named = {value: name for value, name in self.table.items() if name is not None}
        return [MaskRef(name, file, value=value, labels=tuple(self.table)) for value, name in named.items()]
