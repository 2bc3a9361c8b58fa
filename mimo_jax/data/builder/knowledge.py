"""The facts about named structures that questions may use, read from knowledge.toml.

A fact is a phrase that follows the structure's name: "The liver makes bile." Structures that have exactly the same fact (a left and a
right kidney, the ribs) answer a question together; no other two structures share a fact.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mimo_jax.config import MODALITIES
from mimo_jax.errors import UserError

TABLE = "knowledge.toml"
KINDS = (
    *("organ", "gland", "vessel", "bone", "cartilage", "joint", "muscle", "nerve", "tissue", "region", "cavity", "fluid", "cell"),
    *("lesion", "device"),
)
SIDES = ("left", "right")
MAX_PHRASE = 75  # maximum number of letters of a phrase
_PHRASES = ("within", "does", "lies", "plural")
_LISTS = ("beside", "beside_left", "beside_right", "findings", "modalities", "asks", "also", "homes", "landmarks")
_FLAGS = ("paired", "mass", "numerous")


@dataclass(frozen=True)
class Fact:
    """The facts about one structure; "" or () if unknown. All names are canonical, even those without their own facts."""

    kind: str  # one of KINDS
    within: str  # "abdomen"
    does: str  # "makes bile"
    asks: tuple[str, ...]  # questions about its function that name no structure
    lies: str = ""  # phrase after "lies": "in the right upper abdomen"
    beside: tuple[str, ...] = ()  # neighbours
    findings: tuple[str, ...] = ()  # findings in it: "liver cysts"
    modalities: tuple[str, ...] = ()  # the most usual first
    twin: str = ""  # the same structure on the other side
    plural: str = ""  # its plural, if it can be counted
    numerous: bool = False  # one mask may hold many of it, so that it is named in the plural and not counted by masks alone
    homes: tuple[str, ...] = ()  # of lesions: the structures that may contain one
    landmarks: tuple[str, ...] = ()  # of lesions: the structures by which its position is described
    mass: bool = False  # a mass noun, without indefinite article

    @property
    def many(self) -> str:
        """`does` in the plural: "make bile"."""
        return plural_verb(self.does)

    def verb(self, number: int = 1) -> str:
        return self.does if number == 1 else self.many


def plural_verb(phrase: str) -> str:
    """The plural of a phrase that begins with a verb in the third person: "carries blood" -> "carry blood"."""
    verb, space, rest = phrase.partition(" ")
    irregular = {"is": "are", "has": "have", "does": "do", "lies": "lie", "may": "may", "can": "can"}
    if verb not in irregular:
        if verb.endswith("ies"):
            irregular[verb] = verb[:-3] + "y"
        else:
            irregular[verb] = verb.removesuffix("es" if verb.endswith(("sses", "shes", "ches", "xes", "zzes")) else "s")
    return irregular[verb] + space + rest


def load_knowledge(path: str | Path | None = None) -> dict[str, Fact]:
    """Structure -> its facts, from knowledge.toml or another table of the same form. Raises UserError naming entry and field."""
    file = resources.files(__package__).joinpath(TABLE) if path is None else Path(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file.name}: cannot be read ({error})") from None
    for name, row in table.items():
        _check_row(file.name, name, row)
    facts: dict[str, Fact] = {}
    paired = {each for name, row in table.items() if row.get("paired") for each in (name, *row.get("also", ()))}
    for name, row in table.items():
        for each in (name, *row.get("also", ())):
            for side in ("", *SIDES) if row.get("paired") else ("",):
                entity = f"{side} {each}".strip()
                if entity in facts:
                    raise UserError(f"{file.name}, [{name}]: {entity!r} occurs twice")
                facts[entity] = _fact(row, each, side, paired)
    _check_names(file.name, table, facts)
    return facts


def _fact(row: Mapping, name: str, side: str, paired: set[str]) -> Fact:
    own_side = side or next((s for s in SIDES if name.startswith(f"{s} ")), "")
    beside = [*row.get("beside", ()), *(row.get(f"beside_{side}", ()) if side else ())]
    return Fact(
        kind=row["kind"],
        within=row["within"],
        does=row["does"],
        asks=tuple(row.get("asks", (f"Which {row['kind']} {row['does']}?", f"Which structure {row['does']}?"))),
        lies=row.get("lies", ""),
        beside=tuple(f"{own_side} {other}" if own_side and other in paired else other for other in beside),
        findings=tuple(row.get("findings", ())),
        modalities=tuple(row["modalities"]),
        twin=f"{SIDES[side == 'left']} {name}" if side else "",
        plural=f"{side} {row['plural']}".strip() if "plural" in row else "",
        homes=tuple(each for home in row.get("homes", ()) for each in _sided(home, own_side, paired)),
        landmarks=tuple(row.get("landmarks", ())),
        mass=row.get("mass", False),
        numerous=row.get("numerous", False),
    )


def _sided(home: str, side: str, paired: set[str]) -> tuple[str, ...]:
    """The structures that a home of a lesion stands for: a paired one is that of the lesion's side, or either side, or the structure
    without a side."""
    if home not in paired:
        return (home,)
    return (*(f"{s} {home}" for s in ((side,) if side else SIDES)), home)


def _check_row(file: str, name: str, row: Mapping) -> None:
    where = f"{file}, [{name}]"
    unknown = [key for key in row if key not in ("kind", *_PHRASES, *_LISTS, *_FLAGS)]
    lacking = [key for key in ("kind", "within", "does", "modalities") if not row.get(key)]
    if unknown or lacking:
        raise UserError(f"{where}: " + (f"unknown field {unknown[0]!r}" if unknown else f"lacks {lacking[0]}"))
    for keys, kind, expected in ((("kind", *_PHRASES), str, "text"), (_LISTS, list, "a list of texts"), (_FLAGS, bool, "true or false")):
        for key in keys:
            value = row.get(key, kind())
            if not isinstance(value, kind) or (kind is list and not all(isinstance(text, str) and text for text in value)):
                raise UserError(f"{where}: {key} must be {expected}")
            if kind is list and len(set(value)) < len(value):
                raise UserError(f"{where}: {key} lists an entry twice")
    if name != name.strip() or name.split(" ")[0] in ("a", "an", "the"):
        raise UserError(f"{where}: write the name without article")
    if row["kind"] not in KINDS:
        raise UserError(f"{where}: kind {row['kind']!r}; use one of {', '.join(KINDS)}")
    for modality in row["modalities"]:
        if modality not in MODALITIES:
            raise UserError(f"{where}: modality {modality!r}; use one of {', '.join(MODALITIES)}")
    if row.get("paired") and name.startswith(tuple(f"{side} " for side in SIDES)):
        raise UserError(f"{where}: belongs to one side and cannot be paired")
    if row.get("numerous") and "plural" not in row:
        raise UserError(f"{where}: is numerous, but has no plural")
    if row["kind"] != "lesion" and ("homes" in row or "landmarks" in row):
        raise UserError(f"{where}: only lesions have homes and landmarks")
    for text in [*(row[key] for key in _PHRASES if key in row), *row.get("findings", ()), *row.get("asks", ())]:
        if len(text) > MAX_PHRASE or "{" in text or "\n" in text:
            raise UserError(f"{where}: {text!r} is not a short phrase (at most {MAX_PHRASE} letters, no braces)")
        if f" {name} " in f" {text.rstrip('?')} " and text != row.get("plural"):
            raise UserError(f"{where}: {text!r} names the structure itself; a question with it would give away its answer")
    for text in row.get("asks", ()):
        if not text.endswith("?"):
            raise UserError(f"{where}: {text!r} is not a question; end it with ?")
    for key in ("does", "lies", "within"):
        if row.get(key, "").endswith((".", "?")) or (key == "does" and row["does"].split(" ")[0] in ("the", "a", "an")):
            raise UserError(f"{where}: {key} must be a phrase without full stop, and `does` must begin with a verb")


def _check_names(file: str, table: Mapping[str, Mapping], facts: Mapping[str, Fact]) -> None:
    """Check that every structure an entry refers to exists, and that no fact is shared by two entries, which would both answer one
    question."""
    for entity, fact in facts.items():
        for other in (*fact.beside, *fact.homes, *fact.landmarks):
            if other not in facts:
                raise UserError(f"{file}, [{entity}]: refers to {other!r}, which has no entry")
            if other == entity:
                raise UserError(f"{file}, [{entity}]: refers to itself")
    for key in ("does", "lies", "asks"):
        owner: dict[str, str] = {}
        for name, row in table.items():
            for text in _texts(row.get(key, ())):
                if owner.setdefault(text, name) != name:
                    raise UserError(f"{file}, [{name}]: {key} {text!r} is also given for {owner[text]!r}")


def _texts(value: str | Iterable[str]) -> Iterable[str]:
    return (value,) if isinstance(value, str) else value


KNOWLEDGE = load_knowledge()
