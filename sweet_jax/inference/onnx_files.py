"""The folder onnx/ of an exported model: the graphs of its segments, read without JAX or onnx.

graphs.json names the files of each precision. A graph is a file of its own; the weights of all
graphs of one precision are in one file beside them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sweet_jax.config import UserError
from sweet_jax.files import read_json
from sweet_jax.inference.onnx_segments import Segment

FOLDER, _INDEX = "onnx", "graphs.json"
GRAPHS_VERSION = 1  # of graphs.json
# Of an exported folder, beside run.py: they read model.json.
PROGRAMS = ("classifier.mjs", "index.html", "package.json", "run.mjs", "tokenizer.mjs")


class SavedGraphs(NamedTuple):
    """Holds what an engine needs to run a model's graphs."""

    networks: Sequence[Sequence[tuple[Segment, Any]]]  # in order; each with its graph, or its path
    vocabulary: int  # number of token ids
    hidden: int  # H


def has_graphs(folder: Path) -> bool:
    """Returns whether a model's folder holds its graphs."""
    return (folder / FOLDER / _INDEX).exists()


def check_not_exported(folder: Path) -> None:
    """Raises UserError for a folder of graphs: it lacks the weights that these are made from."""
    if has_graphs(folder):
        raise UserError(
            f"{str(folder)!r} was exported to ONNX, without the weights that JAX reads: give the "
            "folder model/ of its run"
        )


def index_path(folder: Path) -> Path:
    """Returns the path of graphs.json in a model's folder."""
    return folder / FOLDER / _INDEX


def weights_name(precision: str) -> str:
    """Returns the name of the file that holds the weights of a precision's graphs."""
    return f"segment_weights.{precision}.bin"


def read_graphs(folder: Path, precision: str) -> SavedGraphs:
    """Reads graphs.json of a model's folder.

    Raises UserError where it is damaged, of another version or without the precision.
    """
    path = index_path(folder)
    try:
        values = read_json(path)
        if values["version"] != GRAPHS_VERSION:
            raise ValueError(f"version {values['version']!r}")
        written = values["networks"].get(precision)
        if written is None:
            raise UserError(
                f"{str(folder)!r} was exported without {precision}: export the model again after "
                "sweet-jax quantize, or leave precision out"
            )
        networks = [[_parse(path.parent, each) for each in network] for network in written]
        return SavedGraphs(networks, int(values["vocabulary"]), int(values["hidden"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is not readable ({error!r}): export again") from error


def _parse(folder: Path, values: Mapping[str, Any]) -> tuple[Segment, Path]:
    fields = dict(values)
    path = folder / str(fields.pop("file"))
    if not path.exists():
        raise FileNotFoundError(str(path))
    return Segment(**fields), path
