"""Logs a run's data before training: rows, classes, and possible problems.

Shape letters: N rows.
"""

import logging

import jax
import numpy as np

from sweet_jax.config import Config
from sweet_jax.data.batches import whole_lengths
from sweet_jax.preparation import PreparedRun
from sweet_jax.report.details import describe_split
from sweet_jax.training.parallel import devices_used

log = logging.getLogger(__name__)

_TASKS = {"own": "your own rows"}
_FEW = 30  # calibration or tuning rows: with fewer, one row is more than 3 points of accuracy


def log_description(job: PreparedRun) -> None:
    """Logs what is trained, on how many rows and devices, and warns of problems in the data."""
    training, calibration, tuning = (rows.shape[1] for rows in job.rows)
    _log_labels(job)
    _log_lengths(job)
    if job.config.calibration == "held_out" and calibration < _FEW:
        log.warning(
            "only %d calibration rows: temperatures and thresholds fitted on so few may not suit "
            "other rows; use more rows, or a larger calibration_fraction",
            calibration,
        )
    if 0 < tuning < _FEW:
        log.warning(
            "only %d tuning rows: the penalties, the learning rate and the kept state, which they "
            "choose, depend much on chance; use more rows",
            tuning,
        )
    elif not tuning and job.config.tuning_fraction != Config.tuning_fraction:
        log.warning(
            "tuning_fraction=%g holds out no rows of this run, which chooses nothing on tuning "
            "rows: set epochs=auto, head_init=probe, head_refit=True or rate_search=short (with "
            "several learning rates), or remove it",
            job.config.tuning_fraction,
        )
    if job.config.epochs and job.config.batch_size > training:
        log.warning(
            "batch_size=%d is larger than the %d training rows: each step has all of them and "
            "padding; use a smaller batch_size",
            *(job.config.batch_size, training),
        )
    if job.dataset.left_out:
        log.info("%d training rows repeat a validation text and are left out", job.dataset.left_out)
    if job.dataset.repeated:
        log.warning(
            "%d of %d validation texts are also training texts, so the metrics may be too high",
            *(job.dataset.repeated, len(job.dataset.validation.texts)),
        )
    log.info(describe_rows(job))
    used, present = devices_used(job.config), jax.device_count()
    log.info(
        "%s: method %s, an exit after layers %s of %s, %d %s; %s, on %s %s device(s)",
        *(_TASKS.get(job.config.task, job.config.task), job.config.method),
        *(", ".join(map(str, job.config.exits)), job.config.checkpoint),
        *(len(job.dataset.classes), job.objective.outputs, describe_models(job.config)),
        *(present if used == present else f"{used} of {present}", jax.default_backend()),
    )


def describe_rows(job: PreparedRun) -> str:
    """Describes the number of rows of each kind, and train_size if it leaves out rows."""
    train, calibration, tuning = (rows.shape[1] for rows in job.rows)
    known, limit = len(job.dataset.train.labels), job.config.train_size
    drawn = describe_split(job.config)
    limited = f" (train_size {limit} of {known})" if limit < known else ""
    return (
        f"rows: {train} training, {tuning} tuning and {calibration} calibration{limited}, "
        f"{len(job.validation)} validation{f': {drawn}' if drawn else ''}"
    )


def describe_models(config: Config) -> str:
    """Describes how many models a config trains, for its seeds and learning rates."""
    seeds, rates = len(config.seeds), len(config.learning_rates)
    of_seeds = f"{seeds} seed{'s' * (seeds > 1)}"
    of_rates = f"{rates} learning rate{'s' * (rates > 1)}"
    if config.epochs == 0:
        return f"{of_seeds}; the encoder is not trained (epochs=0), only heads are fitted"
    if rates > 1 and config.rate_search == "short":
        return f"{of_seeds}, {of_rates}: each rate is tried briefly, one is trained to the end"
    if seeds * rates == 1:
        return f"{of_seeds}, {of_rates}"
    return f"{of_seeds} x {of_rates} = {seeds * rates} models (replicas)"


def _log_labels(job: PreparedRun) -> None:
    """Logs the labels with their row counts, and warns of labels that look wrong or are rare."""
    splits, names = (job.dataset.train, job.dataset.validation), job.dataset.classes
    column = job.objective.column
    labels = np.concatenate([s.labels for s in splits])
    description, warnings = column.describe(labels, names)
    log.info("%d rows for training and validation: %s", len(labels), description)
    for warning in warnings:
        log.warning(warning)
    rows = (job.rows.training[0], job.rows.calibration[0])
    train, calibration = (column.present(job.train.labels[part]) for part in rows)
    if job.config.calibration == "held_out" and len(missing := np.setdiff1d(train, calibration)):
        listed = ", ".join(repr(names[c]) for c in missing[:5]) + ("…" if len(missing) > 5 else "")
        log.warning(
            "no calibration row has class %s: thresholds ignore it; use more rows of this class",
            listed,
        )


def _log_lengths(job: PreparedRun) -> None:
    """Warns of texts that are truncated, with the length that would keep 95% of them whole."""
    limit, positions = job.config.max_length, job.checkpoint.config.positions
    cut = float((job.train.lengths >= limit).mean())
    if not cut:
        return
    lengths = whole_lengths(job.tokenizer, job.texts, job.train)
    cut, enough = float((lengths > limit).mean()), int(np.quantile(lengths, 0.95, method="higher"))
    if not cut:
        return
    advice = f"--config.max_length={enough} keeps 95% of them whole" if enough > limit else ""
    if positions is not None and enough > positions:
        advice = f"95% of them have up to {enough} tokens, but this encoder takes {positions}"
    log.warning(
        "%s%% of the training texts are longer than max_length, %d tokens, and are truncated%s",
        f"{100 * cut:.0f}" if cut >= 0.01 else f"{100 * cut:.1g}",
        limit,
        f"; {advice}" if advice else "",
    )
