"""Measured latencies beside a saved model: clock.json, a table for each engine and precision.

Shape letters: E exit, B batch size, L length, N texts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.files import read_json, write_json

LATENCY_FILE = "clock.json"


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Holds measured times of one engine in one precision."""

    engine: str  # a name of ENGINES
    precision: str
    threads: int  # that compute a batch
    machine: str  # the host, the device, versions: what a target in milliseconds must find again
    batch_sizes: tuple[int, ...]  # B that were measured, ascending; 1 is the first
    lengths: tuple[int, ...]  # L that were measured, ascending
    milliseconds: np.ndarray  # float64 [number of B, number of L, E], each stage, a whole batch

    def until_exit(self, tokens: int) -> np.ndarray:
        """Returns the milliseconds until each exit of a text by itself, float64 [E]."""
        long_enough = [i for i, length in enumerate(self.lengths) if length >= tokens]
        place = long_enough[0] if long_enough else -1
        return np.cumsum(self.milliseconds[0, place])

    def interpolate_until_exit(self, lengths: np.ndarray) -> np.ndarray:
        """Predicts the milliseconds until each exit of texts by themselves, float64 [N, E].

        Linear in the length between the lengths that were measured, and beyond them.

        lengths: of the texts, padded, int [N].
        """
        known, each = np.asarray(self.lengths), np.cumsum(self.milliseconds[0], axis=-1)  # [L, E]
        if len(known) == 1:
            return np.repeat(each, len(lengths), axis=0)
        place = np.clip(np.searchsorted(known, lengths) - 1, 0, len(known) - 2)  # [N]
        share = (lengths - known[place]) / (known[place + 1] - known[place])  # [N]
        found = each[place] + share[:, None] * (each[place + 1] - each[place])
        return np.maximum(found, 0.0)

    def lines(self, layers: Iterable[int]) -> list[str]:
        """Formats the milliseconds of each stage as a table; `layers` are the exits'."""
        heads = "".join(f"{'to ' + str(layer):>9}" for layer in layers)
        table = [f"{'batch':>6}{'length':>8}{heads}{'all':>9}  milliseconds, {self.machine}"]
        for size, by_length in zip(self.batch_sizes, self.milliseconds, strict=True):
            for length, stages in zip(self.lengths, by_length, strict=True):
                each = "".join(f"{value:9.2f}" for value in stages)
                table.append(f"{size:6d}{length:8d}{each}{stages.sum():9.2f}")
        return table


def write_tables(folder: Path, tables: Sequence[LatencyTable]) -> Path:
    """Writes tables into clock.json of a model's folder; returns its path.

    Those of other engines, precisions or machines stay. Raises UserError if it cannot be written.
    """
    path, new = folder / LATENCY_FILE, {table.machine for table in tables}
    try:
        kept = [table for table in read_tables(folder) if table.machine not in new]
    except UserError:  # damaged: measured again
        kept = []
    rows = [
        dataclasses.asdict(table) | {"milliseconds": table.milliseconds.tolist()}
        for table in [*kept, *tables]
    ]
    try:
        write_json(path, {"rows": rows})
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written to ({error.strerror}): copy the model first"
        ) from error
    return path


def read_tables(folder: Path) -> list[LatencyTable]:
    """Reads clock.json of a model's folder, [] where there is none.

    Raises UserError where it is damaged.
    """
    path = folder / LATENCY_FILE
    if not path.exists():
        return []
    try:
        return [_parse(row) for row in read_json(path)["rows"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error!r}): measure again") from error


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
        raise ValueError("of another shape")
    return table
