"""Requests of folders, JSON lines and tables: what is read, and what is wrong with the rest."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_jax.errors import UserError
from mimo_jax.infer.batch.request_files import KEYS, BatchRequests


def lines(folder: Path, *rows, name="r.jsonl", **defaults) -> BatchRequests:
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return BatchRequests(folder / name, folder / "out", defaults)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_is_gone_through_sorted_without_hidden_files_and_answers(tmp_path):
    for name in ("b.png", "a b.DCM", "sub/10.png", "sub/9.nii.gz", ".hidden.png", ".git/x.png", "out/answer.png", "ä.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    requests = BatchRequests(tmp_path, tmp_path / "out", {"question": "What?", "window": "lung", "frame": None})
    found = list(requests)
    assert [r.image for r in found] == ["a b.DCM", "b.png", "ä.png", "sub/10.png", "sub/9.nii.gz"]
    assert [r.id for r in found] == ["00001-a_b", "00002-b", "00003", "00004-10", "00005-9"]
    assert all(r.questions == ("What?",) and r.window == "lung" and r.frame is None and r.line is None and r.path.is_file() for r in found)
    first = requests.survey()
    assert first[:3] == (5, 0, "") and first == requests.survey()
    (tmp_path / "b.png").write_bytes(b"x")
    assert requests.survey().digest != first.digest


def test_lines_and_tables_say_the_same(folder):
    (folder / "m.png").write_bytes(b"")
    made = lines(
        folder,
        {"id": "x-1", "image": "a.png", "question": "Which?", "points": [[1, 2, 0]], "mask": "m.png", "max_new_tokens": 5},
        "",
        {"image": "b.png", "question": ["Which?", "Why?"], "frame": 3, "window": [-5, 6.5], "prompts": {"boxes": [[1, 2, 3, 4]]}},
        {"id": 7, "image": str(folder / "a.png"), "slice": "k:1", "window": "-5,6.5", "frame": None},
        question="Default?",
    )
    table = lines(
        folder,
        "id,image,question,points,mask,max_new_tokens,frame,window,slice,prompts",
        'x-1,a.png,Which?,"[[1, 2, 0]]",m.png,5',
        ",,,,,,,,,",
        ',b.png,"[""Which?"", ""Why?""]",,,,3,"-5,6.5",,"{""boxes"": [[1, 2, 3, 4]]}"',
        f'7,{folder / "a.png"},,,,,,"[-5, 6.5]",k:1',
        name="r.csv",
        question="Default?",
    )
    assert [dataclasses.replace(r, line=0) for r in table] == [dataclasses.replace(r, line=0) for r in made]
    assert [r.line for r in made] == [1, 3, 4] and [r.line for r in table] == [2, 4, 5]
    first, second, third = table
    assert (first.id, first.max_new_tokens, first.multi_turn) == ("x-1", 5, False)
    assert first.prompts == (("prompts", {"points": [[1, 2, 0]]}), ("mask m.png", folder / "m.png"))
    assert (second.id, second.questions, second.multi_turn, second.frame, second.window) == (
        *("00002-b", ("Which?", "Why?"), True, 3, (-5, 6.5)),
    )
    assert (third.id, third.questions, third.slice, third.window) == ("7", ("Default?",), "k:1", (-5, 6.5))


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ("3", "line 2: is not a JSON object"),
        ({"image": "a.png", "questoin": "?"}, "'questoin' is unknown; did you mean question?"),
        ({"image": "a.png", "colour": 1}, "'colour' is unknown; use id, image"),
        ({"question": "?"}, "image: is missing"),
        ({"image": "gone.png", "question": "?"}, "image gone.png: no such file or folder"),
        ({"image": "x" * 5000, "question": "?"}, "no such file"),
        ({"image": "\ud800", "question": "?"}, "no such file"),
        ({"image": "a.png", "question": " "}, "question: is missing or empty"),
        ({"image": "a.png", "question": ["?"] * 33}, "a list of 1 to 32"),
        ({"image": "a.png", "question": "?", "id": "../../etc/passwd"}, "id '../../etc/passwd': give letters"),
        ({"image": "a.png", "question": "?", "id": ".hidden"}, "id '.hidden': give letters"),
        ({"image": "a.png", "question": "?", "id": "x" * 151}, "at most 150 bytes"),
        ({"image": "a.png", "question": "?", "id": "FIRST"}, "id FIRST is also that of request 1"),
        ({"image": "a.png", "question": "?", "frame": -1}, "frame: give a whole number of 0 or more"),
        ({"image": "https://host/a.png", "question": "?"}, "https://host/a.png: is a URL; download the file first"),
        ({"image": "a.png", "question": "?", "mask_threshold": -1}, "mask_threshold: -1 is not a number above 0"),
        ({"image": "a.png", "question": "?", "max_new_tokens": True}, "max_new_tokens: give a whole number of 1 or more"),
        ({"image": "a.png", "question": "?", "window": [1]}, "window: give"),
        ({"image": "a.png", "question": "?", "window": "1,2,3"}, "window: '1,2,3' is not LOW,HIGH"),
        ({"image": "a.png", "question": "?", "slice": 3}, "slice: give AXIS:INDEX"),
        ({"image": "a.png", "question": "?", "mask": 3}, "mask: give the path of a file or an object"),
        ({"image": "a.png", "question": "?", "prompts": "gone.json"}, "prompts gone.json: no such file"),
    ],
)
def test_a_wrong_line_is_a_fault_and_costs_the_others_nothing(folder, line, says):
    good = {"id": "first", "image": "b.png", "question": "What?"}
    requests = lines(folder, good, line, good | {"id": "last"})
    first, wrong, last = requests
    assert says in wrong.fault and "\n" not in wrong.fault and wrong.fault.startswith("r.jsonl, line 2: ") and wrong.line == 2
    assert (first.id, first.fault, last.id, last.fault) == ("first", "", "last", "")
    assert requests.survey()[:3] == (3, 1, wrong.fault)
    assert wrong.id.startswith("00002")


def test_tables_with_faulty_rows_or_header(folder):
    rows = ["image,question,frame,points", "a.png,?,1,", "a.png,?,x,", "a.png,?,1,2,3", "a.png,?,,[1", "b.png,?,,"]
    assert [r.fault.split(": ", 1)[-1].split(" (")[0] for r in lines(folder, *rows, name="r.csv")] == [
        *("", "frame: give a whole number of 0 or more", "has 5 cells, the header 4; put cells with commas in quotation marks"),
        *("points: is not JSON", ""),
    ]
    (folder / "latin.csv").write_bytes("image,question\na.png,für?\nb.png,?\n".encode("latin-1"))
    assert ["UTF-8" in r.fault for r in BatchRequests(folder / "latin.csv", folder / "out", {})] == [True, False]
    for header, says in (("image,qestion", "did you mean question"), ("image,image", "image occurs twice"), ("", "")):
        if says:
            with pytest.raises(UserError, match=f"r.csv, header: .*{says}"):
                lines(folder, header, name="r.csv")
        else:
            assert not list(lines(folder, header, name="r.csv"))


def test_sources_that_are_none(tmp_path):
    (tmp_path / "x.txt").write_text("")
    for source, defaults, says in (
        ("gone", {}, "no such file or folder"),
        ("x.txt", {}, "give a folder, a .jsonl or a .csv"),
        (".", {}, "give the question about its images with --question"),
    ):
        with pytest.raises(UserError, match=says):
            BatchRequests(tmp_path / source, tmp_path / "out", defaults)
    with pytest.raises(UserError, match="is the folder of the images"):
        BatchRequests(tmp_path, f"{tmp_path}/.", {"question": "?"})


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=3))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.dictionaries(st.sampled_from([*KEYS, "imagee"]), values, max_size=6).map(lambda d: json.dumps(d).encode()),
            st.dictionaries(st.sampled_from(KEYS[3:]), values, max_size=3).map(
                lambda d: json.dumps({"image": "a.png", "question": "?"} | d).encode()
            ),
        ),
        max_size=5,
    ),
    st.sampled_from(["r.jsonl", "r.csv"]),
)
def test_any_lines_are_requests_or_faults_with_ids_that_differ_and_stay_in_their_folder(folder, rows, name):
    head = b"id,image,question,points,frame,window\n" if name == "r.csv" else b""
    (folder / name).write_bytes(head + b"\n".join(rows))
    found = list(BatchRequests(folder / name, folder / "out", {}))
    ids = [r.id.casefold() for r in found]
    assert len(set(ids)) == len(ids) and not any("/" in i or i.startswith(".") for i in ids)
    assert all(r.fault or (r.path.is_file() and r.questions) for r in found)
