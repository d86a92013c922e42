"""The seam below the scheduler: what it asks of an inference engine, and the table of engines.

A stage is what is computed between two exits: from the exit before (or the token ids) to an exit.
The hidden states of requests that continue stay where the engine computes, each in a slot of a
buffer, so that they need not be copied together: the next stage reads and writes the slots that
its batch names.

To add an engine, write a module with `load_engine(model, dtype, cache_dir)` that returns an
`Engine`, and add its line to ENGINES. `plan_stages` cuts a model into stages for any engine; an
engine that compiles nothing has a `compile` that returns at once. Nothing here imports jax: what
crosses the seam are NumPy arrays and the engine's own buffers, which the scheduler only hands back.

Shape letters: E exit, B batch, L length, H hidden, C classes, K plain policies, P slots.
"""

import functools
import importlib.util
import logging
import platform
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sweet_jax.config import UserError, check_choice
from sweet_jax.inference.artifact import INT8_FILE, ModelArtifact
from sweet_jax.inference.latency_table import LATENCY_FILE, read_tables
from sweet_jax.inference.onnx_files import has_graphs

log = logging.getLogger(__name__)

# The module of each engine, imported when it is asked for.
ENGINES = {
    "jax": "sweet_jax.inference.engine_jax",
    "onnxruntime": "sweet_jax.inference.engine_onnx",
}
# The precisions of an engine; of others than these, float32.
PRECISIONS = {"jax": ("float32", "bfloat16"), "onnxruntime": ("float32", "int8")}
_INSTALL = {"jax": "pip install -e .", "onnxruntime": 'pip install -e ".[onnx]"'}

# The policies that read nothing but the logits of one exit, whose confidences an engine may compute
# itself, in the order of `StageOutput.complements`.
PLAIN_POLICIES = ("confidence", "raw_confidence", "entropy", "margin")

# An engine's own buffer of hidden states, [P, L, H].
HiddenStates = Any

# The share of a layer's time that its first token alone takes: 0.2 in batches of 64 and 0.45 in
# those of one, at MiniLM's shape on 2 CPU cores. A lower exit rate does not make up for it.
_LOW_EXIT_RATE = 0.3


class Stage(NamedTuple):
    """Describes the part of a network that leads to one exit."""

    exit: int  # index of the exit among all exits of the model, from 0
    network: int  # index of its network: 0, or under Multi-Model the exit's own
    start: int  # the first layer to compute, from 1
    end: int  # the layer of the exit
    writes_states: bool  # whether the next stage resumes from the hidden states of this one
    whole: bool = False  # whether these are those after layer `end`; else those before it

    @property
    def embeds(self) -> bool:
        """Whether it begins with token ids: the first stage, or one that resumes at layer 1."""
        return self.start == 1

    @property
    def uses_states(self) -> bool:
        """Whether it reads or writes hidden states that are kept between stages."""
        return self.writes_states or not self.embeds


class StageBatch(NamedTuple):
    """Holds the requests of one run of a stage.

    Packed into few arrays, since every array is a transfer to the device.
    """

    length: int  # L, that the requests are padded to
    rows: np.ndarray  # int32 [2, B]: the slot of each, P for none; its number of tokens
    # int32 [2, B, L]: input_ids and token_type_ids; None where the stage embeds nothing.
    texts: np.ndarray | None = None
    requests: int | None = None  # how many of the first rows are no filling; None = all
    temperatures: np.ndarray | None = None  # float32 [B], of the exit; None = 1
    largest: int = 0  # B of the largest batch to come, for engines that compile; 0 = this one's


class StageOutput(NamedTuple):
    """Holds the exit's outputs of one batch, on the host, and the hidden states that are kept."""

    logits: np.ndarray  # float32 [B, C]; rows that fill the batch up may be left out
    exit_scores: np.ndarray | None  # float32 [B], learning-to-exit's, 0 to 1; None without
    states: HiddenStates | None  # the buffer to hand to the next run; None where none is used
    # float32 [B, K], 1 minus the exit confidences of PLAIN_POLICIES; None where none are computed.
    complements: np.ndarray | None = None


class Engine(Protocol):
    """Runs the stages of one saved model. One thread at a time calls it."""

    @property
    def pad_id(self) -> int:
        """Returns the token id that fills input_ids beyond the tokens of a text."""

    @property
    def vocabulary_size(self) -> int:
        """Returns the number of token ids."""

    @property
    def threads(self) -> int:
        """Returns how many threads compute a batch."""

    @property
    def description(self) -> str:
        """Returns what a measured time depends on: device, library and version, dtype."""

    @property
    def compilations(self) -> int:
        """Returns the number of programs compiled, or read from a cache, so far."""

    def stages(self, *, full: bool = False, exit_rates: Sequence[float] = ()) -> list[Stage]:
        """Returns the stages in order, see `plan_stages`."""

    def new_states(self, slots: int, length: int) -> HiddenStates:
        """Returns an empty buffer for the hidden states of P requests of L tokens, [P, L, H]."""

    def run(self, stage: Stage, batch: StageBatch, states: HiddenStates | None) -> StageOutput:
        """Runs a stage on a batch.

        Args:
          stage: one of `stages`.
          batch: the requests.
          states: from `new_states` or the run before, at this length; it may be consumed, so that
            the one in the output takes its place. None where the stage uses none.

        """

    def compile(self, stage: Stage, batch_size: int, length: int, slots: int) -> None:
        """Compiles what `run` needs for batches of up to B, of L and P, unless it has been."""


class EngineChoice(NamedTuple):
    """Names an engine and the precision it runs a model in."""

    engine: str  # a name of ENGINES
    precision: str


def available_engines(
    model: ModelArtifact, engine: str | None = None, precision: str | None = None
) -> list[EngineChoice]:
    """Returns the engines that can run a model here, in each precision, the default one first.

    Args:
      model: the saved model.
      engine: this one alone, whether it is installed or not.
      precision: in this one alone, whether the model has it or not.

    """
    installed = importlib.util.find_spec
    exported = has_graphs(model.folder)
    names = []
    if installed("jax") and not exported:  # an exported model has no weights that JAX reads
        names.append("jax")
    if installed("onnxruntime") and (exported or (installed("jax") and installed("onnx"))):
        names.append("onnxruntime")
    quantized = (model.folder / INT8_FILE).exists()
    found = []
    for name in names if engine is None else [engine]:
        for each in PRECISIONS.get(name, ("float32",)):
            if each == precision or (precision is None and (each != "int8" or quantized)):
                found.append(EngineChoice(name, each))
    return found


def default_engine(model: ModelArtifact, dtype: str = "float32") -> str:
    """Returns the engine where none is named.

    That of int8 is onnxruntime, as of a model that was exported to ONNX, and that of bfloat16 jax.
    Of float32 it is the faster one by the times that `predict --measure` kept on this machine, for
    a text of the median length by itself; without such times jax, where it is installed.
    """
    names = [choice.engine for choice in available_engines(model, precision=dtype)]
    if not names:
        return "onnxruntime" if dtype == "int8" or has_graphs(model.folder) else "jax"
    if len(names) < 2:
        return names[0]
    times = _median_times(model, dtype)
    if not times.keys() >= set(names):
        _log_once("several engines are installed: predict --measure finds the faster one")
        return names[0]
    name = min(names, key=times.__getitem__)
    each = ", ".join(f"{other} {times[other]:.2f} ms" for other in names)
    _log_once(f"the engine is {name}, the faster one in {model.folder / LATENCY_FILE}: {each}")
    return name


def _median_times(model: ModelArtifact, precision: str) -> dict[str, float]:
    """Returns the milliseconds through all exits that were measured here, by engine."""
    try:
        tables = read_tables(model.folder)
    except UserError:  # only a target in milliseconds cannot do without
        return {}
    return {
        table.engine: float(table.until_exit(model.median_tokens)[-1])
        for table in tables
        if table.precision == precision and table.machine.startswith(f"{platform.node()}, ")
    }


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def load_engine(
    name: str,
    model: ModelArtifact,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
) -> Engine:
    """Reads a saved model's weights into an engine.

    Args:
      name: one of ENGINES.
      model: the saved model.
      dtype: of parameters and activations.
      cache_dir: where compiled programs are kept between processes; default the engine's own.
      threads: that compute a batch, where the engine has such a number; default its own.

    Raises UserError for an engine that is unknown or not installed, a dtype or a number of threads
    that it does not have, and weights that are missing or misshapen.

    """
    check_choice("engine", name, ENGINES)
    options = {} if threads is None else {"threads": threads}
    try:
        module = import_module(ENGINES[name])
    except ImportError as error:
        fix = _INSTALL.get(name, "install it")
        raise UserError(f"the {name} engine needs {error.name}: {fix}") from error
    return module.load_engine(model, dtype, cache_dir, **options)


def plan_stages(
    networks: Sequence[Sequence[int]],
    *,
    first_only: bool,
    full: bool = False,
    exit_rates: Sequence[float] = (),
    low_exit_rate: float = _LOW_EXIT_RATE,
) -> list[Stage]:
    """Returns the stages in order; of the full model only the last network, to its last exit.

    An exit's layer is computed at the token that the exit reads, and the rest of it by the next
    stage, for the requests that continue; at exits with a low exit rate, or that read all tokens,
    all of it at once, since its weights are then read once.

    Args:
      networks: the layers of each network's exits, ascending.
      first_only: whether exits read the first token alone, see `models/pooling.py`.
      full: whether no request exits before the last exit.
      exit_rates: of the requests that reach each exit [E], the share that exits there; () where
        it is not known.
      low_exit_rate: below which a layer is computed whole at once.

    """
    stages: list[Stage] = []
    for number, layers in enumerate(networks):
        start = 1
        for end in layers:
            exit = len(stages)
            continues = end < layers[-1]
            rarely = len(exit_rates) > 0 and exit_rates[exit] < low_exit_rate
            whole = continues and (rarely or not first_only)
            # What resumes at layer 1 embeds again, which costs next to nothing.
            writes_states = continues and (whole or end > 1)
            stages.append(Stage(exit, number, start, end, writes_states, whole))
            start = end + whole
    if full:
        stages = [stages[-1]._replace(start=1)]
    return stages


@functools.cache
def padded_lengths(longest: int) -> tuple[int, ...]:
    """Returns the lengths that requests are padded to, ascending: 16, 24, 32, 40, ..., longest.

    Finer than training's: a single request pays for its own padding.
    """
    steps = [*range(16, 48, 8), *range(48, 128, 16), *range(128, 256, 32)]
    steps += [*range(256, 512, 64), *range(512, 1 << 16, 256)]
    return (*(length for length in steps if length < longest), longest)


def padded_length(tokens: int, longest: int) -> int:
    """Returns the first of `padded_lengths` that holds so many tokens, the longest if none does."""
    return next((length for length in padded_lengths(longest) if length >= tokens), longest)
