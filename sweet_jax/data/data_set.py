"""Data sets from the hub, or saved to disk by the library `datasets`."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from sweet_jax.config import Config, split_names
from sweet_jax.data.arrow_tables import is_text
from sweet_jax.data.tasks import Task
from sweet_jax.errors import UserError, check_choice, one_line
from sweet_jax.paths import resolve_path

_GLUE = "nyu-mll/glue"
_VALIDATION = ("validation", "valid", "val", "dev", "test")  # the first one that exists is used


@dataclasses.dataclass(frozen=True, eq=False)
class DataSplit:
    """A split of a data set, and its name in messages."""

    rows: datasets.Dataset
    title: str

    @property
    def schema(self) -> pa.Schema:
        """The schema of the columns, which may declare class names."""
        return self.rows.features.arrow_schema

    @property
    def names(self) -> list[str]:
        """Names of the columns that hold text or declare classes."""
        texts = [field.name for field in self.schema if is_text(field.type)]
        return [*texts, *(name for name in self.class_columns if name not in texts)]

    @property
    def class_columns(self) -> list[str]:
        """Names of the columns that declare classes."""
        kinds = self.rows.features.items()
        return [name for name, kind in kinds if isinstance(kind, datasets.ClassLabel)]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows as Arrow batches."""
        for table in self.rows.with_format("arrow").iter(batch_size=1024):
            yield from table.to_batches()


def read_data_set(config: Config, task: Task) -> list[DataSplit]:
    """Returns the training split and, if there is one, the validation split of a data set.

    `config.dataset` is a folder that `save_to_disk` wrote, or a name on the hub, "owner/name" or
    "owner/name:subset". If it is empty, the data set is the GLUE task.

    Raises UserError if the data set cannot be read, or has no split with a name in `config.splits`.
    """
    name = config.dataset or f"{_GLUE}:{task.name}"
    loaded = _load(name)
    selected = split_names(config.splits)
    if not config.dataset:
        selected = ("train", task.validation)
    if not selected:
        check_choice(f"split of {name!r}", "train", loaded)
        selected = ("train", *[split for split in _VALIDATION if split in loaded][:1])
    if len(selected) > 2:
        raise UserError(
            f"splits takes a training split and at most one validation split; got {config.splits!r}"
        )
    for split in selected:
        check_choice(f"split of {name!r}", split, loaded)
    return [DataSplit(loaded[split], f"{name!r}, {split}") for split in selected]


def _load(name: str) -> Mapping[str, Any]:
    """Returns the splits of a data set, by their names."""
    folder = resolve_path(name)
    if _is_saved(folder):
        return _load_saved(folder)
    try:
        owner, _, subset = name.partition(":")
        return datasets.load_dataset(owner, subset or None)
    except Exception as error:  # the client raises many kinds, which mean the same to a user
        raise UserError(
            f"could not read the data set {name!r}: {one_line(error)}; check the name and the "
            "network connection, or pass a local copy with --config.data_dir or --config.data_files"
        ) from error


def _load_saved(folder: Path) -> Mapping[str, Any]:
    """Returns the splits in a folder of `save_to_disk`; of a single data set, "train" alone."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds; each means the same to a user
        raise UserError(
            f"could not read the saved data set {str(folder)!r}: {one_line(error)}; save it again "
            "with save_to_disk"
        ) from error
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
