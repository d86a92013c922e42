"""The choice of a learning rate by short runs that are compared on tuning rows.

Shape letters: R replica, E exit, M tuning rows, C classes.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.padding import TOKENS_WHILE_COMPILING
from sweet_jax.distributed import barrier, broadcast_from_primary, is_primary
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.files import read_json, write_json
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.preparation import PreparedRun
from sweet_jax.training.best_state import standard_error, tuning_area
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.schedule import search_steps, training_steps
from sweet_jax.training.sharding import mesh_of

log = logging.getLogger(__name__)


def search_rate(job: PreparedRun, workdir: Path) -> tuple[PreparedRun, dict[str, Any] | None]:
    """Chooses the learning rate by a short run of every rate, with the first seed.

    A short run has the complete learning-rate schedule over a fraction of the steps. The first of
    `learning_rates` is kept for all seeds, unless the largest area on tuning rows exceeds its area
    by more than a standard error; then the rate with the largest area is chosen.

    Returns:
      The job with the replicas of the chosen rate, and a record with learning_rates, the area of
      each, steps, seed, tuning_rows and learning_rate; the record is None if there is nothing to
      choose.

    """
    config, rates = job.config, job.config.learning_rates
    if config.epochs == 0:  # the rate does not matter
        return _select_rate(job, rates[0]), None
    if not config.searches_rate:
        return job, None
    path = workdir / "rate_search.json"
    if broadcast_from_primary(path.exists()):
        found = read_json(path)
    else:
        found = _search(job, workdir / "rate_search")
        if is_primary():
            write_json(path, found)
        barrier("rate search")
    if is_primary():
        shutil.rmtree(workdir / "rate_search", ignore_errors=True)
    return _select_rate(job, found["learning_rate"]), found


def _select_rate(job: PreparedRun, rate: float) -> PreparedRun:
    """Returns the job with only the replicas of one learning rate."""
    replicas = [r for r, (_, own) in enumerate(job.config.replicas()) if own == rate]
    return job.select_replicas(dataclasses.replace(job.config, learning_rates=(rate,)), replicas)


def _search(job: PreparedRun, workdir: Path) -> dict[str, Any]:
    """Returns the record of `search_rate`."""
    config, (training, _, tuning) = job.config, (rows.shape[1] for rows in job.rows)
    rates, size = config.learning_rates, config.batch_size
    total = training_steps(config.epochs, training, size)
    steps = search_steps(total)
    log.info(
        "choosing the learning rate of %s by %d steps each: %d rows in all, where training takes "
        "up to %d for each seed",
        ", ".join(f"{rate:g}" for rate in rates),
        steps,
        steps * len(rates) * size,
        total * size,
    )
    alone = _one_rate_at_a_time(config, steps)
    places = range(len(rates))
    together = [[place] for place in places] if alone else [list(places)]
    depths = [model.exits[-1] for model in model_specs(config)]
    work = sum(depths) * (steps * len(rates) + total * len(config.seeds))
    # The expected time is logged once, for this search and the training after it.
    following = [float(work - depths[0] * steps * len(together[0])), *[None] * len(rates)]
    each = zip(together, following, strict=False)
    found = [_short_runs(job, chosen, workdir, left) for chosen, left in each]
    area, error = broadcast_from_primary(np.concatenate(found, axis=1))  # [rates] each
    best = rates[choose_rate(area, error)]
    log.info(_describe_choice(rates, area, error, tuning, job.dataset.task.metric))
    return {
        "learning_rates": list(rates),
        "area": [float(a) if np.isfinite(a) else None for a in area],
        "steps": steps,
        "seed": config.seeds[0],
        "tuning_rows": tuning,
        "learning_rate": best,
    }


def _one_rate_at_a_time(config: Config, steps: int) -> bool:
    """Returns whether the short runs are trained one after the other, not in one program.

    This is faster on one CPU device, whose cores one replica fills. On one accelerator with one
    seed, the runs and the training after them then share a program; this is faster unless the runs
    take longer than compiling a second program (experiments/results/benchmarks/gpu.md).
    """
    if len(jax.devices()) > 1:
        return False
    rows = steps * config.batch_size * len(config.learning_rates)
    short = rows * config.max_length <= TOKENS_WHILE_COMPILING
    return jax.default_backend() == "cpu" or (len(config.seeds) == 1 and short)


def _describe_choice(
    rates: Sequence[float], area: np.ndarray, error: np.ndarray, rows: int, metric: str
) -> str:
    """Describes each rate's area [R] on tuning rows, and the rule by which one was chosen."""
    shown = ShownMetric.of(metric)
    pairs = zip(rates, shown.values(area), strict=True)
    each = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in pairs)
    place = choose_rate(area, error)
    kept = f"kept {rates[0]:g}, the first: no other one is better by more than a standard error"
    chosen = f"chosen {rates[place]:g}: better than the first by more than a standard error"
    name = shown.name.replace("_", " ") + shown.better
    return (
        f"area (mean over costs) of {name} on {rows} tuning rows: {each}; "
        f"{chosen if place else kept} ({error[area.argmax()]:.4f})"
    )


def _short_runs(
    job: PreparedRun, places: Sequence[int], workdir: Path, following: float | None
) -> np.ndarray:
    """Returns the areas on tuning rows of short runs of the first seed, and their standard errors.

    Both in one array, float64 [2, R]; see `tuning_area` and `standard_error`.

    places: indices of the runs' learning rates in the config.
    workdir: directory of the search; each group of runs gets a folder in it.
    following: work that follows the first of the runs, see `TrainingJob`.
    """
    rates = tuple(job.config.learning_rates[place] for place in places)
    config = dataclasses.replace(
        job.config, seeds=job.config.seeds[:1], learning_rates=rates, conflict_every=0
    )
    job = job.select_replicas(config, places)
    folder = workdir / "-".join(f"{rate:g}" for rate in rates)
    logits = []
    for model in model_specs(config):
        training = job.training_job(model, folder, short=True)
        graphdef, params, _ = fit(dataclasses.replace(training, following=following))
        following = None
        program = compile_evaluation(config, graphdef, mesh_of(params), features=config.tunes)
        logits.append(evaluate(config, program, params, job.train, job.rows.tuning).logits)
    outputs = np.concatenate(logits, axis=1)  # [R, E, M, C]
    labels, metric = job.train.labels[job.rows.tuning], job.dataset.task.metric
    cost = layer_cost(config.exits, config.method)
    area = tuning_area(outputs, labels, config.exits, cost, metric, job.objective)
    return np.stack([area, standard_error(area, outputs, labels, metric, job.objective)])


def choose_rate(area: np.ndarray, error: np.ndarray) -> int:
    """Returns the index of the rate with the largest area if it is clearly better than the first.

    Clearly means by more than its standard error; otherwise the index is 0.

    area, error: areas and their standard errors, float [R]; minus infinity and 0 for a rate that
      diverged.
    """
    best = int(np.argmax(area))
    return best if area[best] > area[0] + error[best] else 0
