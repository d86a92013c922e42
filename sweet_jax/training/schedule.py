"""The number of steps of a training, and the number of steps between its evaluations."""

import math

from sweet_jax.config import AUTO

# With `epochs="auto"`, a run over N rows sees _EXAMPLES * sqrt(N) training examples, or N if that
# is more. Small data sets need many epochs: with a thousand rows, a fine-tuned encoder lacks
# updates, not rows (Mosbach et al. 2021, arXiv 2006.04884; Zhang et al. 2021, arXiv 2006.05987).
# Each further row adds less. The number of steps must be known in advance because the learning rate
# decays to zero over the whole training. The formula gives 4.8 epochs for 400 rows, 2.4 for 1,600,
# 1.3 for 5,400, and one from 9,216 rows on.
_EXAMPLES = 96
# Number of evaluations on tuning rows during such a run, the last after the last step; there is one
# more before it.
CHECKS = 8
# With `rate_search="short"`, each rate gets this share of the steps, and at least _SHORTEST steps.
_SHORT, _SHORTEST = 0.1, 40


def training_steps(epochs: int | str, rows: int, batch_size: int) -> int:
    """Returns the number of steps of a run over `rows` rows.

    Args:
      epochs: number of epochs, or "auto". The last batch of an epoch may be partial.
      rows: number of training rows.
      batch_size: number of rows in a batch.

    """
    per_epoch = -(-rows // batch_size)
    if epochs != AUTO:
        return per_epoch * int(epochs)
    return max(per_epoch, math.ceil(_EXAMPLES * math.sqrt(rows) / batch_size))


def search_steps(steps: int) -> int:
    """Returns the number of steps of a learning-rate search for a run of `steps` steps."""
    return min(steps, max(_SHORTEST, math.ceil(_SHORT * steps)))


def check_interval(steps: int) -> int:
    """Returns the number of steps between two evaluations on tuning rows in a run of `steps` steps.

    These evaluations never stop training early: the quality of a state at a large learning rate
    says little about that of the last state, where the rate is zero (see docs/reproduction.md).
    """
    return -(-steps // CHECKS)
