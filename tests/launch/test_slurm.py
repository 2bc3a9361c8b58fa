"""launch/slurm: what is submitted, and the batch script under a SLURM made of scripts, from attempt to attempt."""

import signal
import subprocess

import pytest

from tests.launch.launching import LAUNCH, MIMO, Tools, refused, stop, wait_for

# One process for each task, in a group of its own; signals go to the whole group; the highest code comes back.
SRUN = """#!/usr/bin/env bash
set -m
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i MIMO_PROCESS=$i "$@" &
  pids+=($!)
done
trap 'for pid in "${pids[@]}"; do kill -TERM -- "-$pid"; done' TERM
result=0
for pid in "${pids[@]}"; do
  wait "$pid"
  code=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
  ((code > result)) && result=$code
done
exit "$result"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/scontrol.calls"
[[ $1 != show ]] || echo "JobId=7 JobState=${JOB_STATE:-RUNNING} Reason=None"
"""
SBATCH = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/sbatch.calls"
[[ $1 == --test-only ]] && exit "${REFUSED:-0}"
echo "4711;cluster"
"""


@pytest.fixture
def tools(tmp_path):
    made = Tools(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "logs").mkdir()
    for name, script in {"mimo": MIMO, "srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "stat": "#!/bin/sh\necho nfs\n"}.items():
        made.make(name, script)
    return made


def job(tools, tasks=1, **more):
    command = ["bash", LAUNCH / "slurm/job.sh", LAUNCH.parent, tools.folder / "logs", "2", "mimo", "train", "--workdir", "two words"]
    environment = tools.environment(SLURM_JOB_ID="7", SLURM_NTASKS=str(tasks), **more)
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def attempts(tools, tasks=1, **more) -> list[int]:
    """Exit codes of the batch script, run again as often as it queues itself."""
    codes = []
    while len(codes) < 10:
        process = job(tools, tasks, **more)
        process.communicate(timeout=300)
        codes.append(process.returncode)
        if tools.calls("scontrol").count("requeue 7") < len(codes):
            return codes
    raise AssertionError("it would go on for ever")


@pytest.mark.parametrize(
    "codes, ends",
    [
        ([(0, 0)], [0]),
        ([(75, 75), (75, 75), (75, 75), (0, 0)], [75, 75, 75, 0]),
        ([(2, 2)], [2]),
        ([(75, 75), (2, 75)], [75, 2]),
        ([(75, 137), (1, 1), (75, 139)], [75, 75, 1]),
    ],
)
def test_the_job_queues_itself_on_75_not_on_0_or_2_and_on_faults_a_few_times(tools, codes, ends):
    for process in range(2):
        tools.codes(*(pair[process] for pair in codes), process=process)
    assert attempts(tools, tasks=2) == ends
    calls = tools.calls("mimo")
    assert len(calls) == 2 * len(codes) and all(call.endswith("train --workdir two words") for call in calls)


def test_a_task_that_died_with_its_node_is_a_fault(tools):
    tools.make("srun", "#!/bin/sh\nexit 137\n")
    assert attempts(tools) == [75, 75, 1]


@pytest.mark.parametrize("number, requeued", [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_near_the_time_limit_all_tasks_save_and_the_job_comes_back_unless_the_user_stopped_it(tools, number, requeued):
    for process in range(2):
        tools.codes("wait", process=process)
    process = job(tools, tasks=2)
    wait_for(lambda: len(tools.calls("mimo")) == 2)
    assert stop(process, number)[0] == 75
    assert tools.calls("scontrol").count("requeue 7") == requeued


def test_a_cancelled_job_does_not_come_back(tools):
    tools.codes(75, process=0)
    assert attempts(tools, JOB_STATE="CANCELLED") == [75]
    assert "requeue 7" not in tools.calls("scontrol")


def test_a_task_alone_on_its_node_takes_all_its_gpus(tools):
    tools.make("mimo", '#!/bin/sh\necho "$JAX_LOCAL_DEVICE_IDS" >>"$FAKE/devices.calls"\n')
    job(tools, SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4").communicate(timeout=300)
    job(tools, SLURM_NTASKS_PER_NODE="4", SLURM_GPUS_ON_NODE="4").communicate(timeout=300)
    assert tools.calls("devices") == ["0,1,2,3", ""]


def words(tools, *more):
    places = "--data", tools.folder / "data", "--workdir", tools.folder / "runs/One_run"
    return "slurm/submit.sh", "--config", "configs/tiny.py", *places, "--accelerator", "h100:8", *more


def test_submitting_prints_the_jobs_number_alone_and_the_name_comes_from_the_workdir(tools):
    done = tools.run(*words(tools, "--nodes", "2", "--", "--config.train.steps=5"))
    assert (done.returncode, done.stdout) == (0, "4711\n"), done.stderr
    test, submitted = tools.calls("sbatch")
    assert submitted.removeprefix("--parsable ") == test.removeprefix("--test-only ")
    assert "--job-name one-run --nodes 2 --gpus-per-node h100:8 --ntasks-per-node 8" in submitted
    assert submitted.endswith("--config.train.steps=5")
    assert (tools.folder / "runs/One_run.launch").is_dir()


@pytest.mark.parametrize(
    "more, settings, named",
    [
        ([], {"REFUSED": "1"}, ["SLURM rejects", "sinfo", "sbatch --test-only"]),
        (["--accelerator", "h100"], {}, ["--accelerator 'h100'", "h100:8"]),
        (["--tasks", "core"], {}, ["--tasks core", "gpu or node"]),
        (["--workdir", "gs://b/run"], {}, ["--workdir gs://b/run", "share"]),
    ],
)
def test_a_job_that_cannot_run_is_refused_and_nothing_is_made(tools, more, settings, named):
    refused(tools.run(*words(tools, *more), **settings), *named)
    assert not (tools.folder / "runs").exists() and not any("--parsable" in call for call in tools.calls("sbatch"))


def test_several_nodes_need_a_shared_workdir(tools):
    tools.make("stat", "#!/bin/sh\necho xfs\n")
    refused(tools.run(*words(tools, "--nodes", "2")), "--workdir", "own disk (xfs)", "all nodes share")
    done = tools.run(*words(tools))
    assert done.returncode == 0 and "warning" in done.stderr
