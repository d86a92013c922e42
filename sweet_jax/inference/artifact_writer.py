"""Writes the folder model/ of a run; `artifact` reads it.

Shape letters: R replica, N training texts.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sweet_jax.config import Config
from sweet_jax.directories import copy_additions, replace_directory
from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.operating_point import deployable_policies
from sweet_jax.files import write_json, write_text
from sweet_jax.inference.artifact import EXITS_VERSION, OBJECTIVES_VERSION, PAIRS_VERSION
from sweet_jax.poolings import POOLINGS

if TYPE_CHECKING:  # these modules import datasets and JAX
    from sweet_jax.data.load import Dataset
    from sweet_jax.models.pretrained import Checkpoint


class TrainedModel(NamedTuple):
    """Holds the exits and the parameters of one trained model."""

    exits: tuple[int, ...]  # layers of the exits, ascending
    params: Any  # of one replica, or [R, ...] of all replicas


def save_model(
    folder: Path,
    checkpoint: "Checkpoint",
    tokenizer: Any,
    models: Sequence[TrainedModel],
    exits: Mapping[str, Any],
    card: str,
) -> None:
    """Writes the folder model/ of the best replica, completely or not at all.

    If the folder exists and holds the same weights and tokenizer, its other files are kept, such as
    the measured times of its stages and the thresholds for int8.

    model.safetensors holds the encoder under its Hugging Face names (the last exit's pooler as the
    encoder's pooler), `exits.<layer>.pooler.dense.*`, `exits.<layer>.classifier.*` and, with
    learning-to-exit, `exits.<layer>.learning_to_exit.*`, all in float32. With Multi-Model, it holds
    the deepest model; each shallower one has its own folder depth_<layer>/.

    Args:
      folder: the folder to write.
      checkpoint: the checkpoint that training started from.
      tokenizer: the checkpoint's tokenizer.
      models: the trained models, the deepest last; parameters are on the host.
      exits: contents of exits.json, from `describe_exits`.
      card: text of README.md.

    """
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    written = []
    for model in models:
        subfolder = "." if model is models[-1] else f"depth_{model.exits[-1]:02d}"
        _write_network(aside / subfolder, checkpoint, model)
        written.append({"folder": subfolder, "exits": list(model.exits)})
    tokenizer.save_pretrained(aside)
    write_json(aside / "exits.json", {**exits, "models": written})
    write_text(aside / "README.md", card)
    if folder.exists():
        copy_additions(folder, aside, ignored=("exits.json", "README.md"))
    replace_directory(aside, folder)


def _write_network(folder: Path, checkpoint: "Checkpoint", model: TrainedModel) -> None:
    import safetensors.numpy  # needed to write a model, but not to open one

    from sweet_jax.models.tensor_names import hugging_face_tensors  # imports JAX

    folder.mkdir(parents=True, exist_ok=True)
    family = checkpoint.family
    tensors = hugging_face_tensors(family.names, model.params, model.exits)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = family.config.at_depth(checkpoint.values, model.exits[-1])
    values |= {"model_type": family.model_type, "architectures": [family.architecture]}
    write_json(folder / "config.json", values)
    # safetensors creates a file that only its owner may read, whatever the umask.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def describe_exits(
    config: Config, dataset: "Dataset", analysis: Analysis, lengths: np.ndarray
) -> dict[str, Any]:
    """Returns the contents of exits.json, except for the location of the weights.

    Args:
      config: configuration of the run.
      dataset: the dataset of the run.
      analysis: analysis of the run, which names the best replica.
      lengths: numbers of tokens of the training texts, int [N].

    """
    best, saved = analysis.best, analysis.as_saved()
    keep = saved.operating_point(best)
    seed, rate = analysis.replicas[best]
    temperatures = analysis.temperatures[best]
    single, pooling = config.objective == "single_label", POOLINGS[config.pooling]
    version = EXITS_VERSION if single else OBJECTIVES_VERSION
    fields = {} if single else {"objective": config.objective}
    return fields | {
        "version": PAIRS_VERSION if pooling.pairs else version,
        "task": config.task,
        "method": config.method,
        "seed": seed,
        "learning_rate": rate,
        "classes": list(dataset.classes),
        "text_columns": list(dataset.task.text_columns),
        "max_length": config.max_length,
        "pooling": config.pooling,
        "first_only": pooling.first_only,  # read where the pooling itself is not needed
        "layers": list(config.exits),
        "cost": np.asarray(analysis.validation.cost).tolist(),
        "policy": saved.policy,
        "metric": dataset.task.metric,
        "temperatures": [t if np.isfinite(t) else None for t in temperatures.tolist()],
        "dials": analysis.resolver(best, deployable_policies(analysis.validation)).as_dict()
        | {"full_score": None if keep.threshold is None else keep.as_dict()},
        "median_tokens": int(np.median(lengths)),
        "long_tokens": int(np.quantile(lengths, 0.95, method="higher")),
    }
