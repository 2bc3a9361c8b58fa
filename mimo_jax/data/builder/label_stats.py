"""Statistics of labels: how often each entity is shown, and what a missing mask means. They balance the answers of questions.

A *key* is a (dataset, modality). The labels of an image are *complete* if every entity that its key is labelled with is labelled in it.
In other images a missing mask means nothing, and only entities that are listed as absent are known to be absent. If a structure is shown,
neither the wholes that it is part of nor its parts are known to be absent ("lung" in an image with a "left lung").
Entities of other keys are *foreign* to an image if they are known to be absent from all images of its key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from mimo_jax.data.builder.body_regions import cannot_show
from mimo_jax.data.builder.entities import ENTITIES, ancestors
from mimo_jax.data.schema import Record

PRESENCE_PER_IMAGE = 4.0  # average number of yes-or-no questions about presence
HARD_SHARE = 0.75  # share of the answers "No." that are about an entity which this kind of image might show
Key = tuple[str, str]


@lru_cache(maxsize=1 << 16)
def overlapping(a: str, b: str) -> bool:
    """Whether a mask of one may also show the other: true for a whole and its part, but not for an organ and a lesion in it."""
    return a == b or a in ancestors(b) or b in ancestors(a)


def is_lesion(entity: str) -> bool:
    return entity in ENTITIES and ENTITIES[entity].kind == "lesion"


@dataclass
class LabelCounts:
    """Counts of images, from which LabelStats are computed. The counts of parts of a data set add up to those of all of it."""

    images: Counter[Key] = field(default_factory=Counter)
    complete: Counter[Key] = field(default_factory=Counter)  # images whose labels are complete
    shown: Counter[tuple[Key, str]] = field(default_factory=Counter)
    absent: Counter[tuple[Key, str]] = field(default_factory=Counter)  # listed as absent
    labelled: Counter[tuple[Key, str]] = field(default_factory=Counter)  # shown, in complete images
    determined: Counter[tuple[Key, str]] = field(default_factory=Counter)  # in complete images: shown, listed as absent, or undecidable

    def add(
        self, dataset: str, modality: str, entities: Iterable[str], absent: Iterable[str] = (), complete: bool = True, times: int = 1
    ) -> None:
        """Add `times` images of a kind. entities: those of their masks; absent: those listed as absent; complete: whether their labels
        are complete."""
        key = (dataset, modality)
        shown = frozenset(entities)
        lacking = frozenset(absent) - shown
        self.images[key] += times
        self.shown.update({(key, entity): times for entity in shown})
        self.absent.update({(key, entity): times for entity in lacking})
        if complete:
            self.complete[key] += times
            self.labelled.update({(key, entity): times for entity in shown})
            self.determined.update({(key, entity): times for entity in _covered(shown) | lacking})

    def __iadd__(self, other: LabelCounts) -> LabelCounts:
        for name, counts in vars(other).items():
            getattr(self, name).update(counts)
        return self


@lru_cache(maxsize=1 << 12)
def _covered(entities: frozenset[str]) -> frozenset[str]:
    wholes_and_parts = {other for entity in entities for other in _related(entity)}
    return entities | wholes_and_parts


@lru_cache(maxsize=1 << 12)
def _related(entity: str) -> tuple[str, ...]:
    return tuple(other for other in ENTITIES if other != entity and overlapping(entity, other))


@dataclass
class LabelStats:
    """Shares of images by key. `absence` and `fully_labelled` are by default those of complete labels; `foreign_to` follows from
    `elsewhere`."""

    share: dict[Key, float] = field(default_factory=dict)  # of all images
    presence: dict[Key, dict[str, float]] = field(default_factory=dict)  # entity → share of that key's images
    elsewhere: bool = False  # whether an entity that a key is not labelled with is known to be absent from its images
    absence: dict[Key, dict[str, float]] | None = None  # entity → share of that key's images that are known to lack it
    fully_labelled: dict[Key, frozenset[str]] | None = None  # entities that complete images of that key are labelled with
    foreign_to: dict[Key, frozenset[str]] | None = None  # entities of other keys that no image of that key shows

    def __post_init__(self):
        if self.absence is None:
            self.absence = {key: {entity: 1 - share for entity, share in shares.items()} for key, shares in self.presence.items()}
        if self.fully_labelled is None:
            self.fully_labelled = {key: frozenset(shares) for key, shares in self.presence.items()}
        if self.foreign_to is None:
            others = self.entities if self.elsewhere else ()
            self.foreign_to = {key: frozenset(others) - here.keys() for key, here in self.presence.items()}

    @staticmethod
    def from_records(records: Iterable[Record], elsewhere: bool = False, absent: Mapping[str, Iterable[str]] | None = None) -> LabelStats:
        """The statistics of the masks of `records`. absent: record id → entities known to be absent, for labels that are not complete;
        without it, all labels are complete."""
        counts = LabelCounts()
        for record in records:
            lacking = () if absent is None else absent.get(record.id, ())
            counts.add(record.dataset, record.modality, {mask.entity for mask in record.masks}, lacking, complete=absent is None)
        return LabelStats.from_counts(counts, elsewhere)

    @staticmethod
    def from_counts(counts: LabelCounts, elsewhere: bool = False, by_region: bool = False) -> LabelStats:
        """elsewhere: as the field. by_region: of other keys' entities, those are foreign that `body_regions.cannot_show` rules out."""
        total = sum(counts.images.values())
        presence: dict[Key, dict[str, float]] = {key: {} for key in counts.images}
        absence: dict[Key, dict[str, float]] = {key: {} for key in counts.images}
        for key, entity in sorted({*counts.shown, *counts.absent}):
            presence[key][entity] = counts.shown[key, entity] / counts.images[key]
            unmentioned = counts.complete[key] - counts.determined[key, entity] if counts.labelled[key, entity] else 0
            absence[key][entity] = (unmentioned + counts.absent[key, entity]) / counts.images[key]
        foreign_to = None
        if by_region:
            entities = {entity for here in presence.values() for entity in here}
            foreign_to = {}
            for key, here in presence.items():
                labelled = [entity for entity, share in here.items() if share] or list(here)
                foreign_to[key] = frozenset(entity for entity in entities - here.keys() if cannot_show(key[1], labelled, entity))
        return LabelStats(
            foreign_to=foreign_to,
            share={key: n / total for key, n in counts.images.items()},
            presence=presence,
            elsewhere=elsewhere,
            absence=absence,
            fully_labelled={key: frozenset(entity for other, entity in counts.labelled if other == key) for key in counts.images},
        )

    def known_absent(self, record: Record, absent: Iterable[str] = (), complete: bool = True) -> list[str]:
        """Entities that are known to be absent from the record's image, although its kind of image may show them. Arguments as for
        `LabelCounts.add`."""
        key = (record.dataset, record.modality)
        shown = {mask.entity for mask in record.masks}
        unmentioned = self.fully_labelled.get(key, frozenset()) if complete else frozenset()
        unmentioned = {entity for entity in unmentioned if not any(overlapping(entity, other) for other in shown)}
        listed = {entity for entity in absent if entity not in shown}
        order = self.presence.get(key, {})
        return [entity for entity in order if entity in unmentioned or entity in listed] + sorted(listed - order.keys())

    def odds(self, record: Record, entity: str) -> float:
        """The number of images of the record's key that show the entity, divided by that of images that are known to lack it; 0 if none
        is known to lack it."""
        key = (record.dataset, record.modality)
        shown, absent = (shares.get(key, {}).get(entity, 0.0) for shares in (self.presence, self.absence))
        return shown / absent if absent else 0.0

    def foreign(self, record: Record) -> list[str]:
        """Entities that are known to be absent from the record's image because they occur only in other keys."""
        key = (record.dataset, record.modality)
        foreign = self.foreign_to.get(key, frozenset(self.entities) if self.elsewhere else frozenset())
        return [entity for entity in self.entities if entity in foreign]

    def foreign_odds(self, entity: str) -> float:
        """The number of images that show the entity, divided by that of images to whose key it is foreign; 0 if there are none."""
        return self._shown(entity) / foreign if (foreign := self._foreign(entity)) else 0.0

    def _shown(self, entity: str) -> float:
        return sum(self.share[k] * p.get(entity, 0.0) for k, p in self.presence.items())

    def _foreign(self, entity: str) -> float:
        return sum(self.share[k] for k, foreign in self.foreign_to.items() if entity in foreign)

    @cached_property
    def entities(self) -> list[str]:
        return sorted({entity for presence in self.presence.values() for entity in presence})

    @cached_property
    def asking_rates(self) -> dict[str, tuple[float, float, float]]:
        """Entity → the probabilities of asking for its presence in an image that shows it, in one that is known to lack it, and in one
        of another key. With them, all entities are asked for equally often over all images (PRESENCE_PER_IMAGE questions per image in
        total), and half of the answers are yes. The probabilities are 0 if no balance is possible."""
        return {entity: self._asking_rates(entity) for entity in self.entities}

    def _asking_rates(self, entity: str) -> tuple[float, float, float]:
        shows, others = self._shown(entity), self._foreign(entity)
        lacks = sum(self.share[k] * p.get(entity, 0.0) for k, p in self.absence.items())
        half = min(PRESENCE_PER_IMAGE / len(self.entities) / 2, shows, lacks + others)
        if half <= 0:
            return 0.0, 0.0, 0.0
        hard = min(lacks, half * HARD_SHARE if others else half)
        easy = min(others, half - hard)
        half = hard + easy
        return half / shows, hard / lacks if lacks else 0.0, easy / others if others else 0.0
