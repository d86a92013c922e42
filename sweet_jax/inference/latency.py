"""Measured latency: what each stage takes on this machine, in clock.json beside a saved model.

Shape letters: E exit, B batch size, L length.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.files import read_json, write_json
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import Engine, Stage, StageBatch, padded_lengths

LATENCY_FILE = "clock.json"
_SECONDS = 0.2  # that a stage is run for, at least


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Holds measured times."""

    machine: str  # that they were measured on, from `describe_machine`
    batch_sizes: tuple[int, ...]  # B that were measured, ascending; 1 is the first
    lengths: tuple[int, ...]  # L that were measured, ascending
    milliseconds: np.ndarray  # float64 [number of B, number of L, E], each stage, a whole batch

    def until_exit(self, tokens: int) -> np.ndarray:
        """Returns the milliseconds until each exit of a text by itself, float64 [E]."""
        long_enough = [i for i, length in enumerate(self.lengths) if length >= tokens]
        place = long_enough[0] if long_enough else -1
        return np.cumsum(self.milliseconds[0, place])

    def lines(self, layers: Iterable[int]) -> list[str]:
        """Formats the milliseconds of each stage as a table; `layers` are the exits'."""
        heads = "".join(f"{'to ' + str(layer):>9}" for layer in layers)
        table = [f"{'batch':>6}{'length':>8}{heads}{'all':>9}  milliseconds, {self.machine}"]
        for size, by_length in zip(self.batch_sizes, self.milliseconds, strict=True):
            for length, stages in zip(self.lengths, by_length, strict=True):
                each = "".join(f"{value:9.2f}" for value in stages)
                table.append(f"{size:6d}{length:8d}{each}{stages.sum():9.2f}")
        return table


def measure_latency(
    engine: Engine,
    lengths: tuple[int, ...],
    batch_sizes: Iterable[int],
    progress: Callable[[], object],
) -> LatencyTable:
    """Times every stage with full batches of texts of these L, ascending, at these B and at 1.

    `progress` is called after each stage at each B and L.
    """
    sizes = tuple(sorted({1, *batch_sizes}))
    stages = engine.stages()
    times = np.zeros((len(sizes), len(lengths), len(stages)))  # [number of B, number of L, E]
    for place in np.ndindex(times.shape):
        size, length, stage = sizes[place[0]], lengths[place[1]], stages[place[2]]
        times[place] = _time_stage(engine, stage, size, length)
        progress()
    return LatencyTable(describe_machine(engine), sizes, lengths, times)


def usual_lengths(max_length: int) -> tuple[int, ...]:
    """Returns every other padded length, ascending; the longest is among them."""
    return padded_lengths(max_length)[::-2][::-1]


def _time_stage(engine: Engine, stage: Stage, size: int, length: int) -> float:
    """Returns the median milliseconds of a run; the first two, which compile, are not counted."""
    rows = np.stack([np.arange(size), np.full(size, length)]).astype(np.int32)  # [2, B]
    texts = np.zeros((2, size, length), np.int32)
    texts[0] = np.random.default_rng(0).integers(0, engine.vocabulary_size, texts[0].shape)
    batch = StageBatch(length, rows, texts if stage.embeds else None)
    states = engine.new_states(size, length) if stage.uses_states else None
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        states = engine.run(stage, batch, states).states
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[2:])


def describe_machine(engine: Engine) -> str:
    """Describes what times depend on: the machine, and the engine with its device and dtype."""
    return f"{platform.node()}, {engine.description}"


def write_latency(folder: Path, table: LatencyTable) -> Path:
    """Writes clock.json into a model's folder; returns its path. Raises UserError if it cannot."""
    values = dataclasses.asdict(table) | {"milliseconds": table.milliseconds.tolist()}
    try:
        write_json(folder / LATENCY_FILE, values)
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written to ({error.strerror}): copy the model first"
        ) from error
    return folder / LATENCY_FILE


def read_latency(model: ModelArtifact, engine: Engine) -> LatencyTable | None:
    """Reads what `write_latency` wrote; returns None where there is no file.

    Raises UserError where it is damaged, or of another machine, engine or dtype.
    """
    path, here = model.folder / LATENCY_FILE, describe_machine(engine)
    table = read_latency_file(path, len(model.layers))
    if table is not None and table.machine != here:
        raise UserError(
            f"{str(path)!r} was measured on {table.machine}, and this is {here}: measure again"
        )
    return table


def read_latency_file(path: Path, exits: int) -> LatencyTable | None:
    """Reads a clock.json, of whichever machine; returns None where there is no file.

    Raises UserError where it is damaged, or not of a model with so many exits.
    """
    if not path.exists():
        return None
    try:
        values = read_json(path)
        table = LatencyTable(
            str(values["machine"]),
            tuple(values["batch_sizes"]),
            tuple(values["lengths"]),
            np.asarray(values["milliseconds"], np.float64),
        )
        if table.milliseconds.shape != (len(table.batch_sizes), len(table.lengths), exits):
            raise ValueError("of another shape")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error!r}): measure again") from error
    return table
