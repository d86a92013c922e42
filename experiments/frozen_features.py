"""Computes and stores the features of a frozen encoder at all its exits, and fits probes on them.

Shape letters: S seed, E exit, U rows of the training file that any seed uses, N training rows,
M tuning rows, K calibration rows, V validation rows, H hidden, C classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sweet_jax.data.batches import Tokens
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import atomic_write
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.preparation import PreparedRun
from sweet_jax.run_outputs import exit_outputs
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.initialization import ModelSpec, initial_state
from sweet_jax.training.probe import LinearClassifiers, Probe, fit_classifiers
from sweet_jax.training.sharding import make_mesh, replica_sharding, reshard


class Features(NamedTuple):
    """Holds the features of all rows, and the rows that each seed uses.

    Attributes:
      train: features of the rows of the training file, float32 [E, U, H].
      labels: their labels, int [U].
      training, tuning, calibration: positions in U of the rows of each seed, int [S, N], [S, M] and
        [S, K].
      validation: features of the validation rows, float32 [E, V, H].

    """

    train: np.ndarray
    labels: np.ndarray
    training: np.ndarray
    tuning: np.ndarray
    calibration: np.ndarray
    validation: np.ndarray


def compute_features(job: PreparedRun, path: Path) -> Features:
    """Returns the features of a run whose encoder is not trained.

    Reads those of `path` if it exists; else computes them and writes it.
    """
    used = np.unique(np.concatenate(job.rows, axis=1))  # [U]
    labels = job.train.labels[used]
    places = [np.searchsorted(used, rows) for rows in job.rows]
    training, calibration, tuning = places
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            train, validation = stored["train"], stored["validation"]
    else:
        train, validation = _encode(job, used)
        with atomic_write(path) as aside:
            np.savez(aside, train=train, validation=validation)
    return Features(train, labels, training, tuning, calibration, validation)


def _encode(job: PreparedRun, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of the rows `used` [E, U, H] and of validation rows [E, V, H]."""
    # The seeds differ only in their heads.
    config = dataclasses.replace(
        job.config, seeds=job.config.seeds[:1], learning_rates=job.config.learning_rates[:1]
    )
    model = ModelSpec("frozen", config.exits)
    graphdef, state = initial_state(config, job.checkpoint, model, len(job.dataset.classes))
    params = state.params
    del state  # frees the optimizer's moments
    mesh = make_mesh(1, config.batch_size)
    params = reshard(params, jax.tree.map(lambda _: replica_sharding(mesh, 1), params))
    program = compile_evaluation(config, graphdef, mesh, features=True)

    def features(tokens: Tokens, rows: np.ndarray) -> np.ndarray:
        outputs = evaluate(config, program, params, tokens, rows[None], features=True)
        return np.asarray(outputs.features)[0]

    return features(job.train, used), features(job.validation, np.arange(len(job.validation)))


def select_exits(features: Features, exits: Sequence[int], chosen: Sequence[int]) -> Features:
    """Returns the features of the exits `chosen`, of the exits `exits`; both are layers."""
    at = [list(exits).index(layer) for layer in chosen]
    return features._replace(train=features.train[at], validation=features.validation[at])


def fit_probes(features: Features, classes: int) -> LinearClassifiers:
    """Fits a logistic regression at every exit for every seed: [S, E]."""
    return fit_classifiers(
        features.train[None],
        features.labels[None],
        features.training,
        features.tuning,
        classes,
    )


def probe_of(features: Features, classifiers: LinearClassifiers) -> Probe:
    """Returns the probe with its predictions on the validation rows."""
    return Probe(classifiers, classifiers.predictions(features.validation[None]))


def probe_outputs(
    job: PreparedRun, features: Features, classifiers: LinearClassifiers
) -> tuple[ExitOutputs, ExitOutputs]:
    """Returns the probes' outputs on calibration and validation rows, with one replica per seed."""

    def logits(rows: np.ndarray, s: int) -> np.ndarray:  # [E, ..., C]
        return rows @ classifiers.kernel[s] + classifiers.bias[s][:, None]

    seeds = range(len(features.training))
    calibration = np.stack([logits(features.train[:, features.calibration[s]], s) for s in seeds])
    validation = np.stack([logits(features.validation, s) for s in seeds])  # [S, E, V, C]
    labels = features.labels[features.calibration]  # [S, K]
    # The fields of a ModelOutput are declared as arrays of jax. Those of the models' outputs that
    # `evaluate` returns, and `exit_outputs` takes, are arrays of NumPy too.
    outputs = [ModelOutput(x) for x in (calibration, validation)]  # type: ignore[arg-type]
    return (
        exit_outputs(job, "calibration", outputs[:1], labels),
        exit_outputs(job, "validation", outputs[1:], job.validation.labels),
    )
