import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.infer.answers.asked import asked_names, canonical_name, unanswered


@pytest.mark.parametrize(
    "phrase, name",
    [("The Liver.", "liver"), (" the  left \n lung ", "left lung"), ("(cyst),", "cyst"), ("a", "a"), ("", ""), ("A the", "the")],
)
def test_canonical_name(phrase, name):
    assert canonical_name(phrase) == name


@given(st.one_of(st.text(max_size=20), st.text("aAthe .,()'", max_size=12)))
def test_canonical_name_is_idempotent(text):
    once = canonical_name(text)
    assert canonical_name(once) == once


@pytest.mark.parametrize(
    "question, names",
    [
        ("Segment the liver, the spleen and the left kidney.", ["liver", "spleen", "left kidney"]),
        ("segment Liver; SPLEEN & l kidney", ["liver", "spleen", "left kidney"]),
        ("Segment the left and right kidney", ["left kidney", "right kidney"]),
        ("Could you please show me the frobnicator and the brain tumour in this image?", ["frobnicator", "brain tumor"]),
        ("Where are the lungs?", ["lung"]),
        ("I need a mask of the HAEMORRHAGE.", ["hemorrhage"]),
        ("Segment the liver. Then the spleen.", ["liver", "spleen"]),
        # These name nothing that a mask could be missing for.
        ("Segment everything", []),
        ("Segment the marked lesion.", []),
        ("Outline this structure, please", []),
        ("Where is the twin of this?", []),
        ("Is there a brain tumor in this image?", []),
        ("Which is larger here, the liver or the spleen?", []),
        ("请分割肝脏", []),
        ("", []),
    ],
)
def test_the_names_that_a_request_asks_for(question, names):
    assert asked_names(question) == names


@pytest.mark.parametrize(
    "question, text, phrases, names",
    [
        ("Segment the liver and the spleen.", "The spleen is outlined.", ["The spleen"], ["liver"]),
        ("Segment the unicorn.", "There is no macula in this image.", [], ["unicorn"]),
        ("Segment the spleen.", "There is no spleen in this image.", [], []),
        ("Where are the lungs?", "Here are the left lung and the right lung.", ["left lung", "right lung"], []),
        ("Segment the BRAIN TUMOUR", "The brain tumor is outlined.", ["brain tumor"], []),
        ("Segment the frobnicator", "The Frobnicator is outlined.", ["The Frobnicator"], []),
        ("Segment the left kidney", "The right kidney is outlined.", ["right kidney"], ["left kidney"]),
    ],
)
def test_what_an_answer_leaves_out(question, text, phrases, names):
    assert unanswered(question, text, phrases) == names


@given(st.text(max_size=80))
def test_any_text_is_a_question(text):
    assert all(asked_names(text)) and unanswered(text, text, []) == [] or asked_names(text)
