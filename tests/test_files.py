"""Files that are whole or not there, and locks."""

import os
import subprocess
import sys

import pytest

from mimo_jax import files


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_whole(tmp_path, durable):
    with files.atomic_write(tmp_path / "a", durable) as part:
        part.write_text("new")
        assert files.is_partial(part.name) and not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)) as raised, files.atomic_write(tmp_path / "a") as part:
        part.write_text("ne")
        raise error
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
    if isinstance(error, OSError):
        assert raised.value.filename == str(tmp_path / "a")


def test_errors_name_the_file_and_not_the_one_beside_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.atomic_write(tmp_path / "none" / "a") as part:
        part.write_text("x")
    assert raised.value.filename == str(tmp_path / "none" / "a")
    with pytest.raises(FileNotFoundError) as raised, files.atomic_write(tmp_path / "a"):
        open(tmp_path / "other")
    assert raised.value.filename == str(tmp_path / "other")


def test_json(tmp_path):
    path = tmp_path / "a.json"
    assert files.read_json(path) is None
    files.write_json(path, {"é": [1, None]})
    assert files.read_json(path) == {"é": [1, None]} and path.read_bytes() == files.json_bytes({"é": [1, None]})
    assert files.sha256(path) == files.sha256_bytes(path.read_bytes())
    path.write_text("{")
    assert files.read_json(path) is None


def test_one_at_a_time_has_a_lock_and_a_child_keeps_it(tmp_path):
    with files.locked(tmp_path / "l") as lock:
        with pytest.raises(BlockingIOError):
            files.locked(tmp_path / "l", blocking=False)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with pytest.raises(BlockingIOError):
        files.locked(tmp_path / "l", blocking=False)
    child.communicate(b"\n")
    files.locked(tmp_path / "l", blocking=False).close()


def test_a_file_system_without_locks_has_none(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.filelock, "lock_descriptor", refuse)
    with files.locked(tmp_path / "l", blocking=False), files.locked(tmp_path / "l", blocking=False):
        pass
