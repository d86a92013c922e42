"""The interface between the scheduler and an inference engine.

A stage is the computation between two exits: from the previous exit (or the token ids) to the next.
The hidden states of requests that continue stay on the engine's device, each in a slot of a buffer,
so that they need not be gathered into a new batch: the next stage reads and writes the slots that
its batch names.

To add an engine, write a module with a function `load_engine(model, dtype, cache_dir)` that returns
an `Engine`, and add an entry to ENGINES (`inference/engine_table.py`). The function may also take
the keywords `threads` and `float32_layers`; setting them is an error for an engine whose function
does not. `plan_stages` divides a model into stages for any engine. The `compile` method of an
engine that compiles nothing returns immediately. This module does not import jax: the scheduler and
the engine exchange NumPy arrays and the engine's own buffers, which the scheduler only stores and
passes back.

Shape letters: E exit, B batch, L length, H hidden, C classes, K plain policies, P slots.
"""

import functools
import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from sweet_jax.errors import UserError, missing_package
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine_choice import check_precision
from sweet_jax.inference.engine_table import ENGINES

# The policies that read only the logits of one exit, so that an engine may compute their
# confidences itself, in the order of `StageOutput.complements`.
PLAIN_POLICIES = ("confidence", "raw_confidence", "entropy", "margin")

# An engine's own buffer of hidden states, [P, L, H].
HiddenStates = Any

# Computing only a layer's first token takes about this share of the time of the whole layer: 0.2 at
# batch size 64 and 0.45 at batch size 1, for MiniLM's shape on 2 CPU cores. At a lower exit rate,
# computing the first token separately costs more time than it saves.
_LOW_EXIT_RATE = 0.3


class Stage(NamedTuple):
    """Describes the part of a network that leads to one exit."""

    exit: int  # index of the exit among all exits of the model, from 0
    network: int  # index of its network: 0, or under Multi-Model the exit's own
    start: int  # the first layer to compute, from 1
    end: int  # the layer of the exit
    writes_states: bool  # whether the next stage resumes from the hidden states of this one
    whole: bool = False  # whether they are written after layer `end`; otherwise before it

    @property
    def embeds(self) -> bool:
        """Whether the stage begins with token ids: it is the first, or resumes at layer 1."""
        return self.start == 1

    @property
    def uses_states(self) -> bool:
        """Whether the stage reads or writes hidden states that are kept between stages."""
        return self.writes_states or not self.embeds


class StageBatch(NamedTuple):
    """Holds the requests of one run of a stage.

    They are packed into few arrays, since each array is a separate transfer to the device.
    """

    length: int  # L, the length that the requests are padded to
    rows: np.ndarray  # int32 [2, B]: the slot of each request (P for no slot), its number of tokens
    # int32 [2, B, L]: input_ids and token_type_ids; None if the stage does not embed token ids.
    texts: np.ndarray | None = None
    temperatures: np.ndarray | None = None  # float32 [B], temperatures at this exit; None = 1
    largest: int = 0  # maximum B of later batches, for engines that compile; 0 = this batch's B
    # int32 [B], index of the token at which the second text of a pair begins; None = at the end.
    second_starts: np.ndarray | None = None


class StageOutput(NamedTuple):
    """Holds the outputs of an exit for one batch, on the host, and the hidden states to keep."""

    logits: np.ndarray  # float32 [B, C]
    exit_scores: np.ndarray | None  # float32 [B], from 0 to 1; None without learning-to-exit
    states: HiddenStates | None  # the buffer to pass to the next run; None if the stage uses none
    # float32 [B, K], 1 minus the confidences of PLAIN_POLICIES; None if they are not computed.
    complements: np.ndarray | None = None


class Engine(Protocol):
    """Runs the stages of one saved model.

    Threads may share an engine if each has its own buffers of hidden states.
    """

    @property
    def pad_id(self) -> int:
        """Returns the token id that pads input_ids after the tokens of a text."""

    @property
    def vocabulary_size(self) -> int:
        """Returns the number of token ids."""

    @property
    def threads(self) -> int:
        """Returns the number of threads that compute a batch."""

    @property
    def description(self) -> str:
        """Returns what measured times depend on: device, library and version, dtype."""

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
          states: the buffer from `new_states`, or from the previous run at this length; None if the
            stage uses none. It may be consumed: use the one in the output from then on.

        """

    def compile(self, stage: Stage, batch_size: int, length: int, slots: int) -> None:
        """Compiles what `run` needs for batches of at most B requests, unless it is compiled.

        Args:
          stage: one of `stages`.
          batch_size: B.
          length: L.
          slots: P.

        """


def load_engine(
    name: str,
    model: ModelArtifact,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    float32_layers: Sequence[int] | None = None,
) -> Engine:
    """Reads a saved model's weights into an engine.

    Args:
      name: a name in ENGINES, or "module:OBJECT" for an `EngineEntry` of another module.
      model: the saved model.
      dtype: precision of parameters and activations.
      cache_dir: directory that keeps compiled programs between processes; defaults to the engine's
        own.
      threads: number of threads that compute a batch, for an engine that has this option; defaults
        to the engine's own choice.
      float32_layers: layers, counted from 1, that stay in float32 in int8 models, for an engine
        that has this option; defaults to those listed in int8.json.

    Raises UserError if the engine is unknown or not installed, if it does not support the dtype,
    threads or float32_layers, and if weights are missing or have the wrong shape.

    """
    check_precision(name, dtype, model)
    arguments = {"threads": threads, "float32_layers": float32_layers}
    options = {name: value for name, value in arguments.items() if value is not None}
    module = _import_module(name)
    for option in options:
        if not _has_option(module, option):
            raise UserError(
                f"the {name} engine has no option {option}: leave {option} out, or choose another "
                "engine"
            )
    return module.load_engine(model, dtype, cache_dir, **options)


def takes_threads(name: str) -> bool:
    """Returns whether an engine has the option `threads`.

    Raises UserError if the engine is unknown or not installed.
    """
    return _has_option(_import_module(name), "threads")


def _has_option(module: ModuleType, option: str) -> bool:
    return option in inspect.signature(module.load_engine).parameters


def _import_module(name: str) -> ModuleType:
    """Imports the module of an engine; raises UserError if it needs what is not installed."""
    entry = ENGINES[name]
    try:
        return import_module(entry.module)
    except ImportError as error:
        package = missing_package(error)
        fix = entry.install or "install it"
        raise UserError(f"the {name} engine needs {package}: {fix}") from error


def plan_stages(
    networks: Sequence[Sequence[int]],
    *,
    first_only: bool,
    full: bool = False,
    exit_rates: Sequence[float] = (),
    low_exit_rate: float = _LOW_EXIT_RATE,
) -> list[Stage]:
    """Returns the stages in order; with `full`, a single one that computes the last exit.

    A stage computes an exit's layer only at the token that the exit reads; the next stage computes
    the other tokens, for the requests that continue. Where an exit reads all tokens, or has a low
    exit rate, the stage computes the whole layer, so that its weights are read only once.

    Args:
      networks: layers of each network's exits, ascending.
      first_only: whether exits read only the first token, see `models/pooling.py`.
      full: whether every request goes to the last exit.
      exit_rates: share of the requests reaching each exit that exit there [E]; () if unknown.
      low_exit_rate: exit rate below which a stage computes the whole layer.

    """
    stages: list[Stage] = []
    for number, layers in enumerate(networks):
        start = 1
        for end in layers:
            exit = len(stages)
            continues = end < layers[-1]
            rarely = len(exit_rates) > 0 and exit_rates[exit] < low_exit_rate
            whole = continues and (rarely or not first_only)
            # A stage that resumes at layer 1 embeds again, which costs next to nothing.
            writes_states = continues and (whole or end > 1)
            stages.append(Stage(exit, number, start, end, writes_states, whole))
            start = end + whole
    if full:
        stages = [stages[-1]._replace(start=1)]
    return stages


@functools.cache
def padded_lengths(longest: int) -> tuple[int, ...]:
    """Returns the lengths that requests are padded to, ascending: 16, 24, 32, 40, ..., longest.

    The steps are finer than in training, since a single request pays for its own padding.
    """
    steps = [*range(16, 48, 8), *range(48, 128, 16), *range(128, 256, 32)]
    steps += [*range(256, 512, 64), *range(512, 1 << 16, 256)]
    return (*(length for length in steps if length < longest), longest)


def padded_length(tokens: int, longest: int) -> int:
    """Returns the smallest of `padded_lengths` that fits the tokens; the longest if none does."""
    return next((length for length in padded_lengths(longest) if length >= tokens), longest)
