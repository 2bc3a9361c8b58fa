"""Questions of vqa, with short answers and no masks: presence, number, modality, size comparison, and a list of all structures."""

from __future__ import annotations

from collections.abc import Iterable

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.relations import MIN_AREA_RATIO
from mimo_jax.data.builder.scene import Scene
from mimo_jax.data.builder.templates import NUMBERS, with_article
from mimo_jax.data.schema import Sample, Target

MAX_LISTED = 8  # maximum number of structures that a question asks to list
IN_HOME_SHARE = 0.4  # share of questions for a lesion with one home that name it: "Is there a gallstone in the gallbladder?"
ASK_COUNT, ASK_MODALITY, ASK_COMPARE, ASK_LIST = 0.4, 0.4, 0.6, 1.0  # share of the images where the question is possible
ZEROS = 0.5  # maximum number of counting questions answered by zero for each that is not
COMPARE = ("Is the {} larger than the {}?", "Is the {} smaller than the {}?")


def plain(scene: Scene) -> list[Sample]:
    return [*_presences(scene), *_counts(scene), *_modality(scene), *_comparison(scene), *_inventory(scene)]


def _closed(scene: Scene, kind: str, question: str, answer: str, choices: list[str], *others: str, about: Iterable[str] = ()) -> Sample:
    """about: the entities whose masks or absence make the answer true."""
    targets = [Target(1, e, mask_ids=scene.ids(e)) if e in scene.masks else Target(1, e, absent=True) for e in about]
    text = (f"{answer}.", targets)
    return scene.sample("vqa", kind, question, text, answer_type="closed", references=[answer, *others], choices=choices)


def _presences(scene: Scene) -> list[Sample]:
    entities = scene.determined + scene.foreign
    samples = []
    for entity, draw in zip(entities, scene.rng.random(len(entities)), strict=True):
        yes, lacks, foreign = scene.label_stats.asking_rates.get(entity, (0.0, 0.0, 0.0))
        shown = entity in scene.masks
        if draw < (yes if shown else lacks if entity in scene.determined else foreign):
            fact = KNOWLEDGE.get(entity)
            named = with_article(entity, bool(fact and fact.mass))
            question = scene.pick(scene.style.presence).format(a=named)
            homes = fact.homes if fact else ()
            if len(homes) == 1 and scene.rng.random() < IN_HOME_SHARE:
                question = f"Is there {named} in the {homes[0]}?"
            samples.append(_closed(scene, "yes_no", question, "Yes" if shown else "No", ["Yes", "No"], about=[entity]))
    return samples


def _counts(scene: Scene) -> list[Sample]:
    samples = []
    for entity in scene.determined:
        number = len(scene.masks.get(entity, []))
        odds = scene.label_stats.odds(scene.record, entity)  # if no image is known to lack it, everyone would guess one
        share = ASK_COUNT * (min(1.0, ZEROS * odds) if number == 0 or not odds else 1.0)
        if _counted(scene, entity) and scene.rng.random() < share:
            question = scene.pick(scene.style.count).format(KNOWLEDGE[entity].plural)
            choices = list(NUMBERS[: max(4, number + 1)])
            samples.append(_closed(scene, "count", question, NUMBERS[number], choices, str(number), about=[entity]))
    return samples


def _counted(scene: Scene, entity: str) -> bool:
    """Whether an entity has a plural, few instances, and one mask per instance."""
    masks = scene.masks.get(entity, [])
    return entity in KNOWLEDGE and bool(KNOWLEDGE[entity].plural) and len(masks) < len(NUMBERS) and scene.layout.countable(entity)


def _modality(scene: Scene) -> list[Sample]:
    if scene.rng.random() >= ASK_MODALITY:
        return []
    known = {modality for _, modality in scene.label_stats.share}
    choices = [name for name in MODALITIES if name in known]
    if len(choices) < 2:
        return []
    return [_closed(scene, "modality", scene.pick(scene.style.modality), scene.record.modality, choices)]


def _comparison(scene: Scene) -> list[Sample]:
    """Compares only twins: for other pairs the names reveal which is larger."""
    samples = []
    for entity in scene.masks:
        fact = KNOWLEDGE.get(entity)
        if not (fact and entity.startswith("left ") and fact.twin in scene.masks) or scene.rng.random() >= ASK_COMPARE:
            continue
        pair = scene.shuffled([entity, fact.twin])
        first, second = (sum(mask.area_px for mask in scene.masks[name]) for name in pair)
        if max(first, second) >= MIN_AREA_RATIO * min(first, second):
            which = int(scene.rng.integers(2))
            answer = "Yes" if (first > second) == (which == 0) else "No"
            samples.append(_closed(scene, "compare", COMPARE[which].format(*pair), answer, ["Yes", "No"], about=pair))
    return samples


def _inventory(scene: Scene) -> list[Sample]:
    """An open question for all labelled entities, in alphabetical order, lesions with their number."""
    if not 0 < len(scene.finest) <= MAX_LISTED or scene.rng.random() >= ASK_LIST:
        return []
    named = []
    for entity in sorted(scene.finest):
        number = len(scene.masks[entity])
        counted = _counted(scene, entity)
        named.append(f"{NUMBERS[number].lower()} {KNOWLEDGE[entity].plural if number > 1 else entity}" if counted else entity)
    text = ", ".join(named)
    text = f"{text[0].upper()}{text[1:]}."
    return [scene.sample("vqa", "list", scene.pick(scene.style.inventory), (text, []), answer_type="open", references=[text])]
