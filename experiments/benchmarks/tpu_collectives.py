"""Reads the collective operations of a compiled program from its text."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.tpu_loops import run_counts

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(.*?(?:replica_groups=mesh\[(.*?)\] \{(.*?)\}|(?:groups|pairs)=(\S+))"
)
_PART_OF_A_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="')


class Collective(NamedTuple):
    """Holds one collective operation of a compiled program."""

    kind: str  # opcode; reduce-scatter also for an all-reduce of which each device keeps a part
    groups: set[frozenset[int]]  # groups of devices, which are numbered along the mesh
    counts: list[int]  # number of elements of each whole array
    bytes: int  # of these arrays
    times: int = 1  # number of runs, in a loop

    def sent(self) -> float:
        """Returns the least bytes that a device sends, if it sends to all others of its group."""
        if self.kind == "collective-permute":
            return self.bytes * self.times
        others = max(map(len, self.groups)) - 1
        passes = 2 if self.kind == "all-reduce" else 1
        return self.bytes * self.times * passes * others / (others + 1)


def collectives(text: str) -> Iterator[Collective]:
    """Yields the collectives of a compiled program, given its text.

    Groups that are written neither as axes of the mesh nor as lists count as one group.
    """
    computation, chains = "", set()
    times = run_counts(text)
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%(\S+) \(", line):
            computation = "" if head[1] else head[2]
        if not (parts := _COLLECTIVE.search(line)):
            continue
        if chain := _PART_OF_A_CHAIN.search(line):  # it is repeated in each fusion that it spans
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        shapes, kind, axes, joined, listed = parts.groups()
        if computation.startswith("all-reduce-scatter"):  # followed by a slice of the sum
            kind = "reduce-scatter"
        arrays = _arrays(shapes)
        if "-start(" in line and kind != "all-reduce":  # operands, results, and flags
            half = len(arrays) // 2
            whole = {"all-gather": arrays[half:], "reduce-scatter": arrays[:half]}
            arrays = whole.get(kind, arrays[1:2])
        yield Collective(
            kind,
            set(map(frozenset, _groups(axes, joined, listed))),
            [count for count, _ in arrays],
            sum(count * bits // 8 for count, bits in arrays),
            max(1, times[computation]),
        )


def _arrays(shapes: str) -> list[tuple[int, int]]:
    """Returns the number of elements, and the bits of each, of every array."""
    arrays = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", shapes)
    return [
        (math.prod(int(size) for size in sizes.split(",") if size), int(bits or 8))
        for _, bits, sizes in arrays
    ]


def _groups(axes: str, joined: str, listed: str) -> list[list[int]]:
    """Returns the groups of devices, which are numbered along the mesh.

    Args:
      axes, joined: axes of the mesh with their sizes, and those along which devices are grouped.
      listed: the groups as a list or as an iota, if there are no axes.

    """
    if not axes:
        if counted := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", listed):
            count, size, shape, order = counted.groups()
            grid = np.arange(int(count) * int(size)).reshape([int(n) for n in shape.split(",")])
            grid = grid.transpose([int(axis) for axis in order.split(",")] if order else None)
            return grid.reshape(int(count), int(size)).tolist()
        groups = re.findall(r"\{([\d,]+)\}", listed)
        return [[int(number) for number in group.split(",")] for group in groups] or [[-1]]
    extents = [int(number) for number in re.findall(r"=(\d+)", axes)]
    last = [int(number) for number in re.findall(r"axis_(\d+)", joined)]
    order = [axis for axis in range(len(extents)) if axis not in last] + last
    numbers: Any = np.arange(math.prod(extents)).reshape(extents).transpose(order)
    return numbers.reshape(-1, math.prod(extents[axis] for axis in last)).tolist()
