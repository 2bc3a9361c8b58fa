"""What questions may take for known: facts of named structures, in words of our own.

A fact is a verb phrase that follows the structure's name ("The liver makes bile.") and the questions that it answers
without naming the structure. Structures that share a fact word for word (a left and a right kidney) answer together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    one: str  # "makes urine"
    many: str  # "make urine"
    asks: tuple[str, ...]  # questions that name no structure
    twin: str = ""  # the structure of the other side
    plural: str = ""  # lesions only: their plural, for counting
    homes: tuple[str, ...] = ()  # lesions only: the organs that one may lie in
    landmarks: tuple[str, ...] = ()  # lesions only: the structures that one's place is told by

    @property
    def lesion(self) -> bool:
        return bool(self.plural)


def _pair(name: str, one: str, many: str, asks: tuple[str, ...]) -> dict[str, Fact]:
    return {f"{a} {name}": Fact(one, many, asks, twin=f"{b} {name}") for a, b in (("left", "right"), ("right", "left"))}


KNOWLEDGE: dict[str, Fact] = {
    "liver": Fact("makes bile", "make bile", ("Which organ makes bile?", "Where is bile made?")),
    "spleen": Fact("clears old blood cells", "clear old blood cells", ("Which organ clears old blood cells?", "What filters the blood?")),
    **_pair("kidney", "makes urine", "make urine", ("Which organs make urine?", "Where is urine made?")),
    "aorta": Fact(
        "carries blood from the heart",
        "carry blood from the heart",
        ("Which structure carries blood from the heart?", "What is the largest artery?"),
    ),
    "liver cyst": Fact(
        "holds clear fluid", "hold clear fluid", ("Which lesion holds clear fluid?",), plural="liver cysts", homes=("liver",)
    ),
    **_pair(
        "lung", "oxygenates the blood", "oxygenate the blood", ("Which structures oxygenate the blood?", "Where does blood take up oxygen?")
    ),
    "heart": Fact("pumps the blood", "pump the blood", ("Which organ pumps the blood?", "What keeps the blood moving?")),
    "lung nodule": Fact(
        "may be an early cancer",
        "may be an early cancer",
        ("Which lesion may be an early cancer?",),
        plural="lung nodules",
        homes=("left lung", "right lung"),
    ),
    **_pair("lateral ventricle", "holds brain fluid", "hold brain fluid", ("Which structures hold brain fluid?", "Where is brain fluid?")),
    "brain tumor": Fact(
        "presses on the brain",
        "press on the brain",
        ("Which lesion presses on the brain?",),
        plural="brain tumors",
        landmarks=("left lateral ventricle", "right lateral ventricle"),
    ),
    "optic disc": Fact(
        "is where the optic nerve leaves the eye",
        "are where the optic nerve leaves the eye",
        ("Where does the optic nerve leave the eye?",),
    ),
    "macula": Fact("gives sharp vision", "give sharp vision", ("Which structure gives sharp vision?", "What serves reading?")),
    "hemorrhage": Fact(
        "is leaked blood", "are leaked blood", ("Where has blood leaked?",), plural="hemorrhages", landmarks=("optic disc", "macula")
    ),
    "gallbladder": Fact("stores bile", "store bile", ("Which organ stores bile?", "Where is bile kept?")),
    "portal vein": Fact(
        "carries blood from the gut", "carry blood from the gut", ("Which structure carries blood from the gut?", "What drains the gut?")
    ),
    "gallstone": Fact(
        "can block the bile", "can block the bile", ("What can block the bile?",), plural="gallstones", homes=("gallbladder",)
    ),
    "stomach": Fact("breaks down food", "break down food", ("Which organ breaks down food first?",)),
    "pancreas": Fact("makes insulin", "make insulin", ("Which organ makes insulin?",)),
    "colon": Fact("takes water from stool", "take water from stool", ("Which organ takes water from stool?",)),
    "inferior vena cava": Fact("returns blood to the heart", "return blood to the heart", ("Which vein returns blood to the heart?",)),
    "spinal cord": Fact("links the brain to the body", "link the brain to the body", ("What links the brain to the body?",)),
    "polyp": Fact("may turn into cancer", "may turn into cancer", ("Which growth may turn into cancer?",), plural="polyps"),
    "fetal head": Fact("shelters the growing brain", "shelter the growing brain", ("What shelters the growing brain?",)),
}
