"""The runs of a sweep on a cluster: each training is a job of launch/slurm or launch/gke, its evaluation follows on this machine.

What was submitted goes on without the sweep: RUN/job.json tells the next one which job to wait for.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from mimo_jax import config_flags, files
from mimo_jax.sweep.plan import Run, SweepError
from mimo_jax.sweep.run import JOB, Processes

_LOOK = 30.0  # seconds between two looks at a job
_NAME = 40  # characters that a job's name may have
_MOUNTED = "/gcs/"  # where jobs find buckets


@dataclass(frozen=True)
class SweepCluster:
    """flags: of the launcher, such as --accelerator h100:8."""

    backend: str  # "slurm" or "gke"
    flags: tuple[str, ...]

    def check(self, workdir: Path) -> None:
        """SweepError where it cannot be used for runs in `workdir`."""
        if not self._script().is_file():
            raise SweepError(f"--backend {self.backend}: {self._script()} is missing; run from a checkout of the project")
        if self.backend == "gke" and not str(files.absolute(workdir)).startswith(_MOUNTED):
            raise SweepError(
                f"--workdir {workdir}: mount the bucket where jobs find it (gcsfuse BUCKET /gcs/BUCKET), and name /gcs/BUCKET/…"
            )

    def _script(self) -> Path:
        return config_flags.PACKAGED.parent / "launch" / self.backend / "submit.sh"

    def submit(self, run: Run) -> list[str]:
        """The launcher's command for a training."""
        data = [word for value in run.common.data for word in ("--data", self._place(value))]
        places = ["--config", run.common.base, *data, "--workdir", self._place(str(run.folder))]
        return [str(self._script()), *places, "--name", job_name(run.name), *self.flags, "--", *run.common.shared, *run.overrides]

    def log(self, run: Run, job: str) -> str:
        """Where a job's log is."""
        return f"{run.folder}.launch" if self.backend == "slurm" else f"kubectl logs -l jobset.sigs.k8s.io/jobset-name={job}"

    def alive(self, job: str) -> bool:
        """Whether a job waits or runs; also where nothing can be learnt of it now."""
        if self.backend == "slurm":
            words, gone = ["squeue", "-h", "-j", job, "-o", "%T"], "Invalid job id"
        else:
            namespace = [word for flag in zip(self.flags, self.flags[1:], strict=False) if flag[0] == "--namespace" for word in flag]
            words, gone = ["kubectl", "get", "jobset", job, *namespace, "-o", "jsonpath={.status.terminalState}"], "NotFound"
        asked = subprocess.run(words, capture_output=True, text=True)
        if asked.returncode:
            return gone not in asked.stderr
        return bool(asked.stdout.strip()) == (self.backend == "slurm")  # a state while it is there; a state once it has ended

    def _place(self, value: str) -> str:
        """A place as the launcher names it: gke's jobs find gs://BUCKET where it is mounted here, too."""
        name, equals, path = value.rpartition("=")
        return f"{name}{equals}gs://{path.removeprefix(_MOUNTED)}" if self.backend == "gke" and path.startswith(_MOUNTED) else value


def job_name(name: str) -> str:
    """A run's name, its middle left out where it is too long."""
    label, seed, digest = name.rsplit("-", 2)
    tail = f"-{seed}-{digest}"
    return f"{label[: _NAME - len(tail)].rstrip('-')}{tail}"


class SubmittedJob(Processes):
    """One run: the training as a job, then `mimo eval` here."""

    def __init__(self, run: Run, cluster: SweepCluster):
        super().__init__(run, cluster.backend)
        self.cluster = cluster
        self.file = run.folder / JOB
        self.look_at = 0.0  # time.monotonic() of the next look

    def going(self, stopping: bool) -> bool:
        if self._trains() and not stopping:
            self._look()
            if self._trains():
                return True
        return super().going(stopping)

    def _trains(self) -> bool:
        return bool(self.due) and self.due[0][0] == "train"

    def _look(self) -> None:
        """Submits what is not, and sees whether what is has ended."""
        if time.monotonic() < self.look_at:
            return
        self.look_at = time.monotonic() + _LOOK
        job = files.read_json(self.file)
        if job is None:
            self._submit()
        elif not self.cluster.alive(job["id"]):
            self.file.unlink()
            self.due = self.run.due()
            if self._trains():
                self._fail(f"job {job['id']} ended before its training; see {self.cluster.log(self.run, job['id'])}")

    def _submit(self) -> None:
        words = self.cluster.submit(self.run)
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            self._fail(f"not submitted: {said[-1].removeprefix('launch: error: ')}")
            return
        files.write_json(self.file, {"backend": self.cluster.backend, "id": done.stdout.split()[-1], "command": shlex.join(words)})
