"""The folder model/ of a run: the best replica under Hugging Face names, its tokenizer and exits.

JAX is imported only where weights are written; opening a model does not need it.

Shape letters: E exit, C classes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from sweet_jax.errors import UnknownNameError, UserError
from sweet_jax.exits.operating_point import ThresholdResolver
from sweet_jax.files import read_json
from sweet_jax.inference.onnx_files import has_graphs
from sweet_jax.inference.saved_tokenizer import load_saved_tokenizer
from sweet_jax.models.checkpoint_folder import locate_checkpoint, refuse_run_folder
from sweet_jax.objectives import OBJECTIVES, SINGLE_LABEL, Objective
from sweet_jax.poolings import POOLINGS
from sweet_jax.registry import Registry

if TYPE_CHECKING:  # these modules import datasets and JAX
    pass

Entry = TypeVar("Entry")

EXITS_VERSION = 5  # of exits.json
# For objectives other than single-label: older releases would take the outputs for class logits.
OBJECTIVES_VERSION = 6
INT8_FILE, INT8_VERSION = "int8.json", 2  # thresholds fitted for the model in int8
_INT8_READABLE = (1, INT8_VERSION)  # version 1 had no float32_layers: all layers were in int8
PAIRS_VERSION = 7  # for models whose exits compare two texts
# Version 4 had no key "pooling": all exits read the first token.
_READABLE = (4, EXITS_VERSION, OBJECTIVES_VERSION, PAIRS_VERSION)


class NetworkFiles(NamedTuple):
    """Locates the weights of one network, and names the layers of its exits."""

    folder: Path
    exits: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelArtifact:
    """Holds everything in a folder model/ except the weights, which an engine reads."""

    folder: Path  # the folder it was read from
    tokenizer: Any  # the checkpoint's own
    task: str  # name of the task it was trained on
    policy: str  # name of the exit policy of the run
    metric: str  # name of the run's metric: one of its objective's, or module:OBJECT
    pooling: str  # how an exit reads its layer, a name in POOLINGS
    text_columns: tuple[str, ...]  # names of the one or two text columns it was trained on
    classes: tuple[str, ...]  # names of the outputs [C]
    layers: tuple[int, ...]  # layers of the exits [E]
    cost: np.ndarray  # float64 [E], share of the full model's layers spent when exit e is taken
    max_length: int  # maximum number of tokens of a text
    median_tokens: int  # median number of tokens of the training texts
    resolver: ThresholdResolver  # turns targets into thresholds, fitted on calibration rows
    networks: tuple[NetworkFiles, ...]  # one network, or with Multi-Model one for each exit
    objective: Objective = SINGLE_LABEL  # what its outputs mean
    long_tokens: int = 0  # 95% of the training texts have at most this many tokens; 0 = unknown


def open_model(name: str | Path, precision: str = "float32") -> ModelArtifact:
    """Reads a saved model's exits.json and tokenizer; an engine reads the weights.

    Args:
      name: folder model/ of a run, or id of the hub repository it was pushed to.
      precision: precision that an engine will run it in; "int8" has its own thresholds, in
        int8.json.

    Raises UserError if there is no such model, its files are damaged or have another version, or
    its objective cannot be found, or its pooling, which only a model exported to ONNX can do
    without.

    """
    refuse_run_folder(Path(name))
    if (Path(name) / "parameters.npz").exists():  # only a StableHLO export has this file
        raise UserError(
            f"{str(name)!r} is a StableHLO export, which only its own run.py can run: pass the "
            "folder model/ of its run"
        )
    checkpoint = locate_checkpoint(str(name))
    values = _read_exits(checkpoint.folder)
    if precision == "int8":
        values["dials"] = _read_int8(checkpoint.folder)["dials"]
    try:
        reads_first = _reads_first(checkpoint.folder, values)
        fields = _parse_exits(checkpoint.folder, values)
    except UnknownNameError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(checkpoint.folder / 'exits.json')!r} is damaged ({error!r}): run the command of "
            "its run again, in the same workdir"
        ) from error
    tokenizer = load_saved_tokenizer(checkpoint, first_token=reads_first)
    return ModelArtifact(tokenizer=tokenizer, **fields)


def _read_exits(folder: Path) -> dict[str, Any]:
    path = folder / "exits.json"
    if not path.exists():
        raise UserError(
            f"{str(folder)!r} is an encoder without exits: pass the folder model/ of a run, which "
            "holds exits.json"
        )
    try:
        values = read_json(path)
        version = values["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error!r}): run the command of its run again, in the "
            "same workdir"
        ) from error
    if version not in _READABLE:
        raise UserError(
            f"{str(path)!r} has version {version!r}, but this release reads versions "
            f"{', '.join(map(str, _READABLE))}: run the command of its run again, in the same "
            "workdir, to rewrite it"
        )
    return values


def read_float32_layers(folder: Path) -> tuple[int, ...]:
    """Returns the layers, counted from 1, that stay in float32 when a saved model runs in int8.

    Raises UserError if int8.json is damaged.
    """
    if not (folder / INT8_FILE).exists():
        return ()
    return tuple(_read_int8(folder)["float32_layers"])


def _read_int8(folder: Path) -> dict[str, Any]:
    """Returns the contents of int8.json. Raises UserError if it is missing or damaged."""
    path = folder / INT8_FILE
    if not path.exists():
        raise UserError(
            f"{str(folder)!r} has no thresholds for int8 ({INT8_FILE}): run sweet-jax quantize "
            "--run=DIR with the directory of its run, or leave precision out"
        )
    try:
        values = read_json(path)
        if values["version"] not in _INT8_READABLE:
            raise ValueError(f"version {values['version']!r}")
        layers = [int(layer) for layer in values.get("float32_layers", ())]
        return {"dials": values["dials"], "float32_layers": layers}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error!r}): run sweet-jax quantize again"
        ) from error


def _reads_first(folder: Path, values: Mapping[str, Any]) -> bool:
    """Returns whether the exits of a saved model read the first token alone.

    The graphs of an exported model contain its pooling, which then need not be found here. Raises
    TypeError for an invalid value, and UnknownNameError as `_find` does.
    """
    saved = values.get("first_only")  # missing in models of older releases
    if has_graphs(folder) and isinstance(saved, bool):
        return saved
    return _find(POOLINGS, values.get("pooling", "first"), folder).first_only


def _find(table: Registry[Entry], name: str, folder: Path) -> Entry:
    """Returns the entry that exits.json names.

    Raises UnknownNameError if it cannot be found, for example in a package that is not installed.
    """
    try:
        return table[name]
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{str(folder / 'exits.json')!r} needs the {table.what} {name!r}, {error.reason}: "
            "install or import the package that defines it"
        ) from error


def _parse_exits(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ModelArtifact`, except the tokenizer.

    Raises KeyError, TypeError or ValueError if a value is missing or invalid, and UnknownNameError
    if its objective cannot be found.
    """
    return {
        "folder": folder,
        "task": str(values["task"]),
        "objective": _find(OBJECTIVES, values.get("objective", "single_label"), folder),
        "policy": str(values["policy"]),
        "metric": str(values.get("metric", "accuracy")),  # missing in models of older releases
        "pooling": str(values.get("pooling", "first")),
        "text_columns": tuple(values["text_columns"]),
        "classes": tuple(values["classes"]),
        "layers": tuple(values["layers"]),
        "cost": np.asarray(values["cost"], np.float64),  # [E]
        "max_length": int(values["max_length"]),
        "median_tokens": int(values["median_tokens"]),
        "long_tokens": int(values.get("long_tokens", 0)),  # missing in models of older releases
        "resolver": ThresholdResolver.from_dict(values["dials"], float(values["cost"][-1])),
        "networks": tuple(
            NetworkFiles(folder / m["folder"], tuple(m["exits"])) for m in values["models"]
        ),
    }
