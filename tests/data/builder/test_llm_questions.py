"""Only questions from the facts of the image are kept of what a language model writes; it receives nothing private."""

import json
from collections import Counter

import pytest

from mimo_jax.data.builder.knowledge import KNOWLEDGE
from mimo_jax.data.builder.llm_client import ChatClient, EndpointError
from mimo_jax.data.builder.llm_questions import describe, llm_samples, rejection_reason
from mimo_jax.data.schema import encode_mask
from tests.data.builder.bodies import SLICE, slice_record
from tests.data.builder.chat_server import chat_server

BILE = "Which organ makes bile?"


def entry(question, answer, grounded, about="") -> dict:
    fields = {"question": question, "answer": answer, "grounded": list(grounded)}
    return {"perspective": "IV" if about else "III", "about": about, **fields}


GOOD = [
    entry(BILE, "The liver makes bile.", ["liver"]),
    entry("Please tell me: which structure clears old blood cells?", "It is the spleen. The spleen clears old blood cells.", ["spleen"]),
    entry("Which organs make urine?", "The left kidney and the right kidney make urine.", ["left kidney", "right kidney"]),
    entry("What can be found in the left upper abdomen, between esophagus and duodenum?", "The stomach is located there.", ["stomach"]),
    entry("What is shown here, and what does it do?", "This is the liver, which makes bile.", ["liver"], "liver"),
    entry("Which organ is marked in this CT image?", "This is the spleen.", ["spleen"], "spleen"),
    entry(
        "Can you name the marked lesion and where it lies?", "The liver cyst lies within the liver.", ["liver cyst", "liver"], "liver cyst"
    ),
    entry("What can you say about this organ?", "This is the stomach: the spleen touches the stomach.", ["stomach", "spleen"], "stomach"),
]
BAD = [
    ("a finding", entry(BILE, "The liver makes bile and shows a metastasis.", ["liver"]), "the image does not have"),
    ("a finding by a synonym", entry(BILE, "The liver makes bile and has a neoplasm.", ["liver"]), "the image does not have"),
    ("findings in the plural", entry(BILE, "The liver makes bile and holds tumors.", ["liver"]), "the image does not have"),
    ("a finding of knowledge", entry(BILE, "The liver makes bile in spite of cirrhosis.", ["liver"]), "the image does not have"),
    ("another structure", entry(BILE, "The liver makes bile for the gallbladder.", ["liver"]), "the image does not have"),
    ("one asked for", entry("Which organ makes bile for the duodenum?", "The liver makes bile.", ["liver"]), "the image does not have"),
    ("a state", entry(BILE, "The enlarged liver makes bile.", ["liver"]), "word that is in no fact"),
    ("health", entry(BILE, "The liver makes bile and is normal.", ["liver"]), "word that is in no fact"),
    ("a number", entry(BILE, "The liver makes bile; it is 12 cm large.", ["liver"]), "word that is in no fact"),
    ("free knowledge", entry("Which organ stores iron?", "The liver makes bile.", ["liver"]), "word that is in no fact"),
    ("a negation", entry(BILE, "The liver makes bile, not urine.", ["liver"]), "word that is in no fact"),
    ("a patient", entry(BILE, "The liver of Mr Smith makes bile.", ["liver"]), "word that is in no fact"),
    ("the wrong organ", entry(BILE, "The spleen makes bile.", ["spleen"]), "fact of another structure"),
    ("facts swapped", entry("Which?", "The liver clears old blood cells, the spleen makes bile.", ["liver", "spleen"]), "of another"),
    ("a wrong place", entry("Which organ does what?", "The aorta makes bile.", ["aorta"]), "fact of another structure"),
    ("an untold relation", entry("What touches what?", "The aorta touches the liver.", ["aorta", "liver"]), "no fact links"),
    ("a turned relation", entry("Which is it?", "The liver lies within the liver cyst.", ["liver", "liver cyst"]), "no fact links"),
    ("a hidden relation", entry(BILE, "The liver makes bile in the spleen.", ["liver", "spleen"]), "no fact links"),
    ("another", entry("Which?", "The liver makes bile in the spleen, which clears old blood cells.", ["liver", "spleen"]), "no fact links"),
    ("a second relation", entry("What?", "In the aorta, the spleen touches the stomach.", ["spleen", "stomach", "aorta"]), "too many"),
    ("a doubled one", entry("What?", "The spleen in the stomach: the spleen touches the stomach.", ["spleen", "stomach"]), "no fact links"),
    ("no fact", entry("Which organ is it?", "It is the liver.", ["liver"]), "no fact links"),
    ("no structure", entry(BILE, "The gallbladder makes bile.", ["gallbladder"]), "not a structure of the image"),
    ("no span", entry(BILE, "It makes bile.", ["liver"]), "not those that the answer names"),
    ("a span left out", entry(BILE, "The liver makes bile, as the spleen clears old blood cells.", ["liver"]), "not those that the answer"),
    ("a part of a name", entry(BILE, "The liver cyst makes bile.", ["liver"]), "not those that the answer names"),
    ("nothing grounded", entry(BILE, "The liver makes bile.", []), "no, repeated or too many"),
    ("one twice", entry(BILE, "The liver makes bile.", ["liver", "liver"]), "no, repeated or too many"),
    ("a leak", entry("Does the liver make bile?", "The liver makes bile.", ["liver"]), "question names its answer"),
    ("a leak of what is marked", entry("What does this liver do?", "The liver makes bile.", ["liver"], "liver"), "question names, or"),
    ("another marked", entry("What is this?", "This is the liver.", ["liver"], "spleen"), "question names, or answer omits"),
    ("markup", entry(BILE, "The <SEG>liver makes bile.", ["liver"]), "marked-up text"),
    ("a line break", entry(BILE, "The liver\nmakes bile.", ["liver"]), "marked-up text"),
    ("length", entry(BILE, "The liver makes bile. " * 20, ["liver"]), "empty, long"),
    ("emptiness", entry("", "The liver makes bile.", ["liver"]), "empty, long"),
    ("no question", entry("Which organ makes bile", "The liver makes bile.", ["liver"]), "not a question"),
    ("a perspective", entry(BILE, "The liver makes bile.", ["liver"]) | {"perspective": "V"}, "other perspective"),
]  # fmt: skip


@pytest.fixture(scope="module")
def record():
    return slice_record()


def client_of(chat, folder, **limits) -> ChatClient:
    return ChatClient(chat.url, "parrot", folder, **{"timeout": 5.0, "attempts": 2} | limits)


def reply(*entries) -> str:
    return json.dumps({"questions": list(entries)})


def test_only_names_modality_and_relations_leave_the_machine(record, tmp_path):
    secret = slice_record(name="patient-4711", source="/data/Smith/visit7.png", licence="mine")
    secret.masks.append(encode_mask(secret.masks[0].decode(), "Smith_0", "smith nodule (2019)", class_raw="Smith"))
    with chat_server(reply(GOOD[0])) as chat:
        llm_samples(secret, describe(secret), client_of(chat, tmp_path), seed=0)
        llm_samples(record, describe(record), client_of(chat, tmp_path), seed=0)
    assert len(chat.asked) == 1  # the facts are the same
    text = json.dumps(chat.asked) + json.dumps(chat.headers) + "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    for word in ("4711", "Smith", "smith", "2019", "visit7", "ward", "m0", "mine"):
        assert word not in text, word
    told = describe(record).as_dict()
    assert sorted(told) == ["entities", "modality", "relations"] and {e["name"] for e in told["entities"]} == set(SLICE)
    assert all(set(e) <= {"name", "does", "lies"} for e in told["entities"])
    assert "the liver cyst lies within the liver" in told["relations"] and "the spleen touches the stomach" in told["relations"]
    assert "the aorta lies to the patient's left of the liver" in told["relations"]


def test_facts_omit_a_whole_whose_part_is_shown():
    facts = describe(slice_record({"lung": (0, 0, 50, 50), "left lung": (0, 0, 50, 40), "heart": (60, 0, 80, 20)}))
    assert facts.entities == ("heart", "left lung")


@pytest.mark.parametrize("good", GOOD, ids=lambda e: e["answer"])
def test_questions_from_the_facts_are_kept(record, good):
    assert rejection_reason(good, describe(record)) == ""


@pytest.mark.parametrize("bad, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_questions_beyond_the_facts_are_rejected(record, bad, message):
    assert message in rejection_reason(bad, describe(record))


def test_samples_are_grounded_and_say_where_they_come_from(record, tmp_path):
    rejects = Counter()
    with chat_server(reply(*GOOD, *(case[1] for case in BAD[:8]))) as chat:
        samples = llm_samples(record, describe(record), client_of(chat, tmp_path), seed=0, rejects=rejects)
    assert Counter(sample.perspective for sample in samples) == {"III": 4, "IV": 4}
    assert sum(rejects.values()) == 8 and rejects["names a structure or finding that the image does not have"] == 6
    record.samples = samples
    record.check()
    assert len({sample.sample_id for sample in samples}) == 8
    for sample in samples:
        text, prompted = sample.turns[1].text, sample.turns[0].prompted
        assert sample.gen["model"] == "parrot" and len(sample.gen["prompt_hash"]) == 64
        for target in sample.targets:
            assert text[slice(*target.span)] == target.entity
            assert {record.mask(i).entity for i in target.mask_ids} == {target.entity}
        assert bool(prompted) == (sample.perspective == "IV")
        assert not prompted or any(target.mask_ids == prompted for target in sample.targets)
    record.samples = []


def test_the_same_seed_keeps_the_same(record, tmp_path):
    with chat_server(reply(*GOOD)) as chat:
        facts, client = describe(record), client_of(chat, tmp_path)
        first = llm_samples(record, facts, client, seed=0)
        assert first == llm_samples(record, facts, client_of(chat, tmp_path), seed=0)
        assert [s.turns for s in first] != [s.turns for s in llm_samples(record, facts, client, seed=1)]
        assert len(chat.asked) == 1
        other = ChatClient(chat.url, "another model", tmp_path)
        llm_samples(record, facts, other, seed=0)
        assert len(chat.asked) == 2


@pytest.mark.parametrize("text, reason", [
    ("I am sorry, I cannot do that.", "reply is not the requested JSON"), ("[]", "reply is not the requested JSON"),
    ('{"questions": {}}', "reply is not the requested JSON"), (reply(GOOD[0])[:-9], "reply is not the requested JSON"),
    ("[" * 100_000, "reply is not the requested JSON"), ("\ud800", "reply is not the requested JSON"),
    (reply(GOOD[0] | {"answer": "The liver makes bile\ud800."}), "empty, long or marked-up text"),
    (reply("text"), "malformed entry"), (reply(GOOD[0] | {"extra": 1}), "malformed entry"),
    (reply(GOOD[0] | {"grounded": [3]}), "malformed entry"), (reply(GOOD[0] | {"question": None}), "malformed entry"),
    (reply(GOOD[0], GOOD[0]), "asked twice"),
])  # fmt: skip
def test_replies_of_another_form_are_counted_and_not_paid_for_again(record, tmp_path, text, reason):
    with chat_server(text) as chat:
        for _ in range(2):
            rejects = Counter()
            samples = llm_samples(record, describe(record), client_of(chat, tmp_path), seed=0, rejects=rejects)
            assert rejects == {reason: 1} and len(samples) == (reason == "asked twice")
        assert len(chat.asked) == 1


def test_a_fence_around_the_json_is_let_pass(record, tmp_path):
    with chat_server(f"```json\n{reply(GOOD[0])}\n```\n") as chat:
        assert len(llm_samples(record, describe(record), client_of(chat, tmp_path), seed=0)) == 1


def test_an_image_of_which_nothing_is_known_asks_nothing(tmp_path):
    strange = slice_record({"smith nodule": (0, 0, 5, 5)})
    client = ChatClient("http://127.0.0.1:9/v1", "parrot", tmp_path, attempts=1)
    assert llm_samples(strange, describe(strange), client, seed=0) == []
    with pytest.raises(EndpointError):
        llm_samples(slice_record(), describe(slice_record()), client, seed=0)


def test_a_mouthpiece_of_the_facts_passes_and_a_wild_one_does_not(tmp_path):
    """Over many images: all questions of a model that repeats the facts are kept, all of one that swaps or invents facts are rejected."""

    def honest(prompt):
        told = json.loads(prompt[prompt.rindex('{\n "modality"') :])["entities"]
        return reply(
            *(
                entry(f"Which structure {e['does']}?", f"The {e['name']} {e['does']}.", [e["name"]])
                for e in told
                if "kidney" not in e["name"]
            )
        )

    def wild(prompt):
        told = json.loads(prompt[prompt.rindex('{\n "modality"') :])["entities"]
        swapped = zip(told, told[1:] + told[:1], strict=True)
        return reply(
            *(
                entry(f"Which structure {b['does']}?", f"The {a['name']} {b['does']}.", [a["name"]])
                for a, b in swapped
                if a["does"] != b["does"]
            )
        )

    names = list(SLICE)
    for model, kept in ((honest, True), (wild, False)):
        with chat_server(model) as chat:
            client = client_of(chat, tmp_path / model.__name__)
            rejects, number = Counter(), 0
            for n in range(len(names)):
                record = slice_record({name: SLICE[name] for name in names[n : n + 4]}, name=f"r{n}")
                number += len(llm_samples(record, describe(record), client, seed=n, rejects=rejects))
            assert (number > 10 and not rejects) if kept else (number == 0 and rejects.keys() == {"a fact of another structure"}), rejects


def test_facts_may_be_repeated_in_full():
    """Whatever the knowledge base says of a structure, its own words pass."""
    for entity, fact in KNOWLEDGE.items():
        facts = describe(slice_record({entity: (0, 0, 9, 9)}))
        assert rejection_reason(entry(f"Which structure {fact.does}?", f"The {entity} {fact.does}.", [entity]), facts) == "", entity
