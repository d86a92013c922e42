"""Labeled rows in memory (DataFrames, data sets, tables, dicts), saved in a run's directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from sweet_jax.data.tables import ColumnError, find_column
from sweet_jax.errors import UserError
from sweet_jax.files import atomic_write
from sweet_jax.run_directory import is_unclaimed


def write_rows(
    data: Any, columns: Sequence[str], path: Path, workdir: Path, part: str = "data"
) -> None:
    """Writes rows in memory to a file in the workdir, unless a run there has the same rows.

    Args:
      data: the rows, see `train`.
      columns: names of the columns to write; () for all.
      path: the file.
      workdir: the run directory.
      part: which rows these are, for messages: an argument of `train`, "data" or "validation".

    Raises UserError if the data has no rows or cannot be read as a table, or the run has others.

    """
    table = _table_of(data, part)
    title = "the data" if part == "data" else f"the {part} data"
    if columns:  # the other columns are not needed, and may be large or private
        try:
            table = table.select([find_column(name, table.column_names) for name in columns])
        except ColumnError as error:
            raise ColumnError(f"{title}: {error}") from None
    if not table.num_rows:  # its columns have no types, so that their check would mislead
        raise UserError(f"{title} has no rows")
    try:
        if path.exists() and not is_unclaimed(workdir):
            with pa.memory_map(str(path)) as source:
                if _same_rows(pa.ipc.open_file(source).read_all(), table):
                    return
            raise UserError(
                f"workdir {str(workdir)!r} belongs to a run on other rows: choose another workdir, "
                "or remove this one"
            )
        with atomic_write(path) as aside, pa.ipc.new_file(str(aside), table.schema) as writer:
            writer.write_table(table)
    except OSError as error:
        raise UserError(
            f"workdir {str(workdir)!r} cannot be used ({error}): choose another workdir"
        ) from error


def _same_rows(left: pa.Table, right: pa.Table) -> bool:
    """Returns whether two tables have the same columns and values, regardless of Arrow types."""
    ours, theirs = left.to_pydict(), right.to_pydict()
    return ours.keys() == theirs.keys() and all(
        len(values) == len(theirs[name])
        # NaN, a missing number, is not equal to itself.
        and all(a == b or repr(a) == repr(b) for a, b in zip(values, theirs[name], strict=True))
        for name, values in ours.items()
    )


def _table_of(data: Any, part: str) -> pa.Table:
    """Returns rows in memory as a table. Raises UserError if they cannot be read as one."""
    try:
        if isinstance(data, pa.Table):
            return data
        if isinstance(data, Mapping):
            return pa.table(dict(data))
        if hasattr(data, "to_pandas") and hasattr(data, "num_rows"):  # a datasets.Dataset
            return data.with_format("arrow")[:]
        if hasattr(data, "iterrows"):
            return pa.Table.from_pandas(data, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"{part} cannot be read as a table: {error}") from error
    raise UserError(
        f"{part} must be the name of a file, a DataFrame, a Dataset, or a dict of columns such as "
        f"{{'text': [...], 'label': [...]}}; got {type(data).__name__}"
    )
