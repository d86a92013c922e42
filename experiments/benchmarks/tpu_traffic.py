"""Where a program compiled for a TPU moves its bytes: by the function that an operation comes from.

Read from the compiled text. Only what crosses a chip's main memory counts: layouts name the memory
space, and S(1) is the chip's fast memory beside the units that compute.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmarks.tpu_loops import body_runs

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # of others, the number in their name
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_FREE = {"bitcast", "tuple", "get-tuple-element", "parameter", "constant", "copy-done"}
_FREE |= {"async-done", "all-reduce-done", "slice-done", "while", "after-all", "iota"}
_LINE = re.compile(r"^  (?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")


class Operation(NamedTuple):
    """Holds an operation of a compiled program's text."""

    name: str
    opcode: str
    source: str  # the innermost function of this package that it comes from; "" for none
    backward: bool  # whether a gradient is what it computes
    written: int  # bytes of main memory
    read: int  # bytes of main memory
    times: int  # that it runs, in a loop


def traffic(text: str, package: str = "/sweet_jax/") -> Counter[tuple[str, bool]]:
    """Returns the bytes of main memory read and written, by (function, whether backward)."""
    found: Counter[tuple[str, bool]] = Counter()
    for operation in operations(text, package):
        moved = operation.times * (operation.written + operation.read)
        found[operation.source or operation.opcode, operation.backward] += moved
    return found


def operations(text: str, package: str = "/sweet_jax/") -> Iterator[Operation]:
    """Yields the operations of the entry computation and of the loops' bodies."""
    sources, trips, shown = _sources(text, package), body_runs(text), ""
    results: dict[str, int] = {}  # bytes that each read of a result moves
    copied: dict[str, int] = {}  # bytes that were moved into fast memory, for the next operation
    origins: dict[str, str] = {}  # the sources of results
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%(\S+) \(", line):
            shown = head[2] if head[1] or head[2] in trips else ""
            results, copied = {}, {}
        if not shown or not (parts := _LINE.match(line)):
            continue
        name, result, opcode, rest = parts.groups()
        operands = re.findall(r"%([\w.-]+)", _operands(rest))
        if opcode in ("copy-done", "slice-done") or "ConcatBitcast" in rest:
            copied[name] = sum(copied.pop(o, 0) for o in operands)
            results[name] = _bytes(result)
            continue
        read = sum(results.get(o, 0) + copied.pop(o, 0) for o in operands)
        if opcode in ("copy-start", "slice-start"):
            # The copy, and what is copied: the other way round where it is a slice.
            arrays = [array[0] for array in _ARRAY.finditer(result)]
            result = arrays[opcode == "slice-start"]
            if not _bytes(result):
                copied[name] = min(read, _bytes(result, everywhere=True))
                continue
        if re.search("gather|dynamic-slice", f"{name} {opcode}"):  # a part of an operand
            read = min(read, _bytes(result, everywhere=True))
        results[name] = _bytes(result)
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        source = sources.get(int(frame[1]), "") if frame else ""
        if not source and operands:
            source = origins.get(operands[0], "")
        origins[name] = source
        if opcode in _FREE:
            continue
        backward = "transpose(" in (re.search(r'op_name="([^"]*)"', rest) or [""])[0]
        yield Operation(name, opcode, source, backward, _bytes(result), read, trips.get(shown, 1))


def _operands(rest: str) -> str:
    """Returns the text up to the parenthesis that closes the operands."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:at]
    return rest


def _bytes(result: str, *, everywhere: bool = False) -> int:
    """Returns the bytes of a result, an array or a tuple of arrays, that are in main memory."""
    total = 0
    for kind, sizes, layout in _ARRAY.findall(result):
        if everywhere or "S(" not in layout:
            digits = re.search(r"\d+", kind)
            bits = _BITS.get(kind, int(digits[0]) if digits else 0)
            total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _table(text: str, name: str) -> dict[int, str]:
    """Returns one of the tables that the text begins with, by number."""
    part = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    rows = part[1].splitlines() if part else []
    return {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows}


def _sources(text: str, package: str) -> dict[int, str]:
    """Returns the innermost function of a package of each stack frame, by the frame's number."""
    files, functions = _table(text, "FileNames"), _table(text, "FunctionNames")
    places, frames = _table(text, "FileLocations"), _table(text, "StackFrames")

    def number(key: str, row: str) -> int:
        return int((re.search(rf"{key}=(\d+)", row) or [0, "0"])[1])

    found: dict[int, str] = {}
    for frame, row in frames.items():
        place = places.get(number("file_location_id", row), "")
        parent = number("parent_frame_id", row)
        if package in files.get(number("file_name_id", place), ""):
            found[frame] = functions[number("function_name_id", place)].strip('"')
        else:
            found[frame] = found.get(parent - 1, "")
    return found
