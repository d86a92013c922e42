"""Measures what each stage of a saved model takes on this machine, by engine and precision.

Shape letters: E exit, B batch size, L length.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import (
    Engine,
    Stage,
    StageBatch,
    padded_length,
    padded_lengths,
)
from sweet_jax.inference.engine_choice import EngineChoice
from sweet_jax.inference.latency_table import LATENCY_FILE, LatencyTable, read_tables

TABLE_NOTE = (
    '"to E" is the stage from the exit before to exit E, "all" the sum: a text that leaves nowhere '
    "early; a batch is computed at once, and its texts have the same length, in tokens"
)
_SECONDS = 0.2  # that a stage is run for, at least


def measure_latency(
    engine: Engine,
    choice: EngineChoice,
    lengths: tuple[int, ...],
    batch_sizes: Iterable[int],
    progress: Callable[[], object],
) -> LatencyTable:
    """Times every stage with full batches of texts of these L, ascending, at these B and at 1.

    Args:
      engine: to time.
      choice: its name and precision, for the table.
      lengths: L.
      batch_sizes: B.
      progress: called after each stage at each B and L.

    """
    sizes = tuple(sorted({1, *batch_sizes}))
    stages = engine.stages()
    times = np.zeros((len(sizes), len(lengths), len(stages)))  # [number of B, number of L, E]
    for place in np.ndindex(times.shape):
        size, length, stage = sizes[place[0]], lengths[place[1]], stages[place[2]]
        times[place] = _time_stage(engine, stage, size, length)
        progress()
    return LatencyTable(*choice, engine.threads, describe_machine(engine), sizes, lengths, times)


def usual_lengths(max_length: int) -> tuple[int, ...]:
    """Returns every other padded length, ascending; the longest is among them."""
    return padded_lengths(max_length)[::-2][::-1]


def measured_lengths(model: ModelArtifact) -> tuple[int, ...]:
    """Returns the lengths that are measured: the usual ones, the median and that of long texts."""
    own = {
        padded_length(n, model.max_length) for n in (model.median_tokens, model.long_tokens) if n
    }
    return tuple(sorted({*usual_lengths(model.max_length), *own}))


def describe_fastest(model: ModelArtifact, tables: Sequence[LatencyTable]) -> list[str]:
    """Says which engine and precision is fastest for single texts of the usual lengths."""
    lines = []
    about = {model.median_tokens: "the median of the training texts"}
    if model.long_tokens > model.median_tokens:
        about[model.long_tokens] = "95% of them have no more"
    for tokens, what in about.items():
        times = [(float(table.until_exit(tokens)[-1]), table) for table in tables]
        times.sort(key=lambda pair: pair[0])
        each = ", ".join(f"{t.engine} {t.precision} {value:.2f} ms" for value, t in times)
        lines.append(f"one text of {tokens} tokens ({what}) through all layers: {each}")
    return lines


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


def read_latency(model: ModelArtifact, engine: Engine) -> LatencyTable | None:
    """Reads the table of an engine, in its precision; returns None where nothing was measured.

    Raises UserError where the file is damaged, or has no table of this machine and engine.
    """
    tables, here = read_tables(model.folder), describe_machine(engine)
    if not tables:
        return None
    found = [table for table in tables if table.machine == here]
    path = str(model.folder / LATENCY_FILE)
    if not found:
        measured = "; ".join(table.machine for table in tables)
        raise UserError(
            f"{path!r} was measured on {measured}, and this is {here}: measure again, with "
            f"sweet-jax predict --model={model.folder} --measure and the same --engine, "
            "--precision and --threads"
        )
    if found[-1].milliseconds.shape[-1] != len(model.layers):
        raise UserError(f"{path!r} is damaged (another number of exits): measure again")
    return found[-1]
