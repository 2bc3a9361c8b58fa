"""Machines that are not available: the devices of a TPU topology, or virtual devices of this CPU.

A topology has the name that libtpu uses, such as v5e:16x16; cpu:8 is this CPU as 8 devices.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mimo_jax.errors import UserError

if TYPE_CHECKING:
    import jax

# Kind -> (dimensions of its torus, accelerator type of 16 chips for libtpu).
_TPUS = {"v4": (3, "v4-32"), "v5e": (2, "v5litepod-16"), "v5p": (3, "v5p-32"), "v6e": (2, "v6e-16")}
_KNOWN = "v4:2x2x4, v5e:4x4, v5e:16x16, v5p:2x2x4, v6e:16x16 or cpu:8"


class Topology(NamedTuple):
    """kind: v4, v5e, v5p, v6e or cpu; dims: of the torus, or (devices,); slices: number of slices."""

    kind: str
    dims: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.dims))}"

    @property
    def chips(self) -> int:
        return math.prod(self.dims) * self.slices

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Sets the environment for importing jax and loading libtpu, so that they do not look for a TPU on this machine."""
        wanted = {"JAX_PLATFORMS": "cpu"}
        if self.kind != "cpu":
            wanted |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": _TPUS[self.kind][1], "TPU_WORKER_HOSTNAMES": "localhost"}
            # Nothing runs on a device, so several processes may load libtpu. jax can write such a program to its cache, but not read it.
            wanted |= {"TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def devices(self) -> list[jax.Device]:
        """The devices. Raises UserError if libtpu has no such topology, or if jax was started with fewer devices in this process."""
        import jax

        if self.kind == "cpu":
            with contextlib.suppress(RuntimeError):  # jax has started
                jax.config.update("jax_num_cpu_devices", self.chips)
            available = jax.devices("cpu")
            if len(available) < self.chips:
                raise UserError(f"{self}: jax has started with {len(available)} CPU devices in this process; compile in a new process")
            return available[: self.chips]
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if self.kind == "v4":
            options["chip_config_name"] = "megacore"  # a chip is one device, as on a machine
        if math.prod(self.dims) < 4:
            options["chips_per_host_bounds"] = (*self.dims, 1, 1)[:3]
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options).devices)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"--topology {self}: is unknown to libtpu ({str(error).splitlines()[0]}); use one such as {_KNOWN}") from error


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The topology of a name. Raises UserError for an invalid name, and for a TPU if libtpu is not installed."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kind, dims = (found[1], tuple(int(size) for size in found[2].split("x"))) if found else ("", ())
    wanted = 1 if kind == "cpu" else _TPUS[kind][0] if kind in _TPUS else 0
    if not dims or len(dims) != wanted or not all(dims):
        raise UserError(f"--topology {name}: is invalid; use one such as {_KNOWN}")
    if kind != "cpu" and "libtpu" not in sys.modules and importlib.util.find_spec("libtpu") is None:
        raise UserError(f'--topology {name}: needs libtpu, which is not installed; pip install "mimo_jax[tpu]"')
    return Topology(kind, dims, slices)
