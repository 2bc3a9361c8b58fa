"""launch/check.py: the report of `mimo compile` against what is to be rented. launch/render.py: names and values match."""

import json

import pytest

from launch.render import render
from tests.launch.launching import Tools, refused

REPORT = {"fits": True, "topology": "v5e:4x4", "chips": 16, "remedies": []}


@pytest.fixture
def checked(tmp_path):
    """What a launch says of a report with these changes; of this text, if it is one."""
    tools = Tools(tmp_path)

    def check(report):
        file = tmp_path / "report.json"
        file.write_text(report if isinstance(report, str) else json.dumps(REPORT | report))
        places = "--data", "gs://b/data", "--workdir", "gs://b/run"
        machines = "--zone", "z", "--accelerator", "v5e:4x4", "--report", file
        return tools.run("tpu/tpu.sh", "run", "--config", "configs/mimo_7b.py", *places, *machines, "--dry-run")

    return check


def test_a_report_that_fits_this_slice_lets_the_launch_go_on(checked):
    done = checked({})
    assert done.returncode == 0 and "queued-resources create" in done.stdout


@pytest.mark.parametrize(
    "report, named",
    [
        ({"fits": False, "remedies": ["--batch-per-chip 2", "fsdp 16"]}, ["does not fit", "--batch-per-chip 2 or fsdp 16"]),
        ({"fits": None}, ["does not fit", "lower the batch"]),
        ({"chips": 32}, ["32 chips", "16 chips"]),
        ({"topology": "v5e:16x16"}, ["is for v5e:16x16", "mimo compile --topology v5e:4x4"]),
        ("{}", ["is not a report of mimo compile"]),
        ("not JSON", ["is not a report of mimo compile"]),
    ],
)
def test_another_report_stops_it(checked, report, named):
    refused(checked(report), "report.json", *named)


def test_a_template_takes_exactly_its_names():
    assert render("a: $one$$", {"one": "1"}) == "a: 1$"
    with pytest.raises(KeyError, match="one"):
        render("a: $one", {})
    with pytest.raises(ValueError, match="two"):
        render("a: $one", {"one": "1", "two": "2"})
