"""Text to ids and back, and files that cannot serve."""

import json
import pickle
import string

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers

from mimo_jax.data.tokenizer import TokenizerError, add_grounding, load_tokenizer, train_tokenizer
from mimo_jax.model_config import LlamaConfig, ModelConfig
from tests.data import handmade

TAGS = ("<p>", "</p>", "<SEG>")


def write_llama(path, merges=("▁ l", "i v", "e r", "iv er", "▁l iver", "▁ ▁", "▁ t", "h e", "▁t he"), letters=string.ascii_letters):
    """A tokenizer.json as Vicuna's: no pre-tokenizer, '▁' put before everything, specials as added tokens, BOS added."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    for token in [*"▁" + letters, *(merge.replace(" ", "") for merge in merges)]:
        vocab.setdefault(token, len(vocab))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(path))
    return len(vocab)


@pytest.fixture(scope="module", params=["trained", "llama"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":
        return handmade.tokenizer(folder)
    size = write_llama(folder / "base.json")
    return add_grounding(folder / "base.json", folder / "tokenizer.json", size + 5)


AWKWARD = ["▁", " ", "  ", "\n", "<SEG>", "</s>", "<0x41>", "<unused_3>", "liver", "é", "肝", "🫀", "\x00"]
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join))


@settings(max_examples=300)
@given(text=TEXT)
def test_any_text_comes_back_and_holds_no_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=300)
@given(before=TEXT, text=TEXT)
def test_continued_text_adds_no_space(tokenizer, before, text):
    ids = [*tokenizer.encode(before), tokenizer.p_open, *tokenizer.encode(text, continued=True)]
    assert tokenizer.decode(ids) == f"{before}<p>{text}"


def test_no_merge_makes_a_control_token_of_text(tmp_path):
    """As a tokenizer.json may have it whose vocabulary holds both halves of "</s>"."""
    size = write_llama(tmp_path / "base.json", merges=("▁ l", "< /", "s >", "</ s>"), letters="his</>l")
    made = add_grounding(tmp_path / "base.json", tmp_path / "tokenizer.json", size)
    ids = made.encode("hi </s>")
    assert made.eos not in ids and made.decode(ids) == "hi </s>"


def test_continued_words_are_the_same_tokens(tokenizer):
    assert tokenizer.encode(" liver", continued=True) == tokenizer.encode("liver")
    assert len(tokenizer.encode("liver")) == 1


def test_lone_surrogate_is_read_as_question_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_decode_keeps_grounding_tokens_and_drops_other_control_tokens(tokenizer):
    t = tokenizer
    ids = [t.bos, *t.encode("The"), t.p_open, *t.encode("liver"), t.seg, t.p_close, t.eos, t.pad]
    assert t.decode(ids) == "The<p> liver<SEG></p>"
    assert t.pieces(ids) == ["The", t.p_open, " liver", t.seg, t.p_close]


def test_pieces_tell_a_spelt_tag_from_a_real_one(tokenizer):
    assert tokenizer.pieces([*tokenizer.encode("a <SEG>"), tokenizer.seg]) == ["a <SEG>", tokenizer.seg]


def test_unfinished_bytes_decode_to_a_replacement_character(tokenizer):
    cut = tokenizer.encode("肝")[:-1]
    assert tokenizer.decode(cut) == "�"


def test_grounding_ids_follow_the_base_vocabulary(tokenizer):
    v = tokenizer.vocab_size
    assert (tokenizer.p_open, tokenizer.p_close, tokenizer.seg) == (v, v + 1, v + 2)
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, len(tokenizer)) == (0, 1, 2, v + 3)


def test_a_seg_may_follow_the_base_alone(tmp_path):
    t = handmade.lisa_tokenizer(tmp_path)
    assert (t.grounding, t.p_open, t.p_close, t.seg, t.vocab_size, len(t)) == (("<SEG>",), None, None, 512, 512, 513)
    ids = [t.id_of("<im_start>"), *t.encode("a <p>liver</p> <SEG>"), t.seg, *t.encode(" is", continued=True), t.id_of("<im_end>")]
    assert (ids[0], ids[-1]) == (510, 511)
    assert t.pieces(ids) == ["a <p>liver</p> <SEG>", t.seg, " is"]
    assert t.decode(ids) == "a <p>liver</p> <SEG><SEG> is"


def test_only_control_tokens_of_the_base_are_found_by_name(tmp_path):
    t = handmade.lisa_tokenizer(tmp_path)
    assert t.id_of("</s>") == t.eos
    for name in ("<SEG>", "<p>", "<image>", "▁liver"):
        expected = rf"^config.data.image_tokens: {name} is not .*name two of .*<im_start>, <im_end>, or none"
        with pytest.raises(TokenizerError, match=expected):
            t.id_of(name)


def test_survives_pickling(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("Segment the liver.") == tokenizer.encode("Segment the liver.")
    assert again.fingerprint == tokenizer.fingerprint


def test_trained_file_is_a_plain_tokenizer_json(tmp_path):
    ours = handmade.tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "The liver is outlined, 12 mm; é."
    assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert [theirs.token_to_id(tag) for tag in TAGS] == [512, 513, 514]
    assert theirs.get_vocab_size() == 515


def test_common_words_are_one_token_and_digits_are_apart(tmp_path):
    t = handmade.tokenizer(tmp_path)
    assert [len(t.encode(word)) for word in ("liver", "outlined", "USER")] == [1, 1, 1]
    assert len(t.encode("liver.")) == 2
    assert len(t.encode("123")) == 4  # "▁" and three digits


def test_training_is_deterministic_and_pads(tmp_path):
    a = train_tokenizer(handmade.CORPUS, 1000, tmp_path / "a.json")
    b = train_tokenizer(iter(handmade.CORPUS), 1000, tmp_path / "b.json")
    assert a.fingerprint == b.fingerprint
    vocab = json.loads((tmp_path / "a.json").read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(1000))
    assert any(token.startswith("<unused_") for token in vocab)


def test_too_small_a_vocabulary_names_the_least(tmp_path):
    with pytest.raises(TokenizerError, match=r"vocab_size must be at least 3\d\d"):
        train_tokenizer(["x"], 300, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_fingerprint_is_that_of_the_file(tmp_path):
    import hashlib

    t = handmade.tokenizer(tmp_path)
    assert t.fingerprint == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def damage(folder, change):
    handmade.tokenizer(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


def test_missing_grounding_tokens(tmp_path):
    size = write_llama(tmp_path / "t.json")
    with pytest.raises(
        TokenizerError, match=rf"<SEG> have the ids \[None, None, None\], not \[{size}, .* or \[None, None, {size}\], .*add_grounding"
    ):
        load_tokenizer(tmp_path / "t.json")


def test_grounding_tokens_in_another_order(tmp_path):
    def swap(values):
        values["added_tokens"][-1]["content"], values["added_tokens"][-2]["content"] = "</p>", "<SEG>"

    with pytest.raises(TokenizerError, match=r"\[512, 514, 513\], not \[512, 513, 514\]"):
        load_tokenizer(damage(tmp_path, swap))


def test_add_grounding_moves_tokens_that_stand_elsewhere(tmp_path):
    def swap(values):
        values["added_tokens"][-1]["content"], values["added_tokens"][-2]["content"] = "</p>", "<SEG>"

    t = add_grounding(damage(tmp_path, swap), tmp_path / "new.json", 520)
    assert (t.p_open, t.p_close, t.seg) == (520, 521, 522)


def test_add_grounding_takes_out_what_is_not_asked_for(tmp_path):
    handmade.tokenizer(tmp_path)
    bare = add_grounding(tmp_path / "tokenizer.json", tmp_path / "bare.json", 512, ("<SEG>",))
    assert (bare.grounding, bare.seg, len(bare)) == (("<SEG>",), 512, 513)
    assert add_grounding(tmp_path / "bare.json", tmp_path / "again.json", 512).grounding == TAGS


def model(vocab_size=512, seg_position="inside"):
    return ModelConfig(llm=LlamaConfig(vocab_size=vocab_size), seg_position=seg_position)


def test_another_vocabulary_than_the_models(tmp_path):
    (tmp_path / "bare").mkdir()
    handmade.tokenizer(tmp_path)
    handmade.lisa_tokenizer(tmp_path / "bare")
    three, bare = tmp_path / "tokenizer.json", tmp_path / "bare" / "tokenizer.json"
    assert load_tokenizer(three, model(seg_position="after")).grounding == model().grounding_tokens() == TAGS
    assert load_tokenizer(bare, model(seg_position="bare")).grounding == model(seg_position="bare").grounding_tokens() == ("<SEG>",)
    with pytest.raises(TokenizerError, match="has 512 base ids, config.model.llm.vocab_size is 600"):
        load_tokenizer(three, model(600))
    with pytest.raises(TokenizerError, match="are <SEG>, those of .*=after are <p>, </p>, <SEG>; set config.model.seg_position=bare$"):
        load_tokenizer(bare, model(seg_position="after"))
    with pytest.raises(TokenizerError, match="are <p>, </p>, <SEG>, those of .*=bare are <SEG>; set .*.seg_position=inside or after"):
        load_tokenizer(three, model(seg_position="bare"))


def test_add_grounding_refuses_a_base_that_is_too_large(tmp_path):
    size = write_llama(tmp_path / "t.json")
    with pytest.raises(TokenizerError, match=f"exceed a base vocabulary of {size - 1}"):
        add_grounding(tmp_path / "t.json", tmp_path / "o.json", size - 1)


@pytest.mark.parametrize("content, message", [
    (None, "cannot be read"), ("{", "is not JSON"), ("[]", "model of type None"), ('{"model": {"type": "Unigram"}}', "type Unigram"),
    ('{"model": {"type": "BPE", "vocab": {"a": 0}}}', "lacks <s>, </s>, ▁; give a Llama-style BPE"),
])  # fmt: skip
def test_files_that_are_not_a_supported_tokenizer(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_a_line_feed_that_merges_is_refused(tmp_path):
    def merge(values):
        values["model"]["vocab"]["\n"] = values["model"]["vocab"].pop("<unused_511>")

    with pytest.raises(TokenizerError, match="line feed"):
        load_tokenizer(damage(tmp_path, merge))
