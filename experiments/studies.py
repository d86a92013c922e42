"""Reads the records of several studies, and formats their cells as table rows.

Shape letters: S seed, C table columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from experiments.comparison import Record, paired_differences
from experiments.comparison_tables import format_columns, format_interval
from experiments.records import read_study

Statistic = Callable[[Record], np.ndarray]  # values [S, C]


@dataclasses.dataclass(frozen=True)
class Row:
    """Describes a row: scores of a cell, or a difference of two or four cells.

    Attributes:
      label: text of the first column.
      study: name of the study that has the cells.
      cells: names of the cells; of several, see `paired_differences`.

    """

    label: str
    study: str
    cells: tuple[str, ...]


class Studies:
    """Reads the records of the studies in a folder when they are first used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read = functools.cache(lambda study: read_study(folder / study)[0])

    def records(self, row: Row) -> list[Record]:
        """Returns the records of a row's cells, or none if one is not finished."""
        study = self._read(row.study)
        return [study[name] for name in row.cells] if set(row.cells) <= set(study) else []

    def values(self, row: Row, statistic: Statistic) -> list[str]:
        """Formats a statistic of a row's cell, or the difference between its cells."""
        records = self.records(row)
        if len(records) == 1:
            return format_columns(records[0], statistic)
        gaps = paired_differences(records, statistic)
        return [format_interval(gap, sign=True) for gap in gaps.T]

    def lines(self, rows: Iterable[Row], statistic: Statistic) -> list[list[str]]:
        """Returns the labels and values of the rows whose cells are finished."""
        return [[row.label, *self.values(row, statistic)] for row in rows if self.records(row)]
