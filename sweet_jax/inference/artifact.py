"""The saved model, written and read: the best replica under Hugging Face names, its tokenizer and
its exits.

Shape letters: R replica, E exit, H hidden, C classes.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from sweet_jax.config import Config, UserError
from sweet_jax.data.load import Dataset
from sweet_jax.exits.analysis import Analysis, OperatingPoint, cheapest_full_score
from sweet_jax.exits.operating_point import ThresholdResolver, deployable_policies
from sweet_jax.files import write_json, write_text
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.pooling import POOLINGS
from sweet_jax.models.pretrained import Checkpoint, load_tokenizer, open_checkpoint
from sweet_jax.models.tensor_names import hugging_face_tensors

EXITS_VERSION = 5  # of exits.json
_READABLE = (4, EXITS_VERSION)  # 4 had no pooling: it was "first"
DTYPES = ("float32", "bfloat16")


class TrainedModel(NamedTuple):
    """One trained model: its exits and its parameters, of one replica or [R, ...] of all."""

    exits: tuple[int, ...]
    params: Any


def save_model(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: Any,
    config: Config,
    dataset: Dataset,
    analysis: Analysis,
    models: Sequence[TrainedModel],
    *,
    card: str,
    median_tokens: int,
) -> None:
    """Writes `model/` of the best replica, whole or not at all.

    `models` have its parameters on the host, `card` is its README.md, `median_tokens` how long its
    training texts were.

    model.safetensors holds the encoder under its Hugging Face names (the last exit's pooler as the
    encoder's) and beside it `exits.<layer>.pooler.dense.*`, `exits.<layer>.classifier.*` and, with
    learning-to-exit, `exits.<layer>.learning_to_exit.*`, all float32. Multi-Model's deepest model
    stands there, each shallower one in a folder depth_<layer>/ of its own.
    """
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    family, places = checkpoint.family, []
    for model in models:
        place = "." if model is models[-1] else f"depth_{model.exits[-1]:02d}"
        (aside / place).mkdir(parents=True, exist_ok=True)
        tensors = hugging_face_tensors(family.names, model.params, model.exits)
        safetensors.numpy.save_file(
            tensors, aside / place / "model.safetensors", metadata={"format": "pt"}
        )
        values = json.loads((checkpoint.folder / "config.json").read_text())
        values |= {family.depth_key: model.exits[-1], "architectures": [family.architecture]}
        write_json(aside / place / "config.json", values)
        places.append({"folder": place, "exits": list(model.exits)})
    tokenizer.save_pretrained(aside)
    about = _exits(config, dataset, analysis) | {"median_tokens": median_tokens}
    write_json(aside / "exits.json", about | {"models": places})
    write_text(aside / "README.md", card)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _exits(config: Config, dataset: Dataset, analysis: Analysis) -> dict[str, Any]:
    best = analysis.best
    keep = cheapest_full_score(analysis, best)
    seed, rate = analysis.replicas[best]
    temperatures = analysis.temperatures[best]
    return {
        "version": EXITS_VERSION,
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
        "temperatures": [t if np.isfinite(t) else None for t in temperatures.tolist()],
        "dials": analysis.resolver(best, deployable_policies(analysis.validation)).as_dict()
        | {"full_score": keep.as_dict() if isinstance(keep, OperatingPoint) else None},
    }


class Network(NamedTuple):
    """An encoder with its exits: all of them, or under Multi-Model one of several networks."""

    exits: tuple[int, ...]
    graphdef: nnx.GraphDef  # of an EarlyExit
    params: Any  # pure dict of arrays on the host
    pooling: str = "first"  # see models/pooling.py

    @property
    def hidden_size(self) -> int:
        """H."""
        return len(self.params["heads"][str(self.exits[0])]["classifier"]["kernel"])


@dataclasses.dataclass(frozen=True, eq=False)
class SavedModel:
    """Everything in a folder model/.

    Attributes:
      folder: where it was read from.
      about: the rest of exits.json: task, method, policy, text_columns and so on.
      tokenizer: the checkpoint's own.
      classes: names of the classes [C].
      layers: of the exits [E].
      cost: float64 [E], share of the full model's layers spent when exit e answers.
      max_length: tokens at most.
      resolver: of targets to thresholds, fitted on calibration rows.
      networks: one, or under Multi-Model one for each exit.

    """

    folder: Path
    about: Mapping[str, Any]
    tokenizer: Any
    classes: tuple[str, ...]
    layers: tuple[int, ...]
    cost: np.ndarray
    max_length: int
    resolver: ThresholdResolver
    networks: tuple[Network, ...]

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the one or two text columns that it was trained on."""
        return tuple(self.about["text_columns"])


def open_model(name: str | Path, dtype: str = "float32") -> SavedModel:
    """Reads a saved model by folder or hub id.

    Args:
      name: a folder model/ of a run, or the id of a repository it was pushed to.
      dtype: of parameters and activations, "float32" or "bfloat16".

    Raises UserError where there is none, or its files are damaged or of another version.

    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if (inside := Path(name) / "model" / "exits.json").exists():
        raise UserError(f"{str(name)!r} is the folder of a run: give {str(inside.parent)!r}")
    checkpoint = open_checkpoint(str(name))
    about = _read_exits(checkpoint.folder)
    try:
        resolver = ThresholdResolver.from_dict(about["dials"])
        places = [(checkpoint.folder / m["folder"], tuple(m["exits"])) for m in about["models"]]
        classes, layers = tuple(about["classes"]), tuple(about["layers"])
        cost = np.asarray(about["cost"], np.float64)
        max_length = int(about["max_length"])
        pooling = about.setdefault("pooling", "first")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}")
        for name in ("task", "policy", "text_columns", "median_tokens"):
            about[name]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(checkpoint.folder / 'exits.json')!r} is damaged ({error!r}): run the report of "
            "its run again"
        ) from error
    return SavedModel(
        checkpoint.folder,
        about,
        load_tokenizer(checkpoint),
        classes,
        layers,
        cost,
        max_length,
        resolver,
        tuple(
            _network(open_checkpoint(str(p)), e, len(classes), pooling, dtype) for p, e in places
        ),
    )


def _read_exits(folder: Path) -> dict[str, Any]:
    path = folder / "exits.json"
    if not path.exists():
        raise UserError(
            f"{str(folder)!r} is an encoder without exits: give the model/ folder of a run of "
            "python -m sweet_jax.main (it holds exits.json)"
        )
    try:
        about = json.loads(path.read_text())
        version = about["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is not readable ({error!r})") from error
    if version not in _READABLE:
        raise UserError(
            f"{str(path)!r} is of version {version!r}, this is for version {EXITS_VERSION}: run "
            "the command of its run again, in the same workdir, to write it anew"
        )
    return about


def _network(
    checkpoint: Checkpoint, exits: tuple[int, ...], classes: int, pooling: str, dtype: str
) -> Network:
    weights = checkpoint.weights
    tensors = weights.exits
    learned = f"exits.{exits[0]}.learning_to_exit.weight" in tensors

    def make() -> EarlyExit:
        key = jax.random.key(0)
        learning = "joint" if learned else ""  # detached or not: one in a forward pass
        encoder = checkpoint.encoder(key, dtype)
        config = ExitConfig(pooling=pooling, learning_to_exit=learning)
        return EarlyExit(encoder, exits, classes, key, config, dtype)

    graphdef, wanted = nnx.split(nnx.eval_shape(make))
    heads = nnx.to_pure_dict(wanted)["heads"]
    absent: list[str] = []

    def pick(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        layer, *module, kind = (p.key for p in path)
        part = "pooler.dense" if module == ["pooler"] else module[0]
        name = f"exits.{layer}.{part}.{'weight' if kind == 'kernel' else 'bias'}"
        value = tensors.get(name, np.empty(0))
        value = value.T if kind == "kernel" else value
        if value.shape != leaf.shape:
            absent.append(name)
        return np.ascontiguousarray(value)

    found = {"encoder": weights.encoder, "heads": jax.tree.map_with_path(pick, heads)}
    if absent:
        raise UserError(
            f"tensors in {str(checkpoint.folder)!r} are missing or misshapen: {', '.join(absent)}"
        )
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), found)
    return Network(exits, graphdef, params, pooling)
