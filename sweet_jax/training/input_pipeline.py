"""The batches of a training, placed on the devices.

Shape letters: R replica, B batch.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.batches import append_unlabeled, steps_per_epoch, training_batch_indices
from sweet_jax.data.padding import (
    bucket_lengths,
    longest_row,
    padded_length,
    with_short,
    worth_compiling,
)
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.parallel import ExecutionPlan
from sweet_jax.training.schedule import training_steps
from sweet_jax.training.sharding import drop_replica_axis

_UNLABELED = zlib.crc32(b"unlabeled")
_LOOKED_AT = 400  # maximum number of batches of the first epoch whose lengths are examined


def training_batches(job: TrainingJob, plan: ExecutionPlan) -> Callable[[int], tuple[Any, int]]:
    """Returns a function of a step's number that returns (batch on the devices, its length).

    If the job has unlabeled rows, a batch has as many of them as labeled ones.
    """
    config, tokens = job.config, job.tokens
    seeds = [seed for seed, _ in config.replicas()]
    sources = [(list(job.rows), seeds)]
    if job.unlabeled is not None:
        others = len(tokens) + np.arange(len(job.unlabeled))
        tokens = append_unlabeled(tokens, job.unlabeled)
        # The other seeds give another order than the labeled rows have, even if there are as many.
        sources.append(([others] * len(seeds), [seed ^ _UNLABELED for seed in seeds]))
    grouped = tokens.lengths if config.group_by_length else None

    def draw(number: int) -> np.ndarray:
        indices = [
            training_batch_indices(rows, orders, number, config.batch_size, grouped)
            for rows, orders in sources
        ]
        return np.concatenate(indices, axis=1)  # [R, B], or twice as many

    lengths = _lengths(config, job.rows.shape[1], lambda step: longest_row(tokens, draw(step)))

    def batch(number: int) -> tuple[Any, int]:
        rows = draw(number)
        length = padded_length(tokens, rows, lengths)
        return plan.place(tokens, drop_replica_axis(rows, len(seeds)), lengths), length

    return batch


def _lengths(config: Config, rows: int, longest: Callable[[int], int]) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to.

    Args:
      config: config of the run.
      rows: number of training rows of a replica.
      longest: function of a step's number that returns the number of tokens in the longest row of
        its batch.

    """
    lengths = bucket_lengths(config.max_length)
    # Short runs of the learning-rate search count the steps of the whole training too, so that they
    # share its compiled programs.
    steps = training_steps(config.epochs, rows, config.batch_size)
    if config.max_steps:
        steps = min(steps, config.max_steps)
    epoch = range(steps_per_epoch(rows, config.batch_size))[:_LOOKED_AT]
    tokens = np.asarray([longest(step) for step in epoch])
    if jax.default_backend() == "cpu":
        return with_short(lengths, tokens, steps)
    return worth_compiling(lengths, tokens, steps * config.batch_size * len(config.replicas()))
