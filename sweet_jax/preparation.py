"""Reads and checks everything that a config names, before anything is written.

Shape letters: R replica, U training rows that any replica uses, N training rows, K calibration
rows, M tuning rows, V validation rows.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import AUTO, Config, UserError
from sweet_jax.data.batches import Tokens, tokenize
from sweet_jax.data.label_checks import list_labels
from sweet_jax.data.load import Dataset, load_dataset, task_of
from sweet_jax.data.run_rows import RunRows, draw_rows
from sweet_jax.data.splits import Split, select_rows
from sweet_jax.exits.policies import UnlabeledOutputs, exit_confidences, policy_rule
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pooling import POOLINGS, declared_pooling
from sweet_jax.models.pretrained import Checkpoint, open_checkpoint
from sweet_jax.models.special_tokens import ensure_first_token
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.objectives.single_label import balanced_weights, reweighted
from sweet_jax.training.growth import BaseRun, read_base_run
from sweet_jax.training.initialization import (
    ModelSpec,
    base_checkpoint_folder,
    with_training_dropout,
)
from sweet_jax.training.job import TrainingJob
from sweet_jax.training.parallel import check_devices
from sweet_jax.training.probe import Probe

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """Holds a resolved config and everything it names, read once and checked.

    Row numbers index `texts` and `train`, which hold those training rows of the data set that a
    replica uses.
    """

    config: Config
    checkpoint: Checkpoint  # with its weights
    dataset: Dataset
    digest: str  # of the data set
    base: BaseRun | None  # that this one grows from
    tokenizer: Any
    texts: list[tuple[str, ...]]  # U of them
    train: Tokens  # U rows
    validation: Tokens
    rows: RunRows
    unlabeled: Tokens | None = None  # of rows without labels, whose texts are in no other
    objective: Objective = SINGLE_LABEL  # with the weights that the config trains it by
    targets: np.ndarray | None = None  # of `texts` in their own units; None: those of `train`
    units: tuple[float, float] | None = None  # mean and deviation that `train` has them without
    probe: Probe | None = None  # that the heads start from, once it is fitted

    @property
    def labels(self) -> np.ndarray:
        """Returns the targets of the training rows in their own units, [U, ...]."""
        return self.train.labels if self.targets is None else self.targets

    @property
    def validation_rows(self) -> np.ndarray:
        """Returns the rows that each replica is reported on: all of `validation`, int [R, V]."""
        replicas = len(self.rows.training)
        return np.tile(np.arange(len(self.validation)), (replicas, 1))

    def select_replicas(self, config: Config, replicas: Sequence[int]) -> "PreparedRun":
        """Returns the run of some replicas alone, which are those of `config`."""
        rows = RunRows(*(each[list(replicas)] for each in self.rows))
        probe = self.probe.select_replicas(replicas) if self.probe else None
        return dataclasses.replace(self, config=config, rows=rows, probe=probe)

    def training_job(self, model: ModelSpec, workdir: Path, *, short: bool = False) -> TrainingJob:
        """Returns the training of one of the method's models; see TrainingJob for the arguments."""
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
    """Reads and checks all that a config names; raises UserError, and writes nothing."""
    config = config.resolved()
    task_of(config)  # a misspelt name is an error before the hub is asked for anything
    policy_rule(config.policy)  # likewise one of the user's own
    checkpoint = _read_checkpoint(config)
    dataset = load_dataset(config)
    _try_policy(config, dataset)
    config = _choose_pooling(config, checkpoint, dataset)
    digest = dataset.digest()
    base = read_base_run(config, digest)
    if base is not None:
        base_checkpoint_folder(base)
    check_devices(config)
    tokenizer = load_tokenizer(checkpoint)
    if POOLINGS[config.pooling].first_only:
        ensure_first_token(tokenizer, config.checkpoint)
    drawn = draw_rows(config, dataset)
    # A few rows are drawn from a large file: only these are tokenised, and numbered anew.
    used = np.unique(np.concatenate([rows.ravel() for rows in drawn]))
    kept = select_rows(dataset.train, used)
    train, units = tokenize(tokenizer, kept, config.max_length), None
    _check_token_types(checkpoint, train)
    if dataset.objective.units is not None:
        mean, deviation = units = dataset.objective.units(dataset.train.labels)
        train = dataclasses.replace(train, labels=(kept.labels - mean) / deviation)
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
        targets=kept.labels if units else None,
        units=units,
    )


def _try_policy(config: Config, dataset: Dataset) -> None:
    """Raises UserError for an exit policy that fails on outputs of the shapes to come."""
    shape = (1, len(config.exits), 2, len(dataset.classes))
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scores = logits[..., 0] if config.learning_to_exit else None
    layers = np.asarray(config.exits)
    exit_confidences(UnlabeledOutputs(logits, layers, scores, dataset.objective), config.policy)


def _tokenize_unlabeled(
    config: Config,
    dataset: Dataset,
    drawn: Sequence[tuple[str, ...]],
    tokenizer: Any,
    targets: np.ndarray,
) -> Tokens | None:
    """Returns the tokens of the rows without labels; None where the config names none.

    Each text once, and none that any replica trains, tunes or calibrates on (`drawn`), or that is a
    validation text: what a run is chosen and reported by has then no part in its training. Their
    labels are zeros of the shape and dtype of `targets`, and never read.
    Raises UserError where no text is left.
    """
    if not config.unlabeled_files:
        return None
    known = {*drawn, *dataset.validation.texts}
    texts = [text for text in dict.fromkeys(dataset.unlabeled) if text not in known]
    if not texts:
        raise UserError(
            f"unlabeled_files {config.unlabeled_files!r} has no text that is not among the "
            "training or validation rows: give other rows, or leave it out"
        )
    log.info(
        "%d rows without labels; %d more repeat another text of the run: left out",
        *(len(texts), len(dataset.unlabeled) - len(texts)),
    )
    labels = np.zeros((len(texts), *targets.shape[1:]), targets.dtype)
    return tokenize(tokenizer, Split(texts, labels), config.max_length)


def _training_objective(config: Config, dataset: Dataset, labels: np.ndarray) -> Objective:
    """Returns the data's objective, with the weights of the config's loss.

    labels: of the rows that each replica trains on, [R, N, ...]. One program trains all replicas:
    they share their weights.

    Raises UserError for weights of another number of classes.
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
                f"class_weights has {len(weights)} numbers, but there are {classes} classes: "
                f"{list_labels(dataset.classes)}"
            )
    return reweighted(dataset.objective, weights, config.focal_gamma)


def _read_checkpoint(config: Config) -> Checkpoint:
    """Returns the checkpoint, which fits the config."""
    checkpoint = open_checkpoint(config.checkpoint)
    _check_against(checkpoint, config)
    with_training_dropout(config, checkpoint)
    _ = checkpoint.weights  # a damaged file must be known before anything is written
    return checkpoint


def _check_token_types(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Raises UserError for token types that the checkpoint has no embedding of.

    A checkpoint of one type gives it to every token, one of none reads no types.
    """
    types, largest = checkpoint.config.type_vocab_size, int(tokens.token_type_ids.max(initial=0))
    if 1 < types <= largest:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} gives token type {largest}, but the "
            f"checkpoint has type_vocab_size {types}: take the tokenizer that it was trained with"
        )


def _choose_pooling(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> Config:
    """Returns the config with a pooling by name.

    "" is the one that the checkpoint declares, or its family's. "auto" is that too, but of pairs of
    texts "pair" in place of "mean". Raises UserError for "pair" without pairs.
    """
    pooling, columns = config.pooling, dataset.task.text_columns
    if pooling in ("", AUTO):
        pooling = declared_pooling(checkpoint.folder) or checkpoint.family.default_pooling
        if config.pooling == AUTO and pooling == "mean" and len(columns) == 2:
            pooling = "pair"
    if POOLINGS[pooling].pairs and len(columns) != 2:
        raise UserError(
            f"pooling is {pooling!r}, which compares two texts, but a row has one, "
            f"{columns[0]!r}: set --config.pooling=mean, or name two columns by "
            "--config.text_columns"
        )
    return dataclasses.replace(config, pooling=pooling)


def _check_against(checkpoint: Checkpoint, config: Config) -> None:
    depth, positions = config.depth or checkpoint.depth, checkpoint.config.positions
    obstacle = checkpoint.family.isolation_obstacle
    if obstacle and (any(config.isolation) or config.conflict_every):
        asked = f"method {config.method!r} with isolation {config.isolation[-1]:g}"
        fix = "set --config.method=early_exit"
        if not any(config.isolation):
            asked, fix = f"conflict_every {config.conflict_every}", "leave it out"
        raise UserError(
            f"{asked} needs exits with layers of their own, but {config.checkpoint!r} is of "
            f"model_type {checkpoint.model_type}, whose {obstacle}: {fix}"
        )
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
