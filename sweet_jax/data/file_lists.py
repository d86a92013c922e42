"""The files that one key or option names: a list, a folder, a pattern, or several joined by "+"."""

import glob
from pathlib import Path

from sweet_jax.config import UserError, split_names
from sweet_jax.data.records import format_of
from sweet_jax.files import resolve_path


def split_files(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of sources, unless the whole text is the name of a file."""
    return (text,) if _exists(resolve_path(text)) else split_names(text)


def expand_files(name: str) -> list[Path]:
    """Returns the files of one source, in order of their names.

    A name is a file, a folder of label folders, a folder of tables (CSV, Parquet, …), or a pattern
    such as "part-*.parquet"; several are joined by "+". Hidden files of a folder are left out.

    Raises UserError for a pattern or a folder without files.
    """
    path = resolve_path(name)
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if not p.name.startswith(".") and _is_table(p)]
        return found or [path]
    if _exists(path):
        return [path]
    if any(sign in name for sign in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path)) if Path(match).is_file())
        if not found:
            raise UserError(f"no file matches {name!r}")
        return found
    if "+" in name:
        return [
            file for part in name.split("+") if part.strip() for file in expand_files(part.strip())
        ]
    return [path]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a list of many files is too long to be the name of one
        return False


def _is_table(path: Path) -> bool:
    return path.is_file() and bool(format_of(path)) and format_of(path) != ".txt"
