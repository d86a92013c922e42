"""Tables from Excel files: the first sheet, whose first row has the column names."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sweet_jax.data.tables import Columns, Record, Table, find_column, make_record
from sweet_jax.errors import UserError, one_line


@contextlib.contextmanager
def excel_table(path: Path) -> Iterator[Table]:
    """Opens an Excel file as a table; formulas have the values that Excel saved.

    Raises UserError if the extra `excel` is not installed, or the file is damaged or has no header.
    """
    try:
        import openpyxl  # optional
    except ImportError as error:
        raise UserError(
            f'{str(path)!r} is an Excel file: pip install -e ".[excel]" to read it, or save it as '
            "CSV"
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # a damaged file can break the reader in any way
        raise UserError(f"could not read {str(path)!r}: {one_line(error)}") from error
    with contextlib.closing(book):
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # the dimensions stated in the file may be wrong
        rows = sheet.iter_rows(values_only=True)
        header = ["" if name is None else str(name) for name in next(rows, ())]
        if not any(header):
            raise UserError(f"could not read {str(path)!r}: its first row has no column names")

        def records(columns: Columns) -> Iterator[Record]:
            indices = [find_column(name, header) for name in columns.names]
            label = None if columns.label is None else len(columns.texts)
            empty = 0  # number of empty rows just before; empty rows at the end are ignored
            for row, cells in enumerate(rows, start=1):
                if all(cell is None for cell in cells):
                    empty += 1
                    continue
                for before in range(row - empty, row):
                    yield make_record((None,) * len(indices), columns, before, before)
                empty = 0
                values = [cells[index] if index < len(cells) else None for index in indices]
                if label is not None and values[label] is not None:
                    values[label] = str(values[label])
                yield make_record(tuple(values), columns, row, row)

        yield Table(header, records)
