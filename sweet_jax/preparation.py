"""Reads and checks everything that a config refers to, before anything is written.

Shape letters: R replica, U training rows that any replica uses, N training rows, K calibration
rows, M tuning rows, V validation rows.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import AUTO, Config
from sweet_jax.data.batches import Tokens, tokenize
from sweet_jax.data.load import Dataset, load_dataset, task_of
from sweet_jax.data.run_rows import RunRows, draw_rows
from sweet_jax.data.splits import Split, select_rows
from sweet_jax.errors import UserError
from sweet_jax.exits.policies import policy_rule
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.ownership import parameter_owners
from sweet_jax.models.pooling import check_pooling, declared_pooling
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint
from sweet_jax.models.special_tokens import ensure_first_token
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.objectives.label_checks import list_labels
from sweet_jax.objectives.objective import TargetScaler
from sweet_jax.objectives.single_label import balanced_weights, reweighted
from sweet_jax.optimizers import OPTIMIZERS
from sweet_jax.poolings import POOLINGS
from sweet_jax.preparation_checks import (
    check_checkpoint,
    check_token_types,
    try_policy,
    try_schedule,
)
from sweet_jax.training.growth import BaseRun, read_base_run
from sweet_jax.training.initialization import (
    ModelSpec,
    base_checkpoint_folder,
    with_training_dropout,
)
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.parallel import check_layout
from sweet_jax.training.probe import Probe

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """Holds a resolved config and everything it refers to, read once and checked.

    Row numbers index `texts` and `train`, which hold the training rows of the data set that at
    least one replica uses.
    """

    config: Config
    checkpoint: Checkpoint  # weights included
    dataset: Dataset
    digest: str  # digest of the data set
    base: BaseRun | None  # the run that this one grows from
    tokenizer: Any
    texts: list[tuple[str, ...]]  # U texts, or pairs of texts
    train: Tokens  # U rows
    validation: Tokens
    rows: RunRows
    unlabeled: Tokens | None = None  # rows without labels, whose texts occur in no other rows
    objective: Objective = SINGLE_LABEL  # includes the class weights of the config's loss
    targets: np.ndarray | None = None  # targets of `texts` in their own units; None: as in `train`
    scaler: TargetScaler | None = None  # by which the targets of `train` are standardized
    probe: Probe | None = None  # the probe that initializes the heads, once it is fitted

    @property
    def labels(self) -> np.ndarray:
        """Returns the targets of the training rows in their own units, [U, ...]."""
        return self.train.labels if self.targets is None else self.targets

    @property
    def validation_rows(self) -> np.ndarray:
        """Returns the validation rows of each replica, which are all of them, int [R, V]."""
        replicas = len(self.rows.training)
        return np.tile(np.arange(len(self.validation)), (replicas, 1))

    @property
    def fits_decisions(self) -> bool:
        """Returns whether a decision threshold for each label is fitted on held-out rows."""
        metric, chosen = self.dataset.task.metric, self.config.decision_thresholds
        wanted = chosen == "f1" or (not chosen and metric.endswith("_f1"))
        return self.objective.decision_shifts is not None and wanted

    def select_replicas(self, config: Config, replicas: Sequence[int]) -> "PreparedRun":
        """Returns the run restricted to some replicas, which must be those of `config`."""
        rows = RunRows(*(each[list(replicas)] for each in self.rows))
        probe = self.probe.select_replicas(replicas) if self.probe else None
        return dataclasses.replace(self, config=config, rows=rows, probe=probe)

    def training_job(self, model: ModelSpec, workdir: Path, *, short: bool = False) -> TrainingJob:
        """Returns the job that trains one of the method's models; see `TrainingJob`."""
        return TrainingJob(
            config=self.config,
            checkpoint=self.checkpoint,
            model=model,
            classes=len(self.dataset.classes),
            tokens=self.train,
            rows=self.rows.training,
            tuning=self.rows.tuning,
            metric=self.dataset.task.metric,
            objective=self.objective,
            workdir=workdir,
            base=self.base,
            unlabeled=self.unlabeled,
            probe=self.probe.classifiers if self.probe else None,
            short=short,
        )


def prepare(config: Config) -> PreparedRun:
    """Reads and checks everything that a config refers to, and writes nothing.

    Raises UserError if anything is invalid.
    """
    config = config.resolved()
    task_of(config)  # so that a misspelled name is an error before anything is downloaded
    policy_rule(config.policy)  # likewise for what the user's own module defines
    _ = OPTIMIZERS[config.optimizer]
    try_schedule(config.learning_rate_schedule)
    if config.pooling not in ("", AUTO):
        _ = POOLINGS[config.pooling]
    checkpoint = _read_checkpoint(config)
    dataset = load_dataset(config)
    try_policy(config, dataset)
    config = _choose_pooling(config, checkpoint, dataset)
    check_pooling(config.pooling, checkpoint.config.hidden_size)
    digest = dataset.digest()
    base = read_base_run(config, digest)
    if base is not None:
        base_checkpoint_folder(base)
    check_layout(config)
    tokenizer = load_tokenizer(checkpoint)
    if POOLINGS[config.pooling].first_only:
        ensure_first_token(tokenizer, config.checkpoint)
    drawn = draw_rows(config, dataset)
    # Few rows may be drawn from a large file: only these are tokenized, and renumbered.
    used = np.unique(np.concatenate([rows.ravel() for rows in drawn]))
    kept = select_rows(dataset.train, used)
    train, scaler = tokenize(tokenizer, kept, config.max_length), None
    check_token_types(checkpoint, train)
    if dataset.objective.fit_scaler is not None:
        scaler = dataset.objective.fit_scaler(dataset.train.labels)
        train = dataclasses.replace(train, labels=scaler.scale(kept.labels))
    return PreparedRun(
        config=config,
        checkpoint=checkpoint,
        dataset=dataset,
        digest=digest,
        base=base,
        tokenizer=tokenizer,
        texts=kept.texts,
        train=train,
        validation=tokenize(tokenizer, dataset.validation, config.max_length),
        rows=RunRows(*(np.searchsorted(used, rows) for rows in drawn)),
        unlabeled=_tokenize_unlabeled(config, dataset, kept.texts, tokenizer, train.labels),
        objective=_training_objective(config, dataset, dataset.train.labels[drawn.training]),
        targets=kept.labels if scaler else None,
        scaler=scaler,
    )


def _tokenize_unlabeled(
    config: Config,
    dataset: Dataset,
    drawn: Sequence[tuple[str, ...]],
    tokenizer: Any,
    targets: np.ndarray,
) -> Tokens | None:
    """Returns the tokens of the rows without labels; None if the config has no unlabeled_files.

    Duplicates are dropped, and so are texts that any replica trains, tunes or calibrates on
    (`drawn`) and validation texts: rows that choose or evaluate a model must not take part in its
    training. The labels are zeros with the shape and dtype of `targets`, and are never read.

    Raises UserError if no text is left.
    """
    if not config.unlabeled_files:
        return None
    known = {*drawn, *dataset.validation.texts}
    texts = [text for text in dict.fromkeys(dataset.unlabeled) if text not in known]
    if not texts:
        raise UserError(
            f"unlabeled_files={config.unlabeled_files!r} has no text that is not among the "
            "training or validation rows: choose other files, or remove it"
        )
    log.info(
        "%d rows without labels; %d more repeat another text of the run and are left out",
        *(len(texts), len(dataset.unlabeled) - len(texts)),
    )
    labels = np.zeros((len(texts), *targets.shape[1:]), targets.dtype)
    return tokenize(tokenizer, Split(texts, labels), config.max_length)


def _training_objective(config: Config, dataset: Dataset, labels: np.ndarray) -> Objective:
    """Returns the data's objective, with the class weights and focal loss of the config.

    labels: labels of the rows that each replica trains on, [R, N, ...]. All replicas share their
      class weights, because one program trains them.

    Raises UserError unless there is a weight for each class.
    """
    if not (config.class_weights or config.focal_gamma):
        return dataset.objective
    classes = len(dataset.classes)
    weights: tuple[float, ...] = ()
    if config.class_weights == "balanced":
        weights = balanced_weights(labels.ravel(), classes)
    elif config.class_weights:
        weights = tuple(map(float, config.class_weights.split(",")))
        if len(weights) != classes:
            raise UserError(
                f"class_weights must have one number for each of the {classes} classes "
                f"{list_labels(dataset.classes)}; got {len(weights)}"
            )
    return reweighted(dataset.objective, weights, config.focal_gamma)


def _read_checkpoint(config: Config) -> Checkpoint:
    """Returns the checkpoint. Raises UserError if it is damaged, or does not fit the config."""
    checkpoint = open_checkpoint(config.checkpoint)
    check_checkpoint(checkpoint, config)
    with_training_dropout(config, checkpoint)
    # Weights are read now, to detect a damaged file before anything is written.
    encoder = {"encoder": checkpoint.weights.first_layers(config.exits[-1])}
    parameter_owners(encoder, config.exits, owners=checkpoint.family.owners.items())
    return checkpoint


def _choose_pooling(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> Config:
    """Returns the config with "" and "auto" replaced by the name of a pooling.

    "" becomes the pooling that the checkpoint declares, else its family's default. So does "auto",
    except that "mean" becomes "aligned_pair" for pairs of texts. Raises UserError for a pooling of
    pairs without pairs.
    """
    pooling, columns = config.pooling, dataset.task.text_columns
    if pooling in ("", AUTO):
        pooling = declared_pooling(checkpoint.folder) or checkpoint.family.default_pooling
        if config.pooling == AUTO and pooling == "mean" and len(columns) == 2:
            pooling = "aligned_pair"
    if POOLINGS[pooling].pairs and len(columns) != 2:
        raise UserError(
            f"pooling={pooling!r} compares two texts, but a row has one, {columns[0]!r}: set "
            "--config.pooling=mean, or two columns with --config.text_columns"
        )
    return dataclasses.replace(config, pooling=pooling)
