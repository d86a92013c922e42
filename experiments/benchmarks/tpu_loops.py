"""Counts how many times each computation of a program compiled for a TPU runs, with its loops.

For eight or more chips, the compiler turns the gradient of a matrix into a loop, which computes one
part while another is sent. Its own counts of FLOPs and bytes include the body of a loop once.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

_HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(")
_CALLED = re.compile(r"(\w+)=\{?%([\w.-]+)")
_CONVOLUTION = re.compile(
    r"= \w+\[([\d,]*)\]\S* convolution\(%[\w.-]+, %([\w.-]+)\)"
    r"(?:, window=\{(.*?)\})?.*dim_labels=\w+_(\w+)->"
)
_RESULT = re.compile(r"^  (?:ROOT )?%([\w.-]+) = \w+\[([\d,]*)\]")


def computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation by its name; that of the entry computation is ""."""
    found: dict[str, list[str]] = defaultdict(list)
    name = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = "" if head[1] else head[2]
        elif line == "}":
            name = None
        elif name is not None:
            found[name].append(line)
    return dict(found)


def run_counts(text: str) -> Counter[str]:
    """Returns how many times each computation runs in one run of the program, by its name."""
    parts, counts = computations(text), Counter[str]()

    def run(name: str, times: int) -> None:
        counts[name] += times
        for line in parts.get(name, ()):
            called = dict(_CALLED.findall(line))
            trips = trip_count(parts, line) if " while(" in line else 1
            for callee in filter(parts.__contains__, called.values()):
                run(callee, times * trips)

    run("", 1)
    return counts


def body_runs(text: str) -> dict[str, int]:
    """Returns how many times the body of each loop runs in one run of the program, by its name."""
    bodies = set(re.findall(r" while\(.*body=%([\w.-]+)", text))
    return {name: times for name, times in run_counts(text).items() if name in bodies}


def trip_count(parts: Mapping[str, list[str]], line: str) -> int:
    """Returns the number of iterations of the loop in a line, as far as it is known, else 1.

    It is in the line itself, or follows from the constants of a loop that counts up from 0 by a
    constant while the count is less than another constant.
    """
    if known := re.search(r'"n":"(\d+)"', line):
        return int(known[1])
    names = dict(_CALLED.findall(line))
    condition, body = (_by_name(parts.get(names.get(key, ""), [])) for key in ("condition", "body"))
    compared, result = _root(condition, "compare"), _root(body, "tuple")
    if "direction=LT" not in compared or not result:
        return 1
    limits = [_constant(condition, name) for name in _operands(compared)]
    indices = [re.search(r"index=(\d+)", condition.get(name, "")) for name in _operands(compared)]
    limit = next((value for value in limits if value is not None), None)
    index = next((int(each[1]) for each in indices if each), None)
    if limit is None or index is None:
        return 1
    counter = body.get(_operands(result)[index], "")
    steps = [_constant(body, name) for name in _operands(counter) if " add(" in counter]
    step = next((value for value in steps if value), None)
    return math.ceil(limit / step) if step else 1


def _by_name(lines: list[str]) -> dict[str, str]:
    """Returns the lines of a computation by the names of their results."""
    return {found[1]: line for line in lines if (found := re.match(r"^  (?:ROOT )?%(\S+) =", line))}


def _root(lines: Mapping[str, str], opcode: str) -> str:
    """Returns the line of a computation's result, or "" if it is another operation."""
    results = (line for line in lines.values() if line.startswith("  ROOT "))
    return next((line for line in results if f" {opcode}(" in line), "")


def _constant(lines: Mapping[str, str], name: str) -> int | None:
    found = re.search(r" constant\((\d+)\)", lines.get(name, ""))
    return int(found[1]) if found else None


def _operands(line: str) -> list[str]:
    """Returns the names of an operation's operands."""
    inside = re.search(r"[a-z-]\(((?:%[\w.-]+(?:, /\*index=\d+\*/|, )?)+)\)", line)
    return re.findall(r"%([\w.-]+)", inside[1]) if inside else []


def repeated_flops(text: str) -> float:
    """Returns the FLOPs of the matrix products in all iterations of loops but the first."""
    parts, counts = computations(text), run_counts(text)
    total = 0.0
    for name, times in counts.items():
        if times > 1:
            shapes = _shapes(parts[name])
            total += (times - 1) * sum(_flops(line, shapes) for line in parts[name])
    return total


def _shapes(lines: list[str]) -> dict[str, list[int]]:
    """Returns the shape of each array of a computation by its name."""
    found = filter(None, map(_RESULT.match, lines))
    return {each[1]: [int(n) for n in each[2].split(",") if n] for each in found}


def _flops(line: str, shapes: Mapping[str, list[int]]) -> float:
    """Returns the FLOPs of a matrix product, which is a convolution in a TPU's program, else 0."""
    if not (parts := _CONVOLUTION.search(line)):
        return 0.0
    result, kernel, window, labels = parts.groups()
    summed = shapes[kernel][labels.index("i")]
    taps = 1
    if window and "lhs_dilate" not in window:  # a dilated window has one element: a batched product
        taps = math.prod(int(n) for n in re.findall(r"\d+", window.split(" ")[0]))
    return 2.0 * math.prod(int(n) for n in result.split(",") if n) * summed * taps
