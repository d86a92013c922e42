"""Reads and checks everything that a config names, before anything is written.

Shape letters: R replica, N training rows that are used.
"""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from sweet_jax.config import Config, UserError
from sweet_jax.data.batches import Tokens, tokenize
from sweet_jax.data.load import Dataset, load_dataset, task_of
from sweet_jax.data.splits import (
    drop_duplicates,
    select_rows,
    split_calibration_rows,
    split_tuning_rows,
)
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pooling import declared_pooling
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint
from sweet_jax.training.growth import base_config
from sweet_jax.training.initialization import base_checkpoint_folder, with_training_dropout
from sweet_jax.training.parallel import check_devices

log = logging.getLogger(__name__)

_FEW = 30  # calibration or tuning rows: one of fewer is more than 3 points of accuracy


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """Holds a resolved config and everything it names, read once and checked.

    Row numbers index `texts` and `train`, which hold those training rows of the data set that a
    replica uses.
    """

    config: Config
    checkpoint: Checkpoint  # with its weights
    dataset: Dataset
    digest: str  # of the data set
    base: Config | None  # of the run that this one grows from
    tokenizer: Any
    texts: list[tuple[str, ...]]  # [N]
    train: Tokens  # N rows
    validation: Tokens
    rows: list[tuple[np.ndarray, np.ndarray]]  # (training, calibration) rows of each of R replicas
    tuning: list[np.ndarray]  # tuning rows of each replica; empty where nothing is tuned


def prepare(config: Config) -> PreparedRun:
    """Reads and checks all that a config names; raises UserError, and writes nothing."""
    config = config.resolved()
    task_of(config)  # a misspelt name is an error before the hub is asked for anything
    config, checkpoint = _read_checkpoint(config)
    dataset = load_dataset(config)
    digest = dataset.digest()
    base = base_config(config, digest)
    if base is not None:
        base_checkpoint_folder(config, base)
    check_devices(config)
    tokenizer = load_tokenizer(checkpoint)
    drawn, tuning = _draw_rows(config, dataset)
    # A few rows are drawn from a large file: only these are tokenised, and numbered anew.
    used = np.unique(np.concatenate([*(rows for pair in drawn for rows in pair), *tuning]))
    kept = select_rows(dataset.train, used)
    return PreparedRun(
        config=config,
        checkpoint=checkpoint,
        dataset=dataset,
        digest=digest,
        base=base,
        tokenizer=tokenizer,
        texts=kept.texts,
        train=tokenize(tokenizer, kept, config.max_length),
        validation=tokenize(tokenizer, dataset.validation, config.max_length),
        rows=[(np.searchsorted(used, t), np.searchsorted(used, h)) for t, h in drawn],
        tuning=[np.searchsorted(used, t) for t in tuning],
    )


def _read_checkpoint(config: Config) -> tuple[Config, Checkpoint]:
    """Returns the config with the pooling that the checkpoint declares, and the checkpoint."""
    checkpoint = open_checkpoint(config.checkpoint)
    if not config.pooling:
        pooling = declared_pooling(checkpoint.folder) or checkpoint.family.default_pooling
        config = dataclasses.replace(config, pooling=pooling)
    _check_against(checkpoint, config)
    with_training_dropout(config, checkpoint)
    _ = checkpoint.weights  # a damaged file must be known before anything is written
    return config, checkpoint


def _draw_rows(
    config: Config, dataset: Dataset
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Returns the (training, calibration) rows and the tuning rows of each replica.

    Raises UserError where a class of the validation rows is in none of the training rows drawn.
    """
    labels = dataset.train.labels
    drawn = [split_calibration_rows(labels, config, seed) for seed, _ in config.replicas()]
    before = len(drawn[0][0])
    drawn = drop_duplicates(dataset.train.texts, drawn)
    if len(drawn[0][0]) < before:
        repeats = before - len(drawn[0][0])
        log.info("%d training rows repeat a calibration text: left out", repeats)
    drawn, tuning = _with_tuning_rows(config, dataset, drawn)
    for (seed, _), (trained, _) in zip(config.replicas(), drawn, strict=True):
        unseen = np.setdiff1d(dataset.validation.labels, labels[trained])
        if len(unseen):
            raise UserError(
                f"label {dataset.classes[unseen[0]]!r} occurs in validation rows, but in none of "
                f"the {len(trained)} training rows drawn for seed {seed}: raise train_size, or "
                "give more distinct texts"
            )
    return drawn, tuning


def _with_tuning_rows(
    config: Config, dataset: Dataset, drawn: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Returns the (training, calibration) rows without tuning rows, and the tuning rows."""
    if not config.tunes:
        return drawn, [np.empty(0, int)] * len(drawn)
    labels, texts = dataset.train.labels, dataset.train.texts
    split = [
        split_tuning_rows(labels, trained, config.tuning_fraction, seed)
        for (seed, _), (trained, _) in zip(config.replicas(), drawn, strict=True)
    ]
    split = drop_duplicates(texts, split)
    size = min(len(tuning) for _, tuning in split)
    rows = [(t, held) for (t, _), (_, held) in zip(split, drawn, strict=True)]
    return rows, [tuning[:size] for _, tuning in split]


def log_description(job: PreparedRun) -> None:
    """Logs what will be trained, on how many rows and devices."""
    train, calibration = job.rows[0]
    if job.config.calibration == "held_out" and len(calibration) < _FEW:
        log.warning(
            "only %d calibration rows: temperatures and thresholds fitted on them say little of "
            "other rows; give more rows, or a larger calibration_fraction",
            len(calibration),
        )
    tuning = len(job.tuning[0])
    if 0 < tuning < _FEW:
        log.warning(
            "only %d tuning rows: the penalties, the learning rate and the state that is kept, "
            "which they choose, may be chosen by chance; give more rows",
            tuning,
        )
    if job.dataset.left_out:
        log.info("%d training rows repeat a validation text: left out", job.dataset.left_out)
    log.info(
        "%s with %s: %d training, %d tuning and %d calibration rows of %d (train_size %d), %d "
        "validation rows, %d classes, %d replicas (seeds x learning rates), on %d %s device(s)",
        job.config.task,
        job.config.method,
        len(train),
        tuning,
        len(calibration),
        len(job.dataset.train.labels),
        job.config.train_size,
        len(job.validation),
        len(job.dataset.classes),
        len(job.rows),
        jax.device_count(),
        jax.default_backend(),
    )


def _check_against(checkpoint: Checkpoint, config: Config) -> None:
    depth, positions = config.depth or checkpoint.depth, checkpoint.config.positions
    if depth > checkpoint.depth:
        raise UserError(
            f"depth is {depth}, but {config.checkpoint!r} has {checkpoint.depth} layers: leave it "
            "out to use all"
        )
    if config.exits[-1] != depth:
        what = "depth" if config.depth else f"the encoder's last layer, {depth} for"
        where = str(depth) if config.depth else f"{config.checkpoint!r}"
        raise UserError(
            f"exits must end with {what} {where}; got {','.join(map(str, config.exits))}"
        )
    if positions is not None and config.max_length > positions:
        raise UserError(
            f"max_length is {config.max_length}, but {config.checkpoint!r} has {positions} "
            f"positions: set --config.max_length={positions} or less"
        )
