"""Questions of III and IV about facts in KNOWLEDGE, without and with a prompt; their answers ground the structures.

A question of III does not name the structure that answers it, except for a lesion whose position it asks for. A question of IV is about
the prompted structure, and its words do not reveal which one that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from mimo_jax.data.builder import templates
from mimo_jax.data.builder.knowledge import KNOWLEDGE, TABLE, Fact
from mimo_jax.data.builder.label_stats import overlapping
from mimo_jax.data.builder.scene import Scene, grounded
from mimo_jax.data.builder.templates import listed, placeholders, with_article
from mimo_jax.data.schema import Mask, Sample

RELATION_SHARE = 0.5  # share of IV that asks for a relation, if there is one
ROLE_SHARE = 0.4  # share of the questions of the extended style about a prompted structure itself that ask for its function


def named(scene: Scene, number: int) -> list[Sample]:
    """At most `number` samples of III."""
    makers = [partial(_function, scene, entities) for entities in _sharing(scene, lambda fact: [fact.does]).values()]
    for entity in scene.masks:
        fact = KNOWLEDGE.get(entity)
        if fact and fact.homes and scene.hosts(entity):
            makers.append(partial(_contains, scene, entity))
        if fact and fact.landmarks and len(scene.masks[entity]) == 1 and scene.landmark(scene.masks[entity][0]):
            makers.append(partial(_nearest, scene, entity))
    if scene.style.extended:
        makers += _extended(scene)
    makers = scene.shuffled(makers)
    if scene.style.extended:  # images with few facts do not get more questions about what is absent
        number = min(number, max(1, math.ceil(len(makers) / (1 - scene.style.absent_share))))
    samples = []
    for _ in range(number):
        absent = scene.absent_entity(known=True) if scene.rng.random() < scene.style.absent_share else None
        if absent:
            samples.append(_absent(scene, absent))
        elif makers:
            samples.append(makers.pop()())
    return samples


def _sharing(scene: Scene, facts_of) -> dict[str, list[str]]:
    """Fact → the structures of the image that have it, without wholes of which a part is also shown. facts_of: Fact → its texts."""
    groups: dict[str, list[str]] = {}
    for entity in scene.masks:
        for text in facts_of(KNOWLEDGE[entity]) if entity in KNOWLEDGE else ():
            groups.setdefault(text, []).append(entity)
    return {text: [e for e in group if e in scene.finest] or group[:1] for text, group in groups.items()}


def _function(scene: Scene, entities: list[str]) -> Sample:
    fact = KNOWLEDGE[entities[0]]
    return _fact_sample(scene, "function", scene.pick(fact.asks), "{The} " + fact.verb(1 + scene.several(entities)) + ".", entities)


def _fact_sample(scene: Scene, kind: str, question: str, answer: str, entities: list[str]) -> Sample:
    return scene.sample(
        "III",
        kind,
        question,
        scene.ground_names(placeholders(answer, len(entities)), scene.worded_spans(sorted(entities))),
        kb=_source(scene, entities[0]),
    )


def _source(scene: Scene, entity: str) -> dict[str, str]:
    """The source of a fact; samples of phantoms omit it."""
    return {"source": TABLE, "id": entity} if scene.style.extended else {}


def _contains(scene: Scene, lesion: str) -> Sample:
    hosts = scene.hosts(lesion)
    verb, named = "lie" if scene.several([lesion]) else "lies", scene.words(lesion)
    answer = grounded(f"The {{}} {verb} in {placeholders('{the}', len(hosts))}.", [*scene.worded_spans([lesion]), *scene.spans(hosts)])
    asks = scene.pick(scene.style.contains)
    if scene.several([lesion]):
        asks = asks.replace("does the {} lie", "do the {} lie").replace("is the {}", "are the {}")
    return scene.sample("III", "contains", asks.format(named), answer)


def _nearest(scene: Scene, lesion: str) -> Sample:
    answer = grounded("The {} is nearest to the {}.", scene.spans([lesion, scene.landmark(scene.masks[lesion][0])]))
    return scene.sample("III", "near", scene.pick(scene.style.nearest).format(lesion), answer)


def _extended(scene: Scene) -> list[partial]:
    """Makers of questions for a structure by its location, its findings or its neighbours, without naming it."""
    makers = []
    for text, entities in _sharing(scene, lambda fact: [fact.lies] if fact.lies else []).items():
        makers.append(partial(_asked, scene, "location", templates.LOCATION, text, "{The} {lies} " + text + ".", entities))
    for entities, texts in _by_group(_sharing(scene, lambda fact: fact.findings)).items():
        text = scene.pick(texts)
        answer = f"{text[0].upper()}{text[1:]} may be found in {{the}}."
        makers.append(partial(_asked, scene, "findings", templates.FINDINGS, text, answer, list(entities)))
    for entities, others in _by_group(_neighbours(scene)).items():
        makers.append(partial(_neighbour, scene, scene.pick(others), list(entities)))
    return makers


def _by_group(groups: dict[str, list[str]]) -> dict[tuple[str, ...], list[str]]:
    """The inverse of `groups`: structures → the facts that exactly these have; one of them is asked for."""
    texts: dict[tuple[str, ...], list[str]] = {}
    for text, entities in groups.items():
        texts.setdefault(tuple(sorted(entities)), []).append(text)
    return texts


def _asked(scene: Scene, kind: str, asks: tuple[str, ...], text: str, answer: str, entities: list[str]) -> Sample:
    answer = answer.replace("{lies}", "lie" if scene.several(entities) else "lies")
    return _fact_sample(scene, kind, scene.pick(asks).format(text), answer, entities)


def _neighbours(scene: Scene) -> dict[str, list[str]]:
    """A structure, shown or not → those in the image that are its neighbours by KNOWLEDGE."""
    groups = _sharing(scene, lambda fact: fact.beside)
    for other in [entity for entity in scene.masks if entity in KNOWLEDGE]:  # being neighbours is symmetric
        known = [entity for entity in KNOWLEDGE[other].beside if entity in scene.masks]
        for entity in known:
            groups.setdefault(entity, [])
            groups[entity] += [other] * (other not in groups[entity])
    return {other: group for other, group in groups.items() if other in scene.masks or not _hidden(scene, other)}


def _hidden(scene: Scene, entity: str) -> bool:
    """Whether an entity without a mask may be shown under the name of a whole or part of it."""
    return any(overlapping(entity, other) for other in scene.masks)


def _neighbour(scene: Scene, other: str, entities: list[str]) -> Sample:
    verb = "lie" if scene.several(entities) else "lies"
    spans = scene.worded_spans(sorted(entities))
    answer = placeholders("{The} usually " + verb + " next to the ", len(entities))
    if other in scene.masks:
        answer, spans = answer + "{}.", spans + scene.spans([other])
    else:
        answer += f"{other}."
    return scene.sample("III", "neighbor", scene.pick(templates.NEIGHBOR).format(other), grounded(answer, spans))


def _absent(scene: Scene, entity: str) -> Sample:
    fact = KNOWLEDGE[entity]
    asks = list(fact.asks)
    asks += [q.format(entity) for q in scene.style.contains] if fact.homes else []
    asks += [q.format(entity) for q in scene.style.nearest] if fact.landmarks else []
    asks += [q.format(fact.lies) for q in templates.LOCATION] if fact.lies and scene.style.extended else []
    return scene.sample("III", "absent", scene.pick(asks), scene.absent_answer(entity))


def prompted(scene: Scene, number: int) -> list[Sample]:
    """At most `number` samples of IV."""
    known = [entity for entity in scene.pointable if entity in KNOWLEDGE]
    return [_about(scene, mask, KNOWLEDGE[mask.entity]) for mask in scene.prompts(known)[:number]]


def _about(scene: Scene, mask: Mask, fact: Fact) -> Sample:
    """A random question about a prompted mask; half of them are about the structure itself, the others about a relation."""
    related = _related(scene, mask, fact)
    if related and scene.rng.random() < RELATION_SHARE:
        kind, questions, template, spans = scene.pick(related)
        answer, kb = grounded(scene.this(mask, template), spans), {}
    else:
        kind, questions, template, spans = _fact_about(scene, mask, fact)
        answer, kb = scene.ground_names(scene.this(mask, template), spans), _source(scene, mask.entity)
    return scene.sample("IV", kind, scene.pick(questions), answer, [mask.mask_id], kb=kb)


def _related(scene: Scene, mask: Mask, fact: Fact) -> list[tuple]:
    """(kind, questions, answer, spans) of every relation between a mask and another structure of the image."""
    this, style = (mask.entity, [mask.mask_id]), scene.style
    found = []
    if fact.homes and (host := scene.host(mask)):
        found.append(("lies_in", style.lies_in, "This is the {}, which lies in the {}.", [this, *scene.spans([host])]))
    if fact.landmarks and (landmark := scene.landmark(mask)):
        found.append(("near", style.near_prompt, "This is the {}, nearest to the {}.", [this, *scene.spans([landmark])]))
    if fact.twin in scene.masks:
        found.append(("twin", style.other_side, "This is the {}, and its twin is the {}.", [this, *scene.spans([fact.twin])]))
    guests = [e for e in scene.determined if e in KNOWLEDGE and mask.entity in KNOWLEDGE[e].homes]
    for guest in guests[:1]:
        inside = [m.mask_id for m in scene.masks.get(guest, []) if scene.host(m) == mask.entity]
        if inside:
            found.append(("holds", style.holds, "This is the {}, which holds the {}.", [this, (guest, inside)]))
        else:
            found.append(("holds", style.holds, f"This is the {{}}, which holds no {guest}.", [this]))
    return found


def _fact_about(scene: Scene, mask: Mask, fact: Fact) -> tuple:
    """(kind, questions, answer, spans) of a random fact about the structure itself."""
    spans = [(mask.entity, [mask.mask_id])]
    role = ("function", scene.style.role, f"This is the {{}}, which {fact.does}.", spans)
    if not scene.style.extended or scene.rng.random() < ROLE_SHARE:
        return role
    return scene.pick(list(_extended_facts(scene, fact, spans)))


def _extended_facts(scene: Scene, fact: Fact, spans: list) -> Iterator[tuple]:
    if fact.lies:
        yield "location", templates.WHERE, f"This is the {{}}, which lies {fact.lies}.", spans
    if fact.findings:
        yield "findings", templates.SHOWS, f"This is the {{}}, in which {listed(list(fact.findings))} may be found.", spans
    beside = [other for other in fact.beside if other in scene.masks]
    if beside:
        other = scene.pick(beside)
        yield "neighbor", templates.BORDERS, "This is the {}, which usually lies next to the {}.", [*spans, *scene.spans([other])]
    elif beside := [other for other in fact.beside if not _hidden(scene, other)]:
        yield "neighbor", templates.BORDERS, f"This is the {{}}, which usually lies next to the {beside[0]}.", spans
    methods = [templates.METHODS.get(modality, modality) for modality in fact.modalities]
    yield "imaged", templates.IMAGED, f"This is the {{}}, usually imaged with {listed(methods, 'or')}.", spans
    yield "kind", templates.KIND, f"This is the {{}}, {with_article(fact.kind)} of the {fact.within}.", spans
