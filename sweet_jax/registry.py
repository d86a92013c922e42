"""Tables of named entries, to which other packages and modules can add their own.

There are three ways to add an entry, and none of them edits this package:

- assign it: `METHODS["mine"] = Method(...)`, in a module that is imported before the name is used;
- install a package with such a module, named by an entry point in the group `sweet_jax`. It is
  imported when a name is looked up that no table has;
- refer to it: the name "module:OBJECT" is the object of that module.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from sweet_jax.errors import UserError, check_choice, one_line

Entry = TypeVar("Entry")

ENTRY_POINTS = "sweet_jax"  # the group


class Registry(dict[str, Entry]):
    """Maps names to entries; `registry[name]` also finds those of other packages and modules.

    Looking up a name that cannot be found raises UserError.
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
        """Finds an entry of another package or module, and keeps it."""
        if ":" in name:
            self[name] = import_entry(self.what, name, self.kind)
        else:
            import_extensions()
        check_choice(self.what, name, self)
        return dict.__getitem__(self, name)


@functools.cache
def import_entry(what: str, reference: str, kind: type) -> Any:
    """Imports the object "module:OBJECT"; its field `name`, if it has one, becomes the reference.

    Raises UserError if it cannot be imported, or is not of the kind.
    """
    entry = import_object(what, reference)
    if not isinstance(entry, kind):
        raise UserError(
            f"{what} {reference!r} is of type {type(entry).__name__}, not {kind.__name__}"
        )
    if dataclasses.is_dataclass(entry) and hasattr(entry, "name"):
        # Saved under this name, from which it is found again.
        entry = dataclasses.replace(entry, name=reference)  # type: ignore[type-var]
    return entry


def import_object(what: str, reference: str) -> Any:
    """Imports the object "module:OBJECT", also from modules of the working directory.

    Raises UserError if it cannot be imported.
    """
    module, _, path = reference.partition(":")
    if "" not in sys.path:  # installed commands do not search the working directory
        sys.path.append("")
    try:
        return functools.reduce(getattr, path.split("."), import_module(module))
    except Exception as error:  # importing a module can raise anything
        raise UserError(
            f"{what} {reference!r}: {type(error).__name__}: {one_line(error)}; write "
            "module:OBJECT, importable from the working directory"
        ) from error


@functools.cache
def import_extensions() -> None:
    """Imports the modules that installed packages name in their entry points, once.

    Raises UserError if one of them cannot be imported.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:  # importing a module can raise anything
            raise UserError(
                f"the extension {point.name!r} ({point.value}) cannot be imported: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
