"""The JAX engine: one compiled program for each stage, batch size, length and number of slots.

A program computes the layers of a stage, the head of its exit, and the confidences under the plain
policies. Batches are split into parts of a few sizes, see `batch_split.py`.

Shape letters: B batch, L length, H hidden, C classes, K plain policies, P slots.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.batch_split import Splitting, usable_cores
from sweet_jax.inference.engine import (
    PLAIN_POLICIES,
    Stage,
    StageBatch,
    StageOutput,
    plan_stages,
)
from sweet_jax.inference.network import Network, load_networks
from sweet_jax.inference.plain_confidences import plain_complements
from sweet_jax.poolings import POOLINGS


def load_engine(
    model: ModelArtifact, dtype: str = "float32", cache_dir: str | Path | None = None
) -> "JaxEngine":
    """Reads a saved model's weights into a JAX engine.

    Compiled programs are kept in `cache_dir`, see `enable_compilation_cache`. JAX itself chooses
    the number of threads. Raises UserError, see `load_networks`.
    """
    enable_compilation_cache(cache_dir)
    return JaxEngine(load_networks(model, dtype), model.tokenizer.pad_token_id)


class _Plan(NamedTuple):
    """Describes how a batch of one size is run."""

    parts: list[tuple[int, Callable]]  # size and program of each part
    params: list[jax.Array]  # parameters that the stage reads
    classes: int  # C


class JaxEngine:
    """Implements `Engine`; each program is compiled at its first use, or by `compile`.

    Args:
      networks: networks of the model, with parameters on the host.
      pad_id: token id that pads input_ids.

    """

    def __init__(self, networks: Sequence[Network], pad_id: int):
        self.networks, self.pad_id = tuple(networks), pad_id
        self._pairs = POOLINGS[networks[0].pooling].pairs  # whether exits compare two texts
        words = networks[0].params["encoder"]["embeddings"]["word"]["embedding"]  # [vocabulary, H]
        self.vocabulary_size = len(words)
        self._dtype = words.dtype
        self._compiled: dict[tuple[Stage, int, int, int], Any] = {}  # by (stage, B, L, P)
        self._lock = threading.Lock()  # held to compile, so that no program is compiled twice
        self._on_device = [jax.device_put(network.params) for network in networks]
        self._params: dict[Stage, list[jax.Array]] = {}
        self._splitting = Splitting.on(jax.default_backend())
        # By (stage, B, largest B, L, P).
        self._plans: dict[tuple[Stage, int, int, int, int], _Plan] = {}

    @property
    def threads(self) -> int:
        """Returns the number of cores that this process may use; 1 on an accelerator."""
        return usable_cores() if jax.default_backend() == "cpu" else 1

    @property
    def description(self) -> str:
        """Returns the device, JAX's version and the dtype."""
        return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {self._dtype}"

    @property
    def compilations(self) -> int:
        """Returns the number of programs compiled, or read from the cache, so far."""
        return len(self._compiled)

    def stages(self, *, full: bool = False, exit_rates: Sequence[float] = ()) -> list[Stage]:
        """Returns the stages in order, see `plan_stages`."""
        return plan_stages(
            [network.exits for network in self.networks],
            first_only=POOLINGS[self.networks[0].pooling].first_only,
            full=full,
            exit_rates=exit_rates,
        )

    def new_states(self, slots: int, length: int) -> jax.Array:
        """Returns zeros for the hidden states of P requests of L tokens, [P, L, H]."""
        shape = self._states(slots, length)
        return jnp.zeros(shape.shape, shape.dtype)

    def run(self, stage: Stage, batch: StageBatch, states: jax.Array | None) -> StageOutput:
        """Runs a stage on a batch, in parts; consumes `states` if the stage writes states."""
        slots, count = 0 if states is None else states.shape[0], batch.rows.shape[1]
        key = (stage, count, batch.largest or count, batch.length, slots)
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        plan, outputs, first = self._plans[key], [], 0
        for size, program in plan.parts:
            inputs = _part(batch, first, size, slots, pairs=self._pairs)
            output, written = program(plan.params, *inputs, states)
            states = states if written is None else written
            outputs.append(output)
            first += size
        values = np.asarray(outputs[0])  # [B, C + K], or [B, C + K + 1] with learning-to-exit's
        if first > count or len(outputs) > 1:
            values = np.concatenate([np.asarray(output) for output in outputs])[:count]
        last = plan.classes + len(PLAIN_POLICIES)
        scores = values[:, last] if values.shape[1] > last else None  # [B]
        complements = values[:, plan.classes : last]
        return StageOutput(values[:, : plan.classes], scores, states, complements)

    def _plan(self, stage: Stage, count: int, largest: int, length: int, slots: int) -> "_Plan":
        sizes = self._splitting.sizes(largest, length)
        split = self._splitting.split(count, sizes)
        parts = [(size, self._program(stage, size, length, slots)) for size in split]
        return _Plan(parts, self._of(stage), self.networks[stage.network].classes)

    def compile(self, stage: Stage, batch_size: int, length: int, slots: int) -> None:
        """Compiles the programs of a stage for batches of at most B texts, at L and P."""
        for size in self._splitting.sizes(batch_size, length):
            self._program(stage, size, length, slots)

    def _program(self, stage: Stage, size: int, length: int, slots: int) -> Callable:
        slots = slots if stage.uses_states else 0
        key = (stage, size, length, slots)
        if key not in self._compiled:
            with self._lock:
                if key not in self._compiled:
                    self._compiled[key] = self.lower(stage, size, length, slots).compile()
        return self._compiled[key]

    def lower(
        self, stage: Stage, size: int, length: int, slots: int, device: jax.Device | None = None
    ) -> jax.stages.Lowered:
        """Returns the lowered program of a stage, which is not compiled yet.

        Args:
          stage: one of `stages`.
          size: B, the exact batch size.
          length: L.
          slots: P.
          device: device to compile for, which need not be present, see
            `experiments/benchmarks/tpu_aot.py`; None for JAX's default device.

        """
        batch = _part(_empty_batch(stage, length), 0, size, slots, pairs=self._pairs)
        states = self._states(slots, length) if slots else None
        arguments = (self._of(stage), *batch, states)
        if device is not None:
            there = SingleDeviceSharding(device)
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arguments
            )
        donated = (5,) if stage.writes_states else ()
        return jax.jit(self._function(stage, length), donate_argnums=donated).lower(*arguments)

    def _function(self, stage: Stage, length: int) -> Callable:
        network = self.networks[stage.network]

        def run(params: list[jax.Array], rows, temperatures, texts, starts, states):
            slots, tokens = rows
            batch = {"mask": jnp.arange(length)[None] < tokens[:, None]}  # [B, L]
            if starts is not None:
                batch["second_start"] = starts
            h = None
            if texts is not None:
                batch |= dict(zip(("input_ids", "token_type_ids"), texts, strict=True))
            elif states is not None:
                h = states.at[slots].get(mode="clip")  # [B, L, H]
            h, logits, scores = run_stage(network, stage, params, h, batch)
            # Joined into one array, so that there is a single transfer to the host.
            outputs = [logits, plain_complements(logits, temperatures)]
            if scores is not None:
                outputs.append(scores[:, None])
            values = jnp.concatenate(outputs, axis=1)  # [B, C + K] or [B, C + K + 1]
            if not stage.writes_states or states is None:
                return values, None
            return values, states.at[slots].set(h, mode="drop")

        return run

    def _of(self, stage: Stage) -> list[jax.Array]:
        if stage not in self._params:
            parameters = stage_parameters(stage, self._on_device[stage.network])
            self._params[stage] = list(parameters.values())
        return self._params[stage]

    def _states(self, slots: int, length: int) -> jax.ShapeDtypeStruct:
        hidden = self.networks[0].hidden_size
        return jax.ShapeDtypeStruct((slots, length, hidden), self._dtype)


def _part(
    batch: StageBatch, first: int, size: int, slots: int, *, pairs: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Returns the inputs of a program for one part of a batch, padded with rows of 0 tokens.

    They are the rows, temperatures, texts (or None), and positions at which the second text of each
    pair begins (None unless exits compare two texts).
    """
    rows, texts, fitted = batch.rows, batch.texts, batch.temperatures
    if fitted is None:
        fitted = np.ones(rows.shape[1], np.float32)
    starts = rows[1] if batch.second_starts is None else batch.second_starts
    missing = first + size - rows.shape[1]
    if first or missing < 0:
        part = slice(first, first + size)
        rows, fitted, starts = rows[:, part], fitted[part], starts[part]
        texts = None if texts is None else texts[:, part]
    if missing > 0:
        filling = np.repeat(np.asarray([[slots], [0]], np.int32), missing, axis=1)
        rows = np.concatenate([rows, filling], axis=1)
        fitted = np.concatenate([fitted, np.ones(missing, np.float32)])
        starts = np.pad(starts, (0, missing))
        if texts is not None:
            texts = np.pad(texts, ((0, 0), (0, missing), (0, 0)))
    return rows, fitted, texts, starts if pairs else None


def _empty_batch(stage: Stage, length: int) -> StageBatch:
    texts = np.zeros((2, 0, length), np.int32) if stage.embeds else None
    return StageBatch(length, np.zeros((2, 0), np.int32), texts)


def stage_parameters(stage: Stage, params: Any) -> dict[str, Any]:
    """Selects the parameters that a stage reads, by path.

    A program gets only these, since JAX checks each argument of a call.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "/".join(str(p.key) for p in path): leaf for path, leaf in leaves if _reads(stage, path)
    }


def run_stage(
    network: Network,
    stage: Stage,
    params: list[jax.Array],
    h: jax.Array | None,
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes a stage.

    Args:
      network: the network of the stage.
      stage: the stage to compute.
      params: values of `stage_parameters`, in order.
      h: hidden states that the previous stage returned; None if this one embeds.
      batch: see `EarlyExit.forward_from`.

    Returns:
      (hidden states [B, L, H], logits [B, C], learning-to-exit scores [B] or None).

    """
    model = nnx.merge(network.graphdef, _fill(stage, params, network.params))
    h, output = model.forward_from(stage.start, stage.end, h, batch, whole=stage.whole)
    return h, output.logits, output.exit_scores


def _reads(stage: Stage, path: tuple[Any, ...]) -> bool:
    """Returns whether a stage reads the parameter at a path."""
    match tuple(p.key for p in path):
        case ("encoder", "embeddings", *_):
            return stage.embeds
        case ("encoder", "layers", int(index), *_):
            return stage.start <= index + 1 <= stage.end
        case ("heads", layer, *_):
            return layer == str(stage.end)
    return True


def _fill(stage: Stage, values: list[jax.Array], params: Any) -> Any:
    """Returns all parameters, with zeros for those that `stage_parameters` left out."""
    rest = iter(values)

    def pick(path: tuple[Any, ...], leaf: np.ndarray) -> jax.Array:
        return next(rest) if _reads(stage, path) else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(pick, params)
