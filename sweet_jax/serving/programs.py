"""The compiled programs of a saved model: one for each stage, batch size and length.

A stage is what is computed between two looks at the answers: from the exit before (or the token
ids) to an exit. Its rows' hidden states stay on the device, each in a slot of its own, so that the
rows that go on need not be copied together: the next stage reads and writes the slots it is told.

Shape letters: E exit, B batch (padded to one of `batch_sizes`), L length, H hidden, C classes,
P slots.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.serving.saved import Network, SavedModel


class Stage(NamedTuple):
    """The part of a network that leads to one exit."""

    exit: int  # index of the exit, from 0
    network: int  # index of its network
    start: int  # the first layer to compute
    end: int  # the layer of the exit

    @property
    def embeds(self) -> bool:
        """Whether it begins with token ids."""
        return self.start == 1


class Inputs(NamedTuple):
    """The rows of one run of a stage, all int32; rows of 0 tokens fill the batch."""

    rows: np.ndarray  # [2, B]: slot, P for none; how many of L tokens
    texts: np.ndarray | None = None  # [2, B, L], where the stage embeds: input_ids, token_type_ids


def plan(networks: tuple[Network, ...], *, full: bool = False) -> list[Stage]:
    """The stages in order; of the full model only the last network, to its last exit."""
    stages, exit = [], 0
    for number, network in enumerate(networks):
        start = 1
        for end in network.exits:
            stages.append(Stage(exit, number, start, end))
            start, exit = end, exit + 1
    if full:
        stages = [stages[-1]._replace(start=1)]
    return stages


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Sizes that batches are padded to, ascending, to `largest`: 1, 2, 4, 8, 12, 16, 24, 32, ..."""
    sizes = {2**i for i in range(20)} | {3 * 2**i for i in range(2, 20)}
    return (*sorted(size for size in sizes if size < largest), largest)


def row_lengths(longest: int) -> tuple[int, ...]:
    """Lengths that rows are padded to, ascending, to `longest`: 16, 24, 32, 40, 48, 64, 80, ...

    Finer than training's: a single row pays for its own padding.
    """
    steps = [*range(16, 48, 8), *range(48, 128, 16), *range(128, 256, 32)]
    steps += [*range(256, 512, 64), *range(512, 1 << 16, 256)]
    return (*(length for length in steps if length < longest), longest)


class Programs:
    """Runs stages; compiles each (stage, size, length) once.

    Args:
      model: what was saved.
      stages: as `plan` gives them.
      slots: P, for every length.

    Attributes:
      compiled: the programs so far, by (index of the stage, B, L).
      classes: C.
      pad_id: what fills input_ids.
      vocabulary: how many ids there are.

    """

    def __init__(self, model: SavedModel, stages: list[Stage], slots: int):
        self.stages, self.slots = stages, slots
        self.compiled: dict[tuple[int, int, int], Any] = {}
        self.classes, self.pad_id = len(model.classes), model.tokenizer.pad_token_id
        self._networks = model.networks
        words = model.networks[0].params["encoder"]["embeddings"]["word"]["embedding"]
        self.vocabulary = len(words)
        whole = [jax.device_put(network.params) for network in model.networks]
        self._params = [list(needed(stage, whole[stage.network]).values()) for stage in stages]
        self._pools: dict[int, jax.Array] = {}  # by length: [P, L, H]

    def carries(self, number: int) -> bool:
        """Whether a stage leaves its rows' states in their slots for the next."""
        following = self.stages[number + 1 : number + 2]
        return bool(following) and not following[0].embeds

    def __call__(self, number: int, length: int, inputs: Inputs) -> jax.Array:
        """The answers of stage `number`, float32 [B, C], or [B, C + 1]: learning-to-exit's last."""
        program = self.compile(number, inputs.rows.shape[1], length)
        params = self._params[number]
        if not self.carries(number) and self.stages[number].embeds:
            return program(params, inputs)
        if not self.carries(number):
            return program(params, inputs, self._pool(length))
        answers, self._pools[length] = program(params, inputs, self._pool(length))
        return answers

    def compile(self, number: int, size: int, length: int) -> Callable:
        """The program of a stage for B and L, compiled if this is the first call for them."""
        key = (number, size, length)
        if key not in self.compiled:
            arguments: list[Any] = [self._params[number], self._example(*key)]
            if self.carries(number) or not self.stages[number].embeds:
                arguments.append(self._pool(length))
            donated = (2,) if self.carries(number) else ()
            traced = jax.jit(self._function(number, length), donate_argnums=donated)
            self.compiled[key] = traced.lower(*arguments).compile()
        return self.compiled[key]

    def _function(self, number: int, length: int) -> Callable:
        stage, carries = self.stages[number], self.carries(number)
        network = self._networks[stage.network]

        def run(params: list[jax.Array], inputs: Inputs, pool: jax.Array | None = None):
            slots, tokens = inputs.rows
            batch = {"mask": jnp.arange(length)[None] < tokens[:, None]}  # [B, L]
            h = None
            if stage.embeds:
                assert inputs.texts is not None
                batch |= dict(zip(("input_ids", "token_type_ids"), inputs.texts, strict=True))
            else:
                assert pool is not None
                h = pool.at[slots].get(mode="clip")  # [B, L, H]
            h, answers = compute(network, stage, params, h, batch)
            if not carries:
                return answers
            assert pool is not None
            return answers, pool.at[slots].set(h, mode="drop")

        return run

    def _example(self, number: int, size: int, length: int) -> Inputs:
        rows, texts = np.zeros((2, size), np.int32), np.zeros((2, size, length), np.int32)
        return Inputs(rows, texts) if self.stages[number].embeds else Inputs(rows)

    def _pool(self, length: int) -> jax.Array:
        if length not in self._pools:
            network = self._networks[0]
            kernel = network.params["heads"][str(network.exits[0])]["pooler"]["kernel"]
            shape = (self.slots, length, len(kernel))
            self._pools[length] = jnp.zeros(shape, kernel.dtype)
        return self._pools[length]


def _needs(stage: Stage, path: tuple[Any, ...]) -> bool:
    """Whether a stage reads the parameter at a path."""
    match tuple(p.key for p in path):
        case ("encoder", "embeddings", *_):
            return stage.embeds
        case ("encoder", "layers", int(index), *_):
            return stage.start <= index + 1 <= stage.end
        case ("heads", number, *_):
            return number == str(stage.end)
    return True


def needed(stage: Stage, params: Any) -> dict[str, Any]:
    """The parameters that a stage reads, by path: a call with all of them would check each."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "/".join(str(p.key) for p in path): leaf for path, leaf in leaves if _needs(stage, path)
    }


def compute(
    network: Network,
    stage: Stage,
    params: list[jax.Array],
    h: jax.Array | None,
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """What a stage hands on [B, L, H], and its answers, see `Programs.__call__`.

    Args:
      network: that the stage is of.
      stage: to compute.
      params: the values of `needed`, in order.
      h: what the stage before handed on; None where this one embeds.
      batch: see `EarlyExit.resume`.

    """
    model = nnx.merge(network.graphdef, _filled(stage, params, network.params))
    h, answer = model.resume(stage.start, stage.end, h, batch)
    if answer.exit_scores is None:
        return h, answer.logits
    return h, jnp.concatenate([answer.logits, answer.exit_scores[:, None]], axis=1)


def _filled(stage: Stage, values: list[jax.Array], params: Any) -> Any:
    """All parameters again: what `needed` left out is zero, and dropped by the compiler."""
    rest = iter(values)

    def pick(path: tuple[Any, ...], leaf: np.ndarray) -> jax.Array:
        return next(rest) if _needs(stage, path) else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(pick, params)


def keep_programs(folder: str | Path | None = None) -> None:
    """Keeps compiled programs, however small, between processes: JAX's persistent cache.

    In ~/.cache/sweet_jax, or the folder given; where JAX was told of a folder, that one stays.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(folder or Path(home) / "sweet_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
