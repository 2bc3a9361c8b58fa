"""Tokenizers of checkpoints: the same ids as sentencepiece gives, and the rows of the tables in their places."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from checkpoints_convert.vocabulary import VocabularyError, find_tokenizer, read_vocabulary
from mimo_jax.data.tokenizer import Tokenizer, add_grounding
from mimo_jax.model_config import GROUNDING_TOKENS
from tests.checkpoints_convert import originals
from tests.data import handmade

ROWS, SEG = originals.PIECES, ("<SEG>",)


def trained(folder: Path, corpus: list[str], size: int, **options) -> Path:
    """A sentencepiece model of Llama's kind, unless `options` say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    like_llama = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=size, **like_llama | options
    )
    return folder


def edited(folder: Path, change) -> Path:
    """tokenizer.model with its pieces changed."""
    proto = SentencePieceExtractor(str(folder / "tokenizer.model")).proto
    change(proto)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def reverse_scores(proto):
    """Later pieces merge first, against the order of their ids."""
    normal = [piece for piece in proto.pieces if piece.type == 1]
    for piece, score in zip(normal, [piece.score for piece in reversed(normal)], strict=True):
        piece.score = score


TAGS = ["yes> x</ b </ c> s> <s <unk k> unk> is> as> </s <0 x41> 41>"] * 50
RUNS = ["a" * (3 * i % 20) + " " * (i % 9) + "ab" * (i % 7) + "b" for i in range(300)]
# In many of these, pieces reach over spaces, or one piece is made in several ways, or would spell a control token or a byte.
MODELS = {
    "tests": lambda folder: originals.put_tokenizer(folder),
    "runs": lambda folder: trained(folder, RUNS, 330, split_by_whitespace=False),
    "tags": lambda folder: trained(folder, TAGS, 340, split_by_unicode_script=False, control_symbols=["<im>"], pad_id=3),
    "scores": lambda folder: edited(trained(folder, RUNS, 300), reverse_scores),
}  # fmt: skip


@functools.cache
def both(name: str) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """Our tokenizer and sentencepiece's, of one tokenizer.model."""
    folder = Path(tempfile.mkdtemp())
    try:
        MODELS[name](folder)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        rows = theirs.get_piece_size()
        made = read_vocabulary(folder, rows, GROUNDING_TOKENS)
        assert made.grounding == [] and np.array_equal(made.order, np.arange(rows))
        return add_grounding(made.tokenizer, folder / "tokenizer.json", rows), theirs
    finally:
        shutil.rmtree(folder)


PARTS = [
    *" \t\n\rab1é肝🫀\x00\u00a0\u3000", "  ", "\r\n", "23", "liver", " The lung", "aa", "abab", "<s>", "</s>", "<unk>", "<pad>", "<im>",
    "<SEG>", "<p>", "<0x41>", "<0x", "yes>", "s>",
]  # fmt: skip
TEXT = st.one_of(st.text(), st.text(" abs</>"), st.lists(st.sampled_from(PARTS), max_size=20).map("".join))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=400)
@given(text=TEXT.map(lambda text: text.replace("▁", "")))
def test_every_text_has_the_ids_of_sentencepiece(name, text):
    """Control tokens too are spelt out by both."""
    ours, theirs = both(name)
    assert ours.encode(text) == theirs.encode(text)


def test_only_the_space_sign_itself_is_read_otherwise():
    """sentencepiece takes it for a space, here it is a letter that comes back as it was."""
    ours, theirs = both("tests")
    assert theirs.encode("the▁lung") == theirs.encode("the lung") == ours.encode("the lung") != ours.encode("the▁lung")
    assert ours.decode(ours.encode("the▁lung")) == "the▁lung"


def test_control_tokens_say_nothing():
    ours, theirs = both("tags")
    for token in ("<unk>", "<s>", "</s>", "<pad>", "<im>"):
        assert ours.id_of(token) == theirs.piece_to_id(token) and ours.decode([ours.id_of(token)]) == ""
    assert ours.decode(ours.encode("yes> </s>")) == theirs.decode(theirs.encode("yes> </s>")) == "yes> </s>"


# --- the order of rows

LISA = {"[SEG]": ROWS, "<im_start>": ROWS + 1, "<im_end>": ROWS + 2}
GLAMM = {"[SEG]": 420, "<im_start>": 421, "<p>": 422, "</p>": 423, "<bbox>": 424, "<im_end>": 425}


@pytest.mark.parametrize(
    "added, rows, tokens, last",
    [
        ({}, ROWS, SEG, []),
        ({}, ROWS + 5, GROUNDING_TOKENS, []),
        ({"<im_start>": 420, "<im_end>": 421}, ROWS + 2, SEG, []),
        (LISA, ROWS + 3, SEG, [["[SEG]", 420]]),
        (LISA, ROWS + 13, SEG, [["[SEG]", 420]]),
        (GLAMM, ROWS + 6, GROUNDING_TOKENS, [["<p>", 422], ["</p>", 423], ["[SEG]", 420]]),
        ({"<p>": 420, "</p>": 421, "<SEG>": 422}, ROWS + 3, GROUNDING_TOKENS, [["<p>", 420], ["</p>", 421], ["<SEG>", 422]]),
    ],
)
@pytest.mark.parametrize("record", ["added_tokens.json", "tokenizer_config.json"])
def test_the_base_comes_first_and_then_the_grounding_tokens(tmp_path, added, rows, tokens, last, record):
    originals.put_tokenizer(tmp_path)
    if record == "added_tokens.json":
        values = added
    else:
        values = {"added_tokens_decoder": {str(i): {"content": token, "special": True} for token, i in {"<s>": 1, **added}.items()}}
    (tmp_path / record).write_text(json.dumps(values))
    made = read_vocabulary(tmp_path, rows, tokens)
    rows_last = [row for _, row in last]
    assert made.grounding == last and made.base_size == rows - len(last)
    assert made.order.tolist() == [row for row in range(rows) if row not in rows_last] + rows_last

    ours = add_grounding(made.tokenizer, tmp_path / "made.json", made.base_size, tokens)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.encode("The lung [SEG] <p>") == theirs.encode("The lung [SEG] <p>") and ours.grounding == tokens
    for token, row in added.items():
        if token not in ("[SEG]", *GROUNDING_TOKENS):
            assert made.order[ours.id_of(token)] == row, token
    for i, row in enumerate(rows_last):
        assert made.order[made.base_size + i] == row
    # As `mimo convert export` has it: a tokenizer.json of the same content gives the same.
    again = read_vocabulary(tmp_path / "made.json", len(ours), tokens)
    assert again.order.tolist() == list(range(len(ours))) and [name for name, _ in again.grounding] == list(tokens)


def test_an_added_token_that_is_a_piece_is_no_more_made_by_text(tmp_path):
    originals.put_tokenizer(tmp_path, {"▁lung": sentencepiece_id("▁lung")})
    made = read_vocabulary(tmp_path, ROWS, SEG)
    ours = add_grounding(made.tokenizer, tmp_path / "made.json", ROWS, SEG)
    assert ours.id_of("▁lung") not in ours.encode("the lung") and ours.decode(ours.encode("the lung")) == "the lung"


def sentencepiece_id(piece: str) -> int:
    return both("tests")[1].piece_to_id(piece)


# --- errors


def test_where_a_tokenizer_is_looked_for(tmp_path):
    empty, whole, other = tmp_path / "empty", tmp_path / "whole", tmp_path / "other.json"
    empty.mkdir()
    originals.put_tokenizer(whole)
    other.write_text("{}")
    assert find_tokenizer([empty, whole, other]) == whole
    assert find_tokenizer([other]) == other
    for folders, named in (([empty], str(empty)), ([], "no folder was given")):
        with pytest.raises(
            VocabularyError, match=rf"^no tokenizer was found \({named}\): put .*tokenizer.model or .*--config.tokenizer=FILE$"
        ):
            find_tokenizer(folders)


def test_ids_beyond_the_rows(tmp_path):
    originals.put_tokenizer(tmp_path, LISA)
    with pytest.raises(VocabularyError, match=f"{tmp_path}: <im_end> 422 exceed the 422 rows of .*; give the tokenizer of this"):
        read_vocabulary(tmp_path, ROWS + 2, SEG)


@pytest.mark.parametrize("added, tokens, has, place", [
    (LISA, GROUNDING_TOKENS, r"\[SEG\]", "bare"),
    (GLAMM, SEG, r"</p>, <p>, \[SEG\]", "inside or after"),
    ({"<p>": 420, "<SEG>": 421}, GROUNDING_TOKENS, "<SEG>, <p>", "inside or after"),
    ({"[SEG]": 420, "<SEG>": 421}, SEG, r"<SEG>, \[SEG\]", "inside or after"),
])  # fmt: skip
def test_grounding_tokens_of_another_place(tmp_path, added, tokens, has, place):
    originals.put_tokenizer(tmp_path, added)
    said = f"has the grounding tokens {has}, the configuration has {', '.join(tokens)}; set --config.model.seg_position={place}"
    with pytest.raises(VocabularyError, match=f"^{tmp_path}: {said}$"):
        read_vocabulary(tmp_path, ROWS + 6, tokens)


@pytest.mark.parametrize("options", [
    {"model_type": "unigram"}, {"model_type": "char"}, {"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"},
    {"add_dummy_prefix": False}, {"byte_fallback": False}, {"treat_whitespace_as_suffix": True}, {"user_defined_symbols": ["<im>"]},
])  # fmt: skip
def test_a_sentencepiece_model_of_another_kind(tmp_path, options):
    trained(tmp_path, TAGS, 300, **options)
    expected = f"^{tmp_path}/tokenizer.model: is not a sentencepiece model like Llama's .*with --config.tokenizer=FILE$"
    with pytest.raises(VocabularyError, match=expected):
        read_vocabulary(tmp_path, 400, SEG)


def test_pieces_that_share_a_score_have_no_order(tmp_path):
    """As those appended to Llama's by other languages' models: sentencepiece takes the leftmost, which merges cannot say."""

    def level(proto):
        for piece in proto.pieces:
            piece.score = 0.0

    originals.put_tokenizer(tmp_path)
    with pytest.raises(VocabularyError, match="is not a sentencepiece model like Llama's .*a distinct score for every piece"):
        read_vocabulary(edited(tmp_path, level), ROWS, SEG)


@pytest.mark.parametrize("name, content, said", [
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", r"is not a sentencepiece model \(DecodeError\); fetch it again"),
    ("tokenizer.model", originals.sentencepiece_model()[:3000], r"is not a sentencepiece model \(DecodeError\); fetch it again"),
    ("added_tokens.json", b'{"[SEG]": ', "is damaged; fetch it again"),
    ("added_tokens.json", b'["[SEG]"]', "is damaged; fetch it again"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {"content": "b"}}}', "is damaged; fetch it again"),
])  # fmt: skip
def test_damaged_files(tmp_path, name, content, said):
    originals.put_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VocabularyError, match=f"^{tmp_path / name}: {said}$"):
        read_vocabulary(tmp_path, ROWS, SEG)


def test_the_first_token_of_a_byte_level_file_is_kept(tmp_path):
    """As <|begin_of_text|> of Llama 3, which its file names only in the post-processor."""
    handmade.byte_level_tokenizer(tmp_path)
    values = json.loads((tmp_path / "base.json").read_text())
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    made = read_vocabulary(tmp_path / "tokenizer.json", 512, GROUNDING_TOKENS)
    assert add_grounding(made.tokenizer, tmp_path / "made.json", 512).bos == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {}}', '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "\xff"])
def test_a_tokenizer_json_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(VocabularyError, match=f"^{tmp_path}/tokenizer.json: is not a tokenizer.json with a BPE model; give the"):
            read_vocabulary(source, ROWS, SEG)
