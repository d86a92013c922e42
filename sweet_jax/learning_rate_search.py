"""The choice of a learning rate by short runs, compared on tuning rows.

Shape letters: R replica, E exit, M tuning rows, C classes.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sweet_jax.distributed import barrier, broadcast_from_primary, is_primary
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.files import write_json
from sweet_jax.head_fitting import Probe, select_replicas
from sweet_jax.preparation import PreparedRun
from sweet_jax.training.early_stopping import standard_error, tuning_area
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.schedule import search_steps, training_steps
from sweet_jax.training.sharding import mesh_of

log = logging.getLogger(__name__)


def search_rate(
    job: PreparedRun, probe: Probe | None, workdir: Path
) -> tuple[PreparedRun, Probe | None, dict[str, Any] | None]:
    """Chooses the learning rate by short runs, of the first seed, of every rate.

    Each has its whole schedule over a share of the steps. The first rate of `learning_rates` is
    kept, for all seeds, unless another has an area on tuning rows that is larger by more than a
    standard error: then the one with the largest.

    Returns:
      The job and the probe of the replicas of that rate, and a record: learning_rates, area of
      each, steps, seed, learning_rate. (job, probe, None) where there is nothing to choose.

    """
    config = job.config
    rates, count = config.learning_rates, len(config.learning_rates)
    if config.epochs == 0:  # the rate does not matter
        return *_of_rate(job, probe, 0), None
    if config.rate_search != "short" or count == 1:
        return job, probe, None
    path = workdir / "rate_search.json"
    if broadcast_from_primary(path.exists()):
        found = json.loads(path.read_text())
    else:
        found = _search(job, probe, workdir / "rate_search")
        if is_primary():
            write_json(path, found)
        barrier("rate search")
    if is_primary():
        shutil.rmtree(workdir / "rate_search", ignore_errors=True)
    return *_of_rate(job, probe, rates.index(found["learning_rate"])), found


def _of_rate(job: PreparedRun, probe: Probe | None, place: int) -> tuple[PreparedRun, Probe | None]:
    """Returns the job and the probe of the replicas of one of the learning rates."""
    config = job.config
    rates = config.learning_rates
    replicas = [s * len(rates) + place for s in range(len(config.seeds))]
    picked = dataclasses.replace(config, learning_rates=(rates[place],))
    kept = None if probe is None else probe.select_replicas(replicas)
    return select_replicas(job, picked, replicas), kept


def _search(job: PreparedRun, probe: Probe | None, workdir: Path) -> dict[str, Any]:
    """Returns the record of `search_rate`."""
    config, total = job.config, _steps(job)
    rates, steps = config.learning_rates, search_steps(total)
    log.info(
        "choosing the learning rate of %s by %d steps each: %d examples, where training takes %d "
        "for each seed",
        ", ".join(f"{rate:g}" for rate in rates),
        steps,
        steps * len(rates) * config.batch_size,
        total * config.batch_size,
    )
    area = np.concatenate([_short_runs(job, probe, r, workdir) for r in _together(len(rates))])
    area = broadcast_from_primary(area)
    count = len(job.tuning[0])
    best = rates[choose_rate(area, count, job.dataset.task.metric)]
    log.info(
        "areas on %d tuning rows: %s; chosen: %g",
        count,
        ", ".join(f"{rate:g}: {value:.4f}" for rate, value in zip(rates, area, strict=True)),
        best,
    )
    return {
        "learning_rates": list(rates),
        "area": [float(a) if np.isfinite(a) else None for a in area],
        "steps": steps,
        "seed": config.seeds[0],
        "tuning_rows": count,
        "learning_rate": best,
    }


def _together(count: int) -> list[list[int]]:
    """Returns which rates are the replicas of one program: all of them.

    On a single CPU device, whose cores one replica fills, each alone: with one seed, they and
    the training that follows then share one compiled program.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return [[rate] for rate in range(count)] if alone else [list(range(count))]


def _short_runs(
    job: PreparedRun, probe: Probe | None, places: Sequence[int], workdir: Path
) -> np.ndarray:
    """Returns the area on tuning rows, float64 [R], of short runs of some of the rates."""
    rates = tuple(job.config.learning_rates[r] for r in places)
    config = dataclasses.replace(
        job.config, seeds=job.config.seeds[:1], learning_rates=rates, conflict_every=0
    )
    job = select_replicas(job, config, places)  # of the first seed
    tuning = np.stack(job.tuning)  # [R, M]
    logits = []
    for training in model_specs(config):
        short = TrainingJob(
            config,
            job.checkpoint,
            training,
            len(job.dataset.classes),
            job.train,
            [trained for trained, _ in job.rows],
            workdir / "-".join(f"{rate:g}" for rate in rates),
            probe=None if probe is None else probe.classifiers.select_replicas(places),
            short=True,
        )
        graphdef, params, _ = fit(short)
        program = compile_evaluation(config, graphdef, mesh_of(params), features=config.tunes)
        logits.append(evaluate(config, program, params, job.train, tuning).logits)
    return tuning_area(
        np.concatenate(logits, axis=1),
        job.train.labels[tuning],
        config.exits,
        layer_cost(config.exits, config.method),
        job.dataset.task.metric,
    )


def choose_rate(area: np.ndarray, rows: int, metric: str) -> int:
    """Returns the place of the rate with the largest area; 0 where it does not clearly beat that.

    Clearly is by more than a standard error on so many rows.

    area: float [R], minus infinity where it diverged.
    """
    best = int(np.argmax(area))
    clearly = area[best] > area[0] + float(standard_error(area[best], rows, metric))
    return best if clearly else 0


def _steps(job: PreparedRun) -> int:
    return training_steps(job.config.epochs, len(job.rows[0][0]), job.config.batch_size)
