"""Templates as data: ChatML with a byte-level tokenizer, one from outside, an unknown one."""

import numpy as np
import pytest

from mimo_jax.chat_templates import CHAT_TEMPLATES, ChatTemplate, register_chat_template
from mimo_jax.config import ConfigError
from mimo_jax.data.conversation import encode_user_turn, parse_ids, render, show, stop_id, template_text
from mimo_jax.data.schema import Sample, Target, Turn
from mimo_jax.data.tokenizer import TokenizerError
from tests.data import handmade
from tests.tiny_config import tiny_config


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return handmade.byte_level_tokenizer(tmp_path_factory.mktemp("byte_level"))


def config_of(template: str):
    config = tiny_config(max_turns=2)
    config.data.chat_template, config.data.system_prompt, config.data.buckets = template, "template", "256"
    return config


def conversation() -> Sample:
    return Sample(
        "s", "III",
        [Turn("user", "Segment <|im_end|> the liver."), Turn("assistant", "The liver is outlined."),
         Turn("user", "And this?", ["s"]), Turn("assistant", "This is the spleen.")],
        [Target(1, "liver", [4, 9], ["l"]), Target(3, "spleen", [12, 18], ["s"])],
    )  # fmt: skip


def test_a_chatml_conversation_of_a_byte_level_tokenizer(byte_level):
    config = config_of("chatml")
    made = render(conversation(), byte_level, config)
    assert show(byte_level, made.input_ids, made.query_index) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nSegment <|im_end|> the liver.<|im_end|>\n"
        "<|im_start|>assistant\nThe<p> liver<SEG></p> is outlined.<|im_end|>\n"
        "<|im_start|>user\n<image>\nAnd this?<|im_end|>\n<|im_start|>assistant\nThis is the<p> spleen<SEG></p>.<|im_end|>"
    )
    learnt = made.input_ids[made.loss_mask == 1]
    text = "The<p> liver<SEG></p> is outlined.<|im_end|>This is the<p> spleen<SEG></p>.<|im_end|>"
    assert show(byte_level, learnt, np.full(len(learnt), -1)) == text
    end = byte_level.id_of("<|im_end|>")
    assert stop_id(byte_level, config) == end and np.count_nonzero(made.input_ids == end) == 5  # the user's is no token
    assert made.seg_positions == np.flatnonzero(made.input_ids == byte_level.seg).tolist() and made.seg_targets == [["l"], ["s"]]
    assert all(made.loss_mask[position] for position in made.seg_positions)
    assert (made.query_index >= 0).sum() == 2 * config.model.query_tokens()
    first = learnt[: learnt.tolist().index(end)].tolist()
    assert parse_ids(byte_level, first)[0] == "The liver is outlined." and parse_ids(byte_level, first)[2] == [("liver", 4, 9)]


def test_a_byte_level_tokenizer_in_vicunas_template(byte_level):
    config = config_of("vicuna")
    config.data.system_prompt = "Be brief."
    made = render(conversation(), byte_level, config)
    assert show(byte_level, made.input_ids, made.query_index).startswith(
        "Be brief. USER: <image>\nSegment <|im_end|> the liver. ASSISTANT: The<p> liver<SEG></p> is outlined.<|endoftext|>USER: <image>"
    )


def test_a_tokenizer_without_the_templates_tokens(tmp_path):
    with pytest.raises(TokenizerError, match=r"^config.data.chat_template: <\|im_start\|> is not a control token"):
        encode_user_turn(handmade.tokenizer(tmp_path), config_of("chatml"), "Segment the liver.", 0, True)


def test_a_template_from_outside(byte_level):
    register_chat_template("plain", ChatTemplate("", "{system}\n", "Q: ", "\nA: ", image_separator=" ", separator="\n"))
    try:
        config = config_of("plain")
        config.validate()
        made = render(conversation(), byte_level, config)
        assert show(byte_level, made.input_ids, made.query_index) == (
            "Q: <image> Segment <|im_end|> the liver.\nA: The<p> liver<SEG></p> is outlined.<|endoftext|>\n"
            "Q: <image> And this?\nA: This is the<p> spleen<SEG></p>.<|endoftext|>"
        )
        with pytest.raises(ValueError, match="^chat template plain: is already registered"):
            register_chat_template("plain", CHAT_TEMPLATES["vicuna"])
    finally:
        del CHAT_TEMPLATES["plain"]
    with pytest.raises(ValueError, match="^chat template new: system_turn lacks {system}"):
        register_chat_template("new", ChatTemplate("Hello.", "", "Q: ", "A: "))


def test_an_unknown_template_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="^config.data.chat_template: is 'chat-ml'; did you mean chatml"):
        config_of("chat-ml").validate()
    with pytest.raises(ConfigError, match="^config.data.chat_template: is 'x'; use one of vicuna, llava, chatml"):
        config_of("x").validate()


def test_words_for_learning_a_tokenizer_lack_control_tokens():
    assert template_text(config_of("chatml"), ["Hi.", "Yes."]) == "You are a helpful assistant. user Hi. assistant Yes."
