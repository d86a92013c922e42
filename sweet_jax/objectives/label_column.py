"""How an objective reads its targets from the labels of a file, and how it stratifies rows.

Shape letters: N rows, C outputs of an exit.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from sweet_jax.errors import UserError

SEPARATOR = "|"  # between the labels of a row with several labels


class LabelError(UserError):
    """Raised for the label of a row that is not valid.

    Attributes:
      row: index of the row.

    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


@dataclasses.dataclass(frozen=True)
class LabelColumn:
    """Defines how labels, which files store as text, become targets.

    Attributes:
      read_names: function of (labels, names declared by the file or (), name of the column) that
        returns the names of the outputs [C]. Raises UserError if the column holds no labels of
        this objective.
      read: function of (labels, names, texts of the rows) that returns the targets [N, ...] used
        for training. Raises LabelError for an invalid label.
      check: function of (training targets, validation targets, names, name of the column). Raises
        UserError if a model cannot be trained or evaluated on these targets.
      strata: function of the targets that returns the stratum of each row, int [N] from 0, for
        stratified splits.
      strata_name: description of the strata, as in "... in proportion".
      present: function of the targets that returns the indices of the outputs that occur in them,
        int, ascending.
      describe: function of (targets, names) that returns (text to log about the targets, warnings).
      several: whether a row may have several labels or no label.

    """

    read_names: Callable[[Sequence[str], tuple[str, ...], str], tuple[str, ...]]
    read: Callable[[Sequence[str], tuple[str, ...], Sequence[tuple[str, ...]]], np.ndarray]
    check: Callable[[np.ndarray, np.ndarray, tuple[str, ...], str], None]
    strata: Callable[[np.ndarray], np.ndarray]
    strata_name: str
    present: Callable[[np.ndarray], np.ndarray]
    describe: Callable[[np.ndarray, tuple[str, ...]], tuple[str, list[str]]]
    several: bool = False


def ordered_names(names: set[str]) -> tuple[str, ...]:
    """Returns labels in order: numerically if all are integers, otherwise alphabetically."""
    numeric = all(re.fullmatch("-?[0-9]{1,18}", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names))


def split_labels(text: str) -> list[str]:
    """Returns the labels of a row, written as a|b, without surrounding whitespace."""
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]
