"""Splits a batch into parts: for JAX of few sizes, so that few programs are compiled.

On a CPU the time of a text falls with the size of the batch only until the product of texts and
tokens occupies the cores, and rises again once the activations leave the cache: several parts take
no longer than one batch would, and no row is computed in vain. On an accelerator a part takes as
long as the whole, so that batches are filled up instead.

Shape letters: N texts, L length.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Tokens of a part for each core, and of one of JAX's at least: at MiniLM's shape on one core and on
# two, JAX's parts of 512 tokens have the least time for each text
# (experiments/benchmarks/overhead.py --sizes), ONNX Runtime's, on one core, those of 256.
_TOKENS_PER_CORE, _LEAST_TOKENS = 256, 512
_MIDDLE = 4  # the size between 1 and one of at least 16


class Splitting(NamedTuple):
    """Says how batches are split.

    Attributes:
      tokens: that a part has at most, unless it is a single text.
      least_share: of a part's rows that must be texts; a part with fewer is split further.

    """

    tokens: float
    least_share: float

    @classmethod
    def on(cls, platform: str) -> "Splitting":
        """Returns that of a JAX platform: "cpu", or an accelerator's name."""
        if platform != "cpu":
            return cls(float("inf"), 0.0)
        return cls(max(_LEAST_TOKENS, tokens_of_part(usable_cores())), 0.6)

    def sizes(self, largest: int, length: int) -> tuple[int, ...]:
        """Returns the sizes of parts, ascending, of batches of up to `largest` texts of L tokens.

        1, the largest power of two within `tokens` (or `largest` itself), and 4 between the two.
        """
        fitting = self.tokens // length
        top = largest
        if fitting < largest:
            top = 1 << max(0, int(fitting).bit_length() - 1)
        return tuple(sorted({1, top} | ({_MIDDLE} if top >= 4 * _MIDDLE else set())))

    def split(self, count: int, sizes: Sequence[int]) -> list[int]:
        """Returns the sizes of the parts for some texts; the last may be filled up.

        Full parts of the largest size come first; the rest takes the smallest size that holds it,
        if at least `least_share` of it is texts, and else is split in the same way.
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
    """Returns how many tokens a part has at most on a CPU, unless it is a single text."""
    return _TOKENS_PER_CORE * cores


def split_by_length(tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """Splits texts into parts of at most `most` tokens, padded, of neighbors in length.

    Returns the places of each part's texts, the shortest texts first; a longer text is a part by
    itself. Where all of them fit into one part, it has them in their order.

    Args:
      tokens: of each text, int [N].
      most: tokens of a part.

    """
    if len(tokens) * int(tokens.max()) <= most:
        return [np.arange(len(tokens))]
    order = np.argsort(tokens, kind="stable")
    parts: list[list[int]] = [[]]
    for place in order.tolist():
        if parts[-1] and (len(parts[-1]) + 1) * int(tokens[place]) > most:
            parts.append([])
        parts[-1].append(place)
    return [np.asarray(part) for part in parts]


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return (os.cpu_count() or 1) if usable is None else len(usable)
