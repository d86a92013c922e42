"""Features of a frozen encoder at all its exits, computed in one pass and kept, and their probes.

Shape letters: S seed, E exit, U training rows that any seed uses, N training, M tuning,
K calibration, V validation rows, H hidden.
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
    """Holds the features of all rows, and which rows each seed uses."""

    train: np.ndarray  # float32 [E, U, H]
    labels: np.ndarray  # int [U]
    training: np.ndarray  # int [S, N], places on the axis U
    tuning: np.ndarray  # int [S, M]
    calibration: np.ndarray  # int [S, K]
    validation: np.ndarray  # float32 [E, V, H]


def compute_features(job: PreparedRun, path: Path) -> Features:
    """Returns the features of a run whose encoder is not trained; reads them where `path` is."""
    used = np.unique(np.concatenate(job.rows, axis=1))  # [U]
    labels = job.train.labels[used]
    places = [np.searchsorted(used, rows) for rows in job.rows]
    training, calibration, tuning = places
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            train, validation = kept["train"], kept["validation"]
    else:
        train, validation = _encode(job, used)
        with atomic_write(path) as aside:
            np.savez(aside, train=train, validation=validation)
    return Features(train, labels, training, tuning, calibration, validation)


def _encode(job: PreparedRun, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of training rows float32 [E, U, H], and of validation rows [E, V, H]."""
    # Seeds differ in heads alone.
    config = dataclasses.replace(
        job.config, seeds=job.config.seeds[:1], learning_rates=job.config.learning_rates[:1]
    )
    model = ModelSpec("frozen", config.exits)
    graphdef, state = initial_state(config, job.checkpoint, model, len(job.dataset.classes))
    params = state.params
    del state  # with the moments of an optimizer, which nothing needs here
    mesh = make_mesh(1, config.batch_size)
    params = reshard(params, jax.tree.map(lambda _: replica_sharding(mesh, 1), params))
    program = compile_evaluation(config, graphdef, mesh, features=True)

    def features(tokens: Tokens, rows: np.ndarray) -> np.ndarray:
        found = evaluate(config, program, params, tokens, rows[None], features=True)
        return np.asarray(found.features)[0]

    return features(job.train, used), features(job.validation, np.arange(len(job.validation)))


def select_exits(features: Features, exits: Sequence[int], chosen: Sequence[int]) -> Features:
    """Returns the features of some of the exits, both by their layers."""
    at = [list(exits).index(layer) for layer in chosen]
    return features._replace(train=features.train[at], validation=features.validation[at])


def fit_probes(features: Features, classes: int) -> LinearClassifiers:
    """Fits logistic regressions at every exit for every seed."""
    return fit_classifiers(
        features.train[None],
        features.labels[None],
        features.training,
        features.tuning,
        classes,
    )


def probe_of(features: Features, classifiers: LinearClassifiers) -> Probe:
    """Returns the probe with its predictions of the validation rows."""
    return Probe(classifiers, classifiers.predictions(features.validation[None]))


def probe_outputs(
    job: PreparedRun, features: Features, classifiers: LinearClassifiers
) -> tuple[ExitOutputs, ExitOutputs]:
    """Returns the outputs of the probes on calibration and validation rows, a replica a seed."""

    def logits(rows: np.ndarray, s: int) -> np.ndarray:  # [E, ..., C]
        return rows @ classifiers.kernel[s] + classifiers.bias[s][:, None]

    seeds = range(len(features.training))
    held = np.stack([logits(features.train[:, features.calibration[s]], s) for s in seeds])
    shown = np.stack([logits(features.validation, s) for s in seeds])  # [S, E, V, C]
    labels = features.labels[features.calibration]  # [S, K]
    return (
        exit_outputs(job, "calibration", [ModelOutput(held)], labels),
        exit_outputs(job, "validation", [ModelOutput(shown)], job.validation.labels),
    )
