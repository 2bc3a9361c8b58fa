"""Launchers run as a user runs them, with tools on PATH that only look like SLURM, gcloud, kubectl and mimo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))

# Ends with the next code of the file codes.N, N its process, or codes; "wait" is until SIGTERM, then 75. Notes how it was called.
MIMO = """#!/usr/bin/env bash
codes=$FAKE/codes${MIMO_PROCESS:+.$MIMO_PROCESS}
code=$(sed -n 1p "$codes")
sed -i 1d "$codes"
echo "${MIMO_PROCESS:-0}/${MIMO_PROCESSES:-1} ${JAX_PLATFORMS:-} $*" >>"$FAKE/mimo.calls"
if [ "$code" = wait ]; then
  trap 'exit 75' TERM
  while true; do sleep 0.05; done
fi
exit "$code"
"""


class Tools:
    """A folder in front of PATH with tools made of scripts; they find it as $FAKE, and `calls(name)` is what one was called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.make("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

    def make(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)

    def note(self, *names: str) -> None:
        """Tools that note how they were called, and succeed."""
        for name in names:
            self.make(name, f'#!/bin/sh\necho "$*" >>"$FAKE/{name}.calls"\n')

    def calls(self, name: str) -> list[str]:
        file = self.folder / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def codes(self, *codes: int | str, process: int | None = None) -> None:
        """What mimo ends with, one run after the other."""
        name = "codes" if process is None else f"codes.{process}"
        (self.folder / name).write_text("".join(f"{code}\n" for code in codes))

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MIMO_", "SLURM_", "JAX_PLATFORMS"))}
        return kept | {"PATH": path, "FAKE": str(self.folder), "MIMO_LAUNCH_DELAY": "0.05", "LC_ALL": "C.UTF-8"} | more

    def run(self, script: str, *words: str | Path, **more: str) -> subprocess.CompletedProcess:
        """A script of launch/ from the root of the checkout, to its end."""
        command = ["bash", str(LAUNCH / script), *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=self.environment(**more), capture_output=True, text=True, timeout=300)

    def start(self, script: str, *words: str | Path, **more: str) -> subprocess.Popen:
        command = ["bash", str(LAUNCH / script), *map(str, words)]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment(**more), stderr=subprocess.PIPE, text=True, preexec_fn=_hear_signals
        )


def _hear_signals() -> None:
    """A shell does not hear what was ignored when it started, and tests may run in the background or under nohup."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def stop(process: subprocess.Popen, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    """The exit code and the errors of a launcher that is told to stop."""
    process.send_signal(number)
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


def wait_for(what, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """It ended with 2, one line, and all of these words in it."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert len(errors) == 1 and errors[0].startswith("launch: error: "), done.stderr
    assert all(word in errors[0] for word in words), errors[0]
