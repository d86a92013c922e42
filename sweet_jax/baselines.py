"""The baselines of a run: models that a user would try first, trained on the rows of the run.

Shape letters: R replica, E exit, N validation rows.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.run_rows import RunRows
from sweet_jax.data.splits import split_tuning_rows
from sweet_jax.errors import UserError
from sweet_jax.head_fitting import fit_probe
from sweet_jax.learning_rate_search import search_rate
from sweet_jax.poolings import POOLINGS
from sweet_jax.preparation import PreparedRun
from sweet_jax.report.baselines import Baseline
from sweet_jax.text_baselines import constant_predictions, tfidf_predictions
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.probe import Probe
from sweet_jax.training.sharding import mesh_of

log = logging.getLogger(__name__)


def run_baselines(job: PreparedRun, rates: Sequence[float], workdir: Path) -> list[Baseline]:
    """Returns the baselines that the config requests, with their predictions on validation rows.

    "quick": a constant prediction (such as the majority class), a linear model on TF-IDF features,
    and a linear model at every exit of the frozen encoder, with the run's pooling, or mean pooling
    if the run pools the first token. "full": also the plain fine-tuned full model.

    Args:
      job: the prepared run, with the probe from which its heads started.
      rates: the learning rates among which the run chose.
      workdir: the run directory; intermediate results are kept in its folder `baselines`.

    """
    config, probe = job.config, job.probe
    if config.baselines == "none":
        return []
    folder = workdir / "baselines"
    if probe is None or POOLINGS[config.pooling].dense or config.grow_from:
        probe = _frozen_probe(job, folder)
    log.info("baselines: TF-IDF with a linear model")
    found = _without_encoder(job)
    if probe is not None:
        for e, layer in enumerate(config.exits):
            cost = layer / config.exits[-1]
            found.append(Baseline(f"probe_{layer}", probe.predictions[:, e], cost))
    if config.baselines == "full":
        found.append(Baseline("fine_tuned", _fine_tuned(job, rates, folder), 1.0))
    return found


def _without_encoder(job: PreparedRun) -> list[Baseline]:
    """Returns the majority class and TF-IDF, fitted on training and calibration rows together.

    A user would fit them on all rows, since they need no calibration. The strength of TF-IDF's
    regularization is chosen on the tuning rows, if there are any. If the run fits a decision
    threshold for each label, so does TF-IDF.
    """
    labels, new, objective = job.labels, job.dataset.validation.texts, job.objective
    by_seed: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for (seed, _), own, held, tuning in zip(job.config.replicas(), *job.rows, strict=True):
        if seed in by_seed:
            continue
        rows = np.union1d(own, held)
        texts = [job.texts[i] for i in rows]
        chosen_on = ([job.texts[i] for i in tuning], labels[tuning]) if len(tuning) else None
        by_seed[seed] = (
            constant_predictions(labels[rows], len(new), len(job.dataset.classes), objective),
            tfidf_predictions(
                texts,
                labels[rows],
                new,
                tuning=chosen_on,
                objective=objective,
                fit_decisions=job.fits_decisions,
            ),
        )
    each = [by_seed[seed] for seed, _ in job.config.replicas()]
    most, words = (np.stack(predictions) for predictions in zip(*each, strict=True))
    names = objective.linear.baselines
    return [Baseline(name, given, 0.0) for name, given in zip(names, (most, words), strict=True)]


def _frozen_probe(job: PreparedRun, folder: Path) -> Probe | None:
    """Returns a probe fitted as a baseline; None if there are too few rows to fit one."""
    pooling = job.config.pooling
    pooling = "mean" if POOLINGS[pooling].dense else pooling
    config = dataclasses.replace(job.config, pooling=pooling, learning_to_exit="", grow_from="")
    rows = job.rows
    if not config.tunes:
        strata = job.objective.column.strata(job.train.labels)
        try:
            split = [
                split_tuning_rows(strata, own, config.tuning_fraction, seed, job.train.labels)
                for (seed, _), own in zip(config.replicas(), rows.training, strict=True)
            ]
        except UserError:
            log.warning("too few training rows for the frozen-encoder baseline, which is left out")
            return None
        own, tuning = (np.stack(part) for part in zip(*split, strict=True))
        rows = RunRows(own, rows.calibration, tuning)
    return fit_probe(dataclasses.replace(job, config=config, base=None, rows=rows), folder)


def _plain(config: Config) -> Config:
    """Returns the config of plain fine-tuning: only the last exit, on the pooled first token."""
    return dataclasses.replace(
        config,
        method="early_exit",
        exits=config.exits[-1:],
        isolation=(0.0,),
        isolation_schedule="linear",
        boundary_isolation=(),
        loss_weights="uniform",
        last_exit_first=0.0,
        distillation=0.0,
        distillation_temperature=1.0,
        unlabeled_files="",
        pooling="first",
        pooler="per_exit",
        head_init="random",
        head_refit=False,
        epochs=config.epochs or 2,  # a run that only fits probes has 0
        head_learning_rate=1.0,
        layer_decay=1.0,
        layer_scaling=1.0,
        learning_to_exit="",
        grow_from="",
        conflict_every=0,
        segment_parallel=False,
    )


def _fine_tuned(job: PreparedRun, rates: Sequence[float], folder: Path) -> np.ndarray:
    """Returns the predictions of the plain fine-tuned full model, for classes int64 [R, N].

    The model is trained on the run's own rows for the same epochs. If the run searches its learning
    rate, this model gets its own search with the same short runs over the same rates, since the
    rate that is best for the exits may not be the best for it.
    """
    log.info("baseline: the plain fine-tuned full model")
    config = _plain(job.config)
    replicas = list(range(len(config.replicas())))
    if config.rate_search == "short":  # the exits' search left one replica for each seed
        config = dataclasses.replace(config, learning_rates=tuple(rates))
        replicas = [seed for seed in replicas for _ in rates]
        folder /= "fine_tuned"  # `folder` may hold an earlier version's training at the exits' rate
    job = job.select_replicas(config, replicas)
    job = dataclasses.replace(job, base=None, probe=None, unlabeled=None)
    job, _ = search_rate(job, folder)
    config, (model,) = job.config, model_specs(job.config)
    graphdef, params, _ = fit(job.training_job(model, folder))
    program = compile_evaluation(config, graphdef, mesh_of(params), features=config.tunes)
    output = evaluate(config, program, params, job.validation, job.validation_rows)
    predictions = job.objective.predict(np.asarray(output.logits)[:, 0])
    return job.scaler.unscale(predictions) if job.scaler else predictions
