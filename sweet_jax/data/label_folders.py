"""Folders of <label>/<name>.txt files."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from sweet_jax.data.tables import Columns, Record, Table, find_column, make_record
from sweet_jax.errors import UserError

log = logging.getLogger(__name__)

_COLUMNS = ("text", "label")
_LISTED = 3  # maximum number of ignored entries that a warning names


def folder_table(path: Path) -> Table:
    """Returns the table of a folder, in which an empty file is an error.

    Hidden files and folders and __MACOSX, which editors, file managers and archives create, are
    ignored. After the last row, a warning names the other files that are ignored. Reading raises
    UserError if there are no files.
    """

    def records(columns: Columns) -> Iterator[Record]:
        indices = [find_column(name, _COLUMNS) for name in columns.names]
        files = text_files(path)
        if not files:
            raise UserError(f"folder {str(path)!r} has no <label>/<name>.txt files")
        for row, file in enumerate(files, start=1):
            values = (_read_text(file), file.parent.name)
            if values[0].strip():
                yield make_record(tuple(values[index] for index in indices), columns, row, row)
            else:
                error = f"{str(file)!r} is empty: fill it, remove it, or set skip_invalid to True"
                yield Record((), error, row, row, line=0)
        labels = {file.parent for file in files}
        every = {p for folder in (path, *labels) for p in folder.iterdir() if not is_hidden(p)}
        warn_of_unread(str(path), every.difference(labels, files))

    return Table(_COLUMNS, records)


def text_files(path: Path) -> list[Path]:
    """Returns the <label>/<name>.txt files in a folder, ordered by path."""
    return [
        file
        for file in sorted(path.glob("*/*"))
        if file.suffix.lower() == ".txt" and not (is_hidden(file) or is_hidden(file.parent))
    ]


def warn_of_unread(source: str, unread: Collection[Path]) -> None:
    """Logs a warning about entries of a source that are ignored."""
    if unread:
        listed = ", ".join(repr(str(path)) for path in sorted(unread)[:_LISTED])
        more = f" and {len(unread) - _LISTED} more" if len(unread) > _LISTED else ""
        log.warning("ignored in %r: %s%s", source, listed, more)


def is_hidden(path: Path) -> bool:
    """Returns whether an entry is hidden or __MACOSX, as editors and archives create them."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")  # the encoding of many older corpora
