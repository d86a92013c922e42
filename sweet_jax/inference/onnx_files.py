"""The folder onnx/ of an exported model: the graphs of its segments, read without JAX or onnx.

graphs.json names the files of each precision. Each graph has its own file; the weights of all
graphs of a precision are in one file next to them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sweet_jax.errors import UserError
from sweet_jax.files import read_json
from sweet_jax.inference.onnx_segments import Segment

FOLDER, _INDEX = "onnx", "graphs.json"
GRAPHS_VERSION = 1  # of graphs.json
# Programs in an exported folder, in addition to run.py, that read model.json.
PROGRAMS = ("classifier.mjs", "index.html", "package.json", "run.mjs", "tokenizer.mjs")


class SavedGraphs(NamedTuple):
    """Holds what an engine needs to run a model's graphs."""

    # The segments of each network in order, each with its graph or the path of its graph.
    networks: Sequence[Sequence[tuple[Segment, Any]]]
    vocabulary: int  # number of token ids
    hidden: int  # H


def has_graphs(folder: Path) -> bool:
    """Returns whether a model's folder holds ONNX graphs."""
    return (folder / FOLDER / _INDEX).exists()


def check_not_exported(folder: Path) -> None:
    """Raises UserError if a folder holds ONNX graphs, since it lacks the weights for JAX."""
    if has_graphs(folder):
        raise UserError(
            f"{str(folder)!r} was exported to ONNX, without the weights that JAX reads: pass the "
            "folder model/ of its run"
        )


def index_path(folder: Path) -> Path:
    """Returns the path of graphs.json in a model's folder."""
    return folder / FOLDER / _INDEX


def weights_name(precision: str) -> str:
    """Returns the name of the file that holds the weights of a precision's graphs."""
    return f"segment_weights.{precision}.bin"


def read_graphs(folder: Path, precision: str) -> SavedGraphs:
    """Reads graphs.json in a model's folder.

    Raises UserError if it is damaged, has another version, or lacks the precision.
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
        raise UserError(
            f"{str(path)!r} cannot be read ({error!r}): export the model again"
        ) from error


def _parse(folder: Path, values: Mapping[str, Any]) -> tuple[Segment, Path]:
    fields = dict(values)
    path = folder / str(fields.pop("file"))
    if not path.exists():
        raise FileNotFoundError(str(path))
    return Segment(**fields), path
