"""Names of machines that are not at hand."""

import importlib.util
import os

import jax
import pytest

from mimo_jax.analysis import topology
from mimo_jax.analysis.topology import Topology
from mimo_jax.errors import UserError


def test_names(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    assert topology.parse_topology("v5e:16x16", 2) == Topology("v5e", (16, 16), 2) and topology.parse_topology("v5e:16x16", 2).chips == 512
    assert topology.parse_topology("v5p:2x2x4").chips == 16 and str(topology.parse_topology("v4:2x2x1")) == "v4:2x2x1"
    for wrong in ("v5e", "v5e:16", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "cpu:2x2", "cpu:0", "cpu:", "v5e:4x0", "v5litepod-16", ""):
        with pytest.raises(UserError, match=f"^--topology {wrong}: is invalid; use one such as v4:2x2x4"):
            topology.parse_topology(wrong)


def test_a_tpu_needs_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(topology.sys.modules, "libtpu", raising=False)
    with pytest.raises(UserError, match=r'^--topology v5e:2x2: needs libtpu, which is not installed; pip install "mimo_jax\[tpu\]"$'):
        topology.parse_topology("v5e:2x2")
    assert topology.parse_topology("cpu:8").chips == 8


def test_the_environment_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    before = dict(os.environ)
    with pytest.raises(KeyError), Topology("v5e", (2, 2)).environment():
        assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["TPU_SKIP_MDS_QUERY"] == "1"
        raise KeyError
    assert dict(os.environ) == before


def test_a_process_that_has_started_jax_says_so():
    count = jax.device_count()
    assert Topology("cpu", (count,)).devices() == jax.devices()
    with pytest.raises(UserError, match=f"^cpu:64: jax has started with {count} CPU devices in this process; compile in a new process"):
        Topology("cpu", (64,)).devices()
