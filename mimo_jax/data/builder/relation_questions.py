"""Questions of III and IV about the spatial relation of two structures of the image; the answers ground both.

The wrong alternative of a question is certainly wrong, and the names do not reveal the answer: a question never offers a left and a right
structure, two structures whose sizes differ so much that nobody needs the image, or a whole and its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice

from mimo_jax.data.builder import templates
from mimo_jax.data.builder.entities import canonical
from mimo_jax.data.builder.label_stats import is_lesion, overlapping
from mimo_jax.data.builder.scene import Scene, grounded
from mimo_jax.data.schema import Sample

MAX_TRIED_PAIRS = 24  # pairs of structures that are tried for one question


def relations(scene: Scene, number: int) -> list[Sample]:
    """At most `number` of III and of IV each, of different kinds."""
    if number == 0 or len(scene.masks) < 2:
        return []
    named = [_larger, _left_or_right, _touching, _surrounding]
    pointed = [_size_of_this, _side_of_this, _touches_this, _inside_this]
    samples = []
    for kinds in (named, pointed):
        drawn = (kind(scene) for kind in scene.shuffled(kinds))
        samples += islice((sample for sample in drawn if sample is not None), number)
    return samples


def _pairs(scene: Scene) -> Iterator[tuple[str, str]]:
    """At most MAX_TRIED_PAIRS pairs of structures that may be compared, in random order."""
    names = [entity for entity in scene.masks if entity in scene.pointable]
    for a, b in scene.shuffled(combinations(names, 2))[:MAX_TRIED_PAIRS]:
        if not overlapping(a, b) and not scene.layout.covers(a, b):
            yield (a, b) if scene.rng.random() < 0.5 else (b, a)


def _alone(scene: Scene, entity: str) -> bool:
    """Whether one prompt identifies the entity."""
    return len(scene.masks[entity]) == 1


def _side_of(scene: Scene, a: str, b: str) -> str:
    """The side of b on which a lies for the patient; "" if the names would reveal it."""
    return scene.layout.side(a, b) if canonical(a).laterality == canonical(b).laterality else ""


def _touching_pair(scene: Scene) -> tuple[str, str, str] | None:
    """(a structure, one that touches it, one that is clearly apart from it)."""
    for a, b in _pairs(scene):
        if scene.layout.touches(a, b):
            others = [
                c for c in scene.pointable if c not in (a, b) and not overlapping(c, a) and not overlapping(c, b) and scene.layout.far(a, c)
            ]
            if others:
                return a, b, scene.pick(others)
    return None


def _larger(scene: Scene) -> Sample | None:
    for a, b in _pairs(scene) if scene.sizes_known else ():
        if scene.layout.comparable(a, b):
            largest = scene.rng.random() < 0.5
            first, second = (a, b) if (scene.layout.ratio(a, b) > 1) == largest else (b, a)
            words = "covers more of the image than" if largest else "covers less of the image than"
            question = scene.pick(templates.LARGEST if largest else templates.SMALLEST).format(a, b)
            return scene.sample("III", "larger", question, grounded(f"The {{}} {words} the {{}}.", scene.spans([first, second])))
    return None


def _left_or_right(scene: Scene) -> Sample | None:
    for a, b in _pairs(scene):
        if side := _side_of(scene, a, b):
            asked = "left" if scene.rng.random() < 0.5 else "right"
            first, second = (a, b) if side == asked else (b, a)
            question = scene.pick(templates.LEFTMOST).format(a, b, side=asked)
            answer = grounded(f"The {{}} lies to the patient's {asked} of the {{}}.", scene.spans([first, second]))
            return scene.sample("III", "side", question, answer)
    return None


def _touching(scene: Scene) -> Sample | None:
    found = _touching_pair(scene)
    if found is None:
        return None
    a, b, other = found
    question = scene.pick(templates.TOUCHING).format(a, *scene.shuffled([b, other]))
    return scene.sample("III", "adjacent", question, grounded("The {} touches the {}.", scene.spans([b, a])))


def _surrounding(scene: Scene) -> Sample | None:
    """A question for the only structure that contains a lesion."""
    for inner in scene.shuffled(scene.masks):
        around = [outer for outer in scene.masks if outer != inner and scene.layout.within(inner, outer)]
        if len(around) == 1 and is_lesion(inner) and not is_lesion(around[0]):
            answer = grounded("The {} lies within the {}.", scene.spans([inner, around[0]]))
            return scene.sample("III", "within", scene.pick(templates.CONTAINING).format(inner), answer)
    return None


def _size_of_this(scene: Scene) -> Sample | None:
    for a, b in _pairs(scene) if scene.sizes_known else ():
        if _alone(scene, a) and scene.layout.comparable(a, b):
            word = "larger" if scene.layout.ratio(a, b) > 1 else "smaller"
            answer = grounded(f"This is the {{}}, which is {word} here than the {{}}.", scene.spans([a, b]))
            return scene.sample("IV", "larger", scene.pick(templates.SIZE_OF_THIS).format(b), answer, scene.ids(a))
    return None


def _side_of_this(scene: Scene) -> Sample | None:
    for a, b in _pairs(scene):
        if _alone(scene, a) and (side := _side_of(scene, b, a)):
            answer = grounded(f"The {{}} lies to the patient's {side} of this, the {{}}.", scene.spans([b, a]))
            return scene.sample("IV", "side", scene.pick(templates.SIDE_OF_THIS).format(b), answer, scene.ids(a))
    return None


def _touches_this(scene: Scene) -> Sample | None:
    found = _touching_pair(scene)
    if found is None or not _alone(scene, found[0]):
        return None
    a, b, other = found
    question = scene.pick(templates.TOUCHES_THIS).format(*scene.shuffled([b, other]))
    return scene.sample("IV", "adjacent", question, grounded("This is the {}, which touches the {}.", scene.spans([a, b])), scene.ids(a))


def _inside_this(scene: Scene) -> Sample | None:
    for outer in scene.shuffled(scene.pointable):
        inner = [e for e in scene.masks if e != outer and scene.layout.within(e, outer)]
        if _alone(scene, outer) and len(inner) == 1 and is_lesion(inner[0]) and not is_lesion(outer):
            answer = grounded("This is the {}, inside which lies the {}.", scene.spans([outer, inner[0]]))
            return scene.sample("IV", "within", scene.pick(templates.INSIDE_THIS), answer, scene.ids(outer))
    return None
