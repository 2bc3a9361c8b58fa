"""An evaluation by several processes, real ones: each answers its share, and the report is that of one process, bit by bit."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WORK = """
import json, os, sys
from pathlib import Path
from mimo_jax import distributed

def work():
    import jax, numpy as np
    from mimo_jax.eval import evaluate as ev
    from mimo_jax.infer.predictor import Mimo
    from tests.data import handmade
    from tests.eval.test_evaluate import record
    from tests.tiny_config import painting_params, quick_config

    here, me = Path(sys.argv[1]), jax.process_index()
    config = quick_config()
    (folder := here / f"tokenizer{me}").mkdir()
    tokenizer = handmade.tokenizer(folder)
    mimo = Mimo(config, painting_params(config), tokenizer)
    records = [record(i) for i in range(5)]
    records[3].image = records[3].image[:60]
    perspectives = ["vqa", "I", "III"]  # of a model that takes no prompts
    report = ev.evaluate(mimo, records, 24, None, perspectives, overlays=here / "overlays", overlay_count=6)
    asked, polls, stopped = mimo.engine.counts["images"], iter([False, True]), False
    try:
        ev.evaluate(mimo, records, 24, None, perspectives, stop=lambda: me == jax.process_count() - 1 and next(polls))
    except ev.EvaluationStopped:
        stopped = True
    (here / f"report{me}.json").write_text(json.dumps({"report": report, "asked": asked, "stopped": stopped}))
    return 0

sys.exit(distributed.run(work))
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """case -> (folder, what each process wrote)"""
    made = {}
    for case, count in (("alone", 1), ("two", 2)):
        folder = tmp_path_factory.mktemp(case)
        (folder / "work.py").write_text(WORK)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            told = {"MIMO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "MIMO_PROCESSES": str(count)}
        command = [sys.executable, str(folder / "work.py"), str(folder)]
        running = [subprocess.Popen(command, env=os.environ | told | {"MIMO_PROCESS": str(i)}) for i in range(count)]
        try:
            assert [process.wait(600) for process in running] == [0] * count
        finally:
            for process in running:
                process.kill()
        made[case] = folder, [json.loads((folder / f"report{i}.json").read_text()) for i in range(count)]
    return made


def test_the_report_and_the_overlays_are_those_of_one_process(evaluated):
    (alone_folder, (alone,)), (folder, (first, second)) = evaluated["alone"], evaluated["two"]
    assert first["report"] == second["report"] == alone["report"]
    assert alone["report"]["n"]["unusable"] and alone["report"]["score"]["n"]
    assert 0 < first["asked"] < alone["asked"] and 0 < second["asked"] < alone["asked"]  # each encoded only its share
    overlays, expected = ({p.name: p.read_bytes() for p in (of / "overlays").iterdir()} for of in (folder, alone_folder))
    assert overlays == expected and overlays


def test_a_stop_in_one_process_stops_all(evaluated):
    assert [of["stopped"] for _, written in evaluated.values() for of in written] == [True] * 3
