"""Logistic regressions of a run: the probe before training, the refit of its heads afterwards.

Tuning rows, which are neither trained on nor calibrated on, choose their penalties.

Shape letters: R replica, E exit, U rows with features, N rows, M tuning rows, H hidden, C classes.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sweet_jax.config import Config
from sweet_jax.distributed import barrier, broadcast_from_primary, is_primary
from sweet_jax.preparation import PreparedRun
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.initialization import ModelSpec, initial_state
from sweet_jax.training.probe import (
    ROWS,
    LinearClassifiers,
    fit_classifiers,
    read_classifiers,
    refit_path,
    with_classifiers,
)
from sweet_jax.training.sharding import make_mesh, mesh_of, replica_sharding, reshard, to_host
from sweet_jax.training.step import Params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Logistic regressions on the frozen encoder.

    Attributes:
      classifiers: of every replica and exit.
      predictions: of the validation rows, int64 [R, E, N].

    """

    classifiers: LinearClassifiers
    predictions: np.ndarray

    def select_replicas(self, replicas: Sequence[int]) -> "Probe":
        """Returns the probe of some replicas."""
        return Probe(self.classifiers.select_replicas(replicas), self.predictions[list(replicas)])


def select_replicas(job: PreparedRun, config: Config, replicas: Sequence[int]) -> PreparedRun:
    """Returns the job of some replicas alone, which are those of `config`."""
    return dataclasses.replace(
        job,
        config=config,
        rows=[job.rows[r] for r in replicas],
        tuning=[job.tuning[r] for r in replicas],
    )


def fit_probe(job: PreparedRun, workdir: Path) -> Probe:
    """Fits a logistic regression at every exit of the encoder that training starts from.

    One pass of the frozen encoder over training, tuning and validation rows. The result is
    kept in probe.npz, from which a resumed run reads it.
    """
    path = workdir / "probe.npz"
    if broadcast_from_primary(path.exists()):
        known = read_classifiers(path)
        assert known is not None, f"{path} is the first process's alone: workdirs are shared"
        with np.load(path, allow_pickle=False) as arrays:
            return Probe(known, arrays["predictions"])
    began = time.perf_counter()
    config, classes = job.config, len(job.dataset.classes)
    training = ModelSpec("probe", config.exits)
    graphdef, state = initial_state(config, job.checkpoint, training, classes)
    params = state.params
    own, held = _rows(job)
    rows = np.concatenate([own, held], axis=1)  # [R, U]
    if _same_features(params):  # of R = 1 always
        config = dataclasses.replace(
            config, seeds=config.seeds[:1], learning_rates=config.learning_rates[:1]
        )
        params = jax.tree.map(lambda x: x[:1], params)
        rows = np.unique(rows)[None]  # [1, U], ascending
    mesh = make_mesh(len(rows), config.batch_size)
    params = reshard(params, jax.tree.map(lambda _: replica_sharding(mesh, len(rows)), params))
    program = compile_evaluation(config, graphdef, mesh, features=True)
    features = evaluate(config, program, params, job.train, rows, features=True).features
    assert features is not None
    log.info(
        "probe: features of %d rows at %d exits, %.0f MiB",
        rows.shape[1],
        len(config.exits),
        features.nbytes / 2**20,
    )
    if len(rows) == 1:
        places = [np.stack([np.searchsorted(rows[0], r) for r in index]) for index in (own, held)]
    else:
        whole = np.tile(np.arange(rows.shape[1]), (len(rows), 1))  # [R, U]
        places = [whole[:, : own.shape[1]], whole[:, own.shape[1] :]]
    labels = job.train.labels[rows]
    found = fit_classifiers(np.asarray(features), labels, places[0], places[1], classes)
    every = np.tile(np.arange(len(job.validation)), (len(rows), 1))  # [R or 1, N]
    features = evaluate(config, program, params, job.validation, every, features=True).features
    assert features is not None
    found = broadcast_from_primary(found)
    probe = Probe(found, found.predictions(np.asarray(features)))
    if is_primary():
        found.save(path, predictions=probe.predictions)
    barrier("probe")
    log.info("probe: %.0f seconds", time.perf_counter() - began)
    return probe


def _rows(job: PreparedRun) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that regressions are fitted on, int [R, N], and tuned on, int [R, M].

    Of a large file as many as are drawn by a fixed seed: more would take hours and say no more.
    """
    found = []
    for rows in (np.stack([trained for trained, _ in job.rows]), np.stack(job.tuning)):
        use = np.random.default_rng(0).permutation(rows.shape[1])[:ROWS]
        found.append(rows[:, np.sort(use)])
    return found[0], found[1]


def _same_features(params: Params) -> bool:
    """Returns whether all replicas [R, ...] begin with the same encoder and poolers."""

    def same(path: tuple, x: np.ndarray) -> bool:
        if any(p.key in ("classifier", "learning_to_exit") for p in path):
            return True
        return all(np.array_equal(x[0], other) for other in x[1:])

    return all(jax.tree.leaves(jax.tree.map_with_path(same, params)))


def refit_heads(
    job: PreparedRun, training: ModelSpec, graphdef: nnx.GraphDef, params: Params, workdir: Path
) -> Params:
    """Returns trained parameters [R, ...] with the classifiers fitted again on the trained encoder.

    Exits of a run that this one grows from stay as they are, and so do replicas that diverged. The
    classifiers are kept in `refit/`, for a run that grows from this one.
    """
    config, base = job.config, job.base
    kept = base.exits if base is not None else ()
    own, held = _rows(job)
    rows = np.concatenate([own, held], axis=1)  # [R, N + M]
    program = compile_evaluation(config, graphdef, mesh_of(params), features=True)
    output = evaluate(config, program, params, job.train, rows, features=True)
    features = np.asarray(output.features)  # [R, E, N + M, H]
    sound = np.isfinite(features).all(axis=(1, 2, 3))  # [R]
    if not sound.all():
        features[~sound] = 0
    places = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
    count = own.shape[1]
    labels, classes = job.train.labels[rows], len(job.dataset.classes)
    found = fit_classifiers(features, labels, places[:, :count], places[:, count:], classes)
    found = LinearClassifiers(*(np.array(array) for array in broadcast_from_primary(found)))
    for e, layer in enumerate(training.exits):
        dense = jax.tree.map(to_host, params["heads"][str(layer)]["classifier"])
        own_kept = ~sound | (layer in kept)  # [R]
        found.kernel[own_kept, e] = dense["kernel"][own_kept]
        found.bias[own_kept, e] = dense["bias"][own_kept]
    if is_primary():
        found.save(refit_path(workdir, training.name))
    barrier("refit")
    new = with_classifiers(params, training.exits, found, range(len(training.exits)))
    return reshard(new, jax.tree.map(lambda x: x.sharding, params))
