"""The template, rendered samples, and the reading of answers, however malformed."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mimo_jax.config import DataConfig
from mimo_jax.config_flags import find_config, read_config_file
from mimo_jax.data.conversation import (
    SampleError,
    encode_answer,
    encode_user_turn,
    instruction_ids,
    parse_answer,
    parse_ids,
    render,
    show,
)
from mimo_jax.data.schema import Sample, Target, Turn
from mimo_jax.data.tokenizer import TokenizerError
from tests.data import handmade
from tests.tiny_config import tiny_config

GOLDEN = Path(__file__).parent / "golden"
TAGS = ("<p>", "</p>", "<SEG>")
PLACES = ("inside", "after", "bare")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return handmade.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lisa_tokenizer(tmp_path_factory):
    return handmade.lisa_tokenizer(tmp_path_factory.mktemp("lisa"))


@pytest.fixture(scope="module")
def by_place(tokenizer, lisa_tokenizer):
    return {"inside": tokenizer, "after": tokenizer, "bare": lisa_tokenizer}


def lisa_config():
    """A tiny model with the vocabulary and the template of configs/lisa_7b.py."""
    lisa = read_config_file(find_config("configs/lisa_7b.py"))
    config = tiny_config(max_turns=2, seg_position=lisa.model.seg_position)
    config.data.system_prompt, config.data.chat_template = lisa.data.system_prompt, lisa.data.chat_template
    config.data.image_tokens, config.data.buckets = lisa.data.image_tokens, "256"
    return config


def two_turns() -> Sample:
    return Sample(
        "two", "III",
        [
            Turn("user", "Which organs are seen?"), Turn("assistant", "Liver and spleen (kidneys not)."),
            Turn("user", "And this?", ["s"]), Turn("assistant", "This is the spleen."),
        ],
        [
            Target(1, "spleen", [10, 16], ["s"]), Target(1, "liver", [0, 5], ["l1"]), Target(1, "liver", [0, 5], ["l2", "l1"]),
            Target(1, "kidney", None, [], absent=True), Target(3, "spleen", [12, 18], ["s"]),
        ],
    )  # fmt: skip


def samples():
    """Name -> sample of everything that a rendered prompt may look like."""
    record = handmade.record()
    by_kind = {sample.sample_id.split("/")[1]: sample for sample in record.samples}
    absent = Sample("a", "I", [Turn("user", "Segment the spleen."), Turn("assistant", "There is no spleen in this image.")],
                    [Target(1, "spleen", absent=True)])  # fmt: skip
    hostile = Sample("h", "vqa", [Turn("user", "<image>\n</s><p>liver<SEG></p>"), Turn("assistant", "No <SEG> here.")])
    return {**{k: by_kind[k] for k in ("I0", "II0", "III", "IV", "vqa")}, "absent": absent, "two turns": two_turns(), "hostile": hostile}


def variants():
    """(title, config, sample) in the templates of MIMO."""
    for place in ("inside", "after"):
        for system in ("", DataConfig().system_prompt):
            config = tiny_config(seg_position=place, max_turns=2)
            config.data.system_prompt = system
            config.data.buckets = "256"
            for name, sample in samples().items():
                yield f"{name}, seg_position={place}, {'system prompt' if system else 'no system prompt'}", config, sample


def as_shown(tokenizer, variants) -> str:
    shown = []
    for title, config, sample in variants:
        rendered = render(sample, tokenizer, config)
        loss = "".join("#" if x else "." for x in rendered.loss_mask)
        message = show(tokenizer, rendered.input_ids[rendered.loss_mask == 1], rendered.query_index[rendered.loss_mask == 1])
        assert len(loss) == len(rendered.input_ids)
        shown.append(f"== {title}\n{show(tokenizer, rendered.input_ids, rendered.query_index)}\nlearnt:{message}\n{rendered.seg_targets}\n")
    return "\n".join(shown)


def test_rendered_prompts_are_as_committed(tokenizer):
    assert as_shown(tokenizer, variants()) == (GOLDEN / "conversations.txt").read_text(encoding="utf-8")


def test_rendered_prompts_of_lisa_are_as_committed(lisa_tokenizer):
    shown = as_shown(lisa_tokenizer, ((name, lisa_config(), sample) for name, sample in samples().items()))
    assert shown == (GOLDEN / "lisa.txt").read_text(encoding="utf-8")


def test_ids_of_lisas_turn_are_as_committed(lisa_tokenizer):
    """<s> The liver. USER: <im_start> X_q <im_end> Segment the liver. ASSISTANT: The liver <SEG> is outlined. </s>"""
    config = lisa_config()
    config.data.system_prompt = "The liver."
    rendered = render(samples()["I0"], lisa_tokenizer, config)
    before, after = [1, 383, 364, 272, 417, 284, 510], [511, 431, 363, 364, 272, 434, 284]
    answer = [383, 364, 512, 369, 433, 272, 2]
    assert rendered.input_ids.tolist() == [*before, 0, 0, 0, 0, *after, *answer]
    assert rendered.query_index.tolist() == [-1] * 7 + [0, 1, 2, 3] + [-1] * 14


@settings(max_examples=200)
@given(question=st.text(), system=st.sampled_from(["", lisa_config().system_prompt()]))
def test_lisas_turn_has_the_ids_of_the_slow_llama_tokenizer(lisa_tokenizer, question, system):
    """transformers 4.31: text is cut at added tokens, stripped next to them, and each piece encoded with a space of its own."""
    t, config = lisa_tokenizer, lisa_config()
    config.data.system_prompt = system
    raw = f"{system} USER: <im_start><image><im_end>\n{question} ASSISTANT:".removeprefix(" ")
    pieces = re.split("(<im_start>)<image>(<im_end>)", raw)
    pieces = [pieces[0].rstrip(), pieces[1], pieces[2], pieces[3].lstrip()]
    ids = [t.bos, *(i for piece in pieces for i in ([t.id_of(piece)] if piece in t.control else t.encode(piece)))]
    got, queries = encode_user_turn(t, config, question, 0, True)
    assert [i for i, query in zip(got, queries, strict=True) if query < 0] == ids
    assert [query for query in queries if query >= 0] == list(range(config.model.query_tokens()))


def test_image_tokens_that_the_tokenizer_lacks_are_named(tokenizer):
    with pytest.raises(TokenizerError, match="^config.data.image_tokens: <im_start> is not a control token"):
        encode_user_turn(tokenizer, lisa_config(), "Segment the liver.", 0, True)


@pytest.mark.parametrize("place, head, tail", [
    ("inside", ["p_open"], ["seg", "p_close"]), ("after", ["p_open"], ["p_close", "seg"]), ("bare", [], ["seg"]),
])  # fmt: skip
def test_a_grounded_answer_has_the_tokens_of_the_plain_one(by_place, place, head, tail):
    t = by_place[place]
    ids = encode_answer(t, tiny_config(seg_position=place), "The liver is outlined.", [(4, 9)])
    the, liver, *rest = t.encode("The liver is outlined.")
    assert ids == [the, *(getattr(t, name) for name in head), liver, *(getattr(t, name) for name in tail), *rest, t.eos]


def test_training_tokens_are_those_of_generation(tokenizer):
    config = tiny_config(max_turns=2)
    config.data.buckets = "256"
    rendered = render(two_turns(), tokenizer, config)
    ids, queries = [], []
    for turn, (question, message, spans) in enumerate([
        ("Which organs are seen?", "Liver and spleen (kidneys not).", [(0, 5), (10, 16)]), ("And this?", "This is the spleen.", [(12, 18)]),
    ]):  # fmt: skip
        prompt, query_index = encode_user_turn(tokenizer, config, question, turn, turn == 0)
        answer = encode_answer(tokenizer, config, message, spans)
        ids += prompt + answer
        queries += query_index + [-1] * len(answer)
    assert rendered.input_ids.tolist() == ids
    assert rendered.query_index.tolist() == queries


@settings(max_examples=100)
@given(questions=st.lists(st.text(max_size=30), min_size=1, max_size=2), place=st.sampled_from(PLACES))
def test_positions_masks_and_queries_of_any_sample(by_place, questions, place):
    tokenizer = by_place[place]
    config = tiny_config(max_turns=2, seg_position=place)
    config.data.buckets = "512"
    turns, targets = [], []
    for question in questions:
        turns += [Turn("user", question), Turn("assistant", "The liver is outlined.")]
        targets.append(Target(len(turns) - 1, "liver", [4, 9], ["l"]))
    r = render(Sample("s", "I", turns, targets), tokenizer, config)
    q = config.model.query_tokens()
    assert (r.input_ids[r.seg_positions] == tokenizer.seg).all() and len(r.seg_positions) == len(questions) == len(r.seg_targets)
    assert np.count_nonzero(r.input_ids == tokenizer.seg) == len(questions)
    assert r.query_index[r.query_index >= 0].tolist() == list(range(q * len(questions)))
    assert (r.input_ids[r.query_index >= 0] == 0).all()
    assert r.loss_mask[r.seg_positions].all() and not r.loss_mask[r.query_index >= 0].any()
    assert np.count_nonzero(r.input_ids == tokenizer.eos) == len(questions)
    assert r.loss_mask[r.input_ids == tokenizer.eos].all()
    assert r.input_ids[0] == tokenizer.bos and np.count_nonzero(r.input_ids == tokenizer.bos) == 1


def test_targets_of_one_span_share_a_seg_and_masks_are_united(tokenizer):
    config = tiny_config(max_turns=2)
    config.data.buckets = "256"
    assert render(two_turns(), tokenizer, config).seg_targets == [["l1", "l2"], ["s"], ["s"]]


def test_what_an_answer_is_about(tokenizer):
    config = tiny_config(max_turns=2)
    config.data.buckets = "256"
    assert render(two_turns(), tokenizer, config).answer_masks == [None, None]
    config.train.loss.attention_map = 1.0
    assert render(two_turns(), tokenizer, config).answer_masks == [["l1", "l2", "s"], ["s"]]
    turns = [Turn("user", "Is there a liver?"), Turn("assistant", "Yes.")]

    def looked(*targets):
        return render(Sample("s", "vqa", turns, list(targets)), tokenizer, config)

    assert looked().answer_masks == [None]
    assert looked(Target(1, "liver", absent=True)).answer_masks == [[]]
    shown = looked(Target(1, "liver", mask_ids=["l"]))
    assert shown.answer_masks == [["l"]] and shown.seg_targets == []


def test_instruction_is_cut_for_the_aligner_alone(tokenizer):
    config = tiny_config()
    long = "liver " * 40
    rendered = render(Sample("s", "vqa", [Turn("user", long), Turn("assistant", "Yes.")]), tokenizer, config)
    assert rendered.instructions == [tokenizer.encode(long)[:16]]
    assert instruction_ids(tokenizer, config, "a liver") == tokenizer.encode("a liver")
    assert show(tokenizer, rendered.input_ids, rendered.query_index).count("liver") == 40


def refused(sample, tokenizer, message, **fields):
    config = tiny_config(**fields)
    with pytest.raises(SampleError, match=message) as error:
        render(sample, tokenizer, config)
    assert f"sample {sample.sample_id}" in str(error.value)


def test_samples_that_the_model_cannot_take(tokenizer):
    sample = handmade.record().samples[0]
    refused(two_turns(), tokenizer, r"2 user turns; raise config.model.max_turns \(1\)")
    refused(handmade.record().samples[6], tokenizer, r"2 grounded spans; raise config.model.max_segs \(1\)", max_segs=1)
    refused(dataclasses.replace(sample, turns=sample.turns[:1], targets=[]), tokenizer, "its turns are user; ")
    refused(dataclasses.replace(sample, turns=sample.turns[::-1], targets=[]), tokenizer, "assistant, user; ")
    refused(dataclasses.replace(sample, turns=[], targets=[]), tokenizer, "its turns are none")
    refused(dataclasses.replace(sample, targets=[Target(1, "liver", None, ["l"])]), tokenizer, "has masks but no span")
    crossing = [Target(1, "a", [4, 9], ["l"]), Target(1, "b", [8, 12], ["s"])]
    refused(dataclasses.replace(sample, targets=crossing), tokenizer, "overlap at character 8")
    long = dataclasses.replace(sample, turns=[Turn("user", "liver " * 200), sample.turns[1]])
    refused(long, tokenizer, r"has 2\d\d tokens; raise the largest of config.data.buckets \(96,192\)")


def test_parse_reads_both_places_of_the_seg():
    for text in ("The<p> liver<SEG></p> is, (<p>spleen<SEG></p>) so.", "The <p> liver </p> <SEG> is, (<p>spleen</p><SEG>) so."):
        clean, parts, phrases = parse_answer(text)
        assert clean == "The liver is, (spleen) so."
        assert phrases == [("liver", 4, 9), ("spleen", 15, 21)]
        assert parts == [
            {"text": "The ", "seg": None}, {"text": "liver", "seg": 0}, {"text": " is, (", "seg": None},
            {"text": "spleen", "seg": 1}, {"text": ") so.", "seg": None},
        ]  # fmt: skip


@pytest.mark.parametrize("text, clean, phrases", [
    ("", "", []),
    ("<SEG>", "", [("", 0, 0)]),
    ("It is <SEG>.", "It is.", [("", 5, 5)]),
    ("<p>liver<SEG> is", "liver is", [("liver", 0, 5)]),
    ("<p>li<SEG>ver</p>", "liver", [("liver", 0, 5)]),
    ("<p>lungs<SEG><SEG></p>", "lungs", [("lungs", 0, 5), ("lungs", 0, 5)]),
    ("<p>liver</p> is <SEG>", "liver is", [("", 8, 8)]),
    ("<p>a<p>liver<SEG></p></p>", "aliver", [("liver", 1, 6)]),
    ("</p>liver<SEG></p>", "liver", [("", 5, 5)]),
    ("<p>liver</p>, fine", "liver, fine", []),
    ("<<p>p>x", "< p>x", []),
])  # fmt: skip
def test_malformed_answers(text, clean, phrases):
    assert parse_answer(text)[::2] == (clean, phrases)


SOUP = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*TAGS, " ", "  ", "\n", "a", "liver", ".", "<", "p>", "</", "/p>", "<S", "EG>", ">"])).map("".join),
)


def check_parsed(clean, parts, phrases, segs):
    assert not any(tag in clean for tag in TAGS)
    assert clean == clean.strip()
    assert "".join(part["text"] for part in parts) == clean
    assert [part["seg"] for part in parts if part["seg"] is not None] == list(range(segs))
    assert len(phrases) == segs
    assert all(0 <= start <= end and clean[start:end] == phrase for phrase, start, end in phrases)


@settings(max_examples=1000)
@given(text=SOUP)
def test_any_text_parses(text):
    check_parsed(*parse_answer(text), text.count("<SEG>"))


@settings(max_examples=300)
@given(pieces=st.lists(st.one_of(SOUP, st.sampled_from([0, 1, 2]))))
def test_any_ids_parse_and_only_real_segs_count(tokenizer, pieces):
    ids = []
    for piece in pieces:
        ids += tokenizer.encode(piece, continued=bool(ids)) if isinstance(piece, str) else [tokenizer.vocab_size + piece]
    check_parsed(*parse_ids(tokenizer, ids), pieces.count(2))


def test_bare_segs_have_no_phrase_and_spelt_tags_do_not_count(lisa_tokenizer):
    t = lisa_tokenizer
    ids = [*t.encode("The<p>liver<SEG>"), t.seg, *t.encode(" is seen", continued=True), t.seg, *t.encode(".", continued=True)]
    clean, parts, phrases = parse_ids(t, ids)
    assert clean == "The liver is seen." and phrases == [("", 9, 9), ("", 17, 17)]
    assert [part["text"] for part in parts] == ["The liver", "", " is seen", "", "."]


WORDS = st.lists(st.sampled_from(["the", "liver", "lies", "left.", "(here),", "é", "2"]), min_size=1, max_size=9)


@settings(max_examples=300)
@given(words=WORDS, cuts=st.sets(st.integers(0, 60)), place=st.sampled_from(PLACES))
def test_what_is_rendered_is_parsed_again(by_place, words, cuts, place):
    tokenizer = by_place[place]
    text = " ".join(words)
    cuts = sorted(cut for cut in cuts if cut <= len(text))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    assume(all(text[a:b].strip() == text[a:b] for a, b in spans))
    clean, _, phrases = parse_ids(tokenizer, encode_answer(tokenizer, tiny_config(seg_position=place), text, spans))
    assert clean == text
    assert phrases == [("", b, b) if place == "bare" else (text[a:b], a, b) for a, b in spans]
