"""The same build on Apache Beam, where it is installed."""

import pytest

from mimo_jax.data.builder.build_plan import Options
from mimo_jax.data.builder.pipeline import build
from mimo_jax.data.builder.readers import open_reader
from mimo_jax.data.builder.workers import Beam
from mimo_jax.data.records import DataError
from tests.data.builder.sources_made import contents, write_source


def test_beam_writes_the_same_bytes(tmp_path):
    pytest.importorskip("apache_beam", reason="apache_beam is not installed; it comes with the extra beam")
    source = write_source(tmp_path / "in")
    options = Options(shares={"train": 0.6, "val": 0.2, "test": 0.2})
    build(open_reader("manifest", source), tmp_path / "local", options, progress=False)
    build(open_reader("manifest", source), tmp_path / "beam", options, Beam([]), progress=False)
    assert contents(tmp_path / "local") == contents(tmp_path / "beam")


def test_without_beam_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(DataError, match=r'pip install "mimo_jax\[beam\]"'):
        Beam([])
