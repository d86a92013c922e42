"""Evaluation of all replicas: computes the outputs of every exit for every row in one pass.

Shape letters: R replica, E exit, B batch, N examples, H width of a classifier's input, C outputs of
an exit (classes).
"""

import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens, evaluation_batch_indices
from sweet_jax.data.padding import bucket_lengths, evaluation_lengths
from sweet_jax.distributed import PreemptedError, preemption_requested
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.models.layers import derive_key
from sweet_jax.training.sharding import (
    batch_sharding,
    mesh_of,
    put_batch,
    replicated_sharding,
    vmap_replicas,
    warn_on_retrace,
)
from sweet_jax.training.step import Params, evaluate_step

log = logging.getLogger(__name__)

# Larger arrays of features are kept in a file. For MiniLM with 4 exits, 1 GiB holds 170,000 rows.
_IN_MEMORY = 1 << 30


def compile_evaluation(
    config: Config,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    *,
    dropout: bool = False,
    features: bool = False,
) -> Callable:
    """Returns a compiled function (params, batch, number) → ModelOutput, all with the axis R.

    It is compiled once for each batch size and length, and shared by all splits: calls for the same
    model return the same function.

    Args:
      config: resolved config.
      graphdef: structure of the model.
      mesh: mesh of the devices that hold the parameters.
      dropout: whether dropout stays on, as it does on the calibration rows in the paper's released
        code; the masks of a batch depend only on its number.
      features: whether the outputs include the inputs of the classifiers.

    """
    return _compiled(len(config.replicas()), graphdef, mesh, dropout, features)


@functools.lru_cache(maxsize=4)
def _compiled(
    replicas: int, graphdef: nnx.GraphDef, mesh: Mesh, dropout: bool, features: bool
) -> Callable:
    def one(params: Params, batch: dict, number: jax.Array) -> ModelOutput:
        key = derive_key(jax.random.key(0), "calibration", number) if dropout else None
        return evaluate_step(graphdef, params, batch, key, features)

    return jax.jit(
        warn_on_retrace(vmap_replicas(one, replicas)), out_shardings=replicated_sharding(mesh)
    )


def evaluate(
    config: Config,
    program: Callable,
    params: Params,
    tokens: Tokens,
    rows: np.ndarray,
    *,
    features: bool = False,
) -> ModelOutput:
    """Computes the outputs of every exit for every row in one pass.

    Args:
      config: resolved config.
      program: function returned by `compile_evaluation`.
      params: parameters [R, ...] on the devices, as `fit` returns them.
      tokens: tokenized texts of the split.
      rows: rows of each replica, int [R, N]; the outputs are in the same order.
      features: whether to return the features too; `program` must compute them.

    Returns:
      The outputs as float32 arrays on the host: logits [R, E, N, C]; exit_scores [R, E, N] if the
      model uses learning-to-exit; and, with `features`, features [R, E, N, H], which are kept in a
      temporary file (under TMPDIR) if they are large.

    Raises:
      PreemptedError: if SIGTERM was received and the run has several processes.

    """
    mesh = mesh_of(params)
    data = mesh.shape["data"]
    size = -(-config.evaluation_batch_size // data) * data
    lengths = bucket_lengths(config.max_length)
    if jax.default_backend() != "cpu":
        lengths = evaluation_lengths(config.max_length, rows.size)
    whole: ModelOutput | None = None
    for number, (positions, picked) in enumerate(evaluation_batch_indices(tokens, rows, size)):
        batch = put_batch(tokens, picked, lengths, batch_sharding(mesh))
        numbers = np.full(len(rows), number, np.int32)
        outputs = program(params, batch, numbers)
        fetched = jax.device_get(outputs if features else outputs._replace(features=None))
        # SIGTERM simply ends a single process here. With several processes, JAX catches the signal.
        if jax.process_count() > 1 and preemption_requested():
            raise PreemptedError("stopped by SIGTERM while evaluating")
        if whole is None:
            whole = jax.tree.map(lambda x, n=rows.shape[1]: _unfilled(x, n), fetched)
        for replica, index in enumerate(positions):
            present = index >= 0
            for into, values in zip(jax.tree.leaves(whole), jax.tree.leaves(fetched), strict=True):
                into[replica, :, index[present]] = values[replica][:, present].swapaxes(0, 1)
    assert whole is not None, "rows is empty"
    return whole


def _unfilled(batch: np.ndarray, rows: int) -> np.ndarray:
    """Allocates a float32 array [R, E, N, ...] for all rows, given a batch's [R, E, B, ...]."""
    shape = (*batch.shape[:2], rows, *batch.shape[3:])
    if 4 * np.prod(shape, dtype=np.int64) <= _IN_MEMORY:
        return np.full(shape, np.nan, np.float32)
    log.info(
        "the features of %d rows take %.1f GiB and are kept in a file under %s",
        rows,
        4 * np.prod(shape, dtype=np.int64) / 2**30,
        tempfile.gettempdir(),
    )
    with tempfile.NamedTemporaryFile(prefix="sweet_jax-", suffix=".features") as file:
        # The file is unlinked at once; its space is freed together with the array.
        return np.memmap(Path(file.name), np.float32, "w+", shape=shape)
