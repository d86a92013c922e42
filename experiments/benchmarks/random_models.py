"""Writes saved models with random heads, for benchmarks in which the predictions do not matter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks.shapes import Shape
from sweet_jax import ExitOutputs
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.artifact_writer import TrainedModel, save_model
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.pretrained import open_checkpoint

_CLASSES = ("a", "b")


def write_with_random_heads(
    folder: Path, checkpoint: str, exits: tuple[int, ...], max_length: int
) -> None:
    """Writes a model with a checkpoint's encoder, random heads at `exits` and two classes."""
    opened, key = open_checkpoint(checkpoint), jax.random.key(0)
    model = EarlyExit(opened.encoder(key, depth=exits[-1]), exits, len(_CLASSES), key)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    params["encoder"] = opened.weights.first_layers(exits[-1])
    trained = TrainedModel(exits, params)
    about = {"task": "random", "text_columns": ["text"], "max_length": max_length}
    save_model(folder, opened, load_tokenizer(opened), [trained], about | _exits(exits), "")


def write_random_model(folder: Path, shape: Shape, like: ModelArtifact) -> ModelArtifact:
    """Writes a random model of a shape, with the task and the tokenizer of another model."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(shape.model())[1]))
    checkpoint: Any = SimpleNamespace(family=shape.family, values=dataclasses.asdict(shape.config))
    tokenizer = load_tokenizer(locate_checkpoint(str(like.folder)))
    trained = TrainedModel(shape.exits, params)
    about = {"task": like.task, "text_columns": list(like.text_columns)}
    about |= {"max_length": like.max_length} | _exits(shape.exits)
    save_model(folder, checkpoint, tokenizer, [trained], about, "")
    return open_model(folder)


def _exits(exits: Sequence[int]) -> dict[str, Any]:
    """Returns the contents of exits.json that are the same for every random model."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(len(exits), 50, 2)), rng.integers(0, 2, 50)
    outputs = ExitOutputs(logits, labels, np.asarray(exits))
    return {
        "version": 5,
        "classes": list(_CLASSES),
        "pooling": "first",
        "layers": list(exits),
        "cost": outputs.cost.tolist(),
        "policy": "confidence",
        "median_tokens": 24,
        "dials": make_resolver(outputs, ("confidence",)).as_dict(),
    }
