"""The tables of the paper from made-up reports, and figures of others with their addresses."""

import json
import os

import pytest

from configs.ablations import get_ablations
from mimo_jax.config import Config
from mimo_jax.errors import UserError
from mimo_jax.sweep.paper_tables import MODELS, SHARES, TITLES, markdown, paper_tables, read_peers, read_sam_box

GROUPS = {
    "aligner": {"cross_attention": ["a0", "a1"], "none": ["b0"]},
    "data": {"100": ["a0", "a1"], "75": ["c0"], "50": ["d0"], "25": ["e0"]},
}


def report(value):
    miou = dict.fromkeys(("I", "II", "III", "IV"), value)
    ap50 = {"X-ray without prompt": value - 0.1, "X-ray with prompt": value}
    bounds = {"miou": {p: [value - 0.05, value + 0.05] for p in miou}, "ap50_by_modality": {c: [v - 0.1, v + 0.1] for c, v in ap50.items()}}
    return {"miou": miou, "ap50_by_modality": ap50, "intervals": bounds}


REPORTS = {"a0": report(0.6), "a1": report(0.7), "b0": report(0.5), "c0": report(0.4), "d0": report(0.3), "e0": report(0.2)}
PEERS = """table,model,column,value,address
miou,SAM (box),II,0.571,https://example.org/paper
miou,SAM (box),IV,0.583,https://example.org/paper
ap50,SAM (box),X-ray with prompt,0.989,https://example.org/other
"""


def test_rows_are_variants_of_the_packaged_ablations():
    groups = get_ablations(Config())
    assert set(MODELS.values()) <= groups["aligner"].keys() and set(SHARES) == groups["data"].keys()


def test_tables_have_seeds_intervals_and_figures_of_others(tmp_path):
    (tmp_path / "peers.csv").write_text(PEERS)
    peers = read_peers(tmp_path / "peers.csv")
    tables, missing = paper_tables(GROUPS, REPORTS, peers)
    assert [table.title for table in tables] == list(TITLES.values()) and missing == []
    lines = markdown("tiny.", tables, missing, peers).splitlines()
    assert "| SAM (box) | - | 0.571 [1] | - | 0.583 [1] |" in lines
    assert f"| MIMO | {' | '.join(['0.650 ± 0.071'] * 4)} |" in lines
    assert f"| MIMO without aligner | {' | '.join(['0.500 (0.450 … 0.550)'] * 4)} |" in lines
    assert "| | SAM (box) | MIMO without aligner | MIMO |" in lines
    assert "| X-ray with prompt | 0.989 [2] | 0.500 (0.400 … 0.600) | 0.650 ± 0.071 |" in lines
    assert f"| 25 % | {' | '.join(['0.200 (0.150 … 0.250)'] * 4)} |" in lines
    assert "[1] published, not measured here; read at https://example.org/paper" in lines and "[2]" in lines[-1]


def test_box_prompted_sam_is_a_row_if_it_has_the_same_samples(tmp_path):
    found = report(0.4) | {"method": "SAM", "data": "d", "split": "test", "limit": None}
    found["miou"]["I"] = None
    (tmp_path / "sam.json").write_text(json.dumps(found))
    tables, _ = paper_tables(GROUPS, REPORTS, sam_box=read_sam_box(tmp_path / "sam.json", os.path.abspath("d"), "test", None))
    assert [list(table.rows)[0] for table in tables] == ["SAM, box prompts", "SAM, box prompts", "25 %"]
    assert tables[0].rows["SAM, box prompts"] == {"I": "-"} | dict.fromkeys(("II", "III", "IV"), "0.400 (0.350 … 0.450)")
    with pytest.raises(UserError, match="sam.json: was made with limit None, the sweep has 9"):
        read_sam_box(tmp_path / "sam.json", os.path.abspath("d"), "test", 9)
    (tmp_path / "sam.json").write_text(json.dumps(report(0.4)))
    with pytest.raises(UserError, match="sam.json: is no report of mimo eval --sam-box"):
        read_sam_box(tmp_path / "sam.json", "d", "test", None)


def test_what_is_not_finished_is_named():
    tables, missing = paper_tables(GROUPS, {"a0": report(0.6)})
    assert [table.rows.keys() for table in tables] == [MODELS.keys()] * 2 + [{f"{s} %": 0 for s in SHARES}.keys()]
    assert tables[0].rows["MIMO without aligner"]["I"] == "-"
    assert missing[0] == "mIoU by perspective: needs finished runs of aligner/none" and "data/25, data/50, data/75" in missing[2]
    assert paper_tables({"queries": {"4": ["a0"]}}, REPORTS)[0] == []


@pytest.mark.parametrize("line, said", [
    ("miou,SAM,II,0.5,", "line 2: address is ''; give the address of the page where the value was read"),
    ("miou,SAM,II,0.5,the paper", "line 2: address is 'the paper'"),
    ("auc,SAM,II,0.5,https://a", "line 2: table is 'auc'; use one of miou, ap50, data"),
    ("miou,SAM,II,good,https://a", "line 2: value is 'good'; give a number"),
])  # fmt: skip
def test_a_figure_without_its_address_is_refused(tmp_path, line, said):
    (tmp_path / "peers.csv").write_text(f"table,model,column,value,address\n{line}\n")
    with pytest.raises(UserError, match=said):
        read_peers(tmp_path / "peers.csv")


def test_a_file_without_the_columns_is_refused(tmp_path):
    (tmp_path / "peers.csv").write_text("model,value\nSAM,0.5\n")
    with pytest.raises(UserError, match="peers.csv: has no column table; its columns are table, model, column, value, address"):
        read_peers(tmp_path / "peers.csv")
