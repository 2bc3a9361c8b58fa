"""Files that are whole or not there, and locks."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tensorstore as ts
from array_record.python.array_record_module import ArrayRecordWriter

from mimo_jax import files
from mimo_jax.errors import UserError

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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


# --- folders


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_whole(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with files.atomic_folder(out) as folder:
        (folder / "a").write_text("new")
        assert folder.name == "out" and not list(tmp_path.glob("out/*"))
    assert (out / "a").read_text() == "new" and contents(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_leaves_the_folder_that_was_there(tmp_path, replace, error):
    if replace:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(type(error)), files.atomic_folder(tmp_path / "out", replace) as folder:
        (folder / "a").write_text("ne")
        raise error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("made", [lambda out: out.write_text("x"), lambda out: (out / "in").mkdir(parents=True)])
def test_a_folder_that_holds_anything_is_not_written_to(tmp_path, made):
    made(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="out: exists and is not an empty folder"), files.atomic_folder(tmp_path / "out"):
        raise AssertionError("not reached")
    assert contents(tmp_path) == before


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path):
    said = "out: cannot be written: Directory not empty"
    with pytest.raises(UserError, match=said), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("mine")
        (tmp_path / "out" / "b").parent.mkdir()
        (tmp_path / "out" / "b").write_text("another's")
    assert contents(tmp_path) == ["out", "out/b"]


def test_a_folder_has_one_writer_and_another_makes_good_what_a_killed_one_left(tmp_path):
    code = "from mimo_jax import files\nwith files.atomic_folder('out') as folder:\n    (folder / 'half').touch()\n    print(input())"
    child = subprocess.Popen([sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=ENV)
    try:
        while ".out.partial/out/half" not in contents(tmp_path):
            assert child.poll() is None
        with pytest.raises(UserError, match="out: is being written by another process"), files.atomic_folder(tmp_path / "out"):
            raise AssertionError("not reached")
    finally:
        child.kill()
        child.communicate()
    assert contents(tmp_path) == [".out.partial", ".out.partial/.lock", ".out.partial/out", ".out.partial/out/half"]
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert contents(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_is_replaced_and_a_kill_loses_neither(tmp_path, renames):
    out = tmp_path / "out"
    with files.atomic_folder(out) as folder:
        (folder / "old").touch()
    code = f"""if 1:
        import os
        from mimo_jax import files
        inner, done = os.rename, []
        def rename(*names):
            inner(*names)
            done.append(names)
            if len(done) == {renames}:
                os._exit(9)
        os.rename = rename
        with files.atomic_folder("out", replace=True) as folder:
            (folder / "new").touch()"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV).returncode == 9
    files.restore(out)
    assert os.listdir(out) == (["old"] if renames == 1 else ["new"])
    with files.atomic_folder(out, replace=True) as folder:
        (folder / "newer").touch()
    assert contents(tmp_path) == ["out", "out/newer"]


def test_a_lock_whose_folder_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    locked, gone = files.locked, []

    def removing(path, blocking=True):
        lock = locked(path, blocking)
        if not gone:
            gone.append(path.unlink())
        return lock

    monkeypatch.setattr(files, "locked", removing)
    with files.claimed(tmp_path / "work", tmp_path / "out"):
        with pytest.raises(UserError, match="another process"):
            files.claimed(tmp_path / "work", tmp_path / "out")


# --- what the disk refuses


def limited_write(path: str) -> None:
    """More than the file may hold, by a limit of this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with open(path, "wb") as file:
            file.write(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_records(path: str) -> None:
    writer = ArrayRecordWriter(path, "group_size:1")
    writer.write(bytes(os.urandom(1 << 20)))
    writer.close()


def write_arrays(path: str) -> None:
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    ts.open(store, create=True, dtype=ts.float32, shape=[4]).result().write([0, 1, 2, 3]).result()


@pytest.mark.parametrize(
    ("write", "place", "reason"),
    [
        (limited_write, "a", "File too large"),
        (lambda path: open(path, "w"), "none/a", "No such file or directory"),
        (lambda path: open(path, "w"), "file/a", "Not a directory"),
        (lambda path: open(path, "w"), ".", "Is a directory"),
        (write_records, "/dev/full", "No space left on device"),
        (write_arrays, "file", "Not a directory"),
    ],
)
def test_what_the_disk_refuses_is_one_line(tmp_path, write, place, reason):
    (tmp_path / "file").touch()
    path = tmp_path / place

    class Kind(UserError):
        pass

    with pytest.raises(Kind) as raised, files.disk_errors(path, Kind, "go on"):
        write(str(path))
    assert str(raised.value) == f"{path}: cannot be written: {reason}; go on" and raised.value.__cause__ is not None


@pytest.mark.parametrize("error", [ValueError("shapes differ"), UserError("config.x: is wrong"), OSError("no number"), KeyboardInterrupt()])
def test_what_is_not_the_disk_passes(tmp_path, error):
    with pytest.raises(type(error)) as raised, files.disk_errors(tmp_path), files.removed_on_failure(tmp_path):
        raise error
    assert raised.value is error and not tmp_path.exists()
