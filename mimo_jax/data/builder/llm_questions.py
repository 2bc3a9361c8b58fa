"""Questions of III and IV written by a language model from facts alone, and kept only if the facts support every word of them.

The endpoint receives names of the table entities.csv, their facts in knowledge.toml, the modality, and the relations that the masks
show: no pixels, no ids, no names invented by a source. Its reply is verified against the same facts: it may name only structures that it
grounds and may claim nothing else. Rejected questions are counted by reason (`rejection_reason`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import combinations

import numpy as np

from mimo_jax.data.builder.entities import ENTITIES, ancestors
from mimo_jax.data.builder.knowledge import KINDS, KNOWLEDGE
from mimo_jax.data.builder.label_stats import is_lesion, overlapping
from mimo_jax.data.builder.llm_client import ChatClient, cache_key
from mimo_jax.data.builder.relations import Layout
from mimo_jax.data.builder.scene import names_pattern
from mimo_jax.data.schema import Mask, Record, Sample, Target, Turn

PROMPT = "llm_prompt_1.txt"  # a changed prompt is another file
ASKED = 4  # questions of III, and of IV, that one request asks for
KEPT = 4  # questions of III, and of IV, per image
MAX_ENTITIES, MAX_RELATIONS = 12, 12  # maximum per image
MAX_SPANS = 2
MAX_QUESTION, MAX_ANSWER = 200, 300  # letters
# Apart from names and facts, word for word, a text may contain only these words, which cannot claim anything.
_PLAIN = frozenset(
    "a an be the this that these it its which what where how here there and or as is are do does did can could may might would you "
    "your i me we us my please tell describe explain say give point find locate identify name named names call called know known show "
    "shows shown see seen visible look mark marked marking outline outlined highlight highlighted indicate indicated select selected "
    "pointed image picture scan slice view user of in on at to for from with by about one same also yes structure structures organ "
    "organs vessel bone muscle gland tissue region cell cavity cartilage nerve joint part body anatomy function functions role job "
    "purpose task responsible lies lie located location place placed situated position sits found question answer kind type let need "
    "want help who whose main usually".split()
)
_JOINING = frozenset("the and this these is are here it they".split())  # words that may join two structures
_GENERIC = frozenset(set(KINDS) - {"lesion", "device"} | {"body", "part", "region"})
_FIELDS = {"perspective": str, "about": str, "question": str, "answer": str, "grounded": list}


@dataclass(frozen=True)
class Facts:
    """The facts about an image that are sent to an endpoint. entities: names. relations: (sentence, the two entities that it relates)."""

    modality: str
    entities: tuple[str, ...]
    relations: tuple[tuple[str, tuple[str, str]], ...]

    def as_dict(self) -> dict:
        """The facts in the form that the prompt describes."""
        entities = []
        for name in self.entities:
            fact = KNOWLEDGE.get(name)
            entities.append({"name": name} | ({"does": fact.does} | ({"lies": fact.lies} if fact.lies else {}) if fact else {}))
        return {"modality": self.modality, "entities": entities, "relations": [text for text, _ in self.relations]}


def describe(record: Record) -> Facts:
    """The facts of a record: its structures that the table contains, preferring the largest, and their relations."""
    masks: dict[str, list[Mask]] = {}
    for mask in record.masks:
        if mask.entity in ENTITIES:
            masks.setdefault(mask.entity, []).append(mask)
    wholes = {whole for part in masks for whole in ancestors(part)}
    largest = sorted((name for name in masks if name not in wholes), key=lambda name: (-sum(m.area_px for m in masks[name]), name))
    names = largest[:MAX_ENTITIES]
    layout = Layout(record, {name: masks[name] for name in names})
    relations = [found for a, b in combinations(sorted(names), 2) for found in _relations(layout, a, b)]
    return Facts(record.modality, tuple(sorted(names)), tuple(relations[:MAX_RELATIONS]))


def _relations(layout: Layout, a: str, b: str) -> Iterator[tuple[str, tuple[str, str]]]:
    if overlapping(a, b):
        return
    for inner, outer in ((a, b), (b, a)):
        if is_lesion(inner) and not is_lesion(outer) and layout.within(inner, outer):
            yield f"the {inner} lies within the {outer}", (inner, outer)
    if layout.touches(a, b):
        yield f"the {a} touches the {b}", (a, b)
    if side := layout.side(a, b) if ENTITIES[a].laterality == ENTITIES[b].laterality else "":
        yield f"the {a} lies to the patient's {side} of the {b}", (a, b)


@lru_cache(maxsize=1)
def _template() -> tuple[str, str]:
    """(the prompt without the facts; its version: the file's name and a hash of its text)."""
    text = resources.files(__package__).joinpath(PROMPT).read_text(encoding="utf-8")
    text = text.format(number=ASKED, words=" ".join(sorted(_PLAIN)), facts="")
    return text, f"{PROMPT} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def llm_samples(record: Record, facts: Facts, client: ChatClient, seed: int, rejects: Counter[str] | None = None) -> list[Sample]:
    """At most KEPT samples of III and of IV for a record, from questions that the endpoint of `client` wrote and that pass
    `rejection_reason`.

    seed: of the choice of samples and prompts. rejects: counts the rejected questions by reason. All images with the same facts, model
    and prompt share one reply, which then comes from the client's cache. Raises EndpointError."""
    rejects = Counter() if rejects is None else rejects
    key, reply = _reply(facts, client)
    rng = np.random.default_rng([seed, int(hashlib.sha256(record.id.encode()).hexdigest()[:16], 16)])
    masks = {name: [mask.mask_id for mask in record.masks if mask.entity == name] for name in facts.entities}
    samples: list[Sample] = []
    written = list(_parse_reply(reply, rejects))
    for number in rng.permutation(len(written)).tolist():
        entry = written[number]
        reason = rejection_reason(entry, facts)
        if not reason and any(sample.turns[0].text == entry["question"] for sample in samples):
            reason = "asked twice"
        if reason:
            rejects[reason] += 1
        elif sum(sample.perspective == entry["perspective"] for sample in samples) < KEPT:
            samples.append(_sample(f"{record.id}/llm{number}", entry, masks, rng, {"model": client.model, "prompt_hash": key}))
    return samples


def _reply(facts: Facts, client: ChatClient) -> tuple[str, str]:
    """(the cache key of the reply, the reply)."""
    if not facts.entities:
        return "", '{"questions": []}'
    text, version = _template()
    known = facts.as_dict()
    key = cache_key(template=version, model=client.model, facts=known)
    return key, client.ask(key, text + json.dumps(known, ensure_ascii=False, indent=1))


def _parse_reply(reply: str, rejects: Counter[str]) -> Iterator[dict]:
    """The well-formed entries of a reply; a code fence around the JSON is accepted."""
    try:
        entries = json.loads(re.sub(r"\A\s*```(?:json)?\s*\n(.*)\n\s*```\s*\Z", r"\1", reply, flags=re.DOTALL))["questions"]
    except (ValueError, LookupError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        rejects["reply is not the requested JSON"] += 1
        return
    for entry in entries[: 4 * ASKED]:
        fits = isinstance(entry, dict) and entry.keys() == _FIELDS.keys()
        fits = fits and all(isinstance(entry[name], kind) for name, kind in _FIELDS.items())
        if fits and all(isinstance(term, str) for term in entry["grounded"]):
            yield entry
        else:
            rejects["malformed entry"] += 1


def rejection_reason(entry: dict, facts: Facts) -> str:
    """Why an entry is rejected, "" if it is accepted."""
    question, answer, grounded = entry["question"], entry["answer"], entry["grounded"]
    if entry["perspective"] not in ("III", "IV"):
        return "other perspective"
    for text, longest in ((question, MAX_QUESTION), (answer, MAX_ANSWER)):
        if not 0 < len(text) <= longest or text != text.strip() or not text.isprintable() or re.search(r"[<>{}\[\]|`]", text):
            return "empty, long or marked-up text"
    if not question.endswith("?") and entry["perspective"] == "III":
        return "not a question"
    if not grounded or len(set(grounded)) < len(grounded) or len(grounded) > MAX_SPANS:
        return "no, repeated or too many grounded terms"
    if any(term not in facts.entities for term in grounded):
        return "grounded term is not a structure of the image"
    if sorted(grounded) != sorted({name for name, _ in _spans(answer, facts)}):
        return "grounded terms are not those that the answer names"
    asked = {name for name, _ in _spans(question, facts)}
    if entry["perspective"] == "III" and (entry["about"] or set(grounded) <= asked):
        return "question names its answer"
    if entry["perspective"] == "IV" and (entry["about"] not in grounded or entry["about"] in asked):
        return "question names, or answer omits, the marked structure"
    return _misattributed(entry, facts) or _unsupported(question, facts, asks=True) or _unsupported(answer, facts, asks=False)


def _fact_owners(facts: Facts) -> dict[str, set[str]]:
    """Fact about single structures, as a text may repeat it → the structures that it is true of."""
    owners: dict[str, set[str]] = {}
    for name in facts.entities:
        if fact := KNOWLEDGE.get(name):
            for phrase in (fact.does, fact.many, fact.lies):
                if phrase:
                    owners.setdefault(phrase, set()).add(name)
    return owners


def _misattributed(entry: dict, facts: Facts) -> str:
    """Why an entry's facts do not belong to its structures, "" if they do. Each phrase must be about a structure that it is true of, and
    two structures may be named together only with a known relation or if each has its own phrase."""
    question, answer, grounded = entry["question"], entry["answer"], set(entry["grounded"])
    covered: set[str] = set()
    for text in (question, answer):
        named = [(match.start(), match[0]) for match in names_pattern(facts.entities).finditer(text)]
        for phrase, owners in _fact_owners(facts).items():
            for match in re.finditer(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text):
                before = [name for start, name in named if start < match.start()][-1:]
                if not owners & set(before or grounded):
                    return "a fact of another structure"
                covered |= owners & grounded | {name for name, _ in _spans(phrase, facts)}
    rest = _without_facts(answer, facts)
    left = {match[0] for match in names_pattern(tuple(name.casefold() for name in grounded)).finditer(rest)}
    linked = len(left) <= 1 and any(set(pair) == grounded and text in answer[0].lower() + answer[1:] for text, pair in facts.relations)
    joined = covered == grounded and (len(left) < 2 or set(re.findall(r"[\w']+", _without_names(rest, facts))) <= _JOINING)
    if not linked and not joined and (len(grounded) > 1 or entry["perspective"] == "III"):
        return "no fact links question and answer"
    return ""


def _without_facts(text: str, facts: Facts) -> str:
    """A text in lower case without the facts that it repeats word for word."""
    text = text.casefold()
    for phrase in sorted([*_fact_owners(facts), *(relation for relation, _ in facts.relations)], key=len, reverse=True):
        text = text.replace(phrase.casefold(), " … ")
    return text


def _without_names(text: str, facts: Facts) -> str:
    return names_pattern(tuple(name.casefold() for name in facts.entities)).sub(" … ", text)


def _spans(text: str, facts: Facts) -> list[tuple[str, list[int]]]:
    """The structures of the image that a text names, with the span of their first mention; "left lung" is not a mention of "lung"."""
    found: dict[str, list[int]] = {}
    for match in names_pattern(facts.entities).finditer(text):
        found.setdefault(match[0], [match.start(), match.end()])
    return list(found.items())


def _unsupported(text: str, facts: Facts, asks: bool) -> str:
    """Why a text claims more than the facts and names of structures, "" if it does not. A question may call a lesion "lesion"."""
    rest = _without_names(_without_facts(text, facts), facts)
    if asks and any(is_lesion(name) for name in facts.entities):
        rest = re.sub(r"\blesions?\b", " … ", rest)
    if _structures().search(rest):
        return "names a structure or finding that the image does not have"
    unknown = set(re.findall(r"[\w']+", rest)) - _PLAIN - {word.casefold() for word in re.findall(r"\w+", facts.modality)}
    return "contains a word that is in no fact" if unknown else ""


@lru_cache(maxsize=1)
def _structures() -> re.Pattern:
    """Matches every name in the tables, singular or plural."""
    names: set[str] = set()
    for entity in ENTITIES.values():
        names |= {entity.name.casefold(), *(alias.casefold() for alias in entity.synonyms)}
    for fact in KNOWLEDGE.values():
        names |= {text.casefold() for text in (*fact.findings, fact.plural) if text}
    ordered = sorted(names - _GENERIC - {""}, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, ordered)) + r")(?:e?s)?(?![\w-])")


def _sample(sample_id: str, entry: dict, masks: dict[str, list[str]], rng: np.random.Generator, gen: dict) -> Sample:
    prompted: list[str] = []
    targets = []
    if entry["perspective"] == "IV":
        prompted = [masks[entry["about"]][int(rng.integers(len(masks[entry["about"]])))]]
    for name, span in _spans(entry["answer"], Facts("", tuple(masks), ())):
        ids: Iterable[str] = prompted if name == entry["about"] and prompted else masks[name]
        targets.append(Target(turn=1, entity=name, span=span, mask_ids=list(ids)))
    turns = [Turn("user", entry["question"], prompted), Turn("assistant", entry["answer"])]
    return Sample(sample_id, entry["perspective"], turns, targets, kind="written", kb={"source": "knowledge.toml"}, gen=gen)
