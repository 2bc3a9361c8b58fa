"""Maps raw class names of any source to canonical structures, by the table entities.csv and a few rules.

A name of the table, one of its synonyms, or either with a side ("kidney_left", "L kidney") means that structure; a synonym may be
restricted to one data set or modality. A name that the table does not contain is made readable and returned with `known=False`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

TABLE = "entities.csv"
_SIDES = {"left": "left", "right": "right", "l": "left", "r": "right", "lt": "left", "rt": "right"}
_SPELLING = {
    "tumour": "tumor", "tumours": "tumors", "oesophagus": "esophagus", "haemorrhage": "hemorrhage", "haemorrhages": "hemorrhages",
    "oedema": "edema", "foetal": "fetal", "foetus": "fetus", "ischaemic": "ischemic", "caecum": "cecum", "grey": "gray", "disk": "disc",
    "haematoma": "hematoma", "naevus": "nevus", "leucocyte": "leukocyte", "glioblastomas": "glioblastoma",
}  # fmt: skip
_LONGEST = 6  # words of a name that `mentions` looks for
_NAMELESS = re.compile(
    r"((left|right)\b)? *((class|label|segment|mask|region|structure|object|target|foreground|background|roi|other)e?s?)?[ -]*\d*"
    r"|benign|malignant|(ab)?normal|positive|negative"
)


@dataclass(frozen=True)
class CanonicalEntity:
    """A structure as questions and answers name it.

    parent: the structure that it is a part or a kind of, "" if none. site: for a lesion, the structure that always contains it.
    kind: organ, part, bone, muscle, vessel, tissue, lesion, cell or device. cui: its UMLS concept, if that is certain.
    """

    name: str
    laterality: str = ""  # "left", "right"
    parent: str = ""
    site: str = ""
    synonyms: tuple[str, ...] = ()
    cui: str = ""
    kind: str = ""
    known: bool = True


@dataclass(frozen=True)
class Mention:
    """A structure that a text names at text[start:end]."""

    start: int
    end: int
    entity: CanonicalEntity


def american(word: str) -> str:
    """The American spelling of a word of structures' names, in lower case; other words unchanged."""
    return _SPELLING.get(word, word)


def is_union(class_raw: str) -> bool:
    """Whether a class is the union of others of its data set ("union_lung")."""
    return _words(class_raw)[:1] == ["union"]


@lru_cache(maxsize=1 << 16)
def canonical(class_raw: str, dataset: str = "", modality: str = "") -> CanonicalEntity:
    """The structure that a source calls `class_raw`, in any spelling. The data set and modality resolve ambiguous names ("lesion",
    "left"). A union is named after what it unites. The canonical name of a structure maps to the same structure."""
    shown = " ".join(_SPELLING.get(word, word) for word in class_raw.casefold().replace("_", " ").split())
    while shown.startswith(("union ", "the ")):
        shown = shown.partition(" ")[2]
    words = _words(shown)
    sides = [word for word in words if word in _SIDES]
    side = _SIDES[sides[0]] if len(sides) == 1 else ""
    keys = [" ".join(words), " ".join([side, *(word for word in words if word not in _SIDES)]) if side else ""]
    data_set, kind = (" ".join(_words(text)) for text in (dataset, modality))
    contexts = [table for context, table in _CONTEXTS.items() if data_set.startswith(context) or kind == context]
    for table in (*contexts, _ALIASES):
        for key in keys:
            for form in (key, key.removesuffix("s")):
                if form in table:
                    return ENTITIES[table[form]]
    if len(sides) == 1 and shown.split().count(side) == 1:
        shown = " ".join([side, *(word for word in shown.split() if word != side)])
    return CanonicalEntity(shown, side, known=False)


def is_nameless(class_raw: str, dataset: str = "") -> bool:
    """Whether a class name identifies no structure: "left", "class3" or "benign" in a data set that says nothing more."""
    entity = canonical(class_raw, dataset)
    return not entity.known and _NAMELESS.fullmatch(entity.name) is not None


def mentions(text: str) -> list[Mention]:
    """The structures of the table that a text names, in any spelling, from left to right; of overlapping names the longer one, the first
    of equally long ones."""
    words = [word for word in re.finditer(r"[^\W_]+", text) if word[0].casefold() not in ("the", "union")]
    found: list[Mention] = []
    first = 0
    while first < len(words):
        for last in range(min(first + _LONGEST, len(words)) - 1, first - 1, -1):
            start, end = words[first].start(), words[last].end()
            named = text[start:end]
            if not re.search(r"[^\w\s'/+-]", named) and (entity := canonical(named)).known:  # no name reaches over a comma
                found.append(Mention(start, end, entity))
                first = last
                break
        first += 1
    return found


def ancestors(name: str) -> tuple[str, ...]:
    """The structures that a structure is a part or a kind of, nearest first: "left lung" and "lung" for "left lung upper lobe"."""
    found: list[str] = []
    while name in ENTITIES and (name := ENTITIES[name].parent):
        found.append(name)
    return tuple(found)


def _words(text: str) -> list[str]:
    """The words of a name as lookup key: American spelling, lower case, without punctuation."""
    words = (_SPELLING.get(word, word) for word in re.split(r"[\s_\-+/,.()]+", text.casefold()))
    return [word for word in words if word]


def _rows() -> Iterator[dict[str, str]]:
    """The rows of the table; those of numbered structures are repeated for each number."""
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    for row in csv.DictReader(line for line in text.splitlines() if line and not line.startswith("#")):
        numbers = re.search(r"\{(\d+)-(\d+)\}", row["name"])
        for n in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else ():
            yield row | {"name": row["name"].replace(numbers[0], str(n)), "synonyms": row["synonyms"].replace("{n}", str(n))}
        if not numbers:
            yield row


def _read() -> tuple[dict[str, CanonicalEntity], dict[str, list[str]]]:
    """(structures by name; the aliases of each by name, as the table writes them, including contexts)."""
    rows = {row["name"]: row for row in _rows()}
    entities: dict[str, CanonicalEntity] = {}
    aliases: dict[str, list[str]] = {}

    def add(name: str, side: str, written: list[str], row: dict[str, str]) -> None:
        within, unsided = row["within"], row["name"] if name != row["name"] else ""
        if name != row["name"] and within and rows[within]["sides"]:
            within = f"{side} {within}"
        parent, site = within or unsided, ""
        if row["kind"] == "lesion" and within:
            container = row["within"]
            if rows[container]["kind"] != "lesion":
                parent, site = unsided, within
            while not site and container:
                site, container = container * (rows[container]["kind"] != "lesion"), rows[container]["within"]
        synonyms = tuple(dict.fromkeys(alias for alias in written if "@" not in alias))
        entities[name] = CanonicalEntity(name, side, parent, site, synonyms, "" if unsided else row["cui"], row["kind"])
        aliases[name] = [name, *written]

    for name, row in rows.items():
        written = [alias.strip() for alias in row["synonyms"].split(";") if alias.strip()]
        own_side = next((side for side in ("left", "right") if name.startswith(f"{side} ")), "")
        add(name, own_side, [alias for alias in written if "{s" not in alias and alias[0] != "@"], row)
        for side in ("left", "right") if row["sides"] else ():
            sided = [alias if "{s" in alias else f"{side} {alias}".replace(" @", "@") for alias in written]
            add(f"{side} {name}", side, [alias.replace("{side}", side).replace("{s}", side[0]) for alias in sided], row)
    return entities, aliases


def _index(written: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """(alias -> name; context -> alias -> name, the longest context first), keyed by words as `canonical` looks them up."""
    everywhere: dict[str, str] = {}
    contexts: dict[str, dict[str, str]] = {}
    for name, aliases in written.items():
        for alias in aliases:
            text, _, context = alias.partition("@")
            table = contexts.setdefault(" ".join(_words(context)), {}) if context else everywhere
            key = " ".join(_words(text))
            if table.setdefault(key, name) != name:
                raise ValueError(f"{TABLE}: {alias!r} is an alias of both {table[key]} and {name}")
    return everywhere, dict(sorted(contexts.items(), key=lambda item: (-len(item[0]), item[0])))


ENTITIES, _written = _read()
_ALIASES, _CONTEXTS = _index(_written)
