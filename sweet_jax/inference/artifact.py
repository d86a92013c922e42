"""The folder model/ of a run: the best replica under Hugging Face names, its tokenizer and exits.

JAX is imported where weights are written; opening a model needs none.

Shape letters: E exit, C classes.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sweet_jax.config import Config, UserError
from sweet_jax.directories import copy_additions, replace_directory
from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.operating_point import ThresholdResolver, deployable_policies
from sweet_jax.files import one_line, read_json, write_json, write_text
from sweet_jax.inference.saved_tokenizer import load_saved_tokenizer
from sweet_jax.models.checkpoint_folder import locate_checkpoint
from sweet_jax.objectives import OBJECTIVES, SINGLE_LABEL, Objective
from sweet_jax.poolings import POOLING_INPUTS

if TYPE_CHECKING:  # these import datasets, and JAX
    from sweet_jax.data.load import Dataset
    from sweet_jax.models.pretrained import Checkpoint

EXITS_VERSION = 5  # of exits.json
# Of a model of another objective than single-label: older versions would take its outputs for
# logits of classes.
OBJECTIVES_VERSION = 6
INT8_FILE, INT8_VERSION = "int8.json", 2  # thresholds of the model's layers in int8
_INT8_READABLE = (1, INT8_VERSION)  # 1 had no float32_layers: all were in int8
PAIRS_VERSION = 7  # of those whose exits compare two texts
_READABLE = (4, EXITS_VERSION, OBJECTIVES_VERSION, PAIRS_VERSION)  # 4 had no pooling: "first"


class TrainedModel(NamedTuple):
    """One trained model: its exits and its parameters, of one replica or [R, ...] of all."""

    exits: tuple[int, ...]
    params: Any


class NetworkFiles(NamedTuple):
    """Locates the weights of one network, and names the layers of its exits."""

    folder: Path
    exits: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelArtifact:
    """Holds everything in a folder model/ but the weights, which an engine reads."""

    folder: Path  # that it was read from
    tokenizer: Any  # the checkpoint's own
    task: str  # that it was trained on
    policy: str  # name of the exit policy that the run was made with
    metric: str  # that it was trained for, a name of METRICS
    pooling: str  # how an exit reads its layer, a name of POOLING_INPUTS
    text_columns: tuple[str, ...]  # one or two, that it was trained on
    classes: tuple[str, ...]  # names of the outputs [C]
    layers: tuple[int, ...]  # of the exits [E]
    cost: np.ndarray  # float64 [E], share of the full model's layers spent when exit e is taken
    max_length: int  # tokens at most
    median_tokens: int  # of its training texts
    resolver: ThresholdResolver  # of targets to thresholds, fitted on calibration rows
    networks: tuple[NetworkFiles, ...]  # one, or under Multi-Model one for each exit
    objective: Objective = SINGLE_LABEL  # what its outputs mean
    long_tokens: int = 0  # that 95% of its training texts do not exceed; 0 where it is not known


def save_model(
    folder: Path,
    checkpoint: "Checkpoint",
    tokenizer: Any,
    models: Sequence[TrainedModel],
    exits: Mapping[str, Any],
    card: str,
) -> None:
    """Writes model/ of the best replica, whole or not at all.

    What else is in a folder of the very same weights and tokenizer stays there: the times of its
    stages, the thresholds for int8.

    model.safetensors holds the encoder under its Hugging Face names (the last exit's pooler as the
    encoder's) and beside it `exits.<layer>.pooler.dense.*`, `exits.<layer>.classifier.*` and, with
    learning-to-exit, `exits.<layer>.learning_to_exit.*`, all float32. Multi-Model's deepest model
    is there, each shallower one in a folder depth_<layer>/ of its own. Parameters are on the host;
    `exits` is what `describe_exits` returns, `card` the text of README.md.
    """
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    written = []
    for model in models:
        place = "." if model is models[-1] else f"depth_{model.exits[-1]:02d}"
        _write_network(aside / place, checkpoint, model)
        written.append({"folder": place, "exits": list(model.exits)})
    tokenizer.save_pretrained(aside)
    write_json(aside / "exits.json", {**exits, "models": written})
    write_text(aside / "README.md", card)
    if folder.exists():
        copy_additions(folder, aside, ignored=("exits.json", "README.md"))
    replace_directory(aside, folder)


def _write_network(folder: Path, checkpoint: "Checkpoint", model: TrainedModel) -> None:
    import safetensors.numpy  # what a model is written with, and not opened

    from sweet_jax.models.tensor_names import hugging_face_tensors  # imports JAX

    folder.mkdir(parents=True, exist_ok=True)
    family = checkpoint.family
    tensors = hugging_face_tensors(family.names, model.params, model.exits)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = family.config.at_depth(checkpoint.values, model.exits[-1])
    values |= {"model_type": family.model_type, "architectures": [family.architecture]}
    write_json(folder / "config.json", values)
    # safetensors makes a file that its owner alone may read, whatever the umask.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def describe_exits(
    config: Config, dataset: "Dataset", analysis: Analysis, lengths: np.ndarray
) -> dict[str, Any]:
    """Returns the contents of exits.json, but for where the weights are.

    lengths: of the training texts in tokens, int [N].
    """
    best = analysis.best
    keep = analysis.operating_point(best)
    seed, rate = analysis.replicas[best]
    temperatures = analysis.temperatures[best]
    single = config.objective == "single_label"
    version = EXITS_VERSION if single else OBJECTIVES_VERSION
    about = {} if single else {"objective": config.objective}
    return about | {
        "version": PAIRS_VERSION if POOLING_INPUTS[config.pooling].pairs else version,
        "task": config.task,
        "method": config.method,
        "seed": seed,
        "learning_rate": rate,
        "classes": list(dataset.classes),
        "text_columns": list(dataset.task.text_columns),
        "max_length": config.max_length,
        "pooling": config.pooling,
        "layers": list(config.exits),
        "cost": np.asarray(analysis.validation.cost).tolist(),
        "policy": config.policy,
        "metric": dataset.task.metric,
        "temperatures": [t if np.isfinite(t) else None for t in temperatures.tolist()],
        "dials": analysis.resolver(best, deployable_policies(analysis.validation)).as_dict()
        | {"full_score": None if keep.threshold is None else keep.as_dict()},
        "median_tokens": int(np.median(lengths)),
        "long_tokens": int(np.quantile(lengths, 0.95, method="higher")),
    }


def open_model(name: str | Path, precision: str = "float32") -> ModelArtifact:
    """Reads a saved model's exits.json and tokenizer; an engine reads the weights.

    Args:
      name: a folder model/ of a run, or the id of a repository it was pushed to.
      precision: that an engine will run it in; "int8" has thresholds of its own, in int8.json.

    Raises UserError where there is none, or its files are damaged or of another version.

    """
    if (inside := Path(name) / "model" / "exits.json").exists():
        raise UserError(f"{str(name)!r} is the folder of a run: give {str(inside.parent)!r}")
    if (Path(name) / "parameters.npz").exists():  # no checkpoint has one
        raise UserError(
            f"{str(name)!r} was exported to StableHLO, which its run.py runs: give the folder "
            "model/ of its run"
        )
    checkpoint = locate_checkpoint(str(name))
    values = _read_exits(checkpoint.folder)
    if precision == "int8":
        values["dials"] = _read_int8(checkpoint.folder)["dials"]
    try:
        values.setdefault("pooling", "first")
        if values["pooling"] not in POOLING_INPUTS:
            raise ValueError(f"pooling {values['pooling']!r}")
        fields = _parse_exits(checkpoint.folder, values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(checkpoint.folder / 'exits.json')!r} is damaged ({error!r}): run the report of "
            "its run again"
        ) from error
    reads_first = POOLING_INPUTS[fields["pooling"]].first_only
    tokenizer = load_saved_tokenizer(checkpoint, first_token=reads_first)
    return ModelArtifact(tokenizer=tokenizer, **fields)


def _read_exits(folder: Path) -> dict[str, Any]:
    path = folder / "exits.json"
    if not path.exists():
        raise UserError(
            f"{str(folder)!r} is an encoder without exits: give the model/ folder of a run of "
            "python -m sweet_jax.main (it holds exits.json)"
        )
    try:
        values = read_json(path)
        version = values["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is not readable ({error!r})") from error
    if version not in _READABLE:
        raise UserError(
            f"{str(path)!r} is of version {version!r}, this is for version {EXITS_VERSION}: run "
            "the command of its run again, in the same workdir, to write it anew"
        )
    return values


def read_float32_layers(folder: Path) -> tuple[int, ...]:
    """Returns the layers, from 1, that stay in float32 where a saved model runs in int8.

    Raises UserError where int8.json is damaged.
    """
    if not (folder / INT8_FILE).exists():
        return ()
    return tuple(_read_int8(folder)["float32_layers"])


def _read_int8(folder: Path) -> dict[str, Any]:
    """Returns what int8.json says. Raises UserError where there is none, or it is damaged."""
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
            f"{str(path)!r} is not readable ({error!r}): run sweet-jax quantize again"
        ) from error


def _parse_exits(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ModelArtifact`, but for the tokenizer.

    Raises KeyError, TypeError or ValueError for values that do not fit.
    """
    return {
        "folder": folder,
        "task": str(values["task"]),
        "objective": OBJECTIVES[values.get("objective", "single_label")],
        "policy": str(values["policy"]),
        "metric": str(values.get("metric", "accuracy")),  # models of older versions do not say
        "pooling": values["pooling"],
        "text_columns": tuple(values["text_columns"]),
        "classes": tuple(values["classes"]),
        "layers": tuple(values["layers"]),
        "cost": np.asarray(values["cost"], np.float64),  # [E]
        "max_length": int(values["max_length"]),
        "median_tokens": int(values["median_tokens"]),
        "long_tokens": int(values.get("long_tokens", 0)),  # models of older versions do not say
        "resolver": ThresholdResolver.from_dict(values["dials"]),
        "networks": tuple(
            NetworkFiles(folder / m["folder"], tuple(m["exits"])) for m in values["models"]
        ),
    }


def push_to_hub(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads a folder model/ to the Hugging Face hub; returns its address.

    `name` is "owner/name"; the repository is made if there is none. Raises UserError where the hub
    refuses.
    """
    import huggingface_hub  # heavy, and not needed for local files

    try:
        huggingface_hub.create_repo(name, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # the client raises many kinds; each means the same to a user
        raise UserError(f"could not push {str(folder)!r} to {name!r}: {one_line(error)}") from error
