"""Which structures cannot be in an image, whatever its labels leave out: no kidney in a photograph of the retina.

Labels that are not complete leave structures out: the CT slice of a data set of livers also shows kidneys. Only two things make sure that
a structure is not there: the kind of image, and the part of the body. The rules say "cannot" only where no image of that kind could show
the structure; in every other case the answer is unknown, and nothing is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from mimo_jax.data.builder.knowledge import KNOWLEDGE

HEAD, NECK, CHEST, ABDOMEN, PELVIS = range(5)
REACH = 1  # an image may also show the neighbouring levels of those that it is labelled with
# Values of `within` in knowledge.toml: the first and the last level that they belong to. Others are those of the structure of that name; a
# name that stands for no level, such as "body" or "skin", has none.
LEVELS = {
    **dict.fromkeys(("head", "brain", "white matter", "face", "mouth", "eye", "orbit", "retina", "inner ear"), (HEAD, HEAD)),
    "neck": (NECK, NECK), "neck and chest": (NECK, CHEST),
    **dict.fromkeys(("chest", "chest wall", "heart", "lung", "right lung", "breast", "pleural space", "pulmonary artery"), (CHEST, CHEST)),
    "trunk": (CHEST, PELVIS), "spine": (NECK, PELVIS), "lower back": (ABDOMEN, PELVIS),
    **dict.fromkeys(("abdomen", "kidney", "liver", "pancreas", "gallbladder"), (ABDOMEN, ABDOMEN)),
    **dict.fromkeys(("bowel", "colon"), (ABDOMEN, PELVIS)),
    **dict.fromkeys(("pelvis", "prostate", "uterus", "scrotum", "pregnant uterus", "fetus"), (PELVIS, PELVIS)),
}  # fmt: skip
_LARGE = ("bone", "cavity", "joint", "region")  # kinds of structures of which no microscope shows more than tissue


@lru_cache(maxsize=1 << 10)
def levels(entity: str) -> tuple[int, int] | None:
    """The first and the last level of the body (HEAD … PELVIS) that a structure belongs to; None if that is unknown or may be any."""
    within = KNOWLEDGE[entity].within if entity in KNOWLEDGE else ""
    if within in LEVELS or within == entity:
        return LEVELS.get(within)
    return levels(within) if within in KNOWLEDGE else None


def cannot_show(modality: str, labelled: Iterable[str], entity: str) -> bool:
    """Whether an image of this modality cannot show `entity`. labelled: the structures that images of its kind are labelled with; unless
    the level of each is known, only the modality counts."""
    fact = KNOWLEDGE.get(entity)
    if fact is None:
        return False
    place = levels(entity)
    if fact.modalities == ("pathology",) and (fact.kind == "cell" or fact.within == "cell"):
        return modality != "pathology"
    if fact.modalities == ("dermoscopy",):
        return modality in ("fundus", "endoscopy")  # the inside of the body; all other images may show skin
    if modality == "dermoscopy":
        return place is not None
    if modality == "pathology":  # tissue may be of any organ or tumor
        return place is not None and fact.kind in _LARGE
    known = [levels(other) for other in labelled]
    if place is None or not known or None in known:
        return False
    if any(KNOWLEDGE[other].within == "fetus" for other in labelled) and fact.kind != "lesion":
        return False  # a fetus has the organs of all levels
    first, last = min(low for low, _ in known), max(high for _, high in known)
    return place[1] < first - REACH or place[0] > last + REACH
