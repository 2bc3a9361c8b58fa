"""Specifications of accelerators by jax's `device_kind`: one table for memory estimates, roofline estimates and utilisation.

Peak bf16 FLOP/s, memory and bandwidths per chip are from the manufacturers' data sheets. `link` is the one-way bandwidth to the other
chips of a slice (TPU) or host (GPU); `network` is the one-way bandwidth per chip to other slices or hosts, as usually provisioned.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

GIB = 2**30


class Hardware(NamedTuple):
    """name; memory: bytes that a program may use; flops: peak bf16 FLOP/s; bandwidth (of the memory), link and network: bytes/s."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float


# regex on `device.device_kind` -> its row; the first match counts.
TABLE: dict[str, Hardware] = {
    r"^TPU v4$": Hardware("TPU v4", 31 * GIB, 275e12, 1.228e12, 150e9, 3.1e9),
    r"^TPU (v5 lite|v5e)$": Hardware("TPU v5e", int(15.75 * GIB), 197e12, 0.819e12, 100e9, 3.1e9),
    r"^TPU (v5|v5p)$": Hardware("TPU v5p", int(95.74 * GIB), 459e12, 2.765e12, 300e9, 6.2e9),
    r"^TPU (v6 lite|v6e)$": Hardware("TPU v6e", int(31.25 * GIB), 918e12, 1.638e12, 224e9, 6.2e9),
    r"H200": Hardware("H200", 139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    r"H100 PCIe": Hardware("H100 PCIe", 79 * GIB, 756e12, 2.0e12, 64e9, 25e9),
    r"H100": Hardware("H100", 79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    r"B200": Hardware("B200", 178 * GIB, 2250e12, 8.0e12, 900e9, 50e9),
    r"A100.*80": Hardware("A100 80GB", 79 * GIB, 312e12, 2.039e12, 300e9, 25e9),
    r"A100": Hardware("A100 40GB", 39 * GIB, 312e12, 1.555e12, 300e9, 25e9),
    r"A800": Hardware("A800", 79 * GIB, 312e12, 2.039e12, 200e9, 25e9),
    r"L40S": Hardware("L40S", 44 * GIB, 362e12, 0.864e12, 32e9, 12.5e9),
    r"L4\b": Hardware("L4", 22 * GIB, 121e12, 0.3e12, 16e9, 6.2e9),
    r"RTX 4090": Hardware("RTX 4090", 23 * GIB, 165e12, 1.008e12, 32e9, 12.5e9),
}


def find_hardware(kind: str) -> Hardware | None:
    """The row of a `device.device_kind`; None for one that is not in the table, such as a CPU."""
    return next((row for pattern, row in TABLE.items() if re.search(pattern, kind)), None)


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a program may use on a device, which may belong to a machine that is not available; None if this is not known."""
    row = find_hardware(device.device_kind)
    if row is not None:
        return row.memory
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # the device is only described by a topology
        return None
