"""Reads the validation texts of a saved model's task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import ModelArtifact


def read_validation_texts(
    model: ModelArtifact, data_dir: str | Path, count: int
) -> tuple[list[Any], list[int]]:
    """Returns at most `count` texts and their labels, in the order of the file.

    A text is a string, or a tuple of two for a task of pairs. The file is
    DATA_DIR/TASK/validation.parquet; raises UserError if it does not exist.
    """
    path = Path(data_dir) / model.task / "validation.parquet"
    if not path.is_file():
        raise UserError(
            f"{str(path)!r} does not exist: set --data_dir to the folder that has "
            "<task>/validation.parquet"
        )
    table = pyarrow.parquet.read_table(path).slice(0, count)
    columns = [table[column].to_pylist() for column in model.text_columns]
    texts = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
    return texts, table["label"].to_pylist()


def as_tuples(texts: Sequence[Any]) -> list[tuple[str, ...]]:
    """Returns texts as `sweet_jax.data.batches.encode` takes them: tuples of one or two strings."""
    return [text if isinstance(text, tuple) else (text,) for text in texts]
