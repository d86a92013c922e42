"""Tables of named entries, to which other packages and modules can add their own.

There are three ways to add an entry, and none of them edits this package:

- install a package with an entry point, `name = "module:OBJECT"`, in the group of the table, such
  as `sweet_jax.methods`. The object is imported when the name is looked up;
- refer to it: the name "module:OBJECT" is the object of that module;
- assign it: `METHODS["mine"] = Method(...)`, before the name is used.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, TypeVar

from sweet_jax.errors import UnknownNameError, check_choice, one_line

Entry = TypeVar("Entry")


class Registry(MutableMapping[str, Entry]):
    """Maps names to entries; `registry[name]` also finds those of other packages and modules.

    Looking up a name that cannot be found raises UnknownNameError. The table lists the entries that
    have names, also those of installed packages, and not those that are referred to as
    "module:OBJECT".
    """

    def __init__(
        self,
        what: str,
        kind: Any,
        entries: Mapping[str, Entry],
        group: str,
        references: Mapping[str, str] | None = None,
    ) -> None:
        """Makes a table.

        Args:
          what: word for the entries in messages.
          kind: their type.
          entries: the entries of this package by their names.
          group: group of the entry points by which installed packages add entries.
          references: entries of this package as "module:OBJECT", imported when they are looked up.

        """
        self.what, self.kind, self.group = what, kind, group
        self._entries, self._own_references = dict(entries), dict(references or {})
        self._own = frozenset((*self._entries, *self._own_references))

    @functools.cached_property
    def _references(self) -> dict[str, str]:
        """Returns the entries that are imported when they are looked up, by their names."""
        installed = {point.name: point.value for point in entry_points(group=self.group)}
        return installed | self._own_references

    def __getitem__(self, name: str) -> Entry:
        """Returns the entry; raises UnknownNameError if it cannot be found or imported."""
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return import_entry(self.what, name, self.kind)
        check_choice(self.what, name, self)  # else a reference has the name
        self._entries[name] = import_entry(self.what, self._references[name], self.kind, name)
        return self._entries[name]

    def is_own(self, name: Any) -> bool:
        """Returns whether the name is that of an entry of this package."""
        return name in self._own

    def get(self, name: Any, default: Any = None) -> Any:
        """Returns the entry that has the name, or a default; never imports "module:OBJECT"."""
        if name in self:
            return self[name]
        return default

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._references

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._entries, *self._references)))

    def __len__(self) -> int:
        return len(dict.fromkeys((*self._entries, *self._references)))

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]


@functools.cache
def import_entry(what: str, reference: str, kind: Any, name: str = "") -> Any:
    """Imports the object "module:OBJECT".

    Its field `name`, if it has one, becomes the name by which it is looked up, since it is saved
    under that name.

    Args:
      what: word for it in messages.
      reference: "module:OBJECT".
      kind: its type.
      name: name by which it is looked up; default the reference.

    Raises UnknownNameError if it cannot be imported, or is not of the kind.

    """
    entry = import_object(what, reference)
    if not isinstance(entry, kind):
        problem = f"is of type {type(entry).__name__}, not {kind.__name__}"
        raise UnknownNameError(f"{what} {reference!r} {problem}", f"which {problem}")
    if dataclasses.is_dataclass(entry) and not isinstance(entry, type) and hasattr(entry, "name"):
        entry = dataclasses.replace(entry, name=name or reference)
    return entry


def import_object(what: str, reference: str) -> Any:
    """Imports the object "module:OBJECT", also from modules of the working directory.

    Raises UnknownNameError if it cannot be imported.
    """
    module, _, path = reference.partition(":")
    try:
        # Installed commands do not search the working directory, which is needed for its own
        # modules only.
        if "" not in sys.path and find_spec(module.partition(".")[0]) is None:
            sys.path.append("")
        return functools.reduce(getattr, path.split("."), import_module(module))
    except Exception as error:  # importing a module can raise anything
        cause = f"{type(error).__name__}: {one_line(error)}"
        raise UnknownNameError(
            f"{what} {reference!r}: {cause}; write module:OBJECT, importable from the working "
            "directory",
            f"which cannot be imported: {cause}",
        ) from error
