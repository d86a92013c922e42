"""Measures the time of each stage of a saved model on this machine, by engine and precision.

Shape letters: E exit, B batch size, L length.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sweet_jax.errors import UserError
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
    '"to E" is the stage from the previous exit to exit E, and "all" their sum, for texts that do '
    "not exit early; each batch is computed at once, and its texts have the same length, in tokens"
)
_SECONDS = 0.2  # minimum time for which a stage is run repeatedly


def measure_latency(
    engine: Engine,
    choice: EngineChoice,
    lengths: tuple[int, ...],
    batch_sizes: Iterable[int],
    progress: Callable[[], object],
) -> LatencyTable:
    """Times every stage on full batches of texts.

    Args:
      engine: the engine to time.
      choice: its name and precision, for the table.
      lengths: lengths L to time, ascending.
      batch_sizes: batch sizes B to time, in addition to 1.
      progress: function called after each stage at each B and L.

    """
    sizes = tuple(sorted({1, *batch_sizes}))
    stages = engine.stages()
    times = np.zeros((len(sizes), len(lengths), len(stages)))  # [number of B, number of L, E]
    for index in np.ndindex(times.shape):
        size, length, stage = sizes[index[0]], lengths[index[1]], stages[index[2]]
        times[index] = _time_stage(engine, stage, size, length)
        progress()
    return LatencyTable(*choice, engine.threads, describe_machine(engine), sizes, lengths, times)


def measured_lengths(model: ModelArtifact) -> tuple[int, ...]:
    """Returns the lengths to measure: every other padded length, and those of typical texts.

    The longest length is one of them. Typical texts are those of median length, and long ones.
    """
    typical = {
        padded_length(n, model.max_length) for n in (model.median_tokens, model.long_tokens) if n
    }
    return tuple(sorted({*padded_lengths(model.max_length)[::-2], *typical}))


def describe_fastest(model: ModelArtifact, tables: Sequence[LatencyTable]) -> list[str]:
    """Describes which engine and precision is fastest for single texts of two lengths."""
    lines = []
    descriptions = {model.median_tokens: "the median of the training texts"}
    if model.long_tokens > model.median_tokens:
        descriptions[model.long_tokens] = "95% of the training texts are no longer"
    for tokens, description in descriptions.items():
        times = [(float(table.until_exit(tokens)[-1]), table) for table in tables]
        times.sort(key=lambda pair: pair[0])
        measured = ", ".join(f"{t.engine} {t.precision} {value:.2f} ms" for value, t in times)
        lines.append(f"one text of {tokens} tokens ({description}) through all layers: {measured}")
    return lines


def _time_stage(engine: Engine, stage: Stage, size: int, length: int) -> float:
    """Returns the median milliseconds of a run, without the first two, which may compile."""
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
    """Describes what measured times depend on: the machine, and the engine's description."""
    return f"{platform.node()}, {engine.description}"


def read_latency(model: ModelArtifact, engine: Engine) -> LatencyTable | None:
    """Reads the table of an engine in its precision; returns None if nothing was measured.

    Raises UserError if the file is damaged, or has no table for this machine and engine.
    """
    tables, here = read_tables(model.folder), describe_machine(engine)
    if not tables:
        return None
    matching = [table for table in tables if table.machine == here]
    path = str(model.folder / LATENCY_FILE)
    if not matching:
        measured = "; ".join(table.machine for table in tables)
        raise UserError(
            f"the times in {path!r} were measured on {measured}, but this is {here}: measure again "
            f"with sweet-jax predict --model={model.folder} --measure and the same --engine, "
            "--precision and --threads"
        )
    if matching[-1].milliseconds.shape[-1] != len(model.layers):
        raise UserError(
            f"{path!r} is damaged (its number of exits is not the model's): measure again"
        )
    return matching[-1]
