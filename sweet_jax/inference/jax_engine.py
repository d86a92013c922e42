"""The compiled programs of a saved model: one for each stage, batch size and length.

A stage is what is computed between two looks at the answers: from the exit before (or the token
ids) to an exit. Its rows' hidden states stay on the device, each in a slot of a pool, so that the
rows that go on need not be copied together: the next stage reads and writes the slots it is told.

Shape letters: E exit, B batch (padded to one of `batch_sizes`), L length, H hidden, C classes,
P slots.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.inference.artifact import Network, SavedModel
from sweet_jax.models.pooling import POOLINGS

# The share of a layer's time that its first token alone takes: 0.2 in batches of 64 and 0.45 in
# those of one, at MiniLM's shape on 2 CPU cores. Fewer rows that leave do not make up for it.
_FEW = 0.3


class Stage(NamedTuple):
    """The part of a network that leads to one exit."""

    exit: int  # index of the exit, from 0
    network: int  # index of its network
    start: int  # the first layer to compute
    end: int  # the layer of the exit
    carries: bool  # whether it leaves its rows' states in their slots for the next
    whole: bool = False  # whether these are those after layer `end`; else, those before it

    @property
    def embeds(self) -> bool:
        """Whether it begins with token ids: the first, or one that resumes layer 1."""
        return self.start == 1


class Inputs(NamedTuple):
    """The rows of one run of a stage, all int32; rows of 0 tokens fill the batch."""

    rows: np.ndarray  # [2, B]: slot, P for none; how many of L tokens
    texts: np.ndarray | None = None  # [2, B, L], where the stage embeds: input_ids, token_type_ids


def make_stages(
    networks: tuple[Network, ...], *, full: bool = False, leaving: Sequence[float] = ()
) -> list[Stage]:
    """The stages in order; of the full model only the last network, to its last exit.

    An exit's layer is computed at the token that the exit reads, and the rest of it by the next
    stage, for the rows that stay; at exits that few leave, or that read all tokens, all of it at
    once, since its weights are then read once.

    Args:
      networks: of the model.
      full: whether no row leaves before the last exit.
      leaving: of the rows that come to each exit [E], the share that leaves; () where not known.

    """
    stages, exit = [], 0
    for number, network in enumerate(networks):
        start = 1
        for end in network.exits:
            goes_on = end < network.exits[-1]
            few_leave = len(leaving) > 0 and leaving[exit] < _FEW
            whole = goes_on and (few_leave or not POOLINGS[network.pooling].first_only)
            # What resumes layer 1 embeds anew, which costs next to nothing.
            carries = goes_on and (whole or end > 1)
            stages.append(Stage(exit, number, start, end, carries, whole))
            start, exit = end + whole, exit + 1
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


class JaxEngine:
    """Runs stages; compiles each for every batch size, length and number of slots once.

    Args:
      model: what was saved.

    Attributes:
      compiled: the programs so far, by (stage, B, L, P).
      classes: C.
      pad_id: what fills input_ids.
      vocabulary: how many ids there are.

    """

    def __init__(self, model: SavedModel):
        self.compiled: dict[tuple[Stage, int, int, int], Any] = {}
        self.classes, self.pad_id = len(model.classes), model.tokenizer.pad_token_id
        words = model.networks[0].params["encoder"]["embeddings"]["word"]["embedding"]
        self.vocabulary = len(words)
        self._networks = model.networks
        self._on_device = [jax.device_put(network.params) for network in model.networks]
        self._params: dict[Stage, list[jax.Array]] = {}

    def __call__(
        self, stage: Stage, inputs: Inputs, length: int, pool: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(answers, pool) of a stage.

        Answers are float32 [B, C], or [B, C + 1] with learning-to-exit's score last. The pool, as
        `new_pool` makes it, is None for a stage that neither reads nor writes one; a stage that
        writes it consumes the one it is given.
        """
        slots = 0 if pool is None else len(pool)
        program = self.compile(stage, inputs.rows.shape[1], length, slots)
        return program(self._of(stage), inputs, pool)

    def new_pool(self, slots: int, length: int) -> jax.Array:
        """Room for the states of P rows of L tokens, [P, L, H]."""
        shape = self._pool(slots, length)
        return jnp.zeros(shape.shape, shape.dtype)

    def compile(self, stage: Stage, size: int, length: int, slots: int) -> Callable:
        """The program of a stage for B, L and P, compiled if this is the first call for them."""
        slots = slots if uses_pool(stage) else 0
        key = (stage, size, length, slots)
        if key not in self.compiled:
            rows, texts = np.zeros((2, size), np.int32), np.zeros((2, size, length), np.int32)
            inputs = Inputs(rows, texts if stage.embeds else None)
            pool = self._pool(slots, length) if slots else None
            donated = (2,) if stage.carries else ()
            traced = jax.jit(self._function(stage, length), donate_argnums=donated)
            self.compiled[key] = traced.lower(self._of(stage), inputs, pool).compile()
        return self.compiled[key]

    def _function(self, stage: Stage, length: int) -> Callable:
        network = self._networks[stage.network]

        def run(params: list[jax.Array], inputs: Inputs, pool: jax.Array | None):
            slots, tokens = inputs.rows
            batch = {"mask": jnp.arange(length)[None] < tokens[:, None]}  # [B, L]
            h = None
            if inputs.texts is not None:
                batch |= dict(zip(("input_ids", "token_type_ids"), inputs.texts, strict=True))
            elif pool is not None:
                h = pool.at[slots].get(mode="clip")  # [B, L, H]
            h, answers = run_stage(network, stage, params, h, batch)
            if not stage.carries or pool is None:
                return answers, None
            return answers, pool.at[slots].set(h, mode="drop")

        return run

    def _of(self, stage: Stage) -> list[jax.Array]:
        if stage not in self._params:
            own = stage_parameters(stage, self._on_device[stage.network])
            self._params[stage] = list(own.values())
        return self._params[stage]

    def _pool(self, slots: int, length: int) -> jax.ShapeDtypeStruct:
        network = self._networks[0]
        dtype = jax.tree.leaves(network.params)[0].dtype
        return jax.ShapeDtypeStruct((slots, length, network.hidden_size), dtype)


def uses_pool(stage: Stage) -> bool:
    """Whether a stage reads or writes hidden states that are kept."""
    return stage.carries or not stage.embeds


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


def stage_parameters(stage: Stage, params: Any) -> dict[str, Any]:
    """The parameters that a stage reads, by path: a call with all of them would check each."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "/".join(str(p.key) for p in path): leaf for path, leaf in leaves if _needs(stage, path)
    }


def run_stage(
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
      params: the values of `stage_parameters`, in order.
      h: what the stage before handed on; None where this one embeds.
      batch: see `EarlyExit.forward_from`.

    """
    model = nnx.merge(network.graphdef, _filled(stage, params, network.params))
    h, answer = model.forward_from(stage.start, stage.end, h, batch, whole=stage.whole)
    if answer.exit_scores is None:
        return h, answer.logits
    return h, jnp.concatenate([answer.logits, answer.exit_scores[:, None]], axis=1)


def _filled(stage: Stage, values: list[jax.Array], params: Any) -> Any:
    """Returns all parameters, zeros for those that `stage_parameters` left out."""
    rest = iter(values)

    def pick(path: tuple[Any, ...], leaf: np.ndarray) -> jax.Array:
        return next(rest) if _needs(stage, path) else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(pick, params)
