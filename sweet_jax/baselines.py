"""The baselines of a run: what a user would try first, trained on the rows that the run has.

Shape letters: R replica, E exit, N validation rows.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from sweet_jax.config import Config, UserError
from sweet_jax.data.splits import split_tuning_rows
from sweet_jax.head_fitting import Probe, fit_probe
from sweet_jax.preparation import PreparedRun
from sweet_jax.report.baselines import Baseline, majority_class, tfidf_predictions
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.job import TrainingJob, TuningRows
from sweet_jax.training.sharding import mesh_of

log = logging.getLogger(__name__)


def run_baselines(job: PreparedRun, probe: Probe | None, workdir: Path) -> list[Baseline]:
    """Returns the baselines that `baselines` asks for, with their answers to the validation rows.

    "quick": the majority class, TF-IDF with logistic regression, and a frozen encoder with mean
    pooling and a logistic regression at every exit. "full": also the plain fine-tuned full model.

    Args:
      job: with the rows of every replica.
      probe: the run's own, None for a run whose heads began at random.
      workdir: what they compute is kept in its folder `baselines`.

    """
    config = job.config
    if config.baselines == "none":
        return []
    folder = workdir / "baselines"
    if probe is None or config.pooling != "mean" or config.grow_from:
        probe = _frozen_probe(job, folder)
    found = _without_encoder(job)
    if probe is not None:
        for e, layer in enumerate(config.exits):
            cost = layer / config.exits[-1]
            found.append(Baseline(f"probe_{layer}", probe.predictions[:, e], cost))
    if config.baselines == "full":
        found.append(Baseline("fine_tuned", _fine_tuned(job, folder), 1.0))
    return found


def _without_encoder(job: PreparedRun) -> list[Baseline]:
    """Returns the majority class and TF-IDF, fitted on training and calibration rows together.

    Nothing of them is calibrated, so that a user would fit them on all rows; their strength is
    chosen on the tuning rows, where there are any.
    """
    labels, count = job.train.labels, len(job.validation)
    by_seed: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    each = []
    for (seed, _), (own, held), tuning in zip(
        job.config.replicas(), job.rows, job.tuning, strict=True
    ):
        if seed not in by_seed:
            rows = np.union1d(own, held)
            texts = [job.texts[i] for i in rows]
            chosen_on = ([job.texts[i] for i in tuning], labels[tuning]) if len(tuning) else None
            by_seed[seed] = (
                majority_class(labels[rows], count, len(job.dataset.classes)),
                tfidf_predictions(
                    texts, labels[rows], job.dataset.validation.texts, tuning=chosen_on
                ),
            )
        each.append(by_seed[seed])
    most, words = (np.stack(predictions) for predictions in zip(*each, strict=True))
    return [Baseline("majority", most, 0.0), Baseline("tfidf", words, 0.0)]


def _frozen_probe(job: PreparedRun, folder: Path) -> Probe | None:
    """Returns the probe of a run that has none of its own; None where rows are too few for one."""
    config = dataclasses.replace(job.config, pooling="mean", learning_to_exit="", grow_from="")
    rows, tuning = job.rows, job.tuning
    if not config.tunes:
        try:
            split = [
                split_tuning_rows(job.train.labels, own, config.tuning_fraction, seed)
                for (seed, _), (own, _) in zip(config.replicas(), job.rows, strict=True)
            ]
        except UserError:
            log.warning("too few training rows for the baseline of a frozen encoder: left out")
            return None
        rows = [(own, held) for (own, _), (_, held) in zip(split, job.rows, strict=True)]
        tuning = [held for _, held in split]
    return fit_probe(dataclasses.replace(job, config=config, rows=rows, tuning=tuning), folder)


def _plain(config: Config) -> Config:
    """Returns the config of a plain fine-tune: the last exit alone, the first token, its pooler."""
    return dataclasses.replace(
        config,
        method="early_exit",
        exits=config.exits[-1:],
        isolation=(0.0,),
        isolation_schedule="linear",
        boundary_isolation=(),
        loss_weights="uniform",
        pooling="first",
        pooler="per_exit",
        head_init="random",
        head_refit=False,
        epochs=config.epochs or 2,  # 0 of a probe alone
        head_learning_rate=1.0,
        learning_to_exit="",
        grow_from="",
        conflict_every=0,
        segment_parallel=False,
    )


def _fine_tuned(job: PreparedRun, folder: Path) -> np.ndarray:
    """Returns the answers of the plain fine-tuned full model, int64 [R, N].

    With the run's own rows, epochs, and the learning rates that the run chose.
    """
    config = _plain(job.config)
    log.info("baseline: the plain fine-tuned full model")
    (training,) = model_specs(config)
    rows = [own for own, _ in job.rows]
    tuning = TuningRows(np.stack(job.tuning), job.dataset.task.metric)
    classes = len(job.dataset.classes)
    graphdef, params, _ = fit(
        TrainingJob(config, job.checkpoint, training, classes, job.train, rows, folder, tuning)
    )
    every = np.tile(np.arange(len(job.validation)), (len(rows), 1))  # [R, N]
    program = compile_evaluation(config, graphdef, mesh_of(params), features=config.tunes)
    answer = evaluate(config, program, params, job.validation, every)
    return np.asarray(answer.logits)[:, 0].argmax(axis=-1)
