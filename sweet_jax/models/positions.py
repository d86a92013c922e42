"""Arrays that depend only on a length, which may be symbolic (`jax.export.symbolic_shape`).

If the length is a number, they are NumPy arrays, and thus constants of the program.

Shape letters: L length.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def array_module(*sizes: Any) -> Any:
    """Returns numpy, or jax.numpy if any of the sizes is symbolic."""
    return np if all(isinstance(size, int) for size in sizes) else jnp


def rows_by_offset(row: Callable[[np.ndarray], np.ndarray], length: Any, farthest: int) -> Any:
    """Returns the row of a table for each offset from -(L - 1) to L, int [2L].

    Args:
      row: function of offsets, an int array of any shape, that returns their rows.
      length: length L.
      farthest: distance from which on all offsets with the same sign share a row.

    """
    if isinstance(length, int):
        return row(np.arange(2 * length) - (length - 1))
    table = jnp.asarray(row(np.arange(-farthest, farthest + 1)), jnp.int32)
    offset = jnp.arange(2 * length) - (length - 1)  # [2L]
    return table[jnp.clip(offset, -farthest, farthest) + farthest]
