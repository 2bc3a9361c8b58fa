"""Short answers by three conventions, and the words of longer ones, against counts by hand and sums over n-grams."""

import math
import random
from collections import Counter

import pytest

from mimo_jax.eval import vqa_text


@pytest.mark.parametrize(
    "text, choices, short",
    [
        ("Yes, there is a cyst.", (), "yes"),
        ("No.", (), "no"),
        ("Not seen.", (), "no"),
        ("Not seen.", ("Yes", "No"), "no"),
        ("None", ("Yes", "No"), "no"),
        ("It isn’t there.", ("yes", "no"), "no"),
        ("A fracture is present.", ("yes", "no"), "yes"),
        ("There is no doubt that it is not. Yes", ("yes", "no"), "no"),
        ("CT scan", (), "ct"),
        ("This is a CT scan.", (), "ct"),
        ("CT scan", ("CT", "MR"), "ct"),
        ("two", (), "2"),
        ("There are three lesions.", (), "3"),
        ("There are 3 lesions", (), "3"),
        ("1.5 cm", (), "1.5"),
        ("left side, not the right", (), "left"),
        ("left side, not the right", ("left", "right"), "left"),
        ("Not the right, but the left.", ("left", "right"), "left"),
        ("left rather than right", ("left", "right"), "left"),
        ("There is no tumour.", ("tumour", "no tumour"), "no tumour"),
        ("The liver.", (), "liver"),
        ("This is a CT image.", ("CT", "MR"), "ct"),
        ("CT or MR", ("CT", "MR"), ""),
        ("ultrasound", ("CT", "MR"), ""),
        ("This is an X-ray.", ("X-ray", "ray"), "x-ray"),
        ("the left lung is larger", ("lung", "left lung"), "left lung"),
        ("nothing here", ("no", "yes"), ""),
        ("", (), ""),
    ],
)
def test_closed_answer(text, choices, short):
    assert vqa_text.closed_answer(text, choices) == short


def test_closed_correct_needs_equality_and_an_answer():
    assert vqa_text.closed_correct("Yes, it is.", ["yes"])
    assert vqa_text.closed_correct("There are two.", ["2", "two lesions"])
    assert vqa_text.closed_correct("two", ["2"]) and vqa_text.closed_correct("2", ["Two."])
    assert vqa_text.closed_correct("It is not seen.", ["No"]) and vqa_text.closed_correct("No", ["Not seen."])
    assert not vqa_text.closed_correct("There are 12.", ["2"])
    assert not vqa_text.closed_correct("", [""])
    assert vqa_text.closed_correct("Four.", ["Four", "4"], ["Zero", "One", "Two"])
    assert not vqa_text.closed_correct("Two or four.", ["Four", "4"], ["Zero", "One", "Two"])
    assert not vqa_text.closed_correct("the right, not the left", ["left"])


def test_the_conventions_differ_where_their_texts_say():
    hedged = "It may be left or right."
    assert not vqa_text.closed_correct(hedged, ["left"]) and vqa_text.contained(hedged, ["left"])
    assert not vqa_text.contained("not at all leftish", ["left"])
    assert vqa_text.contained("Three small cysts", ["3 small"]) and not vqa_text.contained("3 very small", ["3 small"])
    assert vqa_text.token_scores("3 very small", "3 small")[0] == 1
    assert vqa_text.token_scores("upper right", "the right lung")[0] == 0.5


WORDS = "liver spleen left right lung the a cyst two".split()


def texts(number):
    rng = random.Random(number)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 7))) for _ in range(2)]


def test_recall_and_f1_of_words_are_llava_meds():
    """A word by word count: repeated words of the answer count again, those of the reference do not, if the answer has them."""
    for number in range(1000):
        text, reference = texts(number)
        given, wanted = vqa_text.words_of(text), vqa_text.words_of(reference)
        tp = sum(word in wanted for word in given)
        fp, fn = len(given) - tp, sum(word not in given for word in wanted)
        recall = tp / (tp + fn) if tp else 0
        precision = tp / (tp + fp) if tp else 0
        f1 = 2 * precision * recall / (precision + recall) if tp else 0
        assert vqa_text.token_scores(text, reference) == pytest.approx((recall, f1), abs=1e-9)


def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def bleu(given, wanted, order):
    """Papineni's formula for one sentence and one reference."""
    if not given:
        return 0.0
    logs = 0.0
    for n in range(1, order + 1):
        mine, right = ngrams(given, n), sum((ngrams(given, n) & ngrams(wanted, n)).values())
        if not right:
            return 0.0
        logs += math.log(right / sum(mine.values())) / order
    return min(1.0, math.exp(1 - len(wanted) / len(given))) * math.exp(logs)


def rouge_l(given, wanted):
    """F-measure of the longest common subsequence."""
    table = [[0] * (len(wanted) + 1) for _ in range(len(given) + 1)]
    for i, a in enumerate(given, 1):
        for j, b in enumerate(wanted, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    common = table[-1][-1]
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def test_bleu_and_rouge_are_their_formulas():
    for number in range(1000):
        text, reference = texts(number)
        given, wanted = vqa_text.words_of(text), vqa_text.words_of(reference)
        scores = vqa_text.open_scores(text, [reference])
        for order in vqa_text.BLEU_ORDERS:
            assert scores[f"bleu_{order}"] == pytest.approx(bleu(given, wanted, order), abs=1e-9), (text, reference)
        assert scores["rouge_l"] == pytest.approx(rouge_l(text.split(), reference.split()), abs=1e-9)
        assert set(scores) == set(vqa_text.OPEN_METRICS)


def test_of_several_references_the_best_counts():
    scores = vqa_text.open_scores("left lung", ["liver", "the left lung"])
    assert scores["recall"] == scores["f1"] == scores["bleu_2"] == 1 and scores["rouge_l"] == pytest.approx(0.8)
