"""The pixels that the known families of SAM were trained on.

SAM, MedSAM and others have the same tensors, but not the same pixels, and no tensor shows which. A family is recognised by the name of
its file or folder; where it is not, `mimo convert import` demands it (`--sam-family`).

Each row was read in the source that it names. Those of the families in docs/converting.md without a kind of encoder here: EfficientSAM in
`EfficientSam.preprocess` of efficient_sam/efficient_sam.py in yformer/EfficientSAM (values from 0 to 1, stretched to 1024 x 1024, mean and
deviation of ImageNet); SAM 2 in `SAM2Transforms` of sam2/utils/transforms.py in facebookresearch/sam2 (stretched, the same mean and
deviation); MedSAM 2 in medsam2_infer_general.py of bowang-lab/MedSAM2 (stretched to 512 x 512, the same).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from checkpoints_convert.hf_config_check import SettingsError, read_settings
from mimo_jax.config import Config


class SamFamily(NamedTuple):
    """names: regex of the names of its files and folders; pixel_norm, image_fit: the values of `config.model.sam` that it was trained
    with; source: where they were read; kind: that of its encoder."""

    title: str
    names: str
    pixel_norm: str
    image_fit: str
    source: str
    kind: str = "vit"


# The first match decides. docs/converting.md has this table with families whose encoders are of other kinds.
FAMILIES = {
    "litemedsam": SamFamily(
        "LiteMedSAM", r"lite.?medsam|medsam.?lite", "minmax", "pad", "CVPR24_LiteMedSAM_infer.py of bowang-lab/MedSAM", "tiny_vit"
    ),
    "mobilesam": SamFamily(
        "MobileSAM", r"mobile.?sam", "imagenet", "pad", "mobile_sam/{build_sam,modeling/sam}.py of ChaoningZhang/MobileSAM", "tiny_vit"
    ),
    "medsam": SamFamily("MedSAM", r"medsam", "minmax", "stretch", "MedSAM_Inference.py of bowang-lab/MedSAM"),
    "sam-med2d": SamFamily("SAM-Med2D", r"sam.?med2d", "imagenet", "stretch", "DataLoader.py of OpenGVLab/SAM-Med2D"),
    "sam": SamFamily(
        "SAM", r"sam_vit_(b_01ec64|l_0b3195|h_4b8939)|sam-vit-(base|large|huge)", "imagenet", "pad", "Sam.preprocess of segment-anything"
    ),
}
OTHER = "other"  # a family that is not in the table: the settings of the configuration are right


def check_family(name: str, path: Path, config: Config, family: str | None = None) -> str | None:
    """Raise SettingsError if a source with SAM's tensors was trained on other pixels than `config.model.sam.pixel_norm`, or if its family
    is not known. name: of the source; family: a name of FAMILIES, or OTHER. Returns a remark if only `image_fit` differs."""
    flag, sam = f"--{name} {path}", config.model.sam
    if family not in (None, OTHER, *FAMILIES):
        raise SettingsError(f"--sam-family {family}: is unknown; use one of {', '.join((*FAMILIES, OTHER))}")
    if family is None:
        exported = read_settings((path if path.is_dir() else path.parent) / "mimo_config.json").get("model", {}).get("sam", {})
        if "pixel_norm" in exported:
            _check_pixels(flag, "an export of this project", exported["pixel_norm"], config)
            return None
        family = "sam" if name == "joint" else _recognised(path, sam.kind)  # the code of LISA and GLaMM contains SAM's mean and deviation
    if family is None:
        known = ", ".join(f"{key} ({row.pixel_norm})" for key, row in FAMILIES.items() if row.kind == sam.kind)
        raise SettingsError(
            f"{flag}: neither its tensors nor its name show on which pixels it was trained; give --sam-family: {known}, or {OTHER} if "
            f"config.model.sam.pixel_norm={sam.pixel_norm} is right"
        )
    if family == OTHER:
        return None
    row = FAMILIES[family]
    _check_pixels(flag, row.title, row.pixel_norm, config)
    if row.image_fit == sam.image_fit:
        return None
    return (
        f"{name}: {row.title} was trained with image_fit {row.image_fit}, the configuration has {sam.image_fit}; "
        f"--config.model.sam.image_fit={row.image_fit} changes it"
    )


def _check_pixels(flag: str, title: str, pixel_norm: str, config: Config) -> None:
    now = config.model.sam.pixel_norm
    if pixel_norm != now:
        raise SettingsError(
            f"{flag}: is {title}, trained with pixel_norm {pixel_norm}, the configuration has {now}: "
            f"set --config.model.sam.pixel_norm={pixel_norm} (or --sam-family, if it is another)"
        )


def _recognised(path: Path, kind: str) -> str | None:
    """The family with this kind of encoder that the name of a file, in the folder's config.json, or of the folder shows, in this order."""
    folder = path if path.is_dir() else path.parent
    for name in (path.name, str(read_settings(folder / "config.json").get("_name_or_path", "")), folder.name):
        if found := next((key for key, row in FAMILIES.items() if row.kind == kind and re.search(row.names, name.casefold())), None):
            return found
    return None
