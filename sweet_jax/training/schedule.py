"""The number of steps of a training, and of those between its evaluations."""

import math

from sweet_jax.config import AUTO

# Training examples of a run of `epochs="auto"` over N rows: _EXAMPLES * sqrt(N), or N if that is
# more. Few rows want many epochs: what a fine-tuned encoder lacks on a thousand rows is updates,
# not rows (Mosbach et al. 2021, arXiv 2006.04884; Zhang et al. 2021, arXiv 2006.05987). Each
# further row adds less, and the learning rate decays to zero over the whole, so that the length
# must be known beforehand: 4.8 epochs of 400 rows, 2.4 of 1,600, 1.3 of 5,400, one from 9,216 on.
_EXAMPLES = 96
CHECKS = 8  # evaluations on tuning rows in such a run, the last one after the last step
# What `rate_search="short"` gives each rate: this share of the steps, and as many steps at least.
_SHORT, _SHORTEST = 0.1, 40


def training_steps(epochs: int | str, rows: int, batch_size: int) -> int:
    """Returns the number of steps of a run over so many rows.

    epochs: a number of epochs, the last batch of each partial; or "auto".
    """
    per_epoch = -(-rows // batch_size)
    if epochs != AUTO:
        return per_epoch * int(epochs)
    return max(per_epoch, math.ceil(_EXAMPLES * math.sqrt(rows) / batch_size))


def search_steps(steps: int) -> int:
    """Returns the number of steps by which a learning rate is chosen for a run of so many steps."""
    return min(steps, max(_SHORTEST, math.ceil(_SHORT * steps)))


def check_interval(steps: int) -> int:
    """Returns the number of steps between two evaluations on tuning rows of a run of so many.

    None of them ends training: how good a state is at a large learning rate says little of the last
    one, at zero (docs/reproduction.md has a case).
    """
    return -(-steps // CHECKS)
