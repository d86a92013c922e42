"""The types of the tables whose text columns can be predicted, for type checkers."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DataFrameLike(Protocol):
    """A table with `columns`, such as a pandas DataFrame."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""

    def iterrows(self) -> Any:
        """Yields the rows."""

    def __getitem__(self, name: str, /) -> Any:
        """Returns a column."""


@runtime_checkable
class ArrowTableLike(Protocol):
    """A table with `column_names`: a PyArrow table or record batch, or a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""

    def __getitem__(self, name: str, /) -> Any:
        """Returns a column."""


TextTable = DataFrameLike | ArrowTableLike
