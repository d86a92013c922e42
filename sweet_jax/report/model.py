"""The saved model: the best replica under Hugging Face names, its tokenizer, and its exits.

Shape letters: R replica, E exit, H hidden, C classes.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from sweet_jax.config import Config
from sweet_jax.data.load import Dataset
from sweet_jax.exits.analysis import Analysis, Choice, full_score
from sweet_jax.exits.dials import deployed
from sweet_jax.files import write_json
from sweet_jax.models.names import hugging_face_tensors
from sweet_jax.models.pretrained import Checkpoint

EXITS_VERSION = 2  # of exits.json


class Model(NamedTuple):
    """One trained model of all replicas: its exits and its parameters [R, ...]."""

    exits: tuple[int, ...]
    params: Any


def save_model(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: Any,
    config: Config,
    dataset: Dataset,
    analysis: Analysis,
    models: Sequence[Model],
) -> None:
    """Writes `model/` of the best replica, whole or not at all.

    model.safetensors holds the encoder under its Hugging Face names (the last exit's pooler as the
    encoder's) and beside it `exits.<layer>.pooler.dense.*`, `exits.<layer>.classifier.*` and, with
    learning-to-exit, `exits.<layer>.learning_to_exit.*`, all float32. Multi-Model's deepest model
    stands there, each shallower one in a folder depth_<layer>/ of its own.
    """
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    best = analysis.best
    places = []
    for model in models:
        place = "." if model is models[-1] else f"depth_{model.exits[-1]:02d}"
        (aside / place).mkdir(parents=True, exist_ok=True)
        params = jax.tree.map(lambda x: np.asarray(x[best]), model.params)
        tensors = hugging_face_tensors(params, model.exits)
        safetensors.numpy.save_file(
            tensors, aside / place / "model.safetensors", metadata={"format": "pt"}
        )
        values = json.loads((checkpoint.folder / "config.json").read_text())
        values |= {"num_hidden_layers": model.exits[-1], "architectures": [checkpoint.architecture]}
        write_json(aside / place / "config.json", values)
        places.append({"folder": place, "exits": list(model.exits)})
    tokenizer.save_pretrained(aside)
    write_json(aside / "exits.json", _exits(config, dataset, analysis) | {"models": places})
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _exits(config: Config, dataset: Dataset, analysis: Analysis) -> dict[str, Any]:
    best = analysis.best
    keep = full_score(analysis, best)
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
        "layers": list(config.exits),
        "cost": np.asarray(analysis.validation.cost).tolist(),
        "policy": config.policy,
        "temperatures": [t if np.isfinite(t) else None for t in temperatures.tolist()],
        "dials": analysis.dials(best, deployed(analysis.validation)).as_dict()
        | {"full_score": keep.as_dict() if isinstance(keep, Choice) else None},
    }
