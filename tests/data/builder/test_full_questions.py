"""The full style, on synthetic records: what holds of every question, whatever is drawn."""

import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.builder import templates
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import LabelCounts, LabelStats, is_lesion, overlapping
from mimo_jax.data.builder.questions import ask, record_rng
from mimo_jax.data.builder.relations import Layout
from mimo_jax.data.builder.scene import names_pattern
from mimo_jax.data.builder.templates import FULL
from tests.data.builder.bodies import SLICE, slice_record

EXTRA = {  # in addition to SLICE, without overlap
    "left lung": (124, 0, 156, 22), "right lung": (4, 0, 24, 22), "heart": (60, 0, 100, 20), "vertebra T9": (70, 100, 84, 118),
    "left rib 9": (150, 70, 158, 90), "right rib 9": (0, 70, 10, 90), "gizzard": (90, 100, 110, 118), "lung": (124, 0, 156, 21),
    "left lung upper lobe": (124, 0, 156, 9), "kidney stone": (104, 76, 108, 80), "left adrenal gland": (100, 58, 112, 66),
}  # fmt: skip
KINDS = {
    "I": {"one", "two", "absent"},
    "II": {"name", "unmarked"},
    "III": {"function", "contains", "absent", "location", "findings", "neighbor", "larger", "side", "adjacent", "within"},
    "IV": {"function", "lies_in", "twin", "holds", "unmarked", "location", "findings", "neighbor", "imaged", "kind", "larger", "side"}
    | {"adjacent", "within"},
    "vqa": {"yes_no", "knowledge", "count", "modality", "compare", "half", "fact", "list"},
}


def bodies(number: int, seed: int = 0):
    """Records that show any of the structures, some mirrored; those of "yard" are X-rays of chests."""
    rng = np.random.default_rng(seed)
    boxes = SLICE | EXTRA
    records = []
    for n in range(number):
        shown = {name: box for name, box in boxes.items() if rng.random() < 0.5} or {"liver": boxes["liver"]}
        if rng.random() < 0.7:
            shown.pop("lung", None)
        turn = (lambda p: p[:, ::-1]) if n % 2 else (lambda p: p)
        records.append(slice_record(shown, turn, name=f"body{n}"))
        if n % 4 == 0:
            lungs = {name: boxes[name] for name in ("left lung", "right lung", "heart") if name == "heart" or rng.random() < 0.7}
            records.append(slice_record(lungs, name=f"chest{n}"))
            records[-1].dataset, records[-1].modality = "yard", "X-ray"
    return records


@pytest.fixture(scope="module")
def asked():
    """(record, its samples) of complete labels."""
    records = bodies(200)
    label_stats = LabelStats.from_records(records)
    return [(record, ask(record, record_rng(1, record.id), label_stats, style=FULL)) for record in records]


def samples_of(asked, *perspectives):
    return [(record, sample) for record, samples in asked for sample in samples if sample.perspective in perspectives]


def shown_by(record):
    return {mask.entity for mask in record.masks}


def test_records_stay_unchanged_and_every_kind_occurs(asked):
    seen = defaultdict(Counter)
    for record, samples in asked:
        record.samples = samples
        record.check()
        assert len({sample.sample_id for sample in samples}) == len(samples)
        for sample in samples:
            seen[sample.perspective][sample.kind] += 1
    assert {perspective: set(kinds) for perspective, kinds in seen.items()} == KINDS
    assert min(min(kinds.values()) for kinds in seen.values()) > 5


def test_what_an_answer_names_of_the_image_is_grounded(asked):
    for record, sample in samples_of(asked, "I", "II", "III", "IV"):
        text = sample.turns[1].text
        spans = {target.entity for target in sample.targets if not target.absent}
        for target in sample.targets:
            if target.absent:
                assert target.entity not in shown_by(record) and text == f"There is no {target.entity} in this image."
            else:
                assert text[slice(*target.span)] == target.entity
                assert target.mask_ids and {record.mask(i).entity for i in target.mask_ids} == {target.entity}
        if sample.kind not in ("holds", "absent"):
            named = set(names_pattern(tuple(shown_by(record))).findall(text))
            assert spans <= named and all(any(overlapping(name, entity) for entity in spans) for name in named), text


def test_questions_do_not_name_what_they_ask_for(asked):
    for record, sample in samples_of(asked, "II", "III", "IV"):
        question = sample.turns[0].text
        named = set(names_pattern(tuple(shown_by(record))).findall(question))
        if sample.perspective == "III" and sample.kind not in ("larger", "side", "adjacent"):
            assert {target.entity for target in sample.targets} - named, question
        if sample.turns[0].prompted:
            marked = {record.mask(i).entity for i in sample.turns[0].prompted}
            assert len(marked) == 1 and not named & marked
            assert any(set(target.mask_ids) == set(sample.turns[0].prompted) for target in sample.targets)


def test_absence_is_claimed_only_if_known(asked):
    vouched, absent = defaultdict(set), Counter()
    for record, _ in asked:
        vouched[record.dataset, record.modality] |= shown_by(record)
    for record, sample in samples_of(asked, *PERSPECTIVES):
        for target in sample.targets:
            if target.absent:
                absent[sample.perspective] += 1
                assert target.entity in vouched[record.dataset, record.modality]
                assert not any(overlapping(target.entity, entity) for entity in shown_by(record))
                if sample.perspective == "III":
                    here = {KNOWLEDGE[e].does for e in shown_by(record) if e in KNOWLEDGE}
                    assert KNOWLEDGE[target.entity].does not in here
    assert set(absent) == {"I", "III", "vqa"}
    for perspective in ("I", "III"):
        share = np.mean([sample.kind == "absent" for _, sample in samples_of(asked, perspective)])
        assert 0.1 < share < 0.4, perspective


def test_nothing_is_absent_where_labels_are_not_complete():
    records = bodies(40)
    label_counts = LabelCounts()
    for record in records:
        label_counts.add(record.dataset, record.modality, shown_by(record), complete=False)
    label_stats = LabelStats.from_counts(label_counts)
    samples = [s for r in records for s in ask(r, record_rng(0, r.id), label_stats, label_stats.known_absent(r, (), complete=False), FULL)]
    assert samples and not any(target.absent for sample in samples for target in sample.targets)
    assert not any(sample.kind in ("absent", "yes_no") for sample in samples)


def test_yes_comes_as_often_as_no_within_each_wording(asked):
    answers = defaultdict(Counter)
    for record, sample in samples_of(asked, "vqa"):
        if sample.kind in ("yes_no", "compare"):
            names = sorted({*SLICE, *EXTRA}, key=len, reverse=True)
            wording = names_pattern(tuple(names)).sub("X", sample.turns[0].text).replace(" an X", " a X")
            answers[wording][sample.references[0]] += 1
            if sample.kind == "yes_no":
                assert (sample.references[0] == "Yes") == (sample.targets[0].entity in shown_by(record))
    assert len(answers) >= len(FULL.presence)
    for wording, counts in answers.items():
        number = sum(counts.values())
        assert abs(counts["Yes"] / number - 0.5) < 2.6 * 0.5 / np.sqrt(number) + 0.02, (wording, counts)


def layout_of(record) -> Layout:
    masks = {}
    for mask in record.masks:
        masks.setdefault(mask.entity, []).append(mask)
    return Layout(record, masks)


def test_relations_are_true_and_choices_fair(asked):
    first_named = defaultdict(list)
    for record, sample in samples_of(asked, "III", "IV"):
        if sample.kind not in ("larger", "side", "adjacent", "within"):
            continue
        layout, text, question = layout_of(record), sample.turns[1].text, sample.turns[0].text
        a, b = (target.entity for target in sample.targets)
        assert not overlapping(a, b)
        if sample.kind == "larger":
            more = "covers more" in text or "larger here" in text
            assert (layout.ratio(a, b) > 1) == more and 1.4 <= max(layout.ratio(a, b), layout.ratio(b, a)) <= 4
        elif sample.kind == "side":
            image_right = np.subtract(*(layout.boxes[layout.index[name], [0, 2]].mean() for name in (a, b))) > 0
            mirrored = int(record.id.removeprefix("body").removeprefix("chest")) % 2 == 1
            assert f"patient's {'left' if image_right != mirrored else 'right'} of" in text, text
            assert a.split()[0] == b.split()[0] or not {"left", "right"} & {a.split()[0], b.split()[0]}
        elif sample.kind == "adjacent":
            assert layout.touches(a, b)
            other = (set(names_pattern(tuple(shown_by(record))).findall(question)) - {a, b}).pop()
            centre = b if sample.perspective == "III" else a
            assert layout.far(centre, other)
        else:
            inner, outer = (a, b) if sample.perspective == "III" else (b, a)
            assert is_lesion(inner) and layout.within(inner, outer)
        if sample.perspective == "III" and sample.kind in ("larger", "side") or sample.kind == "adjacent":
            right = a if sample.perspective == "III" else b
            named = [n for n in names_pattern(tuple(shown_by(record))).findall(question)][-2:]
            first_named[sample.kind].append(named[0] == right)
    for kind, first in first_named.items():
        assert len(first) > 20 and abs(np.mean(first) - 0.5) < 1.5 / np.sqrt(len(first)), kind


def test_sides_are_asked_as_often_one_way_as_the_other(asked):
    texts = [sample.turns[1].text for _, sample in samples_of(asked, "III", "IV") if sample.kind == "side"]
    message = Counter(word for text in texts for word in ("left", "right") if f"patient's {word} of" in text)
    assert abs(message["left"] / sum(message.values()) - 0.5) < 1.5 / np.sqrt(sum(message.values()))


def test_wholes_and_parts_are_never_alternatives(asked):
    whole = 0
    for record, sample in samples_of(asked, "I", "II", "III", "IV"):
        entities = [target.entity for target in sample.targets]
        assert not any(overlapping(a, b) for i, a in enumerate(entities) for b in entities[:i])
        if sample.turns[0].prompted:
            marked = record.mask(sample.turns[0].prompted[0]).entity
            assert not any(overlapping(marked, e) and e != marked and marked in e for e in shown_by(record)), (marked, shown_by(record))
            whole += any("lung" in e for e in shown_by(record))
    assert whole


def test_no_more_spans_than_a_model_has_slots_for(asked):
    assert max(len(sample.targets) for _, sample in samples_of(asked, *PERSPECTIVES)) == 2


def test_facts_belong_to_their_structures(asked):
    told = {"location": lambda fact: [fact.lies], "findings": lambda fact: fact.findings, "function": lambda fact: [fact.does, fact.many]}
    for _, sample in samples_of(asked, "III", "IV"):
        if sample.kind in told:
            text = sample.turns[1].text.lower()
            assert any(phrase.lower() in text for phrase in told[sample.kind](KNOWLEDGE[sample.targets[0].entity])), text


def test_samples_are_the_same_in_any_process_and_order():
    records = bodies(30)
    label_stats = LabelStats.from_records(records)
    forth = {r.id: ask(r, record_rng(3, r.id), label_stats, style=FULL) for r in records}
    code = (
        "from tests.data.builder.test_full_questions import *\nrecords = bodies(30)\nlabel_stats = LabelStats.from_records(records)\n"
        "print({r.id: ask(r, record_rng(3, r.id), label_stats, style=FULL) for r in records})"
    )
    there = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert there.returncode == 0 and there.stdout == f"{forth}\n", there.stderr
    back = {r.id: ask(r, record_rng(3, r.id), label_stats, style=FULL) for r in records[::-1]}
    assert forth == back
    assert forth != {r.id: ask(r, record_rng(4, r.id), label_stats, style=FULL) for r in records}


def test_wordings_hold_their_blanks_and_core_is_part_of_full():
    for name in ("segment", "name", "role", "contains", "presence", "count", "modality", "inventory", "lies_in", "holds"):
        core, full = getattr(templates.CORE, name), getattr(FULL, name)
        assert full[: len(core)] == core and len(full) > len(core) and len(set(full)) == len(full)
    for question, answer in FULL.segment:
        assert templates.render(question, ["liver", "spleen"]).count("the liver and the spleen") == 1
        assert templates.placeholders(answer, 2).count("{}") == 2 and templates.placeholders(answer, 1).count("{}") == 1
    names = ("aorta", "uterus", "ureter", "ulna", "liver")
    assert " ".join(templates.with_article(name) for name in names) == "an aorta a uterus a ureter an ulna a liver"


def test_the_name_of_what_is_asked_for_does_not_tell_whether_it_is_there():
    """Rare or common, a structure is asked for where it is not about as often, in proportion, as where it is."""
    rng = np.random.default_rng(0)
    shares = {"liver": 0.7, "spleen": 0.5, "stomach": 0.3, "aorta": 0.1, "heart": 0.05, "gizzard": 0.3, "vertebra T9": 0.5}
    records = []
    for n in range(500):
        shown = {name: (SLICE | EXTRA)[name] for name, share in shares.items() if rng.random() < share}
        records.append(slice_record(shown or {"liver": SLICE["liver"]}, name=f"r{n}"))
    label_stats = LabelStats.from_records(records)
    spread = {}
    for style in (FULL, replace(FULL, even=False)):
        asked = defaultdict(Counter)
        for record in records:
            for sample in ask(record, record_rng(0, record.id), label_stats, style=style):
                if sample.kind in ("one", "absent") and sample.perspective == "I":
                    asked[sample.targets[0].entity][sample.kind] += 1
        assert asked.keys() == shares.keys()
        absent = [counts["absent"] / sum(counts.values()) for counts in asked.values()]
        spread[style.even] = min(absent), max(absent)
    assert spread[True][0] > 0.2 and spread[True][1] < 0.7 and spread[False][0] < 0.15 and spread[False][1] > 0.8, spread


def test_zero_is_not_a_better_guess_than_another_number():
    rng = np.random.default_rng(0)
    lesions = ["liver cyst", "kidney stone", "brain tumor", "gallstone", "polyp", "lung nodule"]
    records = []
    for n in range(400):
        boxes = {name: (20 * i, 0, 20 * i + 9, 9) for i, name in enumerate(lesions) if rng.random() < 0.15}
        records.append(slice_record({"liver": SLICE["liver"]} | boxes, name=f"r{n}"))
    label_stats = LabelStats.from_records(records)
    samples = [sample for record in records for sample in ask(record, record_rng(0, record.id), label_stats, style=FULL)]
    answers = Counter(sample.references[0] for sample in samples if sample.kind == "count")
    assert answers.keys() == {"Zero", "One"} and 0.2 < answers["Zero"] / sum(answers.values()) < 0.45
