"""What each stage costs by the clock of this machine: the file clock.json beside a saved model.

Shape letters: E exit, B batch size, L length.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from sweet_jax.config import UserError
from sweet_jax.files import write_json
from sweet_jax.inference.artifact import SavedModel
from sweet_jax.inference.jax_engine import Inputs, JaxEngine, make_stages, row_lengths, uses_pool

_NAME = "clock.json"
_SECONDS = 0.2  # that a stage is run for, at least


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Measured times.

    Attributes:
      machine: what they were measured on.
      batch_sizes: B that were measured.
      lengths: L that were measured.
      milliseconds: [number of B, number of L, E], of each stage, for a whole batch.

    """

    machine: str
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    milliseconds: np.ndarray

    def alone(self, tokens: int) -> np.ndarray:
        """Milliseconds until each exit has answered a text by itself, float64 [E]."""
        long_enough = [i for i, length in enumerate(self.lengths) if length >= tokens]
        place = long_enough[0] if long_enough else -1
        return np.cumsum(self.milliseconds[0, place])

    def lines(self, layers: Iterable[int]) -> list[str]:
        """A table: milliseconds of each stage."""
        heads = "".join(f"{'to ' + str(layer):>9}" for layer in layers)
        found = [f"{'batch':>6}{'length':>8}{heads}{'all':>9}  milliseconds, {self.machine}"]
        for size, by_length in zip(self.batch_sizes, self.milliseconds, strict=True):
            for length, stages in zip(self.lengths, by_length, strict=True):
                each = "".join(f"{value:9.2f}" for value in stages)
                found.append(f"{size:6d}{length:8d}{each}{stages.sum():9.2f}")
        return found


def measure_latency(
    model: SavedModel, batch_sizes: Iterable[int], progress: Callable[[], object]
) -> LatencyTable:
    """Times every stage at batch sizes (1 is always among them) and at every other row length.

    Of full batches of texts that are as long as they may be. `progress` is called after each.
    """
    sizes = tuple(sorted({1, *batch_sizes}))
    lengths = row_lengths(model.max_length)[::-2][::-1]  # the longest is among them
    stages = make_stages(model.networks)
    programs = JaxEngine(model)
    found = np.zeros((len(sizes), len(lengths), len(stages)))
    for place in np.ndindex(found.shape):
        size, length, stage = sizes[place[0]], lengths[place[1]], stages[place[2]]
        rows = np.stack([np.arange(size), np.full(size, length)]).astype(np.int32)
        texts = np.zeros((2, size, length), np.int32)
        texts[0] = np.random.default_rng(0).integers(0, programs.vocabulary, texts[0].shape)
        inputs = Inputs(rows, texts if stage.embeds else None)
        pool = programs.new_pool(size, length) if uses_pool(stage) else None

        def run(stage=stage, length=length, inputs=inputs) -> None:
            nonlocal pool
            answers, written = programs(stage, inputs, length, pool)
            pool = pool if written is None else written
            np.asarray(answers)

        found[place] = _median(run)
        progress()
    return LatencyTable(describe_machine(model), sizes, lengths, found)


def describe_machine(model: SavedModel) -> str:
    """What times depend on: the machine, its device, JAX, and the model's dtype."""
    dtype = jax.tree.leaves(model.networks[0].params)[0].dtype
    return f"{platform.node()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype}"


def _median(run: Callable[[], None]) -> float:
    """Milliseconds of a call, its answer brought to the host; the first two are not counted."""
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[2:])


def write_latency(model: SavedModel, clock: LatencyTable) -> Path:
    """Writes clock.json into the model's folder. Raises UserError where it cannot."""
    values = dataclasses.asdict(clock) | {"milliseconds": clock.milliseconds.tolist()}
    try:
        write_json(model.folder / _NAME, values)
    except OSError as error:
        raise UserError(
            f"{str(model.folder)!r} cannot be written to ({error.strerror}): copy the model first"
        ) from error
    return model.folder / _NAME


def read_latency(model: SavedModel) -> LatencyTable | None:
    """What `write_latency` wrote, or None.

    Raises UserError where it is damaged, or of another machine or dtype.
    """
    path = model.folder / _NAME
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        clock = LatencyTable(
            str(values["machine"]),
            tuple(values["batch_sizes"]),
            tuple(values["lengths"]),
            np.asarray(values["milliseconds"], np.float64),
        )
        if clock.milliseconds.shape != (
            len(clock.batch_sizes),
            len(clock.lengths),
            len(model.layers),
        ):
            raise ValueError("of another shape")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error!r}): measure again") from error
    here = describe_machine(model)
    if clock.machine != here:
        raise UserError(
            f"{str(path)!r} was measured on {clock.machine}, and this is {here}: measure again"
        )
    return clock
