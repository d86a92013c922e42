"""Evaluation of all replicas: what every exit says of every row, in one pass.

Shape letters: R replica, E exit, B batch, N examples, C classes.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens, bucket_lengths, evaluation_picks
from sweet_jax.models.early_exit import Answer
from sweet_jax.models.layers import derive
from sweet_jax.processes import StoppedError, asked_to_stop
from sweet_jax.training.sharding import (
    by_row,
    mesh_of,
    over_replicas,
    placed,
    replicated,
    traced_at_most,
)
from sweet_jax.training.step import Params, evaluate_step


def compile_evaluation(
    config: Config, graphdef: nnx.GraphDef, mesh: Mesh, *, dropout: bool = False
) -> Callable:
    """(params, batch, number) → Answer, all with the axis R, jitted.

    Compiled at most once per batch length, which is asserted, for all splits together.

    Args:
      config: resolved.
      graphdef: structure of the model.
      mesh: of the devices of the parameters.
      dropout: leave dropout on, as the release does on its calibration rows; the masks of a batch
        follow from its number.

    """

    def one(params: Params, batch: dict, number: jax.Array) -> Answer:
        key = derive(jax.random.key(0), "calibration", number) if dropout else None
        return evaluate_step(graphdef, params, batch, key)

    replicas, lengths = len(config.replicas()), len(bucket_lengths(config.max_length))
    return jax.jit(
        traced_at_most(over_replicas(one, replicas), lengths), out_shardings=replicated(mesh)
    )


def evaluate(
    config: Config, answer: Callable, params: Params, tokens: Tokens, rows: np.ndarray
) -> Answer:
    """What every exit says of every row, in one pass: float32 arrays on the host.

    Logits [R, E, N, C], exit_scores [R, E, N] where the model learned to exit.

    Args:
      config: resolved.
      answer: what `compile_evaluation` returns.
      params: [R, ...] on the devices, as `fit` returns them.
      tokens: of the split.
      rows: int [R, N], the rows of each replica; the result is in their order.

    Raises:
      StoppedError: SIGTERM came to one of several processes.

    """
    mesh = mesh_of(params)
    data = mesh.shape["data"]
    size = -(-config.evaluation_batch_size // data) * data
    lengths = bucket_lengths(config.max_length)
    whole: Answer | None = None
    for number, (places, picked) in enumerate(evaluation_picks(tokens, rows, size)):
        batch = placed(tokens, picked, lengths, by_row(mesh))
        numbers = np.full(len(rows), number, np.int32)
        found = jax.device_get(answer(params, batch, numbers))  # [R, E, B, ...]
        # One process is ended by SIGTERM here; of several, JAX has taken the signal.
        if jax.process_count() > 1 and asked_to_stop():
            raise StoppedError("stopped by SIGTERM while evaluating")
        if whole is None:
            whole = jax.tree.map(lambda x, n=rows.shape[1]: _unfilled(x, n), found)
        for replica, place in enumerate(places):
            present = place >= 0
            for into, values in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
                into[replica, :, place[present]] = values[replica][:, present].swapaxes(0, 1)
    assert whole is not None, "rows is empty"
    return whole


def _unfilled(batch: np.ndarray, rows: int) -> np.ndarray:
    """Room for all rows of what `batch` [R, E, B, ...] has a few of: float32 [R, E, N, ...]."""
    return np.full((*batch.shape[:2], rows, *batch.shape[3:]), np.nan, np.float32)
