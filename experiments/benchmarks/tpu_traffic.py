"""Counts the bytes of main memory that a TPU's program reads and writes, by function.

They are read from the compiled text. Layouts with S(1) are in the chip's fast memory, which does
not count.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmarks.tpu_loops import body_runs

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # other types have them in their names
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
# Operations that move no bytes.
_FREE = {"bitcast", "tuple", "get-tuple-element", "parameter", "constant", "copy-done"}
_FREE |= {"async-done", "all-reduce-done", "slice-done", "while", "after-all", "iota"}
_LINE = re.compile(r"^  (?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")


class Operation(NamedTuple):
    """Holds an operation of a compiled program's text."""

    name: str
    opcode: str
    source: str  # innermost function of the package that it comes from, "" for none
    backward: bool  # whether it computes a gradient
    written: int  # bytes of main memory
    read: int  # bytes of main memory
    times: int  # number of runs, in a loop


def traffic(text: str, package: str = "/sweet_jax/") -> Counter[tuple[str, bool]]:
    """Returns the bytes of main memory read and written, by function and whether it is backward.

    Operations that come from no function of the package are counted under their opcode. `package`
    is a part of the paths of its files.
    """
    moved: Counter[tuple[str, bool]] = Counter()
    for operation in operations(text, package):
        function = operation.source or operation.opcode
        count = operation.times * (operation.written + operation.read)
        moved[function, operation.backward] += count
    return moved


def operations(text: str, package: str = "/sweet_jax/") -> Iterator[Operation]:
    """Yields the operations of the entry computation and of the bodies of loops."""
    sources, trips, shown = _sources(text, package), body_runs(text), ""
    results: dict[str, int] = {}  # bytes moved by each read of a result
    copied: dict[str, int] = {}  # bytes moved into fast memory for the operation that uses them
    origins: dict[str, str] = {}  # source of each result
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
            # The destination comes first in the result of a copy, and second in that of a slice.
            arrays = [array[0] for array in _ARRAY.finditer(result)]
            result = arrays[opcode == "slice-start"]
            if not _bytes(result):
                copied[name] = min(read, _bytes(result, everywhere=True))
                continue
        if re.search("gather|dynamic-slice", f"{name} {opcode}"):  # reads a part of an operand
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
    """Returns the bytes of a result (an array, or a tuple of arrays) that are in main memory.

    everywhere: whether those in fast memory count too.
    """
    total = 0
    for kind, sizes, layout in _ARRAY.findall(result):
        if everywhere or "S(" not in layout:
            digits = re.search(r"\d+", kind)
            bits = _BITS.get(kind, int(digits[0]) if digits else 0)
            total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _table(text: str, name: str) -> dict[int, str]:
    """Returns the rows, by number, of one of the tables at the beginning of the text."""
    part = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    rows = part[1].splitlines() if part else []
    return {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows}


def _sources(text: str, package: str) -> dict[int, str]:
    """Returns the innermost function of the package, "" for none, by number of a stack frame."""
    files, functions = _table(text, "FileNames"), _table(text, "FunctionNames")
    places, frames = _table(text, "FileLocations"), _table(text, "StackFrames")

    def number(key: str, row: str) -> int:
        match = re.search(rf"{key}=(\d+)", row)
        return int(match[1]) if match else 0

    found: dict[int, str] = {}
    for frame, row in frames.items():
        place = places.get(number("file_location_id", row), "")
        parent = number("parent_frame_id", row)
        if package in files.get(number("file_name_id", place), ""):
            found[frame] = functions[number("function_name_id", place)].strip('"')
        else:
            found[frame] = found.get(parent - 1, "")
    return found
