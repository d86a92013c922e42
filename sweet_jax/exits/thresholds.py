"""Formats thresholds with as many digits as determine the exit of each known row.

Shape letters: R replica, E exit, N examples, T thresholds, B breakpoints.
"""

from collections.abc import Iterable

import numpy as np

from sweet_jax.exits.certificates import LARGEST, NEVER

_SHORT = 8  # characters: shorter numbers may have been written by a user and are not rounded


def breakpoints(*confidences: np.ndarray) -> np.ndarray:
    """Returns the distinct finite numbers of arrays of any shape, ascending, float64 [B].

    For the confidences of rows, or their running maximum over exits, these are the thresholds at
    which the exit of some row changes.
    """
    every = np.unique(np.concatenate([np.ravel(c) for c in confidences]))
    return every[np.isfinite(every)]


def format_threshold(threshold: float, points: np.ndarray) -> str:
    """Formats one threshold, see `format_thresholds`."""
    (text,) = format_thresholds([threshold], points)
    return text


def format_thresholds(thresholds: Iterable[float], points: np.ndarray) -> list[str]:
    """Formats thresholds with the fewest decimals, at least two, that send rows to the same exits.

    A row leaves where its confidence is at least the threshold, so any number above the next lower
    breakpoint, up to and including the next higher one, has the same effect. Among the numbers with
    the fewest decimals, the one nearest to the threshold is used. Numbers that are already short
    are not rounded. `float` of the text has the same effect as the threshold.

    Args:
      thresholds: thresholds to format, T numbers.
      points: breakpoints of the rows, see `breakpoints`, float64 [B].

    """
    values = np.asarray(list(thresholds), np.float64)  # [T]
    at = np.searchsorted(points, values)  # index of the first breakpoint at or above the threshold
    lower = np.append(-np.inf, points)[at]
    upper = np.append(points, np.inf)[at]
    triples = zip(values.tolist(), lower.tolist(), upper.tolist(), strict=True)
    return [_shortest(*triple) for triple in triples]


def _shortest(value: float, lower: float, upper: float) -> str:
    """Returns the shortest decimal in (lower, upper] that is nearest to value."""
    if value >= NEVER:
        return "inf"
    text = repr(value)
    if len(text) <= _SHORT or value >= LARGEST:  # LARGEST has 309 digits before the point
        return text
    for decimals in range(2, 17):
        step = 10.0**-decimals
        tried = [f"{v:.{decimals}f}" for v in (value, value - step / 2, value + step / 2)]
        for candidate in tried:
            if lower < float(candidate) <= upper:
                return candidate
    return text
