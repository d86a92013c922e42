"""The seam below the scheduler: what it asks of an inference engine, and the table of engines.

A stage is what is computed between two exits: from the exit before (or the token ids) to an exit.
The hidden states of requests that continue stay where the engine computes, each in a slot of a
buffer, so that they need not be copied together: the next stage reads and writes the slots that
its batch names.

To add an engine, write a module with `load_engine(model, dtype, cache_dir)` that returns an
`Engine`, and add its line to ENGINES. It may also take the keywords `threads` and `float32_layers`,
which are refused where it does not. `plan_stages` cuts a model into stages for any engine; an
engine that compiles nothing has a `compile` that returns at once. Nothing here imports jax: what
crosses the seam are NumPy arrays and the engine's own buffers, which the scheduler only hands back.

Shape letters: E exit, B batch, L length, H hidden, C classes, K plain policies, P slots.
"""

import functools
import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sweet_jax.config import UserError, check_choice
from sweet_jax.errors import missing_package
from sweet_jax.inference.artifact import ModelArtifact

# The module of each engine, imported when it is asked for.
ENGINES = {
    "jax": "sweet_jax.inference.engine_jax",
    "onnxruntime": "sweet_jax.inference.engine_onnx",
}
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
    # int32 [B], of pairs of texts the place where the second begins; None = at the end.
    second_starts: np.ndarray | None = None


class StageOutput(NamedTuple):
    """Holds the exit's outputs of one batch, on the host, and the hidden states that are kept."""

    logits: np.ndarray  # float32 [B, C]; rows that fill the batch up may be left out
    exit_scores: np.ndarray | None  # float32 [B], learning-to-exit's, 0 to 1; None without
    states: HiddenStates | None  # the buffer to hand to the next run; None where none is used
    # float32 [B, K], 1 minus the exit confidences of PLAIN_POLICIES; None where none are computed.
    complements: np.ndarray | None = None


class Engine(Protocol):
    """Runs the stages of one saved model. Threads may share it; each has states of its own."""

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
      name: one of ENGINES.
      model: the saved model.
      dtype: of parameters and activations.
      cache_dir: where compiled programs are kept between processes; default the engine's own.
      threads: that compute a batch, where the engine has such a number; default its own.
      float32_layers: that stay in float32 under int8, from 1; default those of int8.json.

    Raises UserError for an engine that is unknown or not installed, a dtype, threads or layers that
    it does not have, and weights that are missing or misshapen.

    """
    check_choice("engine", name, ENGINES)
    given = {"threads": threads, "float32_layers": float32_layers}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        module = import_module(ENGINES[name])
    except ImportError as error:
        package = missing_package(error)
        fix = _INSTALL.get(name, "install it")
        raise UserError(f"the {name} engine needs {package}: {fix}") from error
    known = inspect.signature(module.load_engine).parameters
    for option in options:
        if option not in known:
            raise UserError(
                f"the {name} engine has no {option}: leave {option} out, or choose another engine"
            )
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
