"""Parser for the text of an optimised XLA program, as `Compiled.as_text()` returns it, for TPU, CPU or GPU."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # types whose names do not contain their number of bits
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")


class Array(NamedTuple):
    """An array of the program. bytes: without padding; on_chip: whether it is outside the device's main memory."""

    dims: tuple[int, ...]
    bytes: float
    on_chip: bool

    @property
    def traffic(self) -> float:
        return 0.0 if self.on_chip else self.bytes


class Instruction(NamedTuple):
    """One line: result %name = opcode(operands), rest. `arrays` are those of its result, several in order if that is a tuple."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str  # between the parentheses
    rest: str

    def called(self, key: str = "calls") -> str | None:
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    def branches(self) -> list[str]:
        """Names of the computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return _NAME.findall(listed[1]) if listed else [self.called("true_computation"), self.called("false_computation")]


class Computation(dict):
    """name -> Instruction, in order; `root` is the one whose result is the computation's."""

    root: Instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        made: dict[str, list[Instruction]] = {name: [] for name in self}
        for instruction in self.values():
            for operand in set(instruction.operands):
                made[operand].append(instruction)
        return made

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.inside): name for name, i in self.items() if i.opcode == "parameter"}


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """({name: Computation}, name of the entry)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    # The description of a kernel may contain line breaks; the line of an instruction is indented.
    for line in re.split(r"\n(?=  %|  ROOT |}\n|}$|ENTRY |%|\n)", text):
        if current is None:
            header = _HEADER.match(line.lstrip("\n"))
            if header:
                current = computations[header[2]] = Computation()
                entry = header[2] if header[1] else entry
        elif line.strip() == "}":
            current = None
        else:
            made = _instruction(line.strip().removeprefix("ROOT "))
            current[made.name] = made
            if line.startswith("  ROOT "):
                current.root = made
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    arrays = tuple(_array(*found) for found in _ARRAY.findall(rest[: end + 1]))
    start = rest.index("(", end + 1)
    opcode, stop = rest[end + 1 : start].strip(), _closing(rest, start)
    inside = rest[start + 1 : stop]
    return Instruction(name.lstrip("%"), arrays, opcode, tuple(_NAME.findall(inside)), inside, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


def _array(kind: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(size.strip(" <=")) for size in dims.split(",") if size)
    bits = _BITS.get(kind) if kind in _BITS else int((re.search(r"\d+", kind) or [0])[0])
    return Array(sizes, math.prod(sizes) * bits / 8, bool(re.search(r"S\([1-9]", layout)))


def through(within: Computation, name: str, opcodes: Sequence[str] = ("bitcast",)) -> Instruction:
    """The instruction that produces `name`, skipping operations that change nothing."""
    while within[name].opcode in opcodes:
        name = within[name].operands[0]
    return within[name]


def results(i: Instruction) -> tuple[Array, ...]:
    """The results of an operation, without the operands and flags that an asynchronous start also returns."""
    if not i.opcode.endswith("-start"):
        return i.arrays
    first = 0 if i.opcode in ("copy-start", "all-reduce-start") else len(i.operands)
    return i.arrays[first : first + len(i.operands)]


def device_groups(rest: str, devices: int) -> np.ndarray:
    """[groups, devices of a group] of a collective's `replica_groups`, in any of the forms that XLA writes:

    {{0,1},{2,3}} · {} · [2,2]<=[4] · [2,2]<=[2,2]T(1,0) · mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'} · mesh['a'=4] {'a':(2)2}
    """
    mesh = re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", rest)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        moving = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[3])
        dims: list[int] = []  # sizes of the axes; an axis of which only a part moves is split
        moves: list[bool] = []
        for name, size in sizes.items():
            done = 1
            for before, part in sorted((int(before or 1), int(part or size)) for axis, before, part in moving if axis == name):
                dims, moves, done = [*dims, before // done, part], [*moves, False, True], before * part
            dims, moves = [*dims, size // done], [*moves, False]
        ids = _device_ids(mesh[2], devices).reshape(dims)
        width = math.prod(size for size, moved in zip(dims, moves, strict=True) if moved)
        return ids.transpose(np.argsort(moves, kind="stable")).reshape(-1, width)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
    if listed:
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(groups or [range(devices)])
    shape, ids = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest).groups()
    return _device_ids(ids, devices).reshape([int(size) for size in shape.split(",")])


def _device_ids(text: str | None, devices: int) -> np.ndarray:
    """Device ids in order: "[4,2]T(1,0)" is an array of that shape, transposed; "0,2,1,3" lists them."""
    if not text:
        return np.arange(devices)
    if not text.startswith("["):
        return np.array([int(number) for number in text.split(",")])
    dims, order = ([int(n) for n in part.split(",")] for part in re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text + "T(0)").groups())
    return np.arange(math.prod(dims)).reshape(dims).transpose(order if len(order) == len(dims) else None).ravel()


def numbers(rest: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", rest)
    return [int(number) for number in found[1].split(",") if number] if found else []


def convolution_flops(i: Instruction, image: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """FLOPs without products with padding or with the holes of a dilated image: XLA for TPU writes batched matrix products in that way."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    made = i.arrays[0].dims
    flops = 2.0 * made[out.index("b")] * made[out.index("f")] * kernel[rhs.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]))
    for d in range(len(out) - 2):
        stride, holes, spread = (int(window[key].split("x")[d]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        outputs, taps = np.arange(made[out.index(str(d))]), np.arange(kernel[rhs.index(str(d))])
        at = outputs[:, None] * stride - before + taps * spread
        last = (image[lhs.index(str(d))] - 1) * holes
        flops *= np.count_nonzero((at >= 0) & (at <= last) & (at % holes == 0))
    return float(flops)
