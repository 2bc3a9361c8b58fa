"""One record prepared for question generation: its masks by entity, its known absent entities, and a random generator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np

from mimo_jax.data.builder.entities import ancestors
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import LabelStats, is_lesion, overlapping
from mimo_jax.data.builder.relations import Layout
from mimo_jax.data.builder.templates import TemplateSet, with_article
from mimo_jax.data.schema import ASPECT_CHANGED, Mask, Record, Sample, Target, Turn

NEARER = 1.2  # minimum ratio of the distances to the second nearest and the nearest landmark
NOTHING_SHOWN = 0.7  # least share of those draws that ask an image without any mask for what its kind of image might show
ABSENT_FROM_HERE = 0.75  # share of absent entities that are of this kind of image, not of another

T = TypeVar("T")
Answer = tuple[str, list[Target]]


def grounded(template: str, spans: Iterable[tuple], turn: int = 1) -> Answer:
    """A sentence whose placeholders `{}` are filled with the spans, and the targets of these. A span is (entity, mask ids), or (entity,
    mask ids, words) if the sentence calls the entity by other words than its name, such as a plural."""
    pieces = template.split("{}")
    text, targets = pieces[0], []
    for (entity, mask_ids, *words), piece in zip(spans, pieces[1:], strict=True):
        words = words[0] if words else entity
        targets.append(Target(turn=turn, entity=entity, span=[len(text), len(text) + len(words)], mask_ids=list(mask_ids)))
        text += words + piece
    return text, targets


@lru_cache(maxsize=1 << 10)
def names_pattern(names: tuple[str, ...]) -> re.Pattern:
    """Matches each name as whole words, the longest first: "left lung" is not a mention of "lung"."""
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")(?![\w-])")


class Scene:
    def __init__(
        self,
        record: Record,
        rng: np.random.Generator,
        label_stats: LabelStats,
        absent: Iterable[str] | None,
        style: TemplateSet,
        complete: bool = True,
    ):
        self.record, self.rng, self.label_stats, self.style, self.complete = record, rng, label_stats, style, complete
        self.masks: dict[str, list[Mask]] = {}
        for mask in record.masks:
            self.masks.setdefault(mask.entity, []).append(mask)
        lacking = label_stats.known_absent(record) if absent is None else absent
        self.known_absent = [entity for entity in lacking if entity not in self.masks]
        self.determined = sorted({*self.masks, *self.known_absent})  # entities known to be present or absent
        self.foreign = [entity for entity in label_stats.foreign(record) if entity not in self.masks]

    @cached_property
    def sizes_known(self) -> bool:
        """Whether sizes may be compared: not in an image whose sides were scaled differently."""
        return ASPECT_CHANGED not in self.record.flags

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.record, self.masks)

    @cached_property
    def finest(self) -> list[str]:
        """The entities of which no part is shown under its own name."""
        wholes = {whole for part in self.masks for whole in ancestors(part)}
        return [entity for entity in self.masks if entity not in wholes]

    @cached_property
    def pointable(self) -> list[str]:
        """The entities that a prompt can identify: no whole of which a part is also shown, no two names of one place, and no single mask
        that holds many things; a tree of vessels is one."""
        crowds = [e for e, masks in self.masks.items() if len(masks) == 1 and (f := KNOWLEDGE.get(e)) and f.numerous and f.kind != "vessel"]
        return [entity for entity in self.finest if entity not in crowds and not self.layout.has_near_copy(entity)]

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def shuffled(self, options: Iterable[T]) -> list[T]:
        options = list(options)
        return [options[i] for i in self.rng.permutation(len(options))]

    def ids(self, entity: str) -> list[str]:
        return [mask.mask_id for mask in self.masks[entity]]

    def spans(self, entities: Iterable[str]) -> list[tuple[str, list[str]]]:
        """The spans for `grounded`: each entity with all of its masks."""
        return [(entity, self.ids(entity)) for entity in entities]

    def worded_spans(self, entities: Iterable[str]) -> list[tuple[str, list[str], str]]:
        """Like `spans`, with the plural of an entity of which the image shows several."""
        return [(entity, self.ids(entity), self.words(entity)) for entity in entities]

    def words(self, entity: str) -> str:
        """The name of a shown entity, in the plural if the image shows several of it."""
        return self._plurals.get(entity, entity)

    def several(self, entities: Sequence[str]) -> bool:
        """Whether a sentence about these entities has its verb in the plural."""
        return len(entities) > 1 or any(entity in self._plurals for entity in entities)

    def this(self, mask: Mask, template: str) -> str:
        """A template that begins with "This is the {}", with "a" in place of "the" if the mask is one of several of its kind."""
        fact = KNOWLEDGE.get(mask.entity)
        if not self.style.extended or len(self.masks[mask.entity]) == 1 and not (fact and fact.numerous):
            return template
        article = with_article(mask.entity, bool(fact and fact.mass)).removesuffix(mask.entity)
        return template.replace("This is the {}", f"This is {article}{{}}", 1)

    @cached_property
    def _plurals(self) -> dict[str, str]:
        """Entity → its plural, of entities of which the image shows several; both sides of a pair may be in one mask."""
        if not self.style.extended:
            return {}
        plurals = {}
        for entity, masks in self.masks.items():
            fact = KNOWLEDGE.get(entity)
            if fact and fact.plural and (len(masks) > 1 or fact.numerous):
                plurals[entity] = fact.plural
            elif fact and f"left {entity}" in KNOWLEDGE and self.layout.in_two(entity):
                plurals[entity] = f"{entity}s"
        return plurals

    def ground_names(self, template: str, spans: list[tuple]) -> Answer:
        """Like `grounded`, but also grounds the entities of the image that the template itself names: what an answer names is segmented,
        except a whole of which a part is segmented."""
        pieces, filled = [], []
        done = {entity for entity, *_ in spans}
        for piece, span in zip(template.split("{}"), [*spans, None], strict=True):
            for match in self._named.finditer(piece):
                if not any(overlapping(match[0], other) for other in done):
                    done.add(match[0])
                    filled += self.spans([match[0]])
                    piece = piece.replace(match[0], "{}", 1)
            pieces.append(piece)
            filled += [span] if span else []
        return grounded("{}".join(pieces), filled)

    @cached_property
    def _named(self) -> re.Pattern:
        return names_pattern(tuple(self.masks))

    def sample(self, perspective: str, kind: str, question: str, answer: Answer, prompted: Iterable[str] = (), **extra) -> Sample:
        turns = [Turn("user", question, list(prompted)), Turn("assistant", answer[0])]
        return Sample("", perspective, turns, answer[1], kind=kind, **extra)

    def prompts(self, entities: Iterable[str]) -> list[Mask]:
        """One mask of each entity in random order, so that the image alone does not reveal which is prompted; all masks of a single
        entity."""
        piles = [self.shuffled(self.masks[entity]) for entity in self.shuffled(entities)]
        return piles[0] if len(piles) == 1 else [pile[0] for pile in piles]

    def separate(self, a: str, b: str) -> bool:
        """Whether one question may ask for two entities: neither is a whole of the other, nor do their masks cover each other. An organ
        and a lesion in it are allowed."""
        return not overlapping(a, b) and (is_lesion(a) != is_lesion(b) or not self.layout.covers(a, b))

    def absent_entity(self, known: bool) -> str | None:
        """A random absent entity, preferably of this kind of image; None if there is none. known: only an entity with an entry in
        KNOWLEDGE that no structure of the image could be mistaken for."""
        allowed = [[e for e in group if not known or self.asks_alone(e)] for group in (self.known_absent, self.foreign)]
        first, second = allowed if self.rng.random() < ABSENT_FROM_HERE else allowed[::-1]
        if not self.style.even:
            group = first or second
            return self.pick(group) if group else None
        for group in (first, second):
            weights = np.array([self._absent_odds(entity) for entity in group])
            # Where others could be asked for, an entity that few images show is asked for in few of those that lack it.
            share = weights.sum() if allowed[1] else float(weights.any())
            if not self.masks and group is allowed[0] and weights.any():  # the image can be asked about nothing else of its kind
                share = max(share, NOTHING_SHOWN)
            if share >= 1 or self.rng.random() < share:
                return group[int(self.rng.choice(len(group), p=weights / weights.sum()))]
        return None

    def _absent_odds(self, entity: str) -> float:
        """How much oftener an absent entity is shown than absent: in this kind of image, or, if it is foreign to that, in all."""
        return self.label_stats.odds(self.record, entity) if entity in self.known_absent else self.label_stats.foreign_odds(entity)

    def asks_alone(self, entity: str) -> bool:
        """Whether what an entity does identifies it: no structure of the image, nor its twin, does the same."""
        fact = KNOWLEDGE.get(entity)
        here = {KNOWLEDGE[other].does for other in self.masks if other in KNOWLEDGE and other != entity}
        return fact is not None and not fact.twin and fact.does not in here

    @staticmethod
    def absent_answer(entity: str) -> Answer:
        return f"There is no {entity} in this image.", [Target(turn=1, entity=entity, absent=True)]

    # --- the place of a lesion

    def hosts(self, lesion: str) -> list[str]:
        """Those of the lesion's possible organs that contain one of its instances."""
        hosts = {self.host(mask) for mask in self.masks[lesion]}
        return [home for home in KNOWLEDGE[lesion].homes if home in hosts]

    def host(self, mask: Mask) -> str:
        """The organ that contains one instance of a lesion: its mask's parent, or the one that contains most of it; "" if none does."""
        homes = [home for home in KNOWLEDGE[mask.entity].homes if home in self.masks]
        for home in homes:
            if mask.parent_mask_id in self.ids(home):
                return home
        for home in homes:
            if self.layout.share_within(mask, home) > 0.5:
                return home
        return ""

    def landmark(self, mask: Mask) -> str:
        """The landmark nearest to a lesion, measured between box centres; "" unless there are two and one is clearly nearer."""
        near = sorted(
            (float(np.hypot(*(np.add(mask.box_xyxy[:2], mask.box_xyxy[2:]) - np.add(m.box_xyxy[:2], m.box_xyxy[2:])))), name)
            for name in KNOWLEDGE[mask.entity].landmarks
            for m in self.masks.get(name, [])[:1]
        )
        return near[0][1] if len(near) > 1 and near[1][0] >= NEARER * near[0][0] else ""
