"""How often what is seen where, and what a missing mask says: by this, questions are asked as often with one answer as with another.

A *key* is a (dataset, modality). Labels of an image are *complete* where all that its key is labelled with is labelled in it;
elsewhere a missing mask says nothing, and only what is said to be absent is known to be. While a structure is shown, neither
its wholes nor its parts are known to be absent ("lung" of an image with a "left lung").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from mimo_jax.data.builder.entities import ENTITIES, ancestors
from mimo_jax.data.schema import Record

PRESENCE_PER_IMAGE = 4.0  # yes-or-no questions of presence, on average
HARD_SHARE = 0.75  # of the answers "No.": asked where such an entity might have been
Key = tuple[str, str]


@lru_cache(maxsize=1 << 16)
def overlapping(a: str, b: str) -> bool:
    """Whether a mask of one may be counted to the other: a whole and its part, but not an organ and a lesion in it."""
    return a == b or a in ancestors(b) or b in ancestors(a)


def is_lesion(entity: str) -> bool:
    return entity in ENTITIES and ENTITIES[entity].kind == "lesion"


@dataclass
class LabelCounts:
    """Counts of images, to make a Census of. Tallies of parts of a data set add up to that of the whole."""

    images: Counter[Key] = field(default_factory=Counter)
    complete: Counter[Key] = field(default_factory=Counter)  # of the images, those whose labels are
    shown: Counter[tuple[Key, str]] = field(default_factory=Counter)
    lacked: Counter[tuple[Key, str]] = field(default_factory=Counter)  # said to be absent
    labelled: Counter[tuple[Key, str]] = field(default_factory=Counter)  # shown, in complete images
    known: Counter[tuple[Key, str]] = field(default_factory=Counter)  # in complete images: shown, said to be absent, or not to be told

    def add(
        self, dataset: str, modality: str, entities: Iterable[str], absent: Iterable[str] = (), complete: bool = True, times: int = 1
    ) -> None:
        """`times` images of a kind: what their masks name, what is said to be absent, and whether their labels are complete."""
        key = (dataset, modality)
        shown = frozenset(entities)
        lacked = frozenset(absent) - shown
        self.images[key] += times
        self.shown.update({(key, entity): times for entity in shown})
        self.lacked.update({(key, entity): times for entity in lacked})
        if complete:
            self.complete[key] += times
            self.labelled.update({(key, entity): times for entity in shown})
            self.known.update({(key, entity): times for entity in _covered(shown) | lacked})

    def __iadd__(self, other: LabelCounts) -> LabelCounts:
        for name, counts in vars(other).items():
            getattr(self, name).update(counts)
        return self


@lru_cache(maxsize=1 << 12)
def _covered(entities: frozenset[str]) -> frozenset[str]:
    wholes_and_parts = {other for entity in entities for other in _kin(entity)}
    return entities | wholes_and_parts


@lru_cache(maxsize=1 << 12)
def _kin(entity: str) -> tuple[str, ...]:
    return tuple(other for other in ENTITIES if other != entity and overlapping(entity, other))


@dataclass
class LabelStats:
    """Shares of images by key. `absence` and `vouched` are by default those of complete labels."""

    share: dict[Key, float] = field(default_factory=dict)  # of all images
    presence: dict[Key, dict[str, float]] = field(default_factory=dict)  # entity → share of that key's images
    elsewhere: bool = False  # an entity that a key is not labelled with is known not to be in its images
    absence: dict[Key, dict[str, float]] | None = None  # entity → the share of that key's images that are known to lack it
    vouched: dict[Key, frozenset[str]] | None = None  # what complete images of that key are labelled with

    def __post_init__(self):
        if self.absence is None:
            self.absence = {key: {entity: 1 - share for entity, share in seen.items()} for key, seen in self.presence.items()}
        if self.vouched is None:
            self.vouched = {key: frozenset(seen) for key, seen in self.presence.items()}

    @staticmethod
    def of(records: Iterable[Record], elsewhere: bool = False, absent: Mapping[str, Iterable[str]] | None = None) -> LabelStats:
        """Count the masks of `records`. absent: record id → entities known not to be in it, where labels are not complete;
        without it, they are."""
        tally = LabelCounts()
        for record in records:
            said = () if absent is None else absent.get(record.id, ())
            tally.add(record.dataset, record.modality, {mask.entity for mask in record.masks}, said, complete=absent is None)
        return LabelStats.of_tally(tally, elsewhere)

    @staticmethod
    def of_tally(tally: LabelCounts, elsewhere: bool = False) -> LabelStats:
        total = sum(tally.images.values())
        presence: dict[Key, dict[str, float]] = {key: {} for key in tally.images}
        absence: dict[Key, dict[str, float]] = {key: {} for key in tally.images}
        for key, entity in sorted({*tally.shown, *tally.lacked}):
            presence[key][entity] = tally.shown[key, entity] / tally.images[key]
            silent = tally.complete[key] - tally.known[key, entity] if tally.labelled[key, entity] else 0
            absence[key][entity] = (silent + tally.lacked[key, entity]) / tally.images[key]
        return LabelStats(
            share={key: n / total for key, n in tally.images.items()},
            presence=presence,
            elsewhere=elsewhere,
            absence=absence,
            vouched={key: frozenset(entity for of, entity in tally.labelled if of == key) for key in tally.images},
        )

    def lacking(self, record: Record, absent: Iterable[str] = (), complete: bool = True) -> list[str]:
        """Entities that are known not to be in the record's image, though its kind of image may show them; arguments as of
        Tally.add."""
        key = (record.dataset, record.modality)
        shown = {mask.entity for mask in record.masks}
        silent = self.vouched.get(key, frozenset()) if complete else frozenset()
        silent = {entity for entity in silent if not any(overlapping(entity, other) for other in shown)}
        named = {entity for entity in absent if entity not in shown}
        order = self.presence.get(key, {})
        return [entity for entity in order if entity in silent or entity in named] + sorted(named - order.keys())

    def odds(self, record: Record, entity: str) -> float:
        """Of images like the record's: those that show the entity, for one that is known to lack it."""
        key = (record.dataset, record.modality)
        shown, lacked = (shares.get(key, {}).get(entity, 0.0) for shares in (self.presence, self.absence))
        return shown / lacked if lacked else 0.0

    def foreign(self, record: Record) -> list[str]:
        """Entities that are known not to be in the record's image, for they belong to other keys alone."""
        here = self.presence.get((record.dataset, record.modality), {})
        return [entity for entity in self.entities if entity not in here] if self.elsewhere else []

    @cached_property
    def entities(self) -> list[str]:
        return sorted({entity for presence in self.presence.values() for entity in presence})

    @cached_property
    def asking_rates(self) -> dict[str, tuple[float, float, float]]:
        """Entity → the probabilities of asking for its presence in an image that shows it, in one that is known to lack it, and
        in one of another key, such that over all images it is asked for equally often whatever the entity (PRESENCE_PER_IMAGE
        in all), half of it answered yes. Zeros where a balance cannot be had."""
        return {entity: self._asking_rates(entity) for entity in self.entities}

    def _asking_rates(self, entity: str) -> tuple[float, float, float]:
        shows = sum(self.share[k] * p.get(entity, 0.0) for k, p in self.presence.items())
        lacks = sum(self.share[k] * p.get(entity, 0.0) for k, p in self.absence.items())
        others = sum(self.share[k] for k, p in self.presence.items() if entity not in p) if self.elsewhere else 0.0
        half = min(PRESENCE_PER_IMAGE / len(self.entities) / 2, shows, lacks + others)
        if half <= 0:
            return 0.0, 0.0, 0.0
        hard = min(lacks, half * HARD_SHARE if others else half)
        easy = min(others, half - hard)
        half = hard + easy
        return half / shows, hard / lacks if lacks else 0.0, easy / others if others else 0.0
