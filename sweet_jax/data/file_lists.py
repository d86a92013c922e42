"""The files that a config key or option names: a list, a folder, a pattern, or several with "+"."""

import glob
import os
from pathlib import Path

from sweet_jax.config import split_names
from sweet_jax.data.label_folders import is_hidden, text_files, warn_of_unread
from sweet_jax.data.records import is_table
from sweet_jax.errors import AbsentFileError, UserError
from sweet_jax.paths import resolve_path


def split_files(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of sources, unless the whole text names an existing file."""
    return (text,) if os.path.exists(resolve_path(text)) else split_names(text)


def expand_files(name: str) -> list[Path]:
    """Returns the files of one source, ordered by name.

    The name can be a file, a folder of label folders, a folder of tables (CSV, Parquet, …), or a
    pattern such as "part-*.parquet"; several of them are joined with "+". Hidden files in a folder
    are ignored; a warning names other files that are ignored.

    Raises UserError for a pattern without files, a folder that has both tables and label folders,
    and an empty name.
    """
    if not name.strip(" +"):
        raise UserError(f"{name!r} names no file: pass the name of a file")
    path = resolve_path(name)  # os.path below: a list of many files is too long for Path's methods
    if os.path.isdir(path):
        return _files_of_folder(path)
    if os.path.exists(path):
        return [path]
    if any(sign in name for sign in "*?["):
        matches = sorted(map(Path, glob.glob(str(path))))
        files = [match for match in matches if not match.is_dir()]
        if not files:
            raise AbsentFileError(f"no file matches {name!r}")
        warn_of_unread(name, set(matches).difference(files))
        return files
    if "+" in name:
        return [
            file for part in name.split("+") if part.strip() for file in expand_files(part.strip())
        ]
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    """Returns the tables in a folder, or the folder itself if there are none.

    Broken links count as tables; an error is raised when they are read.
    """
    entries = {path for path in folder.iterdir() if not is_hidden(path)}
    tables = {p for p in entries if not p.is_dir() and is_table(p)}
    texts = text_files(folder)
    if not texts:
        warn_of_unread(str(folder), entries - tables if tables else ())
        return sorted(tables) or [folder]
    labels = {file.parent for file in texts}
    if tables:
        table, pattern = min(tables), folder / f"*{min(tables).suffix}"
        raise UserError(
            f"{str(folder)!r} has tables, such as {table.name!r}, and folders of texts, such as "
            f"{min(labels).name!r}: pass the tables as {str(pattern)!r}, or move them elsewhere"
        )
    return [folder]  # its reader warns about ignored files
