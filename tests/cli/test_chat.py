"""A conversation by lines, as they are typed or piped."""

import io
import json

import numpy as np
import pytest

from mimo_jax.cli.chat import HELP, ChatSession, keyboard_lines
from mimo_jax.infer.answers.answer import NO_MASKS
from mimo_jax.infer.predictor import Mimo
from tests.data.handmade import tokenizer as make_tokenizer
from tests.tiny_config import random_params, tiny_config


@pytest.fixture(scope="module")
def mimo(tmp_path_factory):
    config = tiny_config(max_turns=2)
    config.generate.max_new_tokens = 12
    return Mimo(config, random_params(config), make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def session(mimo):
    return ChatSession(mimo.open(np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)), io.StringIO())


def said(session, *lines):
    """What these lines print."""
    session.out.seek(0)
    session.out.truncate()
    session.run(lines)
    return session.out.getvalue()


def test_lines_are_questions_and_marks_count_for_the_next_one_alone(session, mimo):
    shown = said(session, "", "/point 5,6", "/box 2,3,30,20", "/scribble 1,1 9,9", "What is this?\n", "And then?")
    first, second = session.chat.answers
    assert first.question == "What is this?" and first.text in shown and second.text in shown and not session.failed
    assert (len(first.prompts.points), len(first.prompts.boxes), len(first.prompts.scribbles)) == (1, 1, 1) and not second.prompts
    twin = mimo.open(session.chat.image.pixels)
    marks = {"points": [[5, 6, 1]], "boxes": [[2, 3, 30, 20]], "scribbles": [[[1, 1], [9, 9]]]}
    assert twin.ask("What is this?", **marks).text == first.text and twin.ask("And then?").text == second.text
    assert all(e.describe() in shown for a in (first, second) for e in a.entities)
    assert (NO_MASKS in shown) == (not first.entities or not second.entities)


def test_marks_from_a_file_and_taking_them_back(session, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"points": [[5, 6, 1]]}))
    said(session, "/box 1,1,9,9", "/clear", f"/prompts {tmp_path / 'm.json'}", "What is this?")
    (answer,) = session.chat.answers
    assert len(answer.prompts.points) == 1 and len(answer.prompts.boxes) == 0


@pytest.mark.parametrize(
    "line, error",
    [
        ("/boxes 1,2,3,4", "/boxes 1,2,3,4: is not a command; see /help"),
        ("/box 1,2,3", "is not X0,Y0,X1,Y1"),
        ("/save a.png", "there is no answer yet"),
        ('/save "a', "No closing quotation"),
        ("Where is it? " * 200, "leaves no room to answer"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(session, line, error):
    shown = said(session, line, "What is this?")
    assert f"! {error}" in shown or error in shown.splitlines()[0]
    assert session.failed == 1 and len(session.chat.answers) == 1


def test_answers_are_saved_and_a_conversation_is_restarted(session, tmp_path):
    said(session, "What is this?", f"/save '{tmp_path / 'a b.json'}' {tmp_path / 'c.png'}")
    assert json.loads((tmp_path / "a b.json").read_text())["text"] == session.chat.answers[0].text and (tmp_path / "c.png").exists()
    encoded = session.chat.mimo.engine.counts["images"]
    said(session, "/new", "What is this?")
    assert len(session.chat.answers) == 1 and session.chat.mimo.engine.counts["images"] == encoded


def test_help_and_quit(session):
    assert said(session, "/help", "/quit", "What is this?") == HELP + "\n" and not session.chat.answers


def test_an_interrupted_answer_leaves_the_conversation(session, monkeypatch):
    real = session.chat.mimo.engine.decode
    calls = []

    def decode(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(session.chat.mimo.engine, "decode", decode)
    assert "interrupted" in said(session, "What is this?") and not session.chat.answers
    said(session, "What is this?")
    assert session.chat.answers[0].text


def test_typed_lines_survive_ctrl_c_and_end_with_ctrl_d(capsys):
    keys = iter(["a", KeyboardInterrupt, "b", EOFError])

    def read(prompt):
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    assert list(keyboard_lines(read=read)) == ["a", "b"]
