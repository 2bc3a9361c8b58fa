"""launch/gke: the JobSet that is submitted, and what its rules make of exit codes."""

import re

import pytest
import yaml

from tests.launch.launching import LAUNCH, Tools, refused


@pytest.fixture
def tools(tmp_path):
    made = Tools(tmp_path)
    made.note("kubectl", "xpk")
    made.make("gcloud", "#!/bin/sh\necho True\n")
    return made


def words(*more):
    places = "--data", "med=gs://b/data", "--workdir", "gs://c/runs/a"
    return "gke/submit.sh", "--config", "configs/mimo_7b.py", *places, "--image", "eu-docker.pkg.dev/p/r/mimo:1", *more


def jobset(tools, *more):
    done = tools.run(*words("--dry-run", *more))
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout[done.stdout.index("# One training run") :])


def pods(document):
    """(the replicated job, its Job's spec, its pods' spec, the container)."""
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    return job, spec, pod, pod["containers"][0]


def test_slices_are_jobs_and_hosts_their_pods(tools):
    document = jobset(tools, "--accelerator", "v5e:4x4", "--nodes", "2", "--", "--config.init.path=gs://c/base")
    job, spec, pod, container = pods(document)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and document["kind"] == "JobSet" and document["metadata"]["name"] == "a"
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 4, 4, "Indexed")
    assert list(document["metadata"]["annotations"]) == ["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    tpu = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4"}
    assert pod["nodeSelector"] == tpu and container["resources"]["limits"] == {"google.com/tpu": 4} and container["env"] == []
    places = "--workdir /gcs/c/runs/a --data med=/gcs/b/data --config.init.path=/gcs/c/base"
    assert " ".join(container["command"]) == f"mimo train --config configs/mimo_7b.py {places}"


def test_gpu_machines_are_one_job_whose_processes_are_told_of_each_other(tools):
    document = jobset(tools, "--accelerator", "h100:8", "--nodes", "3", "--spot")
    job, spec, pod, container = pods(document)
    assert (job["replicas"], spec["parallelism"]) == (1, 3) and not document["metadata"]["annotations"]
    gpu = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb", "cloud.google.com/gke-spot": "true"}
    assert pod["nodeSelector"] == gpu and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    told = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert told["MIMO_COORDINATOR"] == f"a-{job['name']}-0-0.a:12355" and told["MIMO_PROCESSES"] == "3"
    assert told["MIMO_PROCESS"] == {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}


def test_pods_run_as_a_user_without_rights_and_get_time_to_save(tools):
    _, _, pod, container = pods(jobset(tools, "--accelerator", "cpu"))
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    buckets = pod["volumes"][0]["csi"]
    assert buckets["driver"] == "gcsfuse.csi.storage.gke.io" and "uid=1000" in buckets["volumeAttributes"]["mountOptions"]
    assert f"USER {pod['securityContext']['runAsUser']}" in (LAUNCH / "gke/Dockerfile").read_text()


def action(document, code=None, disrupted=False):
    """What becomes of the JobSet when a pod ends so, by the rules of Kubernetes (Job, podFailurePolicy) and of JobSet (failurePolicy)."""
    _, spec, _, container = pods(document)
    assert spec["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        conditions = [c["type"] for c in rule.get("onPodConditions", []) if c["status"] == "True"]
        codes = rule.get("onExitCodes", {"values": [], "operator": "In", "containerName": "main"})
        assert rule["action"] == "FailJob" and codes["operator"] == "In" and codes["containerName"] == container["name"]
        if (disrupted and "DisruptionTarget" in conditions) or code in codes["values"]:
            reason, message = (
                "PodFailurePolicy",
                f"Container main for pod default/a failed with exit code {code} matching FailJob rule at index {index}",
            )
            break
    for rule in document["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"  # counted: maxRestarts


def test_75_and_lost_machines_start_it_again_always_2_and_3_never_faults_a_few_times(tools):
    document = jobset(tools, "--accelerator", "v6e:2x4", "--retries", "5")
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert action(document, 75) == action(document, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(document, 2) == action(document, 3) == "FailJobSet"
    assert action(document, 1) == action(document, 137) == "RestartJobSet"


def test_submitting_prints_the_name_alone(tools):
    done = tools.run(*words("--accelerator", "v5e:4x4"))
    assert (done.returncode, done.stdout) == (0, "a\n"), done.stderr
    assert tools.calls("kubectl")[-1] == "create --filename a.yaml"


def test_xpk_makes_it_with_restarts_on_75_only(tools):
    tools.make("xpk", '#!/bin/sh\necho "$*" >>"$FAKE/xpk.calls"\necho /gcs/b /gcs/c\n')
    done = tools.run(*words("--accelerator", "v5e:4x4", "--nodes", "2", "--xpk", "k"))
    assert done.returncode == 0 and done.stdout == "a\n", done.stderr
    assert "--tpu-type v5litepod-16 --num-slices 2" in tools.calls("xpk")[-1] and "--restart-on-exit-codes 75" in tools.calls("xpk")[-1]
    assert not tools.calls("kubectl")


@pytest.mark.parametrize(
    "more, named",
    [
        (["--accelerator", "v5e:4x5"], ["v5e:4x5", "no such slice"]),
        (["--accelerator", "v7:4x4"], ["v7:4x4"]),
        (["--accelerator", "k80:1"], ["k80:1", "GKE has no such GPU", "h100"]),
        (["--accelerator", "h100:8", "--xpk", "k"], ["--xpk", "TPU slices"]),
        (["--accelerator", "cpu", "--image", "mimo:latest"], ["--image mimo:latest", "tag or digest"]),
        (["--accelerator", "cpu", "--data", "/data"], ["/data", "gcloud storage cp"]),
        (["--accelerator", "cpu", "--config", "/dev/null"], ["/dev/null"]),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_submitted(tools, more, named):
    refused(tools.run(*words(*more)), *named)
    assert not tools.calls("kubectl") and not tools.calls("xpk")


@pytest.mark.parametrize(
    "question, named",
    [
        ("auth can-i", ["get-credentials"]),
        ("explain jobset", ["JobSet", "0.10"]),
        ("--dry-run", ["kubectl delete jobset a"]),
    ],
)
def test_what_the_cluster_says_no_to_is_refused(tools, question, named):
    tools.make("kubectl", f'#!/bin/sh\necho "$*" >>"$FAKE/kubectl.calls"\ncase "$*" in *"{question}"*) exit 1;; esac\n')
    refused(tools.run(*words("--accelerator", "cpu")), *named)
    assert "create --filename a.yaml" not in tools.calls("kubectl")
