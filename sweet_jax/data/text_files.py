"""Text files, decompressed and decoded according to their byte order mark, or else as UTF-8."""

import bz2
import contextlib
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from sweet_jax.data.tables import ColumnError, Columns, Record, Table, make_record

_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# The first bytes of compressed files; a bzip2 file's are those of its default level.
_COMPRESSED = {b"\x1f\x8b\x08": ".gz", b"BZh91AY": ".bz2", b"\xfd7zXZ": ".xz"}


class TextFile(NamedTuple):
    """An opened text file.

    Attributes:
      path: path of the file.
      lines: stream of the file's text; a byte that is not UTF-8 is decoded as a lone surrogate,
        which `make_record` reports.
      position: function that returns the number of bytes of the file read so far.

    """

    path: Path
    lines: io.TextIOWrapper
    position: Callable[[], int]


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextFile]:
    """Opens a text file.

    Raises OSError, EOFError or UnicodeError, also while the file is read. A null character near the
    start raises UnicodeError, since it indicates UTF-16 without a byte order mark, and so do the
    first bytes of a compressed file without the suffix of one.
    """
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        opened = _OPENERS.get(path.suffix.lower())
        stream = io.BufferedReader(opened(raw)) if opened else raw
        beginning = stream.peek(8)
        if suffix := next((_COMPRESSED[s] for s in _COMPRESSED if beginning.startswith(s)), ""):
            raise UnicodeError(f"it is compressed: rename it to {path.name + suffix!r}")
        start = beginning[:4]
        marks = (name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark))
        encoding = next(marks, "utf-8-sig")
        if encoding == "utf-8-sig" and b"\0" in start:
            raise UnicodeError("UTF-16 without a byte order mark, or not text: save it as UTF-8")
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        text = io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")
        # The position in the compressed file is used: that of the text is slow or unavailable, and
        # the decompressed size is unknown.
        yield TextFile(path, stack.enter_context(text), raw.tell)


def lines_table(file: TextFile) -> Table:
    """Returns the table of a file with one text per line."""

    def records(columns: Columns) -> Iterator[Record]:
        if len(columns.texts) != 1:
            raise ColumnError(
                "a .txt file has one text per row, but this model takes pairs: use a CSV"
            )
        if columns.kept:
            raise ColumnError(f"a .txt file has no column {columns.kept[0]!r}: use a CSV")
        for row, line in enumerate(file.lines, start=1):
            yield make_record((line.rstrip("\r\n"),), columns, file.position(), row, row)

    return Table((), records)
