"""Splits a batch into parts; for JAX, of few sizes, so that few programs are compiled.

On a CPU, the time per text decreases with the batch size only until the texts' tokens keep all
cores busy, and increases again once the activations no longer fit into the cache. Several parts
then take no longer than one batch, and need fewer padding rows. On an accelerator, a part takes as
long as the whole batch, so batches are padded instead.

Shape letters: N texts, L length.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The maximum tokens of a part, per core, and the minimum of that maximum for JAX. For MiniLM's
# shape, the time per text is least with parts of 512 tokens in JAX, on one core and on two
# (experiments/benchmarks/overhead.py --sizes), and of 256 tokens in ONNX Runtime, on one core.
_TOKENS_PER_CORE, _LEAST_TOKENS = 256, 512
_MIDDLE = 4  # an additional size, if the largest is at least 16


class Splitting(NamedTuple):
    """Describes how batches are split.

    Attributes:
      tokens: maximum number of tokens of a part, unless it is a single text.
      least_share: minimum share of a part's rows that are texts; a part with fewer is split
        further.

    """

    tokens: float
    least_share: float

    @classmethod
    def on(cls, platform: str) -> "Splitting":
        """Returns the splitting for a JAX platform: "cpu", or an accelerator's name."""
        if platform != "cpu":
            return cls(float("inf"), 0.0)
        return cls(max(_LEAST_TOKENS, tokens_of_part(usable_cores())), 0.6)

    def sizes(self, largest: int, length: int) -> tuple[int, ...]:
        """Returns the sizes of parts, ascending, for batches of up to `largest` texts of L tokens.

        The sizes are 1; `largest`, if that many texts fit into `tokens`, or else the largest power
        of two that does; and 4, if that is at least 16.
        """
        fitting = self.tokens // length
        top = largest
        if fitting < largest:
            top = 1 << max(0, int(fitting).bit_length() - 1)
        return tuple(sorted({1, top} | ({_MIDDLE} if top >= 4 * _MIDDLE else set())))

    def split(self, count: int, sizes: Sequence[int]) -> list[int]:
        """Returns the sizes of the parts for `count` texts; the last part may need padding rows.

        Full parts of the largest size come first. The rest becomes one part of the smallest size
        that fits, if at least `least_share` of its rows are texts; otherwise, it is split further.
        """
        parts = []
        while count > 0:
            size = next((size for size in sizes if size >= count), sizes[-1])
            if count < self.least_share * size:
                size = max(smaller for smaller in sizes if smaller < size)
            parts.append(size)
            count -= size
        return parts


def tokens_of_part(cores: int) -> int:
    """Returns the maximum number of tokens of a part on a CPU, unless it is a single text."""
    return _TOKENS_PER_CORE * cores


def split_by_length(tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """Splits texts into parts of similar length, each of at most `most` tokens after padding.

    A text of more tokens is a part by itself.

    Args:
      tokens: number of tokens of each text, int [N].
      most: maximum number of tokens of a part.

    Returns:
      The indices of each part's texts, the shortest texts first. If all texts fit into one part,
      they stay in their order.

    """
    if len(tokens) * int(tokens.max()) <= most:
        return [np.arange(len(tokens))]
    order = np.argsort(tokens, kind="stable")
    parts: list[list[int]] = [[]]
    for index in order.tolist():
        if parts[-1] and (len(parts[-1]) + 1) * int(tokens[index]) > most:
            parts.append([])
        parts[-1].append(index)
    return [np.asarray(part) for part in parts]


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return (os.cpu_count() or 1) if usable is None else len(usable)
