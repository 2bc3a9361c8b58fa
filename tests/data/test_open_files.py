"""Open files are bounded, and a limit that is too low is named as such."""

import errno
import itertools
import os
import pickle
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mimo_jax.data import open_files
from mimo_jax.data.loading.features import FeatureFolder, FeatureWriter
from mimo_jax.data.open_files import OpenFiles, remedy_for
from mimo_jax.data.records import DataError, RecordFolder, write_records
from mimo_jax.models import mimo
from tests.data import handmade
from tests.tiny_config import frozen_config

SHAPES = mimo.feature_shapes(frozen_config())


@contextmanager
def limit(more: int):
    """A limit on open files with which this many more can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{number}")}  # not the list's own
    free = (number for number in itertools.count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, more, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_features(path: Path, shards: int) -> list[dict[str, np.ndarray]]:
    rng, written = np.random.default_rng(0), []
    for number in range(shards):
        writer = FeatureWriter(path)
        written.append({key: rng.integers(0, 2**16, shape).astype(np.uint16) for key, shape in SHAPES.items()})
        writer.add(handmade.record(number), written[-1])
        writer.flush()
    return written


def test_the_files_used_last_stay_open(monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN", 2)
    opened = []
    files = OpenFiles(lambda path: opened.append(path) or path)
    for name in "abacbca":
        assert files[Path(name)] == Path(name)
    assert [str(path) for path in opened] == ["a", "b", "c", "b", "a"]


def test_threads_open_a_file_once_and_a_copy_opens_its_own(tmp_path):
    files = OpenFiles(np.load)
    np.save(tmp_path / "a.npy", np.arange(3))
    found = []
    threads = [threading.Thread(target=lambda: found.append(files[tmp_path / "a.npy"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(array) for array in found}) == 1
    copy = pickle.loads(pickle.dumps(files))[tmp_path / "a.npy"]
    assert copy is not found[0] and np.array_equal(copy, found[0])


def test_more_shards_of_features_than_the_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN", 8)
    written = write_features(tmp_path, 60)
    folder = FeatureFolder(tmp_path, SHAPES)
    with limit(12):
        for _ in range(2):
            for number, features in enumerate(written):
                found = folder.read(handmade.record(number))
                assert all(np.array_equal(found[key], features[key]) for key in SHAPES)


def test_more_shards_of_records_than_the_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN", 8)
    write_records(tmp_path / "set", [handmade.record(i) for i in range(40)], {}, shard_bytes=1)
    folder = RecordFolder(tmp_path / "set", "train")
    assert folder.samples(0)
    with limit(20):
        assert [folder[i].id for i in range(40)] == [f"image{i:03d}" for i in range(40)]


def test_the_limit_is_named_instead_of_the_file(tmp_path):
    write_features(tmp_path / "features", 1)
    folder = FeatureFolder(tmp_path / "features", SHAPES)
    write_records(tmp_path / "set", [handmade.record(0)], {})
    records = RecordFolder(tmp_path / "set", "train")
    told = r"this process may open \d+ files; raise the limit with ulimit -n$"
    with limit(0):
        with pytest.raises(DataError, match=told):
            folder.read(handmade.record(0))
        with pytest.raises(DataError, match=told):
            records[0]
    assert folder.read(handmade.record(0)) and records[0].id == "image000"


def test_other_errors_keep_their_remedy():
    assert remedy_for(OSError(errno.EACCES, os.strerror(errno.EACCES)), "copy it") == "copy it"
    assert "ulimit" in remedy_for(RuntimeError(f"open() failed: {os.strerror(errno.EMFILE)}"), "copy it")
