"""What is asked of a classifier, checked, and what it answers.

Shape letters: N texts, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sweet_jax.config import UserError

Text = str | tuple[str, str] | Sequence[str]


class Prediction(NamedTuple):
    """The answer to one text."""

    label: str
    probabilities: np.ndarray  # float64 [C], after temperature, of `AdaptiveClassifier.classes`
    exit: int  # the layer it left at
    cost: float  # share of the full model's layers

    @property
    def probability(self) -> float:
        """Of the label."""
        return float(self.probabilities.max())


class InvalidRow(NamedTuple):
    """A row without a text, and why."""

    reason: str


class Predictions(NamedTuple):
    """The answers to some texts, in their order."""

    labels: np.ndarray  # str [N]
    probabilities: np.ndarray  # float64 [N, C]
    exits: np.ndarray  # int64 [N], layer numbers
    cost: np.ndarray  # float64 [N]


def collect_predictions(found: Sequence[Prediction], classes: int) -> Predictions:
    """Predictions one by one as arrays."""
    labels, probabilities, exits, cost = zip(*found, strict=True) if found else ((),) * 4
    return Predictions(
        np.asarray(labels, np.str_),
        np.asarray(probabilities, np.float64).reshape(len(found), classes),
        np.asarray(exits, np.int64),
        np.asarray(cost, np.float64),
    )


def validate_text(text: Text, pairs: bool, number: int) -> tuple[str, ...]:
    """A text, or a pair of them, as a tuple of one or two. Raises UserError for anything else.

    `number` is the row's, from 0, for the error.
    """
    several = tuple(text) if isinstance(text, (tuple, list)) else ()
    parts = (text,) if isinstance(text, str) else several
    if len(parts) != 1 + pairs or not all(isinstance(part, str) for part in parts):
        wanted = "a pair of texts (a tuple of two)" if pairs else "a text"
        raise UserError(f"row {number + 1} must be {wanted}; got {text!r:.80}")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"row {number + 1} holds half a surrogate pair: {text!a:.80}") from error
    return parts
