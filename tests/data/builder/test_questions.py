"""Questions: grounded where they say, absent only of what is absent, and not to be answered without the image or the prompt."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from mimo_jax.config import PERSPECTIVES
from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.label_stats import PRESENCE_PER_IMAGE, LabelStats
from mimo_jax.data.builder.phantom import PHANTOM_LABEL_STATS, make_phantom
from mimo_jax.data.builder.questions import ask
from mimo_jax.data.builder.relations import MIN_AREA_RATIO
from mimo_jax.data.builder.templates import NUMBERS, UNMARKED, with_article
from mimo_jax.data.schema import encode_mask
from tests.data.builder.bodies import plain_record
from tests.eval.guessing import score_guessing


@pytest.fixture(scope="module")
def records():
    return [make_phantom(21, index) for index in range(300)]


def samples_of(records, *perspectives):
    return [(record, sample) for record in records for sample in record.samples if sample.perspective in perspectives]


def test_spans_read_as_their_entities(records):
    for record, sample in samples_of(records, "I", "II", "III", "IV"):
        for target in sample.targets:
            text = sample.turns[target.turn].text
            assert sample.turns[target.turn].role == "assistant"
            if target.absent:
                assert target.span is None and text == f"There is no {target.entity} in this image."
            else:
                assert text[target.span[0] : target.span[1]] == target.entity
                assert {record.mask(i).entity for i in target.mask_ids} == {target.entity}


def test_every_perspective_comes_several_times_an_image(records):
    numbers = Counter(sample.perspective for _, sample in samples_of(records, *PERSPECTIVES))
    for perspective in PERSPECTIVES:
        most = 6.6 if perspective == "vqa" else 5.6
        assert most - 3.6 < numbers[perspective] / len(records) < most, perspective
    assert len({sample.sample_id for _, sample in samples_of(records, *PERSPECTIVES)}) == sum(numbers.values())


def test_shown_entities_are_never_called_absent(records):
    for record, sample in samples_of(records, "I", "III"):
        shown = {mask.entity for mask in record.masks}
        for target in sample.targets:
            assert target.absent != (target.entity in shown)
    for perspective in ("I", "III"):
        share = np.mean([sample.kind == "absent" for _, sample in samples_of(records, perspective)])
        assert 0.22 < share < 0.38, perspective


def test_I_asks_for_all_instances_and_II_for_one(records):
    for record, sample in samples_of(records, "I"):
        for target in sample.targets:
            assert target.entity in sample.turns[0].text
            assert sorted(target.mask_ids) == sorted(m.mask_id for m in record.masks if m.entity == target.entity)
    for _, sample in samples_of(records, "II"):
        if sample.kind == "unmarked":
            continue
        assert [target.mask_ids for target in sample.targets] == [sample.turns[0].prompted]


def test_III_and_IV_do_not_name_what_they_ask_for(records):
    for _, sample in samples_of(records, "III"):
        if sample.kind == "function":
            assert not any(target.entity in sample.turns[0].text for target in sample.targets)
    for _, sample in samples_of(records, "II", "IV"):
        assert not any(entity in sample.turns[0].text for entity in KNOWLEDGE)
        if sample.kind == "unmarked":
            assert not sample.targets and not sample.turns[0].prompted and sample.turns[1].text == UNMARKED
            continue
        assert sample.turns[0].prompted == sample.targets[0].mask_ids
    assert {s.perspective for _, s in samples_of(records, *PERSPECTIVES) if s.kind == "unmarked"} == {"II", "IV"}
    assert any(len(sample.targets) >= 2 for _, sample in samples_of(records, "III"))
    assert any(len(sample.targets) == 2 for _, sample in samples_of(records, "IV"))
    assert max(len(sample.targets) for _, sample in samples_of(records, *PERSPECTIVES)) <= 4


def test_relations_are_true_of_the_masks(records):
    seen = Counter()
    for record, sample in samples_of(records, "III", "IV"):
        if sample.kind not in ("contains", "lies_in", "holds") or len(sample.targets) < 2:
            continue
        seen[sample.kind] += 1
        first, *others = sample.targets
        lesion, hosts = (others[0], [first]) if sample.kind == "holds" else (first, others)
        inside = np.any([record.mask(i).decode() for host in hosts for i in host.mask_ids], axis=0)
        assert all(inside[record.mask(i).decode()].all() for i in lesion.mask_ids)
    assert min(seen[kind] for kind in ("contains", "lies_in", "holds")) > 5


def test_the_prompt_is_needed(records):
    """II: no class is common, and the best guess from the image's own structures is right for about one in its number of structures."""
    classes = Counter(sample.targets[0].entity for _, sample in samples_of(records, "II") if sample.targets)
    assert max(classes.values()) <= 0.12 * sum(classes.values())
    assert min(classes.values()) >= 0.02 * sum(classes.values())
    best = total = 0
    for record in records:
        answers = Counter(sample.targets[0].entity for sample in record.samples if sample.perspective == "II" and sample.targets)
        best, total = best + max(answers.values()), total + sum(answers.values())
    assert best / total < 0.38


def test_vqa_cannot_be_guessed(records):
    more = [make_phantom(22, index) for index in range(200)]
    guess = score_guessing(records, more)
    assert guess["text_only"] - guess["majority"] < 0.10
    assert guess["text_only"] < 0.52
    answers = defaultdict(Counter)
    for _, sample in samples_of(records, "vqa"):
        if sample.kind == "list":
            assert sample.answer_type == "open" and sample.turns[1].text == sample.references[0]
            continue
        answers[sample.kind][sample.references[0]] += 1
        assert sample.references[0] in sample.choices and sample.answer_type == "closed"
        assert sample.turns[1].text == f"{sample.references[0]}."
    for kind in ("yes_no", "compare"):
        number = sum(answers[kind].values())
        assert abs(answers[kind]["Yes"] / number - 0.5) < 2.5 / np.sqrt(number), kind
    for kind in ("count", "modality"):
        assert max(answers[kind].values()) < 0.45 * sum(answers[kind].values()), kind


def test_short_answers_say_what_they_are_about(records):
    for record, sample in samples_of(records, "vqa"):
        for target in sample.targets:
            named = KNOWLEDGE[target.entity].plural if sample.kind == "count" else target.entity
            assert target.span is None and named in sample.turns[0].text
            assert sorted(target.mask_ids) == sorted(m.mask_id for m in record.masks if m.entity == target.entity)
            assert target.absent == (sample.references[0] in ("No", "Zero") and sample.kind != "compare")
        assert len(sample.targets) == {"yes_no": 1, "count": 1, "compare": 2}.get(sample.kind, 0)


def test_presence_is_balanced_for_each_entity(records):
    """Over the phantoms of all modalities, yes and no are equally frequent for each entity: exactly by the rates, roughly by count."""
    half = PRESENCE_PER_IMAGE / 19 / 2
    for key, presence in PHANTOM_LABEL_STATS.presence.items():
        for entity, share in presence.items():
            yes, lacks, foreign = PHANTOM_LABEL_STATS.asking_rates[entity]
            here = PHANTOM_LABEL_STATS.share[key]
            assert yes * here * share == pytest.approx(half)
            assert lacks * here * (1 - share) + foreign * (1 - here) == pytest.approx(half)
            assert max(yes, lacks, foreign) <= 1
    answers = defaultdict(Counter)
    for record, sample in samples_of(records, "vqa"):
        if sample.kind == "yes_no":
            entity = max((e for e in KNOWLEDGE if f" {with_article(e)} " in sample.turns[0].text.replace("?", " ")), key=len)
            answers[entity][sample.references[0]] += 1
            assert (sample.references[0] == "Yes") == any(mask.entity == entity for mask in record.masks)
    assert len(answers) == 19
    for entity, counts in answers.items():
        number = sum(counts.values())
        assert number > 20 and abs(counts["Yes"] / number - 0.5) < 2 / np.sqrt(number), entity


def test_counts_and_comparisons_are_true(records):
    seen = Counter()
    for record, sample in samples_of(records, "vqa"):
        question, answer = sample.turns[0].text, sample.references[0]
        if sample.kind == "count":
            entity = next(e for e, fact in KNOWLEDGE.items() if fact.plural and fact.plural in question)
            assert NUMBERS.index(answer) == sum(mask.entity == entity for mask in record.masks)
        elif sample.kind == "compare":
            first, second = sorted((m for m in record.masks if m.entity in question), key=lambda m: question.index(m.entity))
            assert max(first.area_px, second.area_px) >= MIN_AREA_RATIO * min(first.area_px, second.area_px)
            assert ((first.area_px > second.area_px) == ("larger" in question)) == (answer == "Yes")
        elif sample.kind == "modality":
            assert answer == record.modality
        elif sample.kind == "list":
            for entity in {mask.entity for mask in record.masks}:
                number = sum(mask.entity == entity for mask in record.masks)
                fact = KNOWLEDGE[entity]
                told = f"{NUMBERS[number]} {fact.plural if number > 1 else entity}" if fact.plural else entity
                assert told.lower() in answer.lower()
        seen[sample.kind] += 1
    assert min(seen.values()) > 30 and set(seen) == {"yes_no", "count", "modality", "compare", "list"}


def test_the_vocabulary_is_small(records):
    words = {word.strip(".,?") for _, sample in samples_of(records, *PERSPECTIVES) for turn in sample.turns for word in turn.text.split()}
    assert len(words) < 200


def test_unknown_entities_get_what_needs_no_knowledge():
    record = plain_record(["gizzard", "left whatsit", "gizzard"])
    other = plain_record(["left whatsit"], name="s")
    label_stats = LabelStats.from_records([record, other, plain_record(["keel"], modality="MR", name="t")])
    found = [sample for seed in range(40) for sample in ask(record, np.random.default_rng(seed), label_stats)]
    assert {sample.perspective for sample in found} == {"I", "II", "vqa"}
    assert {sample.kind for sample in found} == {"one", "two", "name", "unmarked", "yes_no", "modality", "list"}
    assert not any(target.absent for sample in found for target in sample.targets)  # it lacks nothing that its kind is labelled with
    lacking = [sample for seed in range(40) for sample in ask(other, np.random.default_rng(seed), label_stats)]
    assert {t.entity for s in lacking for t in s.targets if t.absent} == {"gizzard"}
    assert not any("keel" in s.turns[0].text for s in found + lacking)


def test_where_labels_are_not_complete_only_known_absence_counts():
    """A missing mask says nothing; yes and no are balanced over what is known, and nothing else is asked or stated."""
    records = [plain_record(["liver", "spleen"] if i % 2 else ["spleen"], name=f"r{i}") for i in range(40)]
    absent = {record.id: ["liver"] if i % 4 == 0 else [] for i, record in enumerate(records)}
    label_stats = LabelStats.from_records(records, absent=absent)
    assert label_stats.asking_rates["spleen"] == (0.0, 0.0, 0.0)
    yes, lacks, _ = label_stats.asking_rates["liver"]
    assert yes * 0.5 == pytest.approx(lacks * 0.25) and lacks > 0
    answers = Counter()
    for record in records:
        for seed in range(15):
            for sample in ask(record, np.random.default_rng(seed), label_stats, absent[record.id]):
                if sample.kind == "yes_no":
                    answers[sample.references[0]] += 1
                for target in sample.targets:
                    assert not target.absent or target.entity in absent[record.id]
    assert abs(answers["Yes"] / sum(answers.values()) - 0.5) < 2.5 / np.sqrt(sum(answers.values()))


def test_a_host_is_found_by_overlap_where_no_parent_is_recorded():
    record = plain_record(["liver", "spleen"])
    pixels = np.zeros((record.height, record.width), bool)
    pixels[3:6, 3:6] = True
    record.masks.append(encode_mask(pixels, "c", "liver cyst"))
    found = [s for seed in range(20) for s in ask(record, np.random.default_rng(seed), LabelStats.from_records([record]))]
    assert any(s.kind == "contains" and [t.entity for t in s.targets] == ["liver cyst", "liver"] for s in found)


def test_same_generator_same_questions(records):
    one = ask(records[0], np.random.default_rng(4), PHANTOM_LABEL_STATS)
    assert one == ask(records[0], np.random.default_rng(4), PHANTOM_LABEL_STATS)
    assert one != ask(records[0], np.random.default_rng(5), PHANTOM_LABEL_STATS)
