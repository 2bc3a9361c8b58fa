"""The runs of a sweep on a cluster: each run is trained by a job of launch/slurm or launch/gke and evaluated on this machine.

A submitted job continues if the sweep ends; RUN/job.json tells the next sweep which job to wait for.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from mimo_jax import config_flags, files
from mimo_jax.sweep.plan import SweepError, SweepRun
from mimo_jax.sweep.run import JOB_FILE, LocalWorker

_POLL_SECONDS = 30.0  # between two queries about a job
_MAX_NAME = 40  # characters in the name of a job
_MOUNTED = "/gcs/"  # where jobs find the mounted buckets


@dataclass(frozen=True)
class SweepCluster:
    """A cluster that sweeps submit jobs to. flags: flags of the launcher, such as --accelerator h100:8."""

    backend: str  # "slurm" or "gke"
    flags: tuple[str, ...]

    def check(self, workdir: Path) -> None:
        """Raises SweepError if the cluster cannot be used for runs in `workdir`."""
        if not self._script().is_file():
            raise SweepError(f"--backend {self.backend}: {self._script()} is missing; run from a checkout of the project")
        if self.backend == "gke" and not str(files.absolute(workdir)).startswith(_MOUNTED):
            raise SweepError(
                f"--workdir {workdir}: mount the bucket where jobs find it (gcsfuse BUCKET /gcs/BUCKET), and name /gcs/BUCKET/…"
            )

    def _script(self) -> Path:
        return config_flags.PACKAGED.parent / "launch" / self.backend / "submit.sh"

    def submit(self, run: SweepRun) -> list[str]:
        """The launcher command that trains a run."""
        data = [word for value in run.common.data for word in ("--data", self._launcher_path(value))]
        paths = ["--config", run.common.base, *data, "--workdir", self._launcher_path(str(run.folder))]
        return [str(self._script()), *paths, "--name", job_name(run.name), *self.flags, "--", *run.common.shared, *run.overrides]

    def log(self, run: SweepRun, job: str) -> str:
        """The place of a job's log."""
        return f"{run.folder}.launch" if self.backend == "slurm" else f"kubectl logs -l jobset.sigs.k8s.io/jobset-name={job}"

    def is_alive(self, job: str) -> bool:
        """Whether a job waits or runs; True also if its state cannot be queried at the moment."""
        if self.backend == "slurm":
            words, gone = ["squeue", "-h", "-j", job, "-o", "%T"], "Invalid job id"
        else:
            namespace = [word for flag in zip(self.flags, self.flags[1:], strict=False) if flag[0] == "--namespace" for word in flag]
            words, gone = ["kubectl", "get", "jobset", job, *namespace, "-o", "jsonpath={.status.terminalState}"], "NotFound"
        result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode:
            return gone not in result.stderr
        return bool(result.stdout.strip()) == (self.backend == "slurm")  # SLURM prints a state until the job ends, kubectl only then

    def _launcher_path(self, value: str) -> str:
        """A path as the launcher expects it: for GKE, /gcs/BUCKET/x becomes gs://BUCKET/x."""
        name, equals, path = value.rpartition("=")
        return f"{name}{equals}gs://{path.removeprefix(_MOUNTED)}" if self.backend == "gke" and path.startswith(_MOUNTED) else value


def job_name(name: str) -> str:
    """The job name of a run; a label that is too long is truncated."""
    label, seed, digest = name.rsplit("-", 2)
    tail = f"-{seed}-{digest}"
    return f"{label[: _MAX_NAME - len(tail)].rstrip('-')}{tail}"


class ClusterWorker(LocalWorker):
    """Trains one run as a cluster job, then runs `mimo eval` on this machine."""

    def __init__(self, run: SweepRun, cluster: SweepCluster):
        super().__init__(run, cluster.backend)
        self.cluster = cluster
        self.file = run.folder / JOB_FILE
        self.next_poll = 0.0  # time.monotonic() of the next query

    def poll(self, stopping: bool) -> bool:
        if self._training_remains() and not stopping:
            self._poll_job()
            if self._training_remains():
                return True
        return super().poll(stopping)

    def _training_remains(self) -> bool:
        return bool(self.remaining) and self.remaining[0][0] == "train"

    def _poll_job(self) -> None:
        """Submit the job if that has not been done; otherwise check whether it has ended."""
        if time.monotonic() < self.next_poll:
            return
        self.next_poll = time.monotonic() + _POLL_SECONDS
        job = files.read_json(self.file)
        if job is None:
            self._submit()
        elif not self.cluster.is_alive(job["id"]):
            self.file.unlink()
            self.remaining = self.run.remaining()
            if self._training_remains():
                self._fail(f"job {job['id']} ended before its training; see {self.cluster.log(self.run, job['id'])}")

    def _submit(self) -> None:
        words = self.cluster.submit(self.run)
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            self._fail(f"not submitted: {lines[-1].removeprefix('launch: error: ')}")
            return
        files.write_json(self.file, {"backend": self.cluster.backend, "id": done.stdout.split()[-1], "command": shlex.join(words)})
