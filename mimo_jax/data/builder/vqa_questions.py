"""Questions of vqa, with short answers and no masks: presence, number, modality, size comparison, half of the image, a fact, and a list of
all structures."""

from __future__ import annotations

from collections.abc import Iterable

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder import templates
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import is_lesion
from mimo_jax.data.builder.relations import MIN_AREA_RATIO, unsure_sides
from mimo_jax.data.builder.scene import Scene
from mimo_jax.data.builder.templates import NUMBERS, with_article
from mimo_jax.data.schema import Sample, Target

MAX_LISTED = 8  # maximum number of structures that a question asks to list
IN_HOME_SHARE = 0.4  # share of questions for a lesion with one home that name it: "Is there a gallstone in the gallbladder?"
ASK_COUNT, ASK_MODALITY, ASK_COMPARE, ASK_LIST = 0.4, 0.4, 0.6, 1.0  # share of the images where the question is possible
ASK_HALF, ASK_FACT = 0.6, 0.3
BY_FUNCTION_SHARE = 0.25  # share of the questions about presence that describe a structure by what it does
OFF_CENTRE = 0.1  # share of the image's side: a lesion whose centre is closer to the middle is in neither half
HOW_MANY = (  # numbers that are too large to be counted at a glance: the least of each range, and its words
    (6, "6 to 15"), (16, "16 to 40"), (41, "More than 40"),
)  # fmt: skip
ZEROS = 0.5  # maximum number of counting questions answered by zero for each that is not
COMPARE = ("Is the {} larger than the {}?", "Is the {} smaller than the {}?")


def plain(scene: Scene) -> list[Sample]:
    samples = [*_presences(scene), *_counts(scene), *_modality(scene), *_comparison(scene), *_inventory(scene)]
    return samples + [*_half(scene), *_fact(scene)] if scene.style.extended else samples


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
            question, kind = scene.pick(scene.style.presence).format(a=named), "yes_no"
            homes = fact.homes if fact else ()
            if len(homes) == 1 and scene.rng.random() < IN_HOME_SHARE:
                question = f"Is there {named} in the {homes[0]}?"
            if scene.style.extended and scene.asks_alone(entity) and scene.rng.random() < BY_FUNCTION_SHARE:
                question, kind = scene.pick(templates.SHOWS_ONE_THAT).format(fact.does), "knowledge"
            samples.append(_closed(scene, kind, question, "Yes" if shown else "No", ["Yes", "No"], about=[entity]))
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
    return samples + [sample for entity in scene.masks if (sample := _how_many(scene, entity))]


def _how_many(scene: Scene, entity: str) -> Sample | None:
    """A question for the range of a number of masks that is too large to be counted at a glance."""
    number, fact = len(scene.masks[entity]), KNOWLEDGE.get(entity)
    if not (scene.style.extended and fact and fact.numerous) or number < HOW_MANY[0][0] or scene.rng.random() >= ASK_COUNT:
        return None
    answer = [words for least, words in HOW_MANY if number >= least][-1]
    ranges = [words for _, words in HOW_MANY]
    question = f"{scene.pick(templates.ABOUT_HOW_MANY).format(fact.plural)[:-1]}: {ranges[0]}, {ranges[1]} or {ranges[2].lower()}?"
    return _closed(scene, "count", question, answer, ranges, about=[entity])


def _half(scene: Scene) -> list[Sample]:
    """The half of the image in which a lesion lies. Organs have their usual place, which is known without the image."""
    if unsure_sides(scene.record):
        return []
    samples = []
    size = (scene.record.width, scene.record.height)
    for entity, masks in scene.masks.items():
        axis = int(scene.rng.integers(2))
        centre = (masks[0].box_xyxy[axis] + masks[0].box_xyxy[axis + 2]) / 2 / size[axis] - 0.5
        if is_lesion(entity) and len(masks) == 1 and abs(centre) >= OFF_CENTRE and scene.rng.random() < ASK_HALF:
            choices = (["Left", "Right"], ["Upper", "Lower"])[axis]
            question = scene.pick(templates.HALVES[axis]).format(entity)
            samples.append(_closed(scene, "half", question, choices[centre > 0], choices, about=[entity]))
    return samples


def _fact(scene: Scene) -> list[Sample]:
    """An open question about what a shown structure, which it names, does."""
    known = [entity for entity in scene.finest if entity in KNOWLEDGE]
    if not known or scene.rng.random() >= ASK_FACT:
        return []
    entity = scene.pick(known)
    several = scene.several([entity])
    text = f"The {scene.words(entity)} {KNOWLEDGE[entity].verb(1 + several)}."
    question = scene.pick(templates.FACT).format(scene.words(entity))
    return [scene.sample("vqa", "fact", question, (text, []), answer_type="open", references=[text])]


def _counted(scene: Scene, entity: str) -> bool:
    """Whether an entity has a plural, few instances, and one mask per instance."""
    masks, fact = scene.masks.get(entity, []), KNOWLEDGE.get(entity)
    if not (fact and fact.plural) or len(masks) >= len(NUMBERS) or fact.numerous and len(masks) == 1:
        return False
    return scene.layout.countable(entity)


def _modality(scene: Scene) -> list[Sample]:
    if scene.rng.random() >= ASK_MODALITY:
        return []
    known = {modality for _, modality in scene.label_stats.share}
    choices = [name for name in MODALITIES if name in known]
    if len(choices) < 2:
        return []
    if not scene.style.extended:
        return [_closed(scene, "modality", scene.pick(scene.style.modality), scene.record.modality, choices)]
    methods = [_method(name) for name in choices]
    return [_closed(scene, "modality", scene.pick(scene.style.modality), _method(scene.record.modality), methods, scene.record.modality)]


def _method(modality: str) -> str:
    """The name of a modality at the beginning of a sentence."""
    name = templates.METHODS.get(modality, modality)
    return name[0].upper() + name[1:]


def _comparison(scene: Scene) -> list[Sample]:
    """Compares only twins: for other pairs the names reveal which is larger."""
    samples = []
    for entity in scene.masks:
        fact = KNOWLEDGE.get(entity)
        paired = fact and entity.startswith("left ") and fact.twin in scene.masks
        if not paired or not scene.sizes_known or scene.rng.random() >= ASK_COMPARE:
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
    exhaustive = scene.complete or not scene.style.extended
    entities = scene.finest if exhaustive else list(scene.masks)
    if not 0 < len(entities) <= MAX_LISTED or scene.rng.random() >= ASK_LIST:
        return []
    named = []
    for entity in sorted(entities):
        number = len(scene.masks[entity])
        counted = _counted(scene, entity)
        plural = KNOWLEDGE[entity].plural if counted else ""
        named.append(f"{NUMBERS[number].lower()} {plural if number > 1 else entity}" if counted else scene.words(entity))
    text = ", ".join(named)
    text = f"{text[0].upper()}{text[1:]}."
    question = scene.pick(scene.style.inventory if exhaustive else templates.SEEN)
    return [scene.sample("vqa", "list", question, (text, []), answer_type="open", references=[text])]
