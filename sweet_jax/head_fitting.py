"""The linear models of a run: the probe before training, and the refit of the heads after it.

Their penalties are chosen on tuning rows, which are used neither for training nor for calibration.

Shape letters: R replica, E exit, U rows with features, N training or validation rows, M tuning
rows, H input width of a classifier, C outputs of an exit.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from sweet_jax.data.batches import Tokens
from sweet_jax.distributed import barrier, broadcast_from_primary, is_primary
from sweet_jax.objectives.linear_model import LinearModel, Solve
from sweet_jax.preparation import PreparedRun
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.initialization import ModelSpec, initial_state
from sweet_jax.training.probe import (
    PENALTIES,
    ROWS,
    LinearClassifiers,
    Probe,
    fit_classifiers,
    read_classifiers,
    refit_path,
    with_classifiers,
)
from sweet_jax.training.sharding import make_mesh, mesh_of, replica_sharding, reshard, to_host
from sweet_jax.training.step import Params

log = logging.getLogger(__name__)


def fit_probe(job: PreparedRun, workdir: Path) -> Probe:
    """Fits a linear model at every exit of the encoder from which training starts.

    This takes one pass of the frozen encoder over the training, tuning and validation rows. The
    result is kept in probe.npz, from which a resumed run reads it.
    """
    path = workdir / "probe.npz"
    if broadcast_from_primary(path.exists()):
        return _read_probe(path)
    began = time.perf_counter()
    config, classes = job.config, len(job.dataset.classes)
    model = ModelSpec("probe", config.exits)
    graphdef, state = initial_state(config, job.checkpoint, model, classes, job.base)
    params = state.params
    rows, count = _rows_to_fit(job)
    log.info(
        "probe: fitting linear models on the frozen encoder at %d exits, which initialize the "
        "heads and are baselines in the report",
        len(config.exits),
    )
    columns = _columns(rows)
    if _same_features(params):  # always if R = 1
        config = dataclasses.replace(
            config, seeds=config.seeds[:1], learning_rates=config.learning_rates[:1]
        )
        params = jax.tree.map(lambda x: x[:1], params)
        used = np.unique(rows)
        rows, columns = used[None], np.searchsorted(used, rows)  # [1, U], [R, N + M]
    mesh = make_mesh(len(rows), len(jax.devices()))  # `evaluate` fills its batches up for all
    params = reshard(params, jax.tree.map(lambda _: replica_sharding(mesh, len(rows)), params))
    program = compile_evaluation(config, graphdef, mesh, features=True)

    def features(tokens: Tokens, picked: np.ndarray) -> np.ndarray:  # [R or 1, E, N, H]
        batches = -(-picked.shape[1] // config.evaluation_batch_size)
        with _progress("probe, encoding", batches, "batches") as bar:
            counted = _counted(program, bar)
            output = evaluate(config, counted, params, tokens, picked, features=True)
        return np.asarray(output.features)

    inputs, labels = features(job.train, rows), job.train.labels[rows]
    size = (rows.shape[1], len(config.exits), inputs.nbytes / 2**20)
    log.info("probe: features of %d rows at %d exits, %.0f MiB", *size)
    objective, parts = job.objective, (columns[:, :count], columns[:, count:])
    fits = len(np.unique(parts[0], axis=0)) * len(config.exits) * len(PENALTIES)
    with _progress("probe, fitting", fits, "fits") as bar:
        linear = _counted_solver(objective.linear, bar)
        classifiers = fit_classifiers(inputs, labels, *parts, classes, linear)
    classifiers = broadcast_from_primary(classifiers)
    shown = features(job.validation, job.validation_rows[: len(rows)])
    predictions = classifiers.predictions(shown, objective)
    if job.scaler:
        predictions = job.scaler.unscale(predictions)
    probe = Probe(classifiers, predictions)
    if is_primary():
        classifiers.save(path, predictions=probe.predictions)
    barrier("probe")
    log.info("probe: %.0f seconds", time.perf_counter() - began)
    return probe


def _progress(title: str, total: int, unit: str) -> tqdm:
    """Returns a progress bar, which is shown only in the primary process."""
    return tqdm(desc=title, total=total, unit=f" {unit}", disable=not is_primary(), leave=False)


def _counted(program: Callable, bar: tqdm) -> Callable:
    """Returns a program that advances a bar by one each time it is called."""

    def run(*arguments: Any) -> Any:
        result = program(*arguments)
        bar.update()
        return result

    return run


def _counted_solver(linear: LinearModel, bar: tqdm) -> LinearModel:
    """Returns a linear model whose solver advances a bar by one for each penalty.

    If an exit needs fewer fits, the remaining ones are counted when the next exit begins.
    """

    def solver(features: int, outputs: int) -> Solve:
        bar.update(-bar.n % len(PENALTIES))
        return _counted(linear.solver(features, outputs), bar)

    return dataclasses.replace(linear, solver=solver)


def _read_probe(path: Path) -> Probe:
    classifiers = read_classifiers(path)
    assert classifiers is not None, f"{path} exists only for the primary process: share the workdir"
    with np.load(path, allow_pickle=False) as arrays:
        return Probe(classifiers, arrays["predictions"])


def _rows_to_fit(job: PreparedRun) -> tuple[np.ndarray, int]:
    """Returns training and tuning rows, int [R, N + M], and N.

    At most ROWS rows of each kind are drawn, with a fixed seed: more would take hours without
    changing the fit much.
    """
    parts = []
    for rows in (job.rows.training, job.rows.tuning):
        use = np.random.default_rng(0).permutation(rows.shape[1])[:ROWS]
        parts.append(rows[:, np.sort(use)])
    return np.concatenate(parts, axis=1), parts[0].shape[1]


def _columns(rows: np.ndarray) -> np.ndarray:
    """Returns the column number of each entry of the rows [R, U], int [R, U]."""
    return np.broadcast_to(np.arange(rows.shape[1]), rows.shape)


def _same_features(params: Params) -> bool:
    """Returns whether all replicas [R, ...] start with the same encoder and poolers."""

    def same(path: tuple, x: np.ndarray) -> bool:
        if any(p.key in ("classifier", "learning_to_exit") for p in path):
            return True
        return all(np.array_equal(x[0], other) for other in x[1:])

    return all(jax.tree.leaves(jax.tree.map_with_path(same, params)))


def refit_heads(
    job: PreparedRun,
    model: ModelSpec,
    graphdef: nnx.GraphDef,
    params: Params,
    workdir: Path,
    best_steps: Sequence[int] = (),
) -> Params:
    """Returns trained parameters [R, ...] with the classifiers refitted on the trained encoder.

    Three kinds of classifiers stay unchanged: those of the exits of a run that this one grows from,
    those of replicas that diverged, and those of replicas whose kept state is the initial one of a
    probe. The latter were fitted on this very encoder and these rows, and another fit would differ
    from the baseline by rounding. The classifiers are saved in `refit/` for runs that grow from
    this one.

    Args:
      job: the prepared run.
      model: the model that was trained.
      graphdef, params: its structure and parameters.
      workdir: the run directory.
      best_steps: the step whose state was kept for each replica [R]; () if it is the last one.

    """
    config, classes = job.config, len(job.dataset.classes)
    grown = job.base.exits if job.base is not None else ()
    rows, count = _rows_to_fit(job)
    begun = np.zeros(len(rows), bool)  # [R]
    if job.probe is not None and best_steps:
        begun = np.asarray(best_steps) == 0
        if begun.all() and not grown:
            _save_refit(
                job.probe.classifiers.select_exits(config.exits, model.exits), model, workdir
            )
            return params
    program = compile_evaluation(config, graphdef, mesh_of(params), features=True)
    output = evaluate(config, program, params, job.train, rows, features=True)
    features = np.asarray(output.features)  # [R, E, N + M, H]
    sound = np.isfinite(features).all(axis=(1, 2, 3))  # [R]
    if not sound.all():
        features[~sound] = 0
    labels, columns = job.train.labels[rows], _columns(rows)
    parts = columns[:, :count], columns[:, count:]
    fits = len(rows) * len(model.exits) * len(PENALTIES)
    with _progress("fitting the heads", fits, "fits") as bar:
        linear = _counted_solver(job.objective.linear, bar)
        classifiers = fit_classifiers(features, labels, *parts, classes, linear)
    classifiers = LinearClassifiers(
        *(np.array(array) for array in broadcast_from_primary(classifiers))
    )
    for e, layer in enumerate(model.exits):
        dense = jax.tree.map(to_host, params["heads"][str(layer)]["classifier"])
        kept = ~sound | begun | (layer in grown)  # [R]
        classifiers.kernel[kept, e], classifiers.bias[kept, e] = (
            dense["kernel"][kept],
            dense["bias"][kept],
        )
    _save_refit(classifiers, model, workdir)
    new = with_classifiers(params, model.exits, classifiers, range(len(model.exits)))
    return reshard(new, jax.tree.map(lambda x: x.sharding, params))


def transform_outputs(
    params: Params, exits: Sequence[int], factor: float, shift: np.ndarray | float
) -> Params:
    """Returns parameters [R, ...] whose exits' outputs are multiplied by a factor, and shifted.

    exits: layer numbers of the heads [E].
    factor: the factor, applied to kernels and biases.
    shift: float [R, E, C] or one number, added to the biases.
    """
    heads = {}
    for e, layer in enumerate(exits):
        dense = jax.tree.map(to_host, params["heads"][str(layer)]["classifier"])
        added = shift if isinstance(shift, float) else shift[:, e]  # [R, C]
        kernel, bias = dense["kernel"] * factor, dense["bias"] * factor + added
        dense = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
        heads[str(layer)] = params["heads"][str(layer)] | {"classifier": dense}
    new = params | {"heads": params["heads"] | heads}
    return reshard(new, jax.tree.map(lambda x: x.sharding, params))


def _save_refit(found: LinearClassifiers, model: ModelSpec, workdir: Path) -> None:
    """Saves the refitted classifiers of a model, for runs that grow from this one."""
    if is_primary():
        found.save(refit_path(workdir, model.name))
    barrier("refit")
