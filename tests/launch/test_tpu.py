"""launch/tpu: the watch over a queued resource, with a gcloud whose workers are folders of this machine. worker.sh really runs."""

import contextlib
import os
import signal

import pytest

from tests.launch.launching import MIMO, Tools, refused, wait_for

# Queued resources are $FAKE/state; with the file `take` one is taken away once a run has begun. A worker is a folder, ssh a shell in it.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$FAKE/gcloud.calls"
value() { while [[ $2 != "$1" ]]; do set -- "$1" "${@:3}"; done; echo "$3"; }
case "$*" in
  *"buckets describe"*) echo True ;;
  *"queued-resources create"*)
    echo PROVISIONING >"$FAKE/state"
    [ ! -e "$FAKE/no_quota" ] || echo FAILED >"$FAKE/state" ;;
  *"queued-resources list"*)
    [ -e "$FAKE/offline" ] && rm "$FAKE/offline" && exit 1
    state=$(cat "$FAKE/state" 2>/dev/null)
    [ "$state" != PROVISIONING ] || echo ACTIVE >"$FAKE/state"
    if [ "$state" = ACTIVE ] && [ -e "$FAKE/take" ] && [ "$(wc -l <"$FAKE/mimo.calls")" = 2 ]; then
      rm "$FAKE/take"
      for file in "$FAKE"/run/*/*.pid; do kill -KILL -- "-$(cat "$file")"; done
      state=SUSPENDED
      echo "$state" >"$FAKE/state"
    fi
    echo "$state" ;;
  *"queued-resources delete"*) rm -rf "$FAKE/state" "$FAKE/workers" "$FAKE/run" ;;
  *"tpu-vm scp"*)
    for worker in 0 1; do mkdir -p "$FAKE/workers/$worker" && cp "$5" "$FAKE/workers/$worker"; done ;;
  *"tpu-vm ssh"*)
    workers=$(value --worker "$@")
    for worker in ${workers/all/0 1}; do
      mkdir -p "$FAKE/workers/$worker" "$FAKE/run/$worker"
      cd "$FAKE/workers/$worker" || exit
      HOME=$PWD MIMO_LAUNCH_RUN=$FAKE/run/$worker MIMO_PROCESS=$worker PATH=$FAKE/there:$PATH bash -c "$(value --command "$@")" </dev/null
    done ;;
esac
"""
# uv, for the workers: an environment whose mimo is the one that looks like it.
UV = """#!/bin/sh
echo "$*" >>"$FAKE/uv.calls"
[ "$1" != venv ] || { mkdir -p .venv/bin; ln -s "$FAKE/there/mimo" .venv/bin/mimo; }
"""


@pytest.fixture
def tools(tmp_path):
    made = Tools(tmp_path)
    made.make("gcloud", GCLOUD)
    there = tmp_path / "there"
    there.mkdir()
    for name, script in {"mimo": MIMO, "python3": f"#!/bin/sh\nmkdir -p ~/.local/bin; cp {there}/uv ~/.local/bin/uv\n", "uv": UV}.items():
        (there / name).write_text(script)
        (there / name).chmod(0o755)
    made.note("gcsfuse", "mountpoint")
    yield made
    for file in tmp_path.glob("run/*/*.pid"):  # what a failed test leaves running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def words(*more):
    places = "--data", "gs://b/data", "--workdir", "gs://b/runs/night"
    return "run", "--zone", "z", "--config", "configs/tiny.py", *places, "--accelerator", "v5e:2x4", "--spot", *more


def count(tools, words):
    return sum(words in call for call in tools.calls("gcloud"))


@pytest.fixture
def two(tools):
    """`tpu.sh run` for a slice of two hosts."""
    return lambda *more, **settings: tools.run("tpu/tpu.sh", *words("--accelerator", "v5p:2x2x2", *more), **settings)


@pytest.mark.parametrize(
    "codes, ends",
    [
        ([(0, 0)], 0),
        ([(75, 75), (75, 75), (0, 0)], 0),
        ([(2, 2)], 2),
        ([(75, 2)], 2),
        ([(1, 1), (75, 137), (1, 1)], 1),
    ],
)
def test_it_starts_again_on_75_not_on_0_or_2_and_gives_the_tpu_back(tools, two, codes, ends):
    for process in range(2):
        tools.codes(*(pair[process] for pair in codes), process=process)
    done = two("--retries", "2")
    assert done.returncode == ends, done.stderr
    assert len(tools.calls("mimo")) == 2 * len(codes)
    assert all("--workdir /gcs/b/runs/night --data /gcs/b/data" in call for call in tools.calls("mimo"))
    assert count(tools, "queued-resources create") == count(tools, "queued-resources delete") == 1
    assert sum(call.startswith("pip") for call in tools.calls("uv")) == 2  # installed once on each worker


def test_a_tpu_that_was_taken_away_is_asked_for_again(tools, two):
    for process in range(2):
        tools.codes("wait", 0, process=process)
    (tools.folder / "take").touch()
    (tools.folder / "offline").touch()  # one look finds no network
    done = two("--retries", "0")
    assert done.returncode == 0, done.stderr
    assert count(tools, "queued-resources create") == count(tools, "queued-resources delete") == 2
    assert sum(call.startswith("pip") for call in tools.calls("uv")) == 4
    assert "SUSPENDED" in done.stderr and "does not respond" in done.stderr


def test_the_watch_can_be_ended_and_taken_up_again(tools, two):
    for process in range(2):
        tools.codes("wait", process=process)
    watch = tools.start("tpu/tpu.sh", *words("--accelerator", "v5p:2x2x2", "--keep"))
    wait_for(lambda: len(tools.calls("mimo")) == 2)
    watch.send_signal(signal.SIGTERM)
    watch.communicate(timeout=300)
    assert count(tools, "queued-resources delete") == 0
    for process in range(2):
        tools.codes(0, process=process)
    again = tools.start("tpu/tpu.sh", *words("--accelerator", "v5p:2x2x2", "--keep"))
    wait_for(lambda: count(tools, "worker.sh state") > 4)
    for file in tools.folder.glob("run/*/*.pid"):  # the machines stop the runs
        os.killpg(int(file.read_text()), signal.SIGTERM)
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert count(tools, "queued-resources create") == 1 and count(tools, "queued-resources delete") == 0
    deleted = tools.run("tpu/tpu.sh", "delete", "--zone", "z", "--name", "night")
    assert deleted.returncode == 0 and count(tools, "queued-resources delete") == 1


def test_a_request_that_fails_is_made_again_a_few_times_only(tools, two):
    (tools.folder / "no_quota").touch()
    done = two("--retries", "1")
    assert done.returncode == 1 and count(tools, "queued-resources create") == 2


@pytest.mark.parametrize(
    "more, named",
    [
        (["--accelerator", "v5e:3x3"], ["v5e:3x3", "no such slice", "16x16"]),
        (["--accelerator", "h100:8"], ["h100:8", "name a TPU slice"]),
        (["--reserved"], ["--spot", "--reserved"]),
        (["--data", "/data"], ["/data", "gcloud storage cp"]),
        (["--workdir", "runs/a"], ["runs/a", "gs://"]),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_rented(tools, more, named):
    refused(tools.run("tpu/tpu.sh", *words(*more)), *named)
    assert not count(tools, "queued-resources")


@pytest.mark.parametrize(
    "question, named",
    [
        ("auth print-access-token", ["gcloud auth login"]),
        ("storage ls", ["gs://b/data", "cannot be listed"]),
        ("buckets describe", ["gs://b", "--enable-hierarchical-namespace"]),
        ("accelerator-types describe", ["v5e:2x4", "zone z", "accelerator-types list"]),
    ],
)
def test_what_google_says_no_to_is_refused_before_anything_is_rented(tools, question, named):
    tools.make("gcloud", f'#!/bin/sh\necho "$*" >>"$FAKE/gcloud.calls"\ncase "$*" in *"{question}"*) exit 1;; esac\necho True\n')
    refused(tools.run("tpu/tpu.sh", *words()), *named)
    assert not count(tools, "queued-resources")
