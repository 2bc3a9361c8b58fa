"""Questions of an image whose masks are named: from one record to its samples, by templates and a seeded generator.

Perspectives I and II and the questions of presence and modality are asked of any entity; III, IV, counts and
comparisons only of what `knowledge.KNOWLEDGE` knows. Nothing is asked whose answer could be told from its words: within each
wording about as many images say yes as no, and a prompted question names nothing that only the prompt can tell. Absence is asked
rather where the thing might have been (`HARD_SHARE`), so that it does not suffice to know what belongs into which kind of image.
Absence is asked only of entities that this kind of image is labelled with, or, where the census vouches for it (`elsewhere`),
of those of other kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mimo_jax.config import MODALITIES
from mimo_jax.data.build.knowledge import KNOWLEDGE, Fact
from mimo_jax.data.schema import Mask, Record, Sample, Target, Turn

ABSENT_SHARE = 0.35  # of I and III
PAIR_SHARE = 0.15  # of I
UNMARKED_SHARE = 0.35  # the share of images of which II, or IV, is also asked without pointing at anything
PRESENCE_PER_IMAGE = 4.0  # yes-or-no questions of presence, on average
HARD_SHARE = 0.75  # of the answers "No.": asked where such an entity might have been
MOST_LISTED = 8  # structures of an image beyond which nobody is asked to list them
MOST_SPANS = 2  # grounded spans of one answer; what would take more is not asked
ASK_COUNT, ASK_MODALITY, ASK_COMPARE, ASK_LIST = 0.4, 0.4, 0.6, 1.0  # the share of images, of those where it can be asked
LARGER = 1.4  # areas nearer than this are not compared
NEARER = 1.2  # places nearer than this to equally far are not told
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five")

SEGMENT = (  # question, answer for one, answer for two
    ("segment the {}", "The {} is outlined.", "The {} and the {} are outlined."),
    ("Segment the {}.", "The {} is outlined.", "The {} and the {} are outlined."),
    ("Outline the {}.", "The {} is outlined.", "The {} and the {} are outlined."),
    ("Show the {}.", "Here is the {}.", "Here are the {} and the {}."),
    ("Where is the {}?", "Here is the {}.", "Here are the {} and the {}."),
    ("Find the {}.", "Here is the {}.", "Here are the {} and the {}."),
)
NAME = ("What is this?", "Name this structure.", "What is marked here?", "Which structure is this?", "Identify the marked structure.")
ROLE = ("What does the marked structure do?", "What is known of this structure?", "What is this, and what does it do?")
UNMARKED = "Nothing is marked in this image."
LIES_IN = ("What does this lesion lie in?", "Where does the marked lesion lie?")
NEAR_PROMPT = ("What is the marked lesion nearest to?", "Which structure lies nearest to this?")
OTHER_SIDE = ("What is the twin of this structure?", "What matches this structure on the other side?")
HOLDS = ("Is there a lesion in the marked organ?", "What lies in this organ?")
CONTAINS = ("Which organ contains the {}?", "Where does the {} lie?")
NEAREST = ("Which structure is the {} nearest to?", "What lies nearest to the {}?")
PRESENCE = ("Is there {} in this image?", "Does this image show {}?", "Can {} be seen here?")
COUNT = ("How many {} are there?", "Count the {}.")
MODALITY = ("Which modality is this?", "How was this image made?", "What kind of image is this?")
LIST = ("Which structures can be seen?", "What does this image show?", "List what is visible.")
COMPARE = ("Is the {} larger than the {}?", "Is the {} smaller than the {}?")


@dataclass
class Census:
    """How often what is seen where. Keys are (dataset, modality)."""

    share: dict[tuple[str, str], float] = field(default_factory=dict)  # of all images
    presence: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # entity → share of that key's images
    elsewhere: bool = False  # an entity that a key is not labelled with is known not to be in its images
    # Entity → the share of that key's images that are known to lack it, where labels are not complete (see `of`); else the rest.
    absence: dict[tuple[str, str], dict[str, float]] | None = None

    @staticmethod
    def of(records: Iterable[Record], elsewhere: bool = False, absent: Mapping[str, Iterable[str]] | None = None) -> Census:
        """Count the masks of `records`. absent: record id → entities known not to be in it, where a missing mask says nothing;
        without it, what a key's images are ever labelled with is labelled in all of them."""
        images: dict[tuple[str, str], int] = {}
        seen: dict[tuple[str, str], dict[str, int]] = {}
        lacked: dict[tuple[str, str], dict[str, int]] = {}
        for record in records:
            key = (record.dataset, record.modality)
            images[key] = images.get(key, 0) + 1
            tally = seen.setdefault(key, {})
            for entity in {mask.entity for mask in record.masks}:
                tally[entity] = tally.get(entity, 0) + 1
            for entity in (absent or {}).get(record.id, ()):
                tally.setdefault(entity, 0)
                lacked.setdefault(key, {})[entity] = lacked.get(key, {}).get(entity, 0) + 1
        total = sum(images.values())
        return Census(
            share={key: n / total for key, n in images.items()},
            presence={key: {e: n / images[key] for e, n in sorted(tally.items())} for key, tally in seen.items()},
            elsewhere=elsewhere,
            absence=None if absent is None else {key: {e: n / images[key] for e, n in tally.items()} for key, tally in lacked.items()},
        )

    def labelled(self, record: Record) -> dict[str, float]:
        return self.presence.get((record.dataset, record.modality), {})

    def foreign(self, record: Record) -> list[str]:
        """Entities that are known not to be in the record's image, for they belong to other keys alone."""
        here = self.labelled(record)
        return [entity for entity in self.entities if entity not in here] if self.elsewhere else []

    @cached_property
    def entities(self) -> list[str]:
        return sorted({entity for presence in self.presence.values() for entity in presence})

    @cached_property
    def asking_rates(self) -> dict[str, tuple[float, float, float]]:
        """Entity → the probabilities of asking for its presence in an image that shows it, in one that is labelled with it and
        does not, and in one of another key, such that over all images it is asked for equally often whatever the entity
        (PRESENCE_PER_IMAGE in all), half of it answered yes. Zeros where a balance cannot be had."""
        return {entity: self._asking_rates(entity) for entity in self.entities}

    def _asking_rates(self, entity: str) -> tuple[float, float, float]:
        shows = sum(self.share[k] * p.get(entity, 0.0) for k, p in self.presence.items())
        if self.absence is None:
            lacks = sum(self.share[k] * (1 - p[entity]) for k, p in self.presence.items() if entity in p)
        else:
            lacks = sum(self.share[k] * p.get(entity, 0.0) for k, p in self.absence.items())
        others = sum(self.share[k] for k, p in self.presence.items() if entity not in p) if self.elsewhere else 0.0
        half = min(PRESENCE_PER_IMAGE / len(self.entities) / 2, shows, lacks + others)
        if half <= 0:
            return 0.0, 0.0, 0.0
        hard = min(lacks, half * HARD_SHARE if others else half)
        easy = min(others, half - hard)
        half = hard + easy
        return half / shows, hard / lacks if lacks else 0.0, easy / others if others else 0.0


def ask(record: Record, rng: np.random.Generator, census: Census, absent: Iterable[str] | None = None) -> list[Sample]:
    """About 4 samples of I, 4 of II, 3 of III, 3 of IV and 6 of vqa, as far as the record's entities allow.

    absent: entities known not to be in the image, where labels are not complete; without it, all that its kind of image is
    labelled with and that has no mask here."""
    scene = _Scene(record, rng, census, absent)
    samples = [
        *scene.segmentations(4), *scene.namings(4), *scene.knowledge(3), *scene.prompted_knowledge(3), *scene.unmarked(),
        *scene.presences(), *scene.counts(), *scene.modality(), *scene.comparison(), *scene.inventory(),
    ]  # fmt: skip
    samples = [sample for sample in samples if len(sample.targets) <= MOST_SPANS]
    for number, sample in enumerate(samples):
        sample.sample_id = f"{record.id}/{number}"
    return samples


def a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def grounded(template: str, spans: list[tuple[str, list[str]]], turn: int = 1) -> tuple[str, list[Target]]:
    """A sentence whose blanks `{}` are filled with entities, and the targets that its spans carry."""
    pieces = template.split("{}")
    text, targets = pieces[0], []
    for (entity, mask_ids), piece in zip(spans, pieces[1:], strict=True):
        targets.append(Target(turn=turn, entity=entity, span=[len(text), len(text) + len(entity)], mask_ids=list(mask_ids)))
        text += entity + piece
    return text, targets


class _Scene:
    """One record as the questions see it: its masks by entity, what it lacks, and the generator that draws."""

    def __init__(self, record: Record, rng: np.random.Generator, census: Census, absent: Iterable[str] | None):
        self.record, self.rng, self.census = record, rng, census
        self.masks: dict[str, list[Mask]] = {}
        for mask in record.masks:
            self.masks.setdefault(mask.entity, []).append(mask)
        self.lacking = [entity for entity in (census.labelled(record) if absent is None else absent) if entity not in self.masks]
        self.judged = sorted({*self.masks, *self.lacking})  # what is known to be there or not
        self.foreign = [entity for entity in census.foreign(record) if entity not in self.masks]

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def shuffled(self, options) -> list:
        options = list(options)
        return [options[i] for i in self.rng.permutation(len(options))]

    def ids(self, entity: str) -> list[str]:
        return [mask.mask_id for mask in self.masks[entity]]

    def sample(self, perspective: str, kind: str, question: str, answer: tuple[str, list[Target]], prompted=(), **extra) -> Sample:
        turns = [Turn("user", question, list(prompted)), Turn("assistant", answer[0])]
        return Sample("", perspective, turns, answer[1], kind=kind, **extra)

    def absent_entity(self, known: bool) -> str | None:
        """Something that is not there: rather of this kind of image than of another. `known`: one that a question of knowledge has."""
        allowed = [[e for e in group if not known or (e in KNOWLEDGE and not KNOWLEDGE[e].twin)] for group in (self.lacking, self.foreign)]
        first, second = allowed if self.rng.random() < 0.75 else allowed[::-1]
        return self.pick(first or second) if first or second else None

    @staticmethod
    def no_such(entity: str) -> tuple[str, list[Target]]:
        return f"There is no {entity} in this image.", [Target(turn=1, entity=entity, absent=True)]

    # I: a named structure is asked for

    def segmentations(self, number: int) -> list[Sample]:
        samples, asked = [], set()
        queue = self.shuffled(self.masks) * number
        for _ in range(number):
            question, one, two = self.pick(SEGMENT)
            absent = self.absent_entity(known=False) if self.rng.random() < ABSENT_SHARE or not queue else None
            if absent:
                made = self.sample("I", "absent", question.format(absent), self.no_such(absent))
            elif not queue:
                break
            elif len(self.masks) > 1 and self.rng.random() < PAIR_SHARE:
                pair = self.shuffled(self.masks)[:2]
                question = question.replace("is", "are") if question.startswith("Where") else question
                text = question.format(f"{pair[0]} and the {pair[1]}")
                made = self.sample("I", "two", text, grounded(two, [(e, self.ids(e)) for e in pair]))
            else:
                entity = queue.pop(0)
                made = self.sample("I", "one", question.format(entity), grounded(one, [(entity, self.ids(entity))]))
            if made.turns[0].text not in asked:
                asked.add(made.turns[0].text)
                samples.append(made)
        return samples

    # II: a structure is pointed at

    def prompts(self, entities: Iterable[str]) -> list[Mask]:
        """One mask of each entity in random order, so that the image alone favours none of them; of a sole entity, all."""
        piles = [self.shuffled(self.masks[entity]) for entity in self.shuffled(entities)]
        return piles[0] if len(piles) == 1 else [pile[0] for pile in piles]

    def namings(self, number: int) -> list[Sample]:
        return [
            self.sample("II", "name", self.pick(NAME), grounded("This is the {}.", [(mask.entity, [mask.mask_id])]), [mask.mask_id])
            for mask in self.prompts(self.masks)[:number]
        ]

    def unmarked(self) -> list[Sample]:
        """The questions of II and IV with nothing pointed at: there is nothing to name, and the answer says so."""
        asked = [("II", NAME)] * bool(self.masks) + [("IV", ROLE)] * any(entity in KNOWLEDGE for entity in self.masks)
        return [self.sample(p, "unmarked", self.pick(asks), (UNMARKED, [])) for p, asks in asked if self.rng.random() < UNMARKED_SHARE]

    # III: a question of knowledge, or of a relation, that does not name what answers it

    def knowledge(self, number: int) -> list[Sample]:
        facts: dict[str, list[str]] = {}
        for entity in self.masks:
            if entity in KNOWLEDGE:
                facts.setdefault(KNOWLEDGE[entity].one, []).append(entity)
        makers = [(self._function, entities) for entities in facts.values()]
        for entity in self.masks:
            fact = KNOWLEDGE.get(entity)
            if fact and fact.homes and self._hosts(entity):
                makers.append((self._contains, entity))
            if fact and fact.landmarks and len(self.masks[entity]) == 1 and self._landmark(self.masks[entity][0]):
                makers.append((self._nearest, entity))
        makers = self.shuffled(makers)
        samples = []
        for _ in range(number):
            absent = self.absent_entity(known=True) if self.rng.random() < ABSENT_SHARE else None
            if absent:
                samples.append(self._absent_fact(absent))
            elif makers:
                make, about = makers.pop()
                samples.append(make(about))
        return samples

    def _function(self, entities: list[str]) -> Sample:
        fact = KNOWLEDGE[entities[0]]
        subject = "The " + " and the ".join(["{}"] * len(entities))
        template = f"{subject} {fact.one if len(entities) == 1 else fact.many}."
        return self.sample("III", "function", self.pick(fact.asks), grounded(template, [(e, self.ids(e)) for e in sorted(entities)]))

    def _contains(self, lesion: str) -> Sample:
        hosts = self._hosts(lesion)
        template = f"The {{}} lies in {' and '.join(['the {}'] * len(hosts))}."
        spans = [(lesion, self.ids(lesion)), *((host, self.ids(host)) for host in hosts)]
        return self.sample("III", "contains", self.pick(CONTAINS).format(lesion), grounded(template, spans))

    def _nearest(self, lesion: str) -> Sample:
        landmark = self._landmark(self.masks[lesion][0])
        answer = grounded("The {} is nearest to the {}.", [(lesion, self.ids(lesion)), (landmark, self.ids(landmark))])
        return self.sample("III", "near", self.pick(NEAREST).format(lesion), answer)

    def _absent_fact(self, entity: str) -> Sample:
        fact = KNOWLEDGE[entity]
        asks = list(fact.asks)
        asks += [q.format(entity) for q in CONTAINS] if fact.homes else []
        asks += [q.format(entity) for q in NEAREST] if fact.landmarks else []
        return self.sample("III", "absent", self.pick(asks), self.no_such(entity))

    def _hosts(self, lesion: str) -> list[str]:
        """The organs, of those that the lesion may lie in, that do hold one of its instances."""
        hosts = {self._host(mask) for mask in self.masks[lesion]}
        return [home for home in KNOWLEDGE[lesion].homes if home in hosts]

    def _host(self, mask: Mask) -> str:
        homes = [home for home in KNOWLEDGE[mask.entity].homes if home in self.masks]
        for home in homes:
            if mask.parent_mask_id in self.ids(home):
                return home
        for home in homes:
            pixels = mask.decode()
            if any((organ.decode() & pixels).sum() > 0.5 * pixels.sum() for organ in self.masks[home]):
                return home
        return ""

    def _landmark(self, mask: Mask) -> str:
        """The landmark nearest to a lesion, box centre to box centre; "" unless there are two and one is clearly nearer."""
        near = sorted(
            (float(np.hypot(*(np.add(mask.box_xyxy[:2], mask.box_xyxy[2:]) - np.add(m.box_xyxy[:2], m.box_xyxy[2:])))), name)
            for name in KNOWLEDGE[mask.entity].landmarks
            for m in self.masks.get(name, [])[:1]
        )
        return near[0][1] if len(near) > 1 and near[1][0] >= NEARER * near[0][0] else ""

    # IV: a question of what is pointed at, that only the prompt makes answerable

    def prompted_knowledge(self, number: int) -> list[Sample]:
        samples = []
        for mask in self.prompts([entity for entity in self.masks if entity in KNOWLEDGE])[:number]:
            samples.append(self._about(mask, KNOWLEDGE[mask.entity]))
        return samples

    def _about(self, mask: Mask, fact: Fact) -> Sample:
        """A random one of the questions that can be asked of a prompted mask; half of them are of its role."""
        this = (mask.entity, [mask.mask_id])
        relations = []
        if fact.homes and (host := self._host(mask)):
            relations.append(("lies_in", LIES_IN, "This is the {}, which lies in the {}.", [this, (host, self.ids(host))]))
        if fact.landmarks and (landmark := self._landmark(mask)):
            relations.append(("near", NEAR_PROMPT, "This is the {}, nearest to the {}.", [this, (landmark, self.ids(landmark))]))
        if fact.twin in self.masks:
            relations.append(("twin", OTHER_SIDE, "This is the {}, and its twin is the {}.", [this, (fact.twin, self.ids(fact.twin))]))
        guests = [e for e in self.judged if e in KNOWLEDGE and mask.entity in KNOWLEDGE[e].homes]
        for guest in guests[:1]:
            inside = [m.mask_id for m in self.masks.get(guest, []) if self._host(m) == mask.entity]
            if inside:
                relations.append(("holds", HOLDS, "This is the {}, which holds the {}.", [this, (guest, inside)]))
            else:
                relations.append(("holds", HOLDS, f"This is the {{}}, which holds no {guest}.", [this]))
        if relations and self.rng.random() < 0.5:
            kind, questions, template, spans = self.pick(relations)
        else:
            kind, questions, template, spans = "function", ROLE, f"This is the {{}}, which {fact.one}.", [this]
        return self.sample("IV", kind, self.pick(questions), grounded(template, spans), [mask.mask_id])

    # vqa: short answers without masks

    def closed(self, kind: str, question: str, answer: str, choices: list[str], *others: str, about: Iterable[str] = ()) -> Sample:
        """about: the entities whose masks, or absence, make the answer true."""
        targets = [Target(1, e, mask_ids=self.ids(e)) if e in self.masks else Target(1, e, absent=True) for e in about]
        answered = (f"{answer}.", targets)
        return self.sample("vqa", kind, question, answered, answer_type="closed", references=[answer, *others], choices=choices)

    def presences(self) -> list[Sample]:
        entities = self.judged + self.foreign
        samples = []
        for entity, draw in zip(entities, self.rng.random(len(entities)), strict=True):
            yes, lacks, foreign = self.census.asking_rates.get(entity, (0.0, 0.0, 0.0))
            shown = entity in self.masks
            if draw < (yes if shown else lacks if entity in self.judged else foreign):
                question = self.pick(PRESENCE).format(a(entity))
                homes = KNOWLEDGE[entity].homes if entity in KNOWLEDGE else ()
                if len(homes) == 1 and self.rng.random() < 0.4:
                    question = f"Is there {a(entity)} in the {homes[0]}?"
                samples.append(self.closed("yes_no", question, "Yes" if shown else "No", ["Yes", "No"], about=[entity]))
        return samples

    def counts(self) -> list[Sample]:
        samples = []
        for entity in self.judged:
            fact = KNOWLEDGE.get(entity)
            number = len(self.masks.get(entity, []))
            if fact and fact.lesion and number < len(NUMBERS) and self.rng.random() < ASK_COUNT:
                question = self.pick(COUNT).format(fact.plural)
                samples.append(self.closed("count", question, NUMBERS[number], list(NUMBERS[:4]), str(number), about=[entity]))
        return samples

    def modality(self) -> list[Sample]:
        if self.rng.random() >= ASK_MODALITY:
            return []
        known = {modality for _, modality in self.census.share}
        choices = [name for name in MODALITIES if name in known]
        return [self.closed("modality", self.pick(MODALITY), self.record.modality, choices)] if len(choices) > 1 else []

    def comparison(self) -> list[Sample]:
        samples = []
        for entity in self.masks:
            fact = KNOWLEDGE.get(entity)
            if not (fact and entity.startswith("left ") and fact.twin in self.masks) or self.rng.random() >= ASK_COMPARE:
                continue
            pair = self.shuffled([entity, fact.twin])
            first, second = (sum(mask.area_px for mask in self.masks[name]) for name in pair)
            if max(first, second) >= LARGER * min(first, second):
                which = int(self.rng.integers(2))
                answer = "Yes" if (first > second) == (which == 0) else "No"
                samples.append(self.closed("compare", COMPARE[which].format(*pair), answer, ["Yes", "No"], about=pair))
        return samples

    def inventory(self) -> list[Sample]:
        """An open question: everything that is labelled, lesions with their number, in the order of the alphabet."""
        if not 0 < len(self.masks) <= MOST_LISTED or self.rng.random() >= ASK_LIST:
            return []
        named = []
        for entity in sorted(self.masks):
            fact, number = KNOWLEDGE.get(entity), len(self.masks[entity])
            counted = bool(fact and fact.lesion and number < len(NUMBERS))
            named.append(f"{NUMBERS[number].lower()} {fact.plural if number > 1 else entity}" if counted else entity)
        text = ", ".join(named)
        text = f"{text[0].upper()}{text[1:]}."
        sample = self.sample("vqa", "list", self.pick(LIST), (text, []), answer_type="open", references=[text])
        return [sample]
