"""launch/sky: the task that is submitted, and what its shell makes of exit codes."""

import subprocess

import pytest
import yaml

from tests.launch.launching import LAUNCH, MIMO, ROOT, Tools, refused


@pytest.fixture
def tools(tmp_path):
    made = Tools(tmp_path)
    made.make("mimo", MIMO)
    made.make("gcloud", "#!/bin/sh\necho True\n")
    made.make(
        "sky", '#!/bin/sh\necho "$*" >>"$FAKE/sky.calls"\n[ "$1" != jobs ] || printf "\\033[1mManaged Job ID: \\033[36m12\\033[0m\\n"\n'
    )
    return made


def words(*more):
    places = "--data", "gs://b/data", "--workdir", "gs://c/runs/a"
    return "sky/submit.sh", "--config", "configs/mimo_7b.py", *places, *more


def task(tools, *more):
    done = tools.run(*words("--dry-run", *more))
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout[done.stdout.index("# One training run") :])


def test_machines_buckets_and_recovery(tools):
    made = task(tools, "--accelerator", "a100-80gb:8", "--nodes", "2", "--infra", "gcp")
    assert made["num_nodes"] == 2 and made["workdir"] == str(ROOT)
    assert made["resources"]["accelerators"] == "A100-80GB:8" and made["resources"]["infra"] == "gcp" and made["resources"]["use_spot"]
    assert made["file_mounts"] == {f"/gcs/{b}": {"source": f"gs://{b}", "mode": "MOUNT"} for b in "bc"}
    assert made["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert made["resources"]["job_recovery"]["max_restarts_on_errors"] == 0
    assert "MIMO_PROCESS=$SKYPILOT_NODE_RANK" in made["run"] and ".[cuda]" in made["setup"]


def test_a_tpu_slice_is_one_node_and_finds_itself(tools):
    made = task(tools, "--accelerator", "v6e:4x4", "--on-demand")
    assert made["resources"]["accelerators"] == "tpu-v6e-16" and not made["resources"]["use_spot"]
    assert made["resources"]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv6e"}
    assert "MIMO_" not in made["run"] and ".[tpu]" in made["setup"]


def test_the_shell_ends_with_75_for_what_is_to_be_started_again(tools):
    run = task(tools, "--accelerator", "h100:8", "--nodes", "2", "--retries", "2")["run"].replace("/gcs/", f"{tools.folder}/gcs/")
    tools.codes(75, 1, 0, 2, 3, 137, 75, 1, process=1)
    settings = {
        "SKYPILOT_TASK_ID": "task-1",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    (tools.folder / "launch").symlink_to(LAUNCH)
    command, where = ["bash", "-c", run], {"cwd": tools.folder, "env": tools.environment(**settings)}
    codes = [subprocess.run(command, capture_output=True, timeout=300, **where).returncode for _ in range(8)]
    assert codes == [75, 75, 0, 2, 3, 75, 75, 1]
    assert {call.split()[0] for call in tools.calls("mimo")} == {"1/2"}


def test_submitting_prints_the_number_alone(tools):
    done = tools.run(*words("--accelerator", "h100:8"))
    assert (done.returncode, done.stdout) == (0, "12\n"), done.stderr


@pytest.mark.parametrize(
    "more, named",
    [
        (["--accelerator", "cpu"], ["--accelerator 'cpu'", "h100:8"]),
        (["--accelerator", "v5e:4x4", "--nodes", "2"], ["--nodes 2", "launch/gke"]),
        (["--accelerator", "h100:8", "--init", "/base"], ["/base", "gcloud storage cp"]),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_submitted(tools, more, named):
    refused(tools.run(*words(*more)), *named)
    assert not any(call.startswith("jobs") for call in tools.calls("sky"))
