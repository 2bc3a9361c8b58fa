"""The table of facts: whole, true to its own rules, and refused where it is not."""

import pytest

from mimo_jax.config import MODALITIES
from mimo_jax.data.builder.entities import ENTITIES
from mimo_jax.data.builder.knowledge import KNOWLEDGE, load_knowledge, plural_verb
from mimo_jax.data.builder.label_stats import is_lesion, overlapping
from mimo_jax.errors import UserError

ENTRY = '[liver]\nkind = "organ"\nwithin = "abdomen"\ndoes = "makes bile"\nmodalities = ["CT"]\n'


def test_it_knows_what_the_tables_name():
    assert len({fact.does for fact in KNOWLEDGE.values()}) >= 120
    assert not [entity for entity in KNOWLEDGE if entity not in ENTITIES]
    assert not [entity for entity, fact in KNOWLEDGE.items() if (fact.kind == "lesion") != is_lesion(entity)]
    assert {modality for fact in KNOWLEDGE.values() for modality in fact.modalities} == set(MODALITIES)


def test_each_question_is_answered_once_and_names_no_answer():
    owner = {}
    for entity, fact in KNOWLEDGE.items():
        for question in fact.asks:
            assert owner.setdefault(question, fact.does) == fact.does, question
            assert f" {entity} " not in f" {question[:-1]} "
        for text in (fact.does, fact.lies):
            assert not text or owner.setdefault(text, fact.does) == fact.does


def test_sides_share_their_facts_and_name_each_other():
    for entity, fact in KNOWLEDGE.items():
        if fact.twin:
            twin = KNOWLEDGE[fact.twin]
            assert twin.twin == entity and (twin.does, twin.lies, twin.kind) == (fact.does, fact.lies, fact.kind)
        side = entity.split(" ")[0] if entity.split(" ")[0] in ("left", "right") else ""
        for other in (*fact.beside, *fact.homes):
            assert other in KNOWLEDGE
            if side and KNOWLEDGE[other].twin and other in fact.homes:
                assert other.startswith(side)
    assert "left adrenal gland" in KNOWLEDGE["left kidney"].beside and "liver" not in KNOWLEDGE["left kidney"].beside
    assert KNOWLEDGE["lung nodule"].homes == ("left lung", "right lung", "lung")
    assert KNOWLEDGE["left kidney stone"].homes == ("left kidney", "kidney")


def test_no_structure_is_a_neighbour_of_its_own_part():
    assert not [(a, b) for a, fact in KNOWLEDGE.items() for b in fact.beside if overlapping(a, b)]


def test_verbs_of_several():
    assert [plural_verb(text) for text in ("makes bile", "is leaked blood", "carries blood", "passes on", "may turn", "lies low")] == [
        "make bile", "are leaked blood", "carry blood", "pass on", "may turn", "lie low",
    ]  # fmt: skip
    for fact in KNOWLEDGE.values():
        assert plural_verb(fact.does) != fact.does or fact.does.split(" ")[0] in ("may", "can"), fact.does


@pytest.mark.parametrize("table, message", [
    (ENTRY.replace("organ", "orgn"), r"\[liver\]: kind 'orgn'; use one of organ"),
    (ENTRY.replace("CT", "ct"), "modality 'ct'; use one of CT"),
    (ENTRY + 'colour = "red"\n', "unknown field 'colour'"),
    (ENTRY.replace('does = "makes bile"\n', ""), "lacks does"),
    (ENTRY + 'beside = ["stomack"]\n', "refers to 'stomack', which has no entry"),
    (ENTRY + 'beside = ["liver"]\n', "refers to itself"),
    (ENTRY + ENTRY.replace("[liver]", "[spleen]"), r"\[spleen\]: does 'makes bile' is also given for 'liver'"),
    (ENTRY + 'also = ["gall", "gall"]\n', "lists an entry twice"),
    (ENTRY + 'also = ["spleen"]\n' + ENTRY.replace("[liver]", "[spleen]").replace("bile", "pulp"), "'spleen' occurs twice"),
    (ENTRY.replace("makes bile", "lets the liver make bile"), "names the structure itself"),
    (ENTRY.replace("makes bile", "makes bile."), "without full stop"),
    (ENTRY.replace("makes bile", "makes " + "bile and " * 10), "not a short phrase"),
    (ENTRY + 'asks = ["Make bile."]\n', "is not a question"),
    (ENTRY + 'homes = ["liver"]\n', "only lesions have homes and landmarks"),
    (ENTRY + 'paired = "yes"\n', "paired must be true or false"),
    (ENTRY.replace("[liver]", '["the liver"]'), "without article"),
    (ENTRY + ENTRY, "cannot be read"),
])  # fmt: skip
def test_a_table_that_breaks_the_rules_is_refused(tmp_path, table, message):
    path = tmp_path / "mine.toml"
    path.write_text(ENTRY)
    assert load_knowledge(path)["liver"].many == "make bile"
    path.write_text(table)
    with pytest.raises(UserError, match=message) as error:
        load_knowledge(path)
    assert str(error.value).startswith("mine.toml")
