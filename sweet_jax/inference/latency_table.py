"""Measured latencies of a saved model: clock.json holds a table for each engine and precision.

Shape letters: E exit, B batch size, L length, N texts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.directories import write_error
from sweet_jax.errors import UserError
from sweet_jax.files import read_json, write_json

LATENCY_FILE = "clock.json"


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Holds measured times of one engine in one precision."""

    engine: str  # a name of ENGINES, or module:OBJECT
    precision: str
    threads: int  # number of threads that compute a batch
    machine: str  # host, device and versions, which must match for a target in milliseconds
    batch_sizes: tuple[int, ...]  # measured B, ascending; the first is 1
    lengths: tuple[int, ...]  # measured L, ascending
    milliseconds: np.ndarray  # float64 [number of B, number of L, E], of a batch in each stage

    def until_exit(self, tokens: int) -> np.ndarray:
        """Returns the milliseconds until each exit for a text by itself, float64 [E].

        They are those of the smallest measured length that fits the text, or else of the longest.
        """
        long_enough = [i for i, length in enumerate(self.lengths) if length >= tokens]
        index = long_enough[0] if long_enough else -1
        return np.cumsum(self.milliseconds[0, index])

    def interpolate_until_exit(self, lengths: np.ndarray) -> np.ndarray:
        """Predicts the milliseconds until each exit for texts by themselves, float64 [N, E].

        Interpolates linearly between the measured lengths, and extrapolates beyond them.

        Args:
          lengths: padded lengths of the texts, int [N].

        """
        measured = np.asarray(self.lengths)  # [L]
        times = np.cumsum(self.milliseconds[0], axis=-1)  # [L, E]
        if len(measured) == 1:
            return np.repeat(times, len(lengths), axis=0)
        index = np.clip(np.searchsorted(measured, lengths) - 1, 0, len(measured) - 2)  # [N]
        share = (lengths - measured[index]) / (measured[index + 1] - measured[index])  # [N]
        predicted = times[index] + share[:, None] * (times[index + 1] - times[index])
        return np.maximum(predicted, 0.0)

    def lines(self, layers: Iterable[int]) -> list[str]:
        """Formats the milliseconds of each stage as a table; `layers` are those of the exits."""
        heads = "".join(f"{'to ' + str(layer):>9}" for layer in layers)
        table = [f"{'batch':>6}{'length':>8}{heads}{'all':>9}  milliseconds, {self.machine}"]
        for size, by_length in zip(self.batch_sizes, self.milliseconds, strict=True):
            for length, stages in zip(self.lengths, by_length, strict=True):
                cells = "".join(f"{value:9.2f}" for value in stages)
                table.append(f"{size:6d}{length:8d}{cells}{stages.sum():9.2f}")
        return table


def write_tables(folder: Path, tables: Sequence[LatencyTable]) -> Path:
    """Writes tables to clock.json in a model's folder; returns its path.

    Tables of other engines, precisions or machines are kept. Raises UserError if the file cannot be
    written.
    """
    path, new = folder / LATENCY_FILE, {_identity(table) for table in tables}
    try:
        unchanged = [table for table in read_tables(folder) if _identity(table) not in new]
    except UserError:  # a damaged file is replaced
        unchanged = []
    rows = [
        dataclasses.asdict(table) | {"milliseconds": table.milliseconds.tolist()}
        for table in [*unchanged, *tables]
    ]
    try:
        write_json(path, {"rows": rows})
    except OSError as error:
        raise _not_writable(folder, error) from error
    return path


def check_model_writable(folder: Path) -> None:
    """Raises UserError unless tables can be written to a model's folder."""
    if error := write_error(folder):
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    """Returns the error for a model's folder that could not be written to."""
    return UserError(
        f"{str(folder)!r} is not writable ({error.strerror}): copy the model to another folder"
    )


def read_tables(folder: Path) -> list[LatencyTable]:
    """Reads clock.json in a model's folder; returns [] if there is none.

    Raises UserError if it is damaged.
    """
    path = folder / LATENCY_FILE
    if not path.exists():
        return []
    try:
        return [_parse(row) for row in read_json(path)["rows"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error!r}): measure again") from error


def _identity(table: LatencyTable) -> tuple[str, str, str]:
    """Returns the identity of a table: a new table replaces an old one with the same identity."""
    return table.engine, table.precision, table.machine


def _parse(row: Any) -> LatencyTable:
    table = LatencyTable(
        str(row["engine"]),
        str(row["precision"]),
        int(row["threads"]),
        str(row["machine"]),
        tuple(row["batch_sizes"]),
        tuple(row["lengths"]),
        np.asarray(row["milliseconds"], np.float64),
    )
    sizes = (len(table.batch_sizes), len(table.lengths))
    if table.milliseconds.ndim != 3 or table.milliseconds.shape[:2] != sizes:
        raise ValueError("milliseconds of the wrong shape")
    return table
