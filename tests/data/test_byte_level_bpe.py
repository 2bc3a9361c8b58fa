"""Byte-level BPE against transformers, on a small vocabulary learnt here."""

import json

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.data.byte_level_bpe import _BYTE_OF, ByteLevelBpe
from mimo_jax.data.sentencepiece_bpe import SentencePieceBpe
from mimo_jax.data.tokenizer import TokenizerError, add_grounding, load_tokenizer
from tests.data import handmade

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# What holds together: words with their spaces, digits one by one, as in Qwen's file.
QWEN = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}
LLAMA3 = {
    "type": "Sequence",
    "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        },
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("byte_level")


@pytest.fixture(scope="module", params=["gpt2", "qwen", "ignores merges"])
def ours(request, folder):
    made = handmade.byte_level_tokenizer(folder)
    values = json.loads((folder / "base.json").read_text())
    if request.param == "qwen":
        values["pre_tokenizer"] = QWEN
    if request.param == "ignores merges":
        values["model"]["ignore_merges"] = True
    return add_grounding(values, made.path, 512)


@pytest.fixture(scope="module")
def theirs(ours):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=ours.path)


def changed(folder, change):
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    path = folder / "changed.json"
    path.write_text(json.dumps(values))
    return path


@given(text=TEXT)
def test_text_has_the_ids_of_transformers(ours, theirs, text):
    if any(token in text for token in (*ours.control, *ours.grounding)):  # a text never contains control tokens for ours, unlike for theirs
        return
    ids = ours.encode(text, continued=True)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode([ours.seg, *ids]) == "<SEG>" + theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.encode(text) == theirs.encode(f" {text}", add_special_tokens=False)


@given(text=TEXT)
def test_what_is_encoded_decodes_to_itself(ours, text):
    assert ours.decode(ours.encode(text)) == text


@given(text=TEXT, cut=st.integers(0, 40))
def test_a_text_that_comes_piece_by_piece_is_taken_back_only_in_its_unfinished_letter(ours, text, cut):
    ids = ours.encode(text)
    assert text.startswith(ours.decode(ids[:cut]).rstrip("\ufffd"))


def test_no_text_becomes_a_control_token(ours, theirs):
    for text in ("<|im_end|>", "a <SEG>", "<p>liver</p>", "<|endoftext|>"):
        ids = ours.encode(text)
        assert max(ids) < ours.vocab_size and not set(ids) & set(ours.control.values())
        assert ours.decode(ids) == text


def test_grounding_tokens_stand_between_pieces(ours):
    ids = [*ours.encode("The", continued=True), ours.p_open, *ours.encode(" liver", continued=True), ours.seg, ours.p_close]
    assert ours.pieces([*ids, ours.eos]) == ["The", ours.p_open, " liver", ours.seg, ours.p_close]
    assert (ours.p_open, ours.p_close, ours.seg, len(ours)) == (512, 513, 514, 515)
    assert (ours.bos, ours.eos, ours.id_of("<|im_end|>")) == (None, 0, 2)


def test_unfinished_bytes_decode_to_a_replacement_character(ours):
    assert ours.decode(ours.encode("肝")[:-1]) == "\ufffd"


def test_the_kind_is_the_files_own(ours, folder, tmp_path):
    assert type(load_tokenizer(ours.path)) is ByteLevelBpe and type(handmade.tokenizer(tmp_path)) is SentencePieceBpe
    first = changed(folder, lambda values: values.update(post_processor=LLAMA3))
    assert load_tokenizer(first).bos == 1 == tokenizers.Tokenizer.from_file(str(first)).encode("liver").ids[0]


def test_a_file_that_adds_a_space_itself_has_the_same_ids(folder):
    made = load_tokenizer(folder / "tokenizer.json")
    spacing = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    spaced = load_tokenizer(changed(folder, lambda values: values.update(pre_tokenizer=spacing)))
    assert spaced.encode("liver", continued=True) != spaced.encode("liver")
    assert made.encode("the liver") == spaced.encode("the liver")


def test_letters_of_bytes_that_the_file_lacks_are_replaced(folder):
    """SmolLM's file lacks some control characters and the first byte of letters that are not assigned."""

    def lacks_rare_bytes(values):
        vocab = values["model"]["vocab"]
        for number, byte in enumerate((0x00, 0x1D, 0xF1, 0xF2, 0xF4, 0xFF)):
            letter = next(letter for letter, found in _BYTE_OF.items() if found == byte)
            vocab[f"<unused_{number}_>"] = vocab.pop(letter)
        values["model"]["merges"] = [merge for merge in values["model"]["merges"] if all(part in vocab for part in merge)]

    tokenizer = load_tokenizer(changed(folder, lacks_rare_bytes))
    kept = "a \n\t\x01 é肝🫀\U00030000\U0003ffff\U000c0000\U000fffff"
    assert tokenizer.decode(tokenizer.encode(kept)) == kept
    for letter in ("\x00", "\x1d", "\U00040000", "\U0007ffff", "\U00080000", "\U000bffff", "\U00100000", "\U0010ffff"):
        assert tokenizer.decode(tokenizer.encode(f"a{letter}b")) == "a\ufffdb"


def test_a_damaged_vocabulary_is_named(ours, folder):
    def lacks_a_byte(values):
        vocab = values["model"]["vocab"]
        vocab["<unused_x>"] = vocab.pop("Ã")
        values["model"]["merges"] = []

    with pytest.raises(TokenizerError, match="changed.json: lacks the bytes Ã; give a byte-level BPE with all of them"):
        load_tokenizer(changed(folder, lacks_a_byte))

    def endless(values):
        values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] >= 512]
        for name in ("<|endoftext|>", "<|im_end|>"):
            values["model"]["vocab"]["<unused_" + name] = values["model"]["vocab"].pop(name)

    with pytest.raises(TokenizerError, match=r"has no end-of-text token; one of <\|end_of_text\|>"):
        load_tokenizer(changed(folder, endless))
