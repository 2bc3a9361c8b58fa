"""What is saved comes back, whatever happened on the way: steps, faults, paths, configs."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mimo_jax.checkpoints import checkpoint, frozen_params, loading
from mimo_jax.checkpoints.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from tests.small_run import abstract, assert_same, begin, flip_bit, train_state
from tests.tiny_config import tiny_config

# --- steps


def test_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    checkpoints = begin(tmp_path, steps=(7,))
    state, extra = checkpoints.restore(7, abstract())
    assert_same(state, train_state(7))
    assert extra == {"position": 7}


def test_part_of_a_state_can_be_asked_for(tmp_path):
    checkpoints = begin(tmp_path, steps=(7,))
    state, _ = checkpoints.restore(7, {"params": abstract()["params"]})
    assert_same(state, {"params": train_state(7)["params"]})


def test_a_state_without_parameters_and_an_empty_base_work(tmp_path):
    checkpoints = begin(tmp_path, frozen={})
    checkpoints.save(0, {"params": {}}, {})
    checkpoints.wait()
    assert checkpoints.restore(0, {"params": {}})[0] == {"params": {}}
    assert frozen_params.load(tmp_path, {}) == {}
    assert loading.load_params(tmp_path) == {}


def test_saved_values_are_those_of_the_call_though_the_arrays_are_donated_next(tmp_path):
    checkpoints = begin(tmp_path)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    big = jnp.zeros((1024, 1024))
    checkpoints.save(1, {"params": {"w": big}}, {})
    for _ in range(5):
        big = step(big)
    state, _ = checkpoints.restore(1, {"params": {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}})
    np.testing.assert_array_equal(np.asarray(state["params"]["w"]), 0.0)


def test_old_steps_go_and_every_kth_stays(tmp_path):
    begin(tmp_path, steps=(1, 2, 3, 4, 5, 6, 7), keep_last=2, keep_every=3)
    assert sorted(os.listdir(tmp_path / "steps"), key=int) == ["3", "6", "7"]


def test_no_step_no_latest(tmp_path):
    assert begin(tmp_path).latest() is None


def test_shardings_are_obeyed(tmp_path):
    checkpoints = begin(tmp_path, steps=(1,))
    wanted = SingleDeviceSharding(jax.devices()[-1])
    state, _ = checkpoints.restore(1, abstract(), wanted)
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {wanted}


def test_a_flipped_bit_is_found_and_the_step_before_is_taken(tmp_path):
    checkpoints = begin(tmp_path, steps=(1, 2, 3), keep_last=3)
    flip_bit(tmp_path / "steps" / "3" / "arrays" / "state")
    with pytest.warns(CheckpointWarning, match="step 3 is skipped: it is damaged"):
        state, extra = checkpoints.restore(3, abstract())
    assert_same(state, train_state(2))
    assert extra == {"position": 2}
    assert checkpoints.latest() == 2
    with pytest.warns(CheckpointWarning, match="step 3"):
        assert_same(loading.load_params(tmp_path)["aligner"], train_state(2)["params"]["aligner"])
    with pytest.raises(CheckpointError, match="step 3 is damaged"):
        loading.load_params(tmp_path / "steps" / "3")


def test_damage_of_the_optimizer_alone_does_not_concern_inference(tmp_path):
    checkpoints = begin(tmp_path, steps=(1, 2))
    flip_bit(tmp_path / "steps" / "2" / "arrays" / "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loading.load_params(tmp_path)
    with pytest.warns(CheckpointWarning, match="step 2"):
        assert int(checkpoints.restore(2, abstract())[0]["step"]) == 1


def test_a_bit_flipped_in_any_file_of_a_step_is_found(tmp_path):
    checkpoints = begin(tmp_path, steps=(1, 2))
    for file in sorted(f for f in (tmp_path / "steps" / "2").rglob("*") if f.is_file() and f.stat().st_size):
        data = file.read_bytes()
        for at in (0, len(data) // 2):
            file.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
            with pytest.warns(CheckpointWarning, match="step 2 is skipped"):
                assert checkpoints.restore(2, abstract())[1] == {"position": 1}
            checkpoints._damaged.clear()
        file.write_bytes(data)
    assert checkpoints.restore(2, abstract())[1] == {"position": 2}


def test_every_step_damaged_is_an_error(tmp_path):
    checkpoints = begin(tmp_path, steps=(1,))
    flip_bit(tmp_path / "steps" / "1" / "arrays" / "state")
    with pytest.raises(CheckpointError, match="no earlier complete step"):
        checkpoints.restore(1, abstract())


def test_a_damaged_step_is_replaced_by_the_next_save_and_does_not_count_as_kept(tmp_path):
    checkpoints = begin(tmp_path, steps=(1, 2), keep_last=2)
    flip_bit(tmp_path / "steps" / "2" / "arrays" / "state")
    with pytest.warns(CheckpointWarning):
        checkpoints.restore(2, abstract())
    checkpoints.save(2, train_state(2), {})
    checkpoints.wait()
    assert_same(checkpoints.restore(2, abstract())[0], train_state(2))


def test_other_shapes_are_listed(tmp_path):
    checkpoints = begin(tmp_path, steps=(1,))
    wanted = abstract()
    aligner = wanted["params"]["aligner"]
    aligner["gain"] = aligner.pop("bias")
    aligner["kernel"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    listed = "lacks aligner/gain, also has aligner/bias, aligner/kernel is float32[16, 8], the config needs float32[16, 9]"
    with pytest.raises(CheckpointError, match=re.escape(listed)):
        checkpoints.restore(1, wanted)


KILLED = """
import sys, jax.numpy as jnp
from mimo_jax.checkpoints.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
for step in (1, 2):
    checkpoints.save(step, {"params": {"w": jnp.full((3000, 3000), float(step)) + jnp.arange(3000.0)}}, {"position": step})
    if step == 1:
        checkpoints.wait()
checkpoints.wait()
"""


def test_a_process_killed_during_a_save_leaves_the_step_before(tmp_path):
    begin(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    until = time.monotonic() + 60
    while not (tmp_path / "steps" / "2").exists() and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "steps" / "2" / "manifest.json").exists(), "killed too late to show anything"
    assert checkpoint.resolve(tmp_path) == (tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    wanted = {"params": {"w": jax.ShapeDtypeStruct((3000, 3000), jnp.float32)}}
    with pytest.warns(CheckpointWarning, match="step 2 is skipped: it is not complete"):
        state, extra = checkpoints.restore(2, wanted)
    np.testing.assert_array_equal(np.asarray(state["params"]["w"][0]), 1.0 + np.arange(3000.0))
    assert extra == {"position": 1}
    with pytest.raises(CheckpointError, match="this step is not complete"):
        checkpoint.resolve(tmp_path / "steps" / "2")
    checkpoints.save(3, state, {})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path / "steps")) == ["1", "3"], "what the killed save left is removed"


FULL = """
import os, resource, sys, jax, jax.numpy as jnp
from mimo_jax import process
from mimo_jax.checkpoints.checkpoint import Checkpoints
process.quiet_orbax()
checkpoints = Checkpoints(sys.argv[1])
noise = jax.random.normal(jax.random.key(0), (600, 600))
checkpoints.save(1, {"params": {"w": noise[:8]}}, {})
checkpoints.wait()
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpoints.save(2, {"params": {"w": noise}}, {})
    checkpoints.wait()
except Exception as error:
    print(type(error).__name__, error)
print(checkpoints.latest(), os.listdir(sys.argv[1] + "/steps"))
"""


def check_full(done: subprocess.CompletedProcess, workdir: Path, reason: str) -> None:
    message, left = done.stdout.strip().splitlines()
    assert message.startswith(f"CheckpointError {workdir / 'steps' / '2'}: cannot be written: {reason}; step 1 is the last good one")
    assert left == "1 ['1']", "nothing half written stays"
    assert "Traceback" not in done.stderr


def test_a_file_that_may_not_grow_is_reported_and_the_step_before_stands(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), "limit"], capture_output=True, text=True, timeout=120)
    check_full(done, tmp_path, os.strerror(errno.EFBIG))


def test_a_full_disk_is_reported_and_the_step_before_stands(tmp_path):
    mounted = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    try:
        subprocess.run([*inside, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine lets no test mount a small disk ({error}); the test above limits the size of files instead")
    done = subprocess.run([*inside, sys.executable, "-c", FULL, str(tmp_path), "disk"], capture_output=True, text=True, timeout=120)
    check_full(done, tmp_path, os.strerror(errno.ENOSPC))


# --- paths, configs


def test_a_path_is_a_run_or_one_step(tmp_path):
    begin(tmp_path, steps=(5, 10))
    assert checkpoint.resolve(tmp_path) == (tmp_path, 10)
    assert checkpoint.resolve(str(tmp_path / "steps" / "5")) == (tmp_path, 5)
    (tmp_path / "newest").symlink_to("steps/10")
    assert checkpoint.resolve(tmp_path / "newest") == (tmp_path, 10)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone: does not exist"):
        checkpoint.resolve(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.resolve(tmp_path)
    begin(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match="has no complete step yet"):
        checkpoint.resolve(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.resolve(tmp_path / "fresh" / "steps" / "3")


def test_a_run_of_another_config_is_refused_with_the_fields(tmp_path):
    begin(tmp_path)
    config = tiny_config()
    assert checkpoint.open_run(tmp_path, config)
    config.model.remat, config.train.steps = "full", 99
    assert checkpoint.open_run(tmp_path, config), "these may change"
    config.model.llm.width = 32
    config.trainables = {"": 1.0}
    with pytest.raises(CheckpointError, match=r"model\.llm\.width \(16 there, 32 here\), trainables; use its config"):
        checkpoint.open_run(tmp_path, config)


def test_a_config_of_another_version_is_named(tmp_path):
    begin(tmp_path)
    (tmp_path / "config.json").write_text('{"colour": 3}')
    with pytest.raises(CheckpointError, match="config.json: cannot be read as a config.*colour"):
        checkpoint.read_config(tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be created"):
        checkpoint.open_run(tmp_path / "file", tiny_config())
