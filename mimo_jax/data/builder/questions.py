"""Questions of an image whose masks are named: from one record to its samples, by templates and a seeded generator.

Perspectives I and II and the questions of presence and modality are asked of any entity; III, IV, counts and
comparisons only of what `knowledge.KNOWLEDGE` knows, and relations of what the masks show. Nothing is asked whose answer could be
told from its words: within each wording about as many images say yes as no, and a prompted question names nothing that only the
prompt can tell. Absence is asked rather where the thing might have been (`census.HARD_SHARE`), so that it does not suffice to know
what belongs into which kind of image. Absence is asked only of entities that this kind of image is labelled with, or, where the
census vouches for it (`elsewhere`), of those of other kinds. A whole and its parts are never rivals in one question.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from mimo_jax.data.builder import knowledge_questions, relation_questions, vqa_questions
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import LabelStats
from mimo_jax.data.builder.scene import Scene, grounded
from mimo_jax.data.builder.templates import CORE, SHOWN, UNMARKED, TemplateSet, placeholders, render
from mimo_jax.data.schema import Record, Sample

PAIR_SHARE = 0.15  # of I
UNMARKED_SHARE = 0.35  # the share of images of which II, or IV, is also asked without pointing at anything
MOST_SPANS = 2  # grounded spans of one answer; what would take more is not asked


def record_rng(seed: int, record_id: str) -> np.random.Generator:
    """What draws a record's questions, whatever else is built beside it."""
    return np.random.default_rng([seed, zlib.crc32(record_id.encode())])


def ask(
    record: Record, rng: np.random.Generator, census: LabelStats, absent: Iterable[str] | None = None, style: TemplateSet = CORE
) -> list[Sample]:
    """About 4 samples of I, 4 of II, 3 of III, 3 of IV and 6 of vqa, as far as the record's entities allow; of the style
    phrases.FULL some more, with relations.

    absent: entities known not to be in the image, where labels are not complete; without it, all that its kind of image is
    labelled with and that has no mask here (see Census.lacking). They are numbered on from the samples that the record has."""
    scene = Scene(record, rng, census, absent, style)
    of_1, of_2, of_3, of_4 = style.numbers
    samples = [
        *segmentations(scene, of_1),
        *namings(scene, of_2),
        *knowledge_questions.named(scene, of_3),
        *knowledge_questions.pointed(scene, of_4),
        *unmarked(scene),
        *vqa_questions.plain(scene),
        *relation_questions.relations(scene, style.relations),
    ]
    samples = [sample for sample in samples if len(sample.targets) <= MOST_SPANS]
    for number, sample in enumerate(samples, len(record.samples)):
        sample.sample_id = f"{record.id}/{number}"
    return samples


def segmentations(scene: Scene, number: int) -> list[Sample]:
    """I: named structures are asked for, one, two, or one that is not there."""
    samples, asked = [], set()
    queue = scene.shuffled(scene.masks) * number
    for _ in range(number):
        question, answer = scene.pick(scene.style.segment)
        absent = scene.absent_entity(known=False) if scene.rng.random() < scene.style.absent_share or not queue else None
        if absent:
            made = scene.sample("I", "absent", render(question, [absent]), scene.no_such(absent))
        elif not queue:
            break
        elif len(scene.masks) > 1 and scene.rng.random() < PAIR_SHARE:
            pair = scene.shuffled(scene.masks)[:2]
            if not scene.separate(*pair):
                continue
            made = scene.sample("I", "two", render(question, pair), grounded(placeholders(answer, 2), scene.spans(pair)))
        else:
            entity = queue.pop(0)
            made = scene.sample("I", "one", render(question, [entity]), grounded(placeholders(answer, 1), scene.spans([entity])))
        if made.turns[0].text not in asked:
            asked.add(made.turns[0].text)
            samples.append(made)
    return samples


def namings(scene: Scene, number: int) -> list[Sample]:
    """II: a structure is pointed at and named."""
    return [
        scene.sample("II", "name", scene.pick(scene.style.name), grounded(SHOWN, [(mask.entity, [mask.mask_id])]), [mask.mask_id])
        for mask in scene.prompts(scene.pointable)[:number]
    ]


def unmarked(scene: Scene) -> list[Sample]:
    """The questions of II and IV with nothing pointed at: there is nothing to name, and the answer says so."""
    asked = [("II", scene.style.name)] * bool(scene.masks) + [("IV", scene.style.role)] * any(e in KNOWLEDGE for e in scene.masks)
    return [
        scene.sample(perspective, "unmarked", scene.pick(asks), (UNMARKED, []))
        for perspective, asks in asked
        if scene.rng.random() < UNMARKED_SHARE
    ]
