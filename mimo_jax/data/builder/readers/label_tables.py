"""The names of the values of a label volume: a JSON table, or that of TotalSegmentator."""

from __future__ import annotations

from pathlib import Path

from mimo_jax.data.builder.readers.index_files import read
from mimo_jax.data.records import DataError

_SIDES = ("left", "right")
# The 117 classes of its task "total", version 2, in the order of their values from 1.
TOTALSEGMENTATOR = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland_right", "adrenal_gland_left",
    "lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right",
    "esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", "kidney_cyst_left",
    "kidney_cyst_right", "sacrum", "vertebrae_S1", *(f"vertebrae_L{n}" for n in range(5, 0, -1)),
    *(f"vertebrae_T{n}" for n in range(12, 0, -1)), *(f"vertebrae_C{n}" for n in range(7, 0, -1)), "heart", "aorta", "pulmonary_vein",
    "brachiocephalic_trunk", "subclavian_artery_right", "subclavian_artery_left", "common_carotid_artery_right",
    "common_carotid_artery_left", "brachiocephalic_vein_left", "brachiocephalic_vein_right", "atrial_appendage_left",
    "superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein",
    *(f"{name}_{side}" for name in ("iliac_artery", "iliac_vena", "humerus", "scapula", "clavicula", "femur", "hip") for side in _SIDES),
    "spinal_cord",
    *(f"{name}_{side}" for name in ("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas") for side in _SIDES),
    "brain", "skull", *(f"rib_{side}_{n}" for side in _SIDES for n in range(1, 13)), "sternum", "costal_cartilages",
)  # fmt: skip


def label_table(source: str | Path) -> dict[int, str | None]:
    """Value -> name, None for a label that is left out: from "totalsegmentator" or a JSON file. Raises DataError if it is not a table
    of labels."""
    if str(source).casefold() == "totalsegmentator":
        return dict(enumerate(TOTALSEGMENTATOR, 1))
    return parse_table(str(source), read(Path(source)))


def parse_table(where: str, table: object) -> dict[int, str | None]:
    """Value -> name of {"1": "liver"} or {"liver": 1}, without the background; {"2": null} leaves a label out. where: its name in
    errors."""
    if not isinstance(table, dict):
        raise DataError(f'{where}: is not a table of labels, such as {{"1": "liver"}}')
    values: dict[int, str | None] = {}
    for key, value in table.items():
        number, name = (value, key) if isinstance(value, int) else (key, value)
        if not str(number).isdecimal() or not isinstance(name, str | None) or (name or "").isdecimal():
            raise DataError(f'{where}: {key}: {value} is not a label with its name, such as "1": "liver"')
        if int(number) in values:
            raise DataError(f"{where}: names the label {number} twice")
        if int(number):
            values[int(number)] = name
    if not any(values.values()):
        raise DataError(f"{where}: names no label except the background")
    return values
