"""What questions may take for known: the facts of knowledge.toml, of named structures and in words of our own.

A fact is a phrase that follows the structure's name: "The liver makes bile." Structures that share one word for word (a left and
a right kidney, the ribs) answer together, and no two others do.
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
LONGEST = 75  # letters of a phrase
_PHRASES = ("within", "does", "lies", "plural")
_LISTS = ("beside", "beside_left", "beside_right", "findings", "modalities", "asks", "also", "homes", "landmarks")
_FLAGS = ("paired", "mass")


@dataclass(frozen=True)
class Fact:
    """What is known of one structure; "" or () where nothing is. Names are canonical ones, also where they have no fact."""

    kind: str  # one of KINDS
    within: str  # "abdomen"
    does: str  # "makes bile"
    asks: tuple[str, ...]  # questions of what it does, that name no structure
    lies: str = ""  # "in the right upper abdomen"
    beside: tuple[str, ...] = ()  # neighbours
    findings: tuple[str, ...] = ()  # what may be found in it: "liver cysts"
    modalities: tuple[str, ...] = ()  # the most usual first
    twin: str = ""  # the structure of the other side
    plural: str = ""  # what can be counted: its plural
    homes: tuple[str, ...] = ()  # lesions: the structures that one may lie in
    landmarks: tuple[str, ...] = ()  # lesions: the structures that one's place is told by
    mass: bool = False  # has no indefinite article

    @property
    def many(self) -> str:
        """`does` of several: "make bile"."""
        return plural_verb(self.does)

    def verb(self, number: int = 1) -> str:
        return self.does if number == 1 else self.many


def plural_verb(phrase: str) -> str:
    """A phrase that begins with a verb in the third person, of several: "carries blood" -> "carry blood"."""
    verb, space, rest = phrase.partition(" ")
    irregular = {"is": "are", "has": "have", "does": "do", "lies": "lie", "may": "may", "can": "can"}
    if verb not in irregular:
        if verb.endswith("ies"):
            irregular[verb] = verb[:-3] + "y"
        else:
            irregular[verb] = verb.removesuffix("es" if verb.endswith(("sses", "shes", "ches", "xes", "zzes")) else "s")
    return irregular[verb] + space + rest


def load_knowledge(path: str | Path | None = None) -> dict[str, Fact]:
    """Structure -> its facts, of a table like knowledge.toml (by default that one). Raises UserError that names entry and field."""
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
                    raise UserError(f"{file.name}, [{name}]: {entity!r} is there twice")
                facts[entity] = _fact(row, each, side, paired)
    _check_names(file.name, table, facts)
    return facts


def _fact(row: Mapping, name: str, side: str, paired: set[str]) -> Fact:
    here = side or next((s for s in SIDES if name.startswith(f"{s} ")), "")
    beside = [*row.get("beside", ()), *(row.get(f"beside_{side}", ()) if side else ())]
    return Fact(
        kind=row["kind"],
        within=row["within"],
        does=row["does"],
        asks=tuple(row.get("asks", (f"Which {row['kind']} {row['does']}?", f"Which structure {row['does']}?"))),
        lies=row.get("lies", ""),
        beside=tuple(f"{here} {other}" if here and other in paired else other for other in beside),
        findings=tuple(row.get("findings", ())),
        modalities=tuple(row["modalities"]),
        twin=f"{SIDES[side == 'left']} {name}" if side else "",
        plural=f"{side} {row['plural']}".strip() if "plural" in row else "",
        homes=tuple(each for home in row.get("homes", ()) for each in _sided(home, here, paired)),
        landmarks=tuple(row.get("landmarks", ())),
        mass=row.get("mass", False),
    )


def _sided(home: str, side: str, paired: set[str]) -> tuple[str, ...]:
    """A home of a lesion: one that is paired is the one of the lesion's side, or either, or not told apart."""
    if home not in paired:
        return (home,)
    return (*(f"{s} {home}" for s in ((side,) if side else SIDES)), home)


def _check_row(file: str, name: str, row: Mapping) -> None:
    where = f"{file}, [{name}]"
    unknown = [key for key in row if key not in ("kind", *_PHRASES, *_LISTS, *_FLAGS)]
    lacking = [key for key in ("kind", "within", "does", "modalities") if not row.get(key)]
    if unknown or lacking:
        raise UserError(f"{where}: " + (f"unknown field {unknown[0]!r}" if unknown else f"lacks {lacking[0]}"))
    for keys, kind, told in ((("kind", *_PHRASES), str, "text"), (_LISTS, list, "a list of texts"), (_FLAGS, bool, "true or false")):
        for key in keys:
            value = row.get(key, kind())
            if not isinstance(value, kind) or (kind is list and not all(isinstance(text, str) and text for text in value)):
                raise UserError(f"{where}: {key} must be {told}")
            if kind is list and len(set(value)) < len(value):
                raise UserError(f"{where}: {key} says a thing twice")
    if name != name.strip() or name.split(" ")[0] in ("a", "an", "the"):
        raise UserError(f"{where}: write the name without article")
    if row["kind"] not in KINDS:
        raise UserError(f"{where}: kind {row['kind']!r}; use one of {', '.join(KINDS)}")
    for modality in row["modalities"]:
        if modality not in MODALITIES:
            raise UserError(f"{where}: modality {modality!r}; use one of {', '.join(MODALITIES)}")
    if row.get("paired") and name.startswith(tuple(f"{side} " for side in SIDES)):
        raise UserError(f"{where}: is of one side, and cannot be paired")
    if row["kind"] != "lesion" and ("homes" in row or "landmarks" in row):
        raise UserError(f"{where}: homes and landmarks are of lesions")
    for text in [*(row[key] for key in _PHRASES if key in row), *row.get("findings", ()), *row.get("asks", ())]:
        if len(text) > LONGEST or "{" in text or "\n" in text:
            raise UserError(f"{where}: {text!r} is no short phrase ({LONGEST} letters at most, no braces)")
        if f" {name} " in f" {text.rstrip('?')} " and text != row.get("plural"):
            raise UserError(f"{where}: {text!r} names the structure itself; a question of it would tell its answer")
    for text in row.get("asks", ()):
        if not text.endswith("?"):
            raise UserError(f"{where}: {text!r} is no question")
    for key in ("does", "lies", "within"):
        if row.get(key, "").endswith((".", "?")) or (key == "does" and row["does"].split(" ")[0] in ("the", "a", "an")):
            raise UserError(f"{where}: {key} is a phrase without full stop, that of `does` begins with a verb")


def _check_names(file: str, table: Mapping[str, Mapping], facts: Mapping[str, Fact]) -> None:
    """What an entry refers to exists, and nothing is said of two structures that would then answer one question."""
    for entity, fact in facts.items():
        for other in (*fact.beside, *fact.homes, *fact.landmarks):
            if other not in facts:
                raise UserError(f"{file}, [{entity}]: refers to {other!r}, which has no entry")
            if other == entity:
                raise UserError(f"{file}, [{entity}]: refers to itself")
    for key in ("does", "lies", "asks"):
        said: dict[str, str] = {}
        for name, row in table.items():
            for text in _texts(row.get(key, ())):
                if said.setdefault(text, name) != name:
                    raise UserError(f"{file}, [{name}]: {key} {text!r} is said of {said[text]!r} too")


def _texts(value: str | Iterable[str]) -> Iterable[str]:
    return (value,) if isinstance(value, str) else value


KNOWLEDGE = load_knowledge()
