"""Generates the samples of one record from its named masks, by templates and a seeded generator.

Perspectives I and II and the questions about presence and modality are asked about any entity; III, IV, counts and comparisons only
about structures in `knowledge.KNOWLEDGE`; relations about what the masks show. No answer can be guessed from the wording: within each
wording about as many images are answered yes as no, and a prompted question names nothing that only the prompt shows. Most questions
about absent entities are about those that the image might have shown (`label_stats.HARD_SHARE`), so that knowing which entity occurs in
which kind of image does not suffice. They are asked only about entities that this kind of image is labelled with or, if the statistics
allow it (`foreign_to`), about those of other kinds. A whole and its part are never alternatives in one question. If the source doubts where
left and right are (`relations.unsure_sides`), no question or answer has a word of a side.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

from mimo_jax.data.builder import knowledge_questions, relation_questions, vqa_questions
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import LabelStats
from mimo_jax.data.builder.relations import unsure_sides
from mimo_jax.data.builder.scene import Scene, grounded
from mimo_jax.data.builder.templates import CORE, SHOWN, UNMARKED, TemplateSet, placeholders, render
from mimo_jax.data.schema import Record, Sample

PAIR_SHARE = 0.15  # share of the samples of I that ask for two structures
UNMARKED_SHARE = 0.35  # share of images with a question of II, or IV, without any prompt
_SIDE = re.compile(r"\b(left|right)(most)?\b", re.IGNORECASE)
MAX_SPANS = 2  # grounded spans per answer; samples with more are left out


def record_rng(seed: int, record_id: str) -> np.random.Generator:
    """The generator of a record's questions, independent of all other records."""
    return np.random.default_rng([seed, zlib.crc32(record_id.encode())])


def ask(
    record: Record,
    rng: np.random.Generator,
    label_stats: LabelStats,
    absent: Iterable[str] | None = None,
    style: TemplateSet = CORE,
    complete: bool = True,
) -> list[Sample]:
    """About 4 samples of I, 4 of II, 3 of III, 3 of IV and 6 of vqa, as far as the record's entities allow; with the style
    templates.FULL more, including relations.

    absent: entities known to be absent, for labels that are not complete; without it, all entities that its kind of image is labelled
    with and that have no mask (see `LabelStats.known_absent`). complete: whether everything of the kinds that it is labelled with is
    labelled in this image. Numbering continues after the samples that the record already has."""
    scene = Scene(record, rng, label_stats, absent, style, complete)
    of_1, of_2, of_3, of_4 = style.numbers
    samples = [
        *segmentations(scene, of_1),
        *namings(scene, of_2),
        *knowledge_questions.named(scene, of_3),
        *knowledge_questions.prompted(scene, of_4),
        *unmarked(scene),
        *vqa_questions.plain(scene),
        *relation_questions.relations(scene, style.relations),
    ]
    samples = [sample for sample in samples if len(sample.targets) <= MAX_SPANS]
    if unsure_sides(record):
        samples = [sample for sample in samples if not has_sides(sample)]
    for number, sample in enumerate(samples, len(record.samples)):
        sample.sample_id = f"{record.id}/{number}"
    return samples


def has_sides(sample: Sample) -> bool:
    """Whether a question or an answer says left or right, other than in the name of a structure without a twin, such as a ventricle of
    the heart, which is known by its shape."""
    for text in (turn.text for turn in sample.turns):
        for target in sample.targets:
            if target.entity in KNOWLEDGE and not KNOWLEDGE[target.entity].twin:
                text = text.replace(target.entity, "")
        if _SIDE.search(text):
            return True
    return False


def segmentations(scene: Scene, number: int) -> list[Sample]:
    """I: the user asks for one or two named structures, or for an absent one."""
    samples, asked = [], set()
    queue = scene.shuffled(scene.masks) * number
    for _ in range(number):
        question, answer = scene.pick(scene.style.segment)
        absent = scene.absent_entity(known=False) if scene.rng.random() < scene.style.absent_share or not queue else None
        if absent:
            sample = scene.sample("I", "absent", render(question, [absent]), scene.absent_answer(absent))
        elif not queue:
            continue
        elif len(scene.masks) > 1 and scene.rng.random() < PAIR_SHARE:
            pair = scene.shuffled(scene.masks)[:2]
            if not scene.separate(*pair):
                continue
            asked_for = render(question, [scene.words(entity) for entity in pair])
            sample = scene.sample("I", "two", asked_for, grounded(placeholders(answer, 2), scene.worded_spans(pair)))
        else:
            entity = queue.pop(0)
            several, spans = scene.several([entity]), scene.worded_spans([entity])
            answer = grounded(placeholders(answer, 1, several), spans)
            sample = scene.sample("I", "one", render(question, [scene.words(entity)], several), answer)
        if sample.turns[0].text not in asked:
            asked.add(sample.turns[0].text)
            samples.append(sample)
    return samples


def namings(scene: Scene, number: int) -> list[Sample]:
    """II: the user prompts a structure and the answer names it."""
    samples = []
    for mask in scene.prompts(scene.pointable)[:number]:
        answer = grounded(scene.this(mask, SHOWN), [(mask.entity, [mask.mask_id])])
        samples.append(scene.sample("II", "name", scene.pick(scene.style.name), answer, [mask.mask_id]))
    return samples


def unmarked(scene: Scene) -> list[Sample]:
    """Questions of II and IV without a prompt: there is nothing to name, and the answer says so."""
    asked = [("II", scene.style.name)] * bool(scene.masks) + [("IV", scene.style.role)] * any(e in KNOWLEDGE for e in scene.masks)
    return [
        scene.sample(perspective, "unmarked", scene.pick(asks), (UNMARKED, []))
        for perspective, asks in asked
        if scene.rng.random() < UNMARKED_SHARE
    ]
