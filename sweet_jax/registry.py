"""Tables of named entries, to which other packages and modules can add their own.

There are three ways to add an entry, and none of them edits this package:

- assign it: `METHODS["mine"] = Method(...)`, in a module that is imported before the name is used;
- install a package with such a module, named by an entry point in the group `sweet_jax`. It is
  imported when a name is looked up that no table has;
- refer to it: the name "module:OBJECT" is the object of that module.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from sweet_jax.errors import UnknownNameError, check_choice, one_line

Entry = TypeVar("Entry")

ENTRY_POINTS = "sweet_jax"  # the group


class Registry(dict[str, Entry]):
    """Maps names to entries; `registry[name]` also finds those of other packages and modules.

    Looking up a name that cannot be found raises UnknownNameError. The table lists the entries that
    have names, and not those that were referred to as "module:OBJECT".
    """

    def __init__(self, what: str, kind: type, entries: Mapping[str, Entry]) -> None:
        """Makes a table.

        Args:
          what: word for the entries in messages.
          kind: their type.
          entries: the entries by their names.

        """
        super().__init__(entries)
        self.what, self.kind = what, kind

    def __missing__(self, name: str) -> Entry:
        """Finds an entry of another package or module."""
        if ":" in name:
            return import_entry(self.what, name, self.kind)
        import_extensions()
        check_choice(self.what, name, self)
        return dict.__getitem__(self, name)


@functools.cache
def import_entry(what: str, reference: str, kind: type) -> Any:
    """Imports the object "module:OBJECT"; its field `name`, if it has one, becomes the reference.

    Raises UnknownNameError if it cannot be imported, or is not of the kind.
    """
    entry = import_object(what, reference)
    if not isinstance(entry, kind):
        problem = f"is of type {type(entry).__name__}, not {kind.__name__}"
        raise UnknownNameError(f"{what} {reference!r} {problem}", f"which {problem}")
    if dataclasses.is_dataclass(entry) and hasattr(entry, "name"):
        # Saved under this name, from which it is found again.
        entry = dataclasses.replace(entry, name=reference)  # type: ignore[type-var]
    return entry


def import_object(what: str, reference: str) -> Any:
    """Imports the object "module:OBJECT", also from modules of the working directory.

    Raises UnknownNameError if it cannot be imported.
    """
    module, _, path = reference.partition(":")
    try:
        if "" not in sys.path:  # installed commands do not search the working directory
            with contextlib.suppress(ImportError):
                return functools.reduce(getattr, path.split("."), import_module(module))
            sys.path.append("")
        return functools.reduce(getattr, path.split("."), import_module(module))
    except Exception as error:  # importing a module can raise anything
        cause = f"{type(error).__name__}: {one_line(error)}"
        raise UnknownNameError(
            f"{what} {reference!r}: {cause}; write module:OBJECT, importable from the working "
            "directory",
            f"which cannot be imported: {cause}",
        ) from error


@functools.cache
def import_extensions() -> None:
    """Imports the modules that installed packages name in their entry points, once.

    Raises UnknownNameError if one of them cannot be imported.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:  # importing a module can raise anything
            problem = (
                f"the extension {point.name!r} ({point.value}) cannot be imported: "
                f"{type(error).__name__}: {one_line(error)}"
            )
            raise UnknownNameError(problem, f"which is unknown, and {problem}") from error
