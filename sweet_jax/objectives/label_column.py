"""How an objective reads its targets from the labels of a file, and how rows are split by them.

Shape letters: N rows, C outputs of an exit.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

SEPARATOR = "|"  # of the labels of a row that may have several


@dataclasses.dataclass(frozen=True)
class LabelColumn:
    """Defines how labels, which files hold as text, become targets.

    Attributes:
      read_names: (labels, the names that the file declares or (), name of the column) → the names
        of the outputs [C]. Raises UserError for a column that holds something else.
      read: (labels, names, the texts of the rows) → the targets [N, ...] as they are trained on.
        Raises UserError for a label that is none.
      check: (training targets, validation targets, names, name of the column) → None. Raises
        UserError where a model cannot be trained, or not be evaluated, on them.
      strata: targets → int [N] from 0, by which rows are split in proportion.
      strata_name: what they are, in words, as in "... in proportion".
      present: targets → the numbers of the outputs that occur in them, int ascending.
      describe: (targets, names) → (what is logged of them, warnings).
      several: whether a row may have several labels, or none.

    """

    read_names: Callable[[Sequence[str], tuple[str, ...], str], tuple[str, ...]]
    read: Callable[[Sequence[str], tuple[str, ...], Sequence[tuple[str, ...]]], np.ndarray]
    check: Callable[[np.ndarray, np.ndarray, tuple[str, ...], str], None]
    strata: Callable[[np.ndarray], np.ndarray]
    strata_name: str
    present: Callable[[np.ndarray], np.ndarray]
    describe: Callable[[np.ndarray, tuple[str, ...]], tuple[str, list[str]]]
    several: bool = False


def ordered_names(found: set[str]) -> tuple[str, ...]:
    """Returns labels in order: of their numbers where all are whole numbers, else of the text."""
    numeric = all(re.fullmatch("-?[0-9]{1,18}", name) for name in found)
    return tuple(sorted(found, key=lambda name: (int(name), name)) if numeric else sorted(found))


def split_labels(text: str) -> list[str]:
    """Returns the labels of a row, written as a|b, without blanks around them."""
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]
