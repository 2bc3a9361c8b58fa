"""launch/local.sh: what it starts, when it starts again, and how it is stopped."""

import os
import signal
import time

import pytest

from tests.launch.launching import MIMO, Tools, refused, stop, wait_for


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "data").mkdir()
    made = Tools(tmp_path)
    made.make("mimo", MIMO)
    return made


def words(tools, *more):
    return "--config", "configs/tiny.py", "--data", tools.folder / "data", "--workdir", tools.folder / "run", *more


@pytest.mark.parametrize(
    "codes, ends",
    [
        ([0], 0),
        ([75, 75, 0], 0),
        ([2], 2),
        ([75, 2], 2),
        ([3], 3),
        ([1, 75, 1, 0], 0),
        ([75] * 5 + [0], 0),
        ([1, 137, 1], 1),
    ],
)
def test_it_starts_again_on_75_not_on_0_or_2_and_on_faults_a_few_times(tools, codes, ends):
    tools.codes(*codes)
    done = tools.run("local.sh", *words(tools, "--retries", "2"))
    assert done.returncode == ends, done.stderr
    calls = tools.calls("mimo")
    assert len(calls) == len(codes) and len(set(calls)) == 1


@pytest.mark.parametrize("codes, ends", [([(75, 75), (0, 0)], 0), ([(75, 137), (0, 0)], 0), ([(2, 75)], 2), ([(1, 1), (75, 137)], 1)])
def test_all_processes_of_a_rehearsed_cluster_start_again_together(tools, codes, ends):
    for process in range(2):
        tools.codes(*(pair[process] for pair in codes), process=process)
    done = tools.run("local.sh", *words(tools, "--accelerator", "cpu", "--processes", "2", "--retries", "1"))
    assert done.returncode == ends, done.stderr
    firsts = sorted(call.split(" train")[0] for call in tools.calls("mimo"))
    assert firsts == ["0/2 cpu"] * len(codes) + ["1/2 cpu"] * len(codes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_stop_it_lets_the_run_save_and_does_not_start_it_again(tools, number):
    tools.codes(75, "wait", 0)
    process = tools.start("local.sh", *words(tools))
    wait_for(lambda: len(tools.calls("mimo")) == 2)
    code, errors = stop(process, number)
    assert code == 75 and "error" not in errors
    assert len(tools.calls("mimo")) == 2


def test_a_run_that_is_only_halted_is_not_started_a_second_time(tools):
    tools.make("mimo", '#!/bin/sh\necho $$ >>"$FAKE/mimo.calls"\nsleep 0.5\n')
    process = tools.start("local.sh", *words(tools))
    wait_for(lambda: tools.calls("mimo"))
    run = int(tools.calls("mimo")[0])
    os.kill(run, signal.SIGSTOP)
    time.sleep(1)
    os.kill(run, signal.SIGCONT)
    process.communicate(timeout=300)
    assert process.returncode == 0 and len(tools.calls("mimo")) == 1


def test_told_to_stop_between_two_attempts_it_ends_at_once(tools):
    tools.codes(75, 0)
    process = tools.start("local.sh", *words(tools), MIMO_LAUNCH_DELAY="50")
    wait_for(lambda: tools.calls("mimo"))
    wait_for(lambda: "restarting" in process.stderr.readline())
    assert stop(process)[0] == 75 and len(tools.calls("mimo")) == 1


@pytest.mark.parametrize(
    "more, named",
    [
        (["--accelerator", "v5e:4x4"], ["--accelerator v5e:4x4", "use auto, cpu, gpu"]),
        (["--accelerator", "gpu:4", "--processes", "2"], ["--processes 2", "gpu:2"]),
        (["--accelerator", "gpu"], ["nvidia-smi", "driver"]),
        (["--nodes", "2"], ["--nodes", "launch/slurm"]),
        (["--steps", "2"], ["--steps", "is unknown", "--help"]),
        (["--processes"], ["--processes", "needs a value"]),
        (["--retries", "many"], ["--retries many", "not a number"]),
        (["--name", "A_b"], ["--name A_b", "starting with a letter"]),
        (["--data", "/nowhere"], ["--data /nowhere", "does not exist"]),
        (["--", "--config.train.step=4"], ["config.train.step", "did you mean config.train.steps"]),
        (["--", "--config.train.steps=x"], ["steps"]),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_and_nothing_starts(tools, more, named):
    refused(tools.run("local.sh", *words(tools, *more)), *named)
    assert not tools.calls("mimo")


@pytest.mark.parametrize("flag", ["--config", "--data", "--workdir"])
def test_what_every_run_needs_is_asked_for(tools, flag):
    given = list(words(tools))
    at = given.index(flag)
    refused(tools.run("local.sh", *given[:at], *given[at + 2 :]), flag, "is missing")
