"""The structures that a question asks to be segmented, and which of them an answer lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mimo_jax.data.builder.entities import ancestors, canonical, mentions

_POLITE = r"please|kindly|now|then|also|and|(?:can|could|would) you(?: please)?|i (?:need|want) you to"
_VERBS = (
    r"segment|outline|contour|mark|highlight|delineate|locate|find|show(?: me)?|point out"
    r"|where (?:can i find|in the image (?:is|are)|is|are)"
    r"|draw(?: the outlines? of)?|(?:i need a|give me (?:a|the)) (?:mask|segmentation|outline|extent) of|which pixels belong to"
)
_REQUEST = re.compile(rf"\W*(?:(?:{_POLITE})\W+)*(?:{_VERBS})\s+(.+)", re.IGNORECASE | re.DOTALL)
_BETWEEN = re.compile(r"[,;&\n]|\b(?:and|or|as well as)\b|[.?!]\s", re.IGNORECASE)
_IN_IMAGE = re.compile(r"\s+(?:in|on|of|from)\s+(?:this|that|the)\s+(?:image|picture|slice|scan|film|frame|photo)\b", re.IGNORECASE)
_BOTH_SIDES = re.compile(r"\b(left|right)\s+(?:and|or)\s+(left|right)\s+([^,;&.?!\n]+)", re.IGNORECASE)
_REST = re.compile(r"\s+(?:(?:in|on|of|for|from|with|by|please|that|which|visible|shown|lying)\b.*)?$", re.IGNORECASE | re.DOTALL)
# What such words mean depends on the image, or on what was said before.
_POINTING = re.compile(
    r"\b(?:it|its|this|that|these|those|them|they|here|there|both|marked|indicated|same|other|all|every\w*|any\w*|each)\b", re.IGNORECASE
)
_ARTICLES = {"a", "an", "the"}
_OUTER = " \t\r\n.,;:!?\"'()[]"


def canonical_name(phrase: str) -> str:
    """An entity's name normalised for comparison: lower case, no leading article, no outer punctuation, single spaces."""
    words = " ".join(phrase.casefold().split()).strip(_OUTER).split()
    while len(words) > 1 and words[0] in _ARTICLES:
        words = " ".join(words[1:]).strip(_OUTER).split()
    return " ".join(words)


def asked_names(question: str) -> list[str]:
    """The structures that a request ("Segment the liver and the unicorn.", "Where is the spleen?") names, in order: names of entities.csv
    in its spelling, others as they are written. Empty for other questions, and for words such as "this" and
    "all"."""
    request = _REQUEST.match(_IN_IMAGE.sub("", question))
    names: list[str] = []
    for part in _BETWEEN.split(_BOTH_SIDES.sub(r"\1 \3 and \2 \3", request[1])) if request else ():
        part = re.sub(r"\b(?:here|please)\W*$", "", part)
        if not _POINTING.search(part):
            known = [mention.entity.name for mention in mentions(part)]
            names += known or [canonical_name(_REST.sub("", f"{part.strip(_OUTER)} "))]
    return list(dict.fromkeys(filter(None, names)))


def unanswered(question: str, text: str, phrases: Iterable[str]) -> list[str]:
    """Those of `asked_names` that an answer neither says nor marks. text, phrases: of the answer. What is a part or a kind of a structure
    answers for it: "The left lung is outlined." for the lung."""
    said = {mention.entity.name for mention in mentions(text)} | {canonical(phrase).name for phrase in phrases}
    said |= {above for name in said for above in ancestors(name)}
    words = " ".join(["", *re.findall(r"\w+", text.casefold()), ""])
    return [name for name in asked_names(question) if name not in said and f" {name} " not in words]
