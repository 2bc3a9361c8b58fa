"""Cost of one run of an optimised XLA program, read from its text: collectives, memory traffic, matrix products.

XLA's own cost analysis counts the body of a loop once, and a scanned model consists of loops. Here computations are walked from the entry
through the bodies of loops (times their trip counts), fusions, calls and conditionals (the costliest branch).

    cost = program_cost(compiled.as_text(), dict(mesh.shape))

With s input bytes per device, a device sends in a collective over n devices: all-gather s (n-1), reduce-scatter and all-to-all
s (n-1)/n, all-reduce 2 s (n-1)/n, collective-permute s. Memory traffic is what top-level operations read and write of arrays
that are not in on-chip memory: only the slice for a slice, only the update for an update in place. Kernels count with their operands and
results, and without matrix products.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mimo_jax.analysis.hlo import Computation, Instruction, convolution_flops, device_groups, numbers, parse, results, through

COLLECTIVES: dict[str, Callable[[int], float]] = {  # kind -> bytes that a device sends per input byte, among n devices
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "recv"}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
# A later piece of a collective that is fused with other operations: it was started in another fusion.
_LATER_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1")')


@dataclass
class Cost:
    """collectives: (kind, mesh axes) -> [count, bytes that a device sends]; memory: bytes; flops: of matrix products and convolutions;
    unknown: loops with an unknown trip count, which are counted once."""

    collectives: dict[tuple[str, tuple[str, ...]], list[float]] = field(default_factory=dict)
    memory: float = 0.0
    flops: float = 0.0
    unknown: set[str] = field(default_factory=set)

    def add(self, other: Cost, times: float = 1) -> None:
        for key, (count, sent) in other.collectives.items():
            own = self.collectives.setdefault(key, [0, 0.0])
            own[0] += count * times
            own[1] += sent * times
        self.memory += other.memory * times
        self.flops += other.flops * times
        self.unknown |= other.unknown


def program_cost(text: str, mesh: dict[str, int]) -> Cost:
    """The cost per device. text: an optimised program; mesh: axis name -> size, in the order in which devices are numbered."""
    program = _Program(text, mesh)
    return program.cost(program.entry)


class _Program:
    def __init__(self, text: str, mesh: dict[str, int]):
        self.computations, self.entry = parse(text)
        self.mesh = mesh
        self.costs: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        """The cost of one run of a computation."""
        if name not in self.costs:
            self.costs[name] = total = Cost()
            computation = self.computations[name]
            for instruction in computation.values():
                total.add(self.instruction_cost(instruction, computation))
        return self.costs[name]

    def instruction_cost(self, i: Instruction, within: Computation) -> Cost:
        made = Cost()
        kind = i.opcode.removesuffix("-start")
        if i.opcode == "while":
            trips = self.trips(i, within)
            made.add(self.cost(i.called("body")), 1 if trips is None else trips)
            if trips is None:
                made.unknown.add(i.name)
        elif i.opcode == "conditional":
            made.add(max(map(self.cost, i.branches()), key=lambda cost: (cost.memory, cost.flops)))
        elif i.opcode == "call":
            made.add(self.cost(i.called("to_apply")))
        elif i.opcode == "async-start":
            made.add(self.cost(i.called()))
        elif i.opcode == "fusion":
            inner = self.cost(i.called())
            made.add(Cost(inner.collectives, self.traffic(i, within), inner.flops, inner.unknown))
        elif i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or _free_call(i):
            pass
        else:
            if kind in COLLECTIVES or i.opcode == "send":
                self.collective(i, kind, within, made)
            made.memory = self.traffic(i, within)
            if i.opcode == "dot":
                contracted = numbers(i.rest, "lhs_contracting_dims")
                made.flops = 2.0 * math.prod(i.arrays[0].dims) * math.prod(within[i.operands[0]].arrays[0].dims[d] for d in contracted)
            elif i.opcode == "convolution":
                made.flops = convolution_flops(i, *(within[name].arrays[0].dims for name in i.operands))
        return made

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """Trip count of a loop that counts up to a limit in its state, as scans do; None if it is not known."""
        known = re.search(r'known_trip_count\\?"?:\{\\?"?n\\?"?:\\?"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        condition, body, start = (
            self.computations[loop.called("condition")],
            self.computations[loop.called("body")],
            within[loop.operands[0]],
        )
        test, state = condition.root, _element
        while test.opcode == "fusion":
            state = functools.partial(self.argument, condition, test, state)
            condition = self.computations[test.called()]
            test = condition.root
        if test.opcode != "compare" or start.opcode != "tuple":
            return None
        counter, limit = (self.linear(condition, name, state) for name in test.operands)
        places = [place for place in counter or {} if place is not None]
        if len(places) != 1 or limit is None:
            return None
        after = self.linear(body, body.root.operands[places[0]], _element)

        def at_start(value: dict) -> int | None:
            firsts = [self.linear(within, start.operands[place], _element) for place in value if place is not None]
            if any(first is None or set(first) - {None} for first in firsts):
                return None
            return value.get(None, 0) + sum(first.get(None, 0) for first in firsts)

        first, last = at_start(counter), at_start(limit)
        if first is None or last is None or after is None or set(after) - {None} != set(places) or not after.get(None):
            return None
        more = {"LT": 0, "NE": 0, "LE": 1}.get(re.search(r"direction=(\w+)", test.rest)[1])
        return None if more is None else max(0, -(-(last + more - first) // after[None]))

    def linear(self, within: Computation, name: str, state: Callable[[int], dict | None]) -> dict | None:
        """An integer as a sum {index in the loop's state: 1, None: constant}; None if it is not such a sum. state: the value at an index of
        the state, or of the arguments of a fusion."""
        i = through(within, name, ("bitcast", "copy"))
        if i.opcode == "constant":
            return {None: int(i.inside)} if re.fullmatch(r"-?\d+", i.inside) else None
        if i.opcode == "parameter":
            return state(int(i.inside))
        if i.opcode == "get-tuple-element":
            place, source = int(re.search(r"index=(\d+)", i.rest)[1]), within[i.operands[0]]
            if source.opcode == "parameter":
                return state(place)
            if source.opcode == "fusion":
                inner = self.computations[source.called()]
                return self.linear(inner, inner.root.operands[place], functools.partial(self.argument, within, source, state))
        if i.opcode == "fusion":
            inner = self.computations[i.called()]
            return self.linear(inner, inner.root.name, functools.partial(self.argument, within, i, state))
        if i.opcode == "add":
            parts = [self.linear(within, operand, state) for operand in i.operands]
            if None not in parts:
                return {place: sum(part.get(place, 0) for part in parts) for place in {**parts[0], **parts[1]}}
        return None

    def argument(self, within: Computation, fusion: Instruction, state: Callable[[int], dict | None], place: int) -> dict | None:
        return self.linear(within, fusion.operands[place], state)

    def collective(self, i: Instruction, kind: str, within: Computation, made: Cost) -> None:
        size = sum(array.bytes for name in i.operands for array in within[name].arrays)
        if i.opcode == "send":  # between slices; XLA has split off what stays within a slice
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
            if not transfer:
                return
            kind = {"ONE_TO_ONE": "collective-permute"}.get(transfer[1], transfer[1].lower().replace("_", "-"))
            axes, among = ("slice",), self.mesh.get("slice", 1)
        elif "source_target_pairs" in i.rest:
            pairs = re.search(r"source_target_pairs=\{((?:\{[^}]*\},?)*)\}", i.rest)[1]
            axes, among = self.axes([list(map(int, pair.split(","))) for pair in re.findall(r"\{([^}]*)\}", pairs)]), 2
        else:
            if _LATER_PIECE.search(i.rest):
                return
            groups = device_groups(i.rest, math.prod(self.mesh.values()))
            axes, among = self.axes(groups), len(groups[0])
        if axes:
            made.collectives[kind, axes] = [1, size * COLLECTIVES[kind](among)]

    def axes(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ."""
        places = np.stack(np.unravel_index(np.asarray(groups), tuple(self.mesh.values())))  # [axes, groups, devices]
        differ = (places != places[:, :, :1]).any((1, 2))
        return tuple(axis for axis, moves in zip(self.mesh, differ, strict=True) if moves)

    def traffic(self, i: Instruction, within: Computation) -> float:
        """Bytes that a top-level operation reads from memory and writes there."""
        operands = [(place, within[name].arrays[0]) for place, name in enumerate(i.operands) if within[name].arrays]
        read = sum(self.read(i, place, array.bytes) for place, array in operands if not array.on_chip)
        if i.opcode == "fusion":
            inner = self.computations[i.called()]
            if inner.root.opcode != "tuple":
                return read + (self.written(inner, inner.root.name) if any(not array.on_chip for array in i.arrays) else 0.0)
            given = zip(i.arrays, inner.root.operands, strict=True)
            return read + sum(self.written(inner, name) for array, name in given if not array.on_chip)
        if i.opcode.endswith("-start"):
            return read + sum(array.traffic for array in results(i))
        if i.opcode == "send":
            return read
        return read + (0.0 if all(array.on_chip for array in i.arrays) else self.written(within, i.name))

    def read(self, i: Instruction, place: int, size: float) -> float:
        """Bytes that an operation reads of one of its operands, which has `size`."""
        if i.opcode == "fusion":
            inner = self.computations[i.called()]
            return self.read_by_all(inner, inner.parameters[place], size)
        if place == 0 and i.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
            return min(size, results(i)[0].bytes)
        if place == 0 and i.opcode in ("dynamic-update-slice", "scatter") or _free_call(i) or _LATER_PIECE.search(i.rest):
            return 0.0
        return size

    def read_by_all(self, within: Computation, name: str, size: float) -> float:
        total = 0.0
        for user in within.users[name]:
            if user.opcode == "bitcast":
                total += self.read_by_all(within, user.name, size)
            elif user.opcode != "tuple":
                total += sum(self.read(user, place, size) for place, operand in enumerate(user.operands) if operand == name)
        return min(total, size)

    def written(self, within: Computation, name: str) -> float:
        """Bytes that are written to make a result: only the update for an update in place, nothing for what is passed through."""
        made = through(within, name)
        if made.opcode == "parameter" or _free_call(made):
            return 0.0
        if made.opcode in ("dynamic-update-slice", "scatter"):
            return within[made.operands[1 if made.opcode == "dynamic-update-slice" else -1]].arrays[0].bytes
        if made.opcode == "fusion" and len(made.arrays) == 1:
            inner = self.computations[made.called()]
            return self.written(inner, inner.root.name)
        return sum(array.bytes for array in made.arrays)


def _element(place: int) -> dict:
    return {place: 1}


def _free_call(i: Instruction) -> bool:
    return i.opcode == "custom-call" and any(f'custom_call_target="{name}"' in i.rest for name in _FREE_CALLS)
