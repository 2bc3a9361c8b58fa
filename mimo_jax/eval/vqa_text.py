"""Compare an answer in words with its references: closed-ended questions by three conventions, open-ended ones by overlap of words.

Words are lower case, without articles and punctuation, and number words up to twelve are digits.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_OF = {word: str(value) for value, word in enumerate(_NUMBERS)}
_YES, _NO = {"yes", "true", "correct"}, {"no", "false"}
_NEGATIONS = {"no", "not", "none", "without", "never", "neither", "nor", "cannot", "absent"}
_PRESENCE = {"present", "seen", "visible", "identified"}
_NEGATED = re.compile(r"\b(?:no|not|without|never|neither|nor|cannot|rather than|instead of|\w+n't)\b.*", re.IGNORECASE)
_CLAUSES = re.compile(r"[,;:!?]|\.(?!\w)|\bbut\b", re.IGNORECASE)
# Words that an answer may add to a short one without another meaning: "This is a CT scan." says "CT".
_FILLERS = set("it is this that these there are was image scan picture photo side view shows shown shown answer and on in of from".split())
BLEU_ORDERS = (1, 2, 3, 4)
OPEN_METRICS = ("recall", "f1", *(f"bleu_{n}" for n in BLEU_ORDERS), "rouge_l")


def words_of(text: str) -> list[str]:
    """The words of a text, normalised."""
    words = re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*", text.casefold().replace("’", "'"))
    return [_NUMBER_OF.get(word, word) for word in words if word not in _ARTICLES]


# --- closed-ended questions ------------------------------------------------------------------------------------------


def closed_answer(text: str, choices: Sequence[str] = ()) -> str:
    """The short answer in a sentence, for comparison by equality.

    With `choices` of yes and no: the first yes or no; else no if a word denies, yes if one affirms ("Not seen.", "It is present.").
    With other `choices`: the one that the text contains as complete words (the longest if one contains another), clauses that deny left
    out ("left side, not the right"); "" if there are none or several. Without choices: the first yes or no; else the first number; else
    the text without denied clauses and words such as "image" and "side"; no if only a denial is there."""
    words = words_of(text)
    if choices:
        options = list(dict.fromkeys(_short(words_of(choice)) for choice in choices))
        if set(options) <= {"yes", "no"}:
            return _yes_or_no(words)
        denied = any(_NEGATIONS & set(option.split()) for option in options)  # such as "no tumour": a denial is an answer
        plain = f" {_without_fillers(words if denied else words_of(_affirmed(text)))} "
        found = [option for option in options if f" {option} " in plain]
        found = [option for option in found if not any(option != other and f" {option} " in f" {other} " for other in found)]
        return found[0] if len(found) == 1 else ""
    if decided := next((word for word in words if word in ("yes", "no")), ""):
        return decided
    affirmed = words_of(_affirmed(text))
    if number := next((word for word in affirmed if re.fullmatch(r"\d+(\.\d+)?", word)), ""):
        return number
    return _short(affirmed or words)


def closed_correct(text: str, references: Sequence[str], choices: Sequence[str] = ()) -> bool:
    """True if the short answer in `text` equals that in any reference. References that are missing from `choices` are added to them;
    references that are all yes or no have these as choices."""
    if choices or {closed_answer(reference) for reference in references} <= {"yes", "no"}:
        choices = [*choices, *references]
    given = closed_answer(text, choices)
    return bool(given) and any(given == closed_answer(reference, choices) for reference in references)


def contained(text: str, references: Sequence[str]) -> bool:
    """True if the words of any reference occur in the text, in their order and without a gap."""
    given, wanted = " ".join(words_of(text)), [" ".join(words_of(reference)) for reference in references]
    return any(f" {words} " in f" {given} " for words in wanted if words)


def _yes_or_no(words: Sequence[str]) -> str:
    for word in words:
        if word in _YES | _NO:
            return "yes" if word in _YES else "no"
    if any(word in _NEGATIONS or word.endswith("n't") for word in words):
        return "no"
    return "yes" if _PRESENCE & set(words) else ""


def _short(words: Sequence[str]) -> str:
    """The words without fillers; no if they only deny ("Not seen."), yes if they only affirm."""
    left = _without_fillers(words).split()
    if _NEGATIONS & set(left) and set(left) <= _NEGATIONS | _PRESENCE:
        return "no"
    return "yes" if left and set(left) <= _YES else " ".join(left)


def _without_fillers(words: Sequence[str]) -> str:
    return " ".join([word for word in words if word not in _FILLERS] or words)


def _affirmed(text: str) -> str:
    """The text without what its clauses deny."""
    return " , ".join(_NEGATED.sub("", clause) for clause in _CLAUSES.split(text.replace("’", "'")))


# --- open-ended questions --------------------------------------------------------------------------------------------


def token_scores(text: str, reference: str) -> tuple[float, float]:
    """(recall, F1) of words as LLaVA-Med counts them: a word of both texts counts as often as the answer has it, a word that the answer
    lacks as often as the reference has it; 0 if either text has no words."""
    given, wanted = Counter(words_of(text)), Counter(words_of(reference))
    tp = sum(n for word, n in given.items() if word in wanted)
    fp = sum(n for word, n in given.items() if word not in wanted)
    fn = sum(n for word, n in wanted.items() if word not in given)
    return (tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)) if tp else (0.0, 0.0)


def open_scores(text: str, references: Sequence[str]) -> dict[str, float]:
    """OPEN_METRICS of an answer. Recall, F1 and ROUGE-L: the best over the references; BLEU-n: against all of them, of this sentence,
    n-grams up to n with equal weights, without smoothing."""
    recalls, f1s = zip(*(token_scores(text, reference) for reference in references), strict=True)
    bleu = _bleu(words_of(text), [words_of(reference) for reference in references])
    rouge = _rouge_scorer().score_multi(references, text)["rougeL"].fmeasure
    return {"recall": max(recalls), "f1": max(f1s), **bleu, "rouge_l": rouge}


def _bleu(given: list[str], wanted: list[list[str]]) -> dict[str, float]:
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about orders without a match, whose BLEU is 0 here
        values = {n: float(sentence_bleu(wanted, given, weights=(1 / n,) * n)) if given else 0.0 for n in BLEU_ORDERS}
    return {f"bleu_{n}": value if value > 1e-12 else 0.0 for n, value in values.items()}


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
