"""The whole job of one config: data, training, evaluation, calibration, simulation, report.

Shape letters: R replica, E exit, N examples, C classes.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sweet_jax.config import Config, UserError
from sweet_jax.data.batches import Tokens, apart, draw_rows, tokenize
from sweet_jax.data.load import Dataset, load_dataset, take
from sweet_jax.exits.analysis import Analysis, analyse
from sweet_jax.exits.outputs import ExitOutputs, layer_cost
from sweet_jax.files import claimed, write_json
from sweet_jax.models.early_exit import Answer
from sweet_jax.models.pretrained import (
    Checkpoint,
    load_tokenizer,
    open_checkpoint,
    read_encoder,
)
from sweet_jax.processes import agreed, claimed_by_first, first_says, is_first
from sweet_jax.report import page, plots, tables
from sweet_jax.serving.card import model_card
from sweet_jax.serving.saved import Model, save_model
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.growth import base_of
from sweet_jax.training.initial import base_folder, trained_as, trainings
from sweet_jax.training.metrics import diverged, read_metrics
from sweet_jax.training.run import fit
from sweet_jax.training.sharding import mesh_of, one_replica
from sweet_jax.training.spread import check_devices

log = logging.getLogger(__name__)

# Keys that may differ when a run is gone on with: beyond rounding, they change no number. The rows
# are compared by their digest, wherever they lie.
FREE_KEYS = ("checkpoint_every", "segment_parallel", "data_dir")


@dataclasses.dataclass(frozen=True)
class Job:
    """A config with everything it names, read and checked."""

    config: Config  # resolved
    checkpoint: Checkpoint
    dataset: Dataset
    tokenizer: Any
    train: Tokens
    validation: Tokens
    rows: list[tuple[np.ndarray, np.ndarray]]  # of each replica: trained on, calibrated on


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What training and evaluation leave."""

    calibration: ExitOutputs
    validation: ExitOutputs
    models: list[Model]
    timing: dict[str, float]


def run(config: Config, workdir: Path, *, report: bool = True) -> dict[str, Any]:
    """Does the whole job of one config in one directory; returns the contents of results.json.

    Args:
      config: of the run.
      workdir: its directory.
      report: also write report.html, figures/ and model/, and print the table of exits.

    Of several processes, the first writes; the others return an empty dict.

    Raises:
      UserError: the config, the data, the checkpoint or the workdir will not do; nothing was
        written.
      StoppedError: SIGTERM came; the same call goes on where this one stopped.

    """
    with agreed():
        job = prepare(config)
    # JSON has no infinity, which clip_norm may be.
    values = dataclasses.asdict(job.config) | {"data_sha256": job.dataset.digest()}
    identity = {k: str(v) if v == math.inf else v for k, v in values.items()}
    # A run made before there was a key did what the key's default stands for.
    usual = Config(preset=config.preset, method=config.method)
    before = dataclasses.asdict(usual.resolved())
    with claimed_by_first(workdir, identity, lambda: claimed(workdir, identity, FREE_KEYS, before)):
        _describe(job)
        outcome = train_and_evaluate(job, workdir)
        analysis = analyse(outcome.calibration, outcome.validation) if is_first() else None
        # Part of the program that takes it: hosts whose last bits differ must not differ in it.
        number = first_says(analysis.best if analysis else 0)
        best = [Model(m.exits, one_replica(m.params, number)) for m in outcome.models]
        with agreed():
            return _finish(job, outcome, analysis, best, workdir, report) if analysis else {}


def prepare(config: Config) -> Job:
    """Reads and checks all that a config names. Raises UserError; writes nothing."""
    config = config.resolved()
    checkpoint = open_checkpoint(config.checkpoint)
    _check_against(checkpoint, config)
    trained_as(config, checkpoint)
    read_encoder(checkpoint)  # a damaged file must be known before anything is written
    dataset = load_dataset(config)
    base = base_of(config, dataset.digest())
    if base is not None:
        base_folder(config, base)
    check_devices(config)
    tokenizer = load_tokenizer(checkpoint)
    drawn = [draw_rows(dataset.train.labels, config, seed) for seed, _ in config.replicas()]
    before = len(drawn[0][0])
    drawn = apart(dataset.train.texts, drawn)
    if len(drawn[0][0]) < before:
        repeats = before - len(drawn[0][0])
        log.info("%d training rows repeat a calibration text: left out", repeats)
    for (seed, _), (trained, _) in zip(config.replicas(), drawn, strict=True):
        unseen = np.setdiff1d(dataset.validation.labels, dataset.train.labels[trained])
        if len(unseen):
            raise UserError(
                f"label {dataset.classes[unseen[0]]!r} occurs in validation rows, but in none of "
                f"the {len(trained)} training rows drawn for seed {seed}: raise train_size, or "
                "give more distinct texts"
            )
    # Of a large file a few rows are drawn: only they are tokenised, and numbered anew.
    used = np.unique(np.concatenate([np.concatenate(pair) for pair in drawn]))
    rows = [(np.searchsorted(used, t), np.searchsorted(used, h)) for t, h in drawn]
    train, validation = (
        tokenize(tokenizer, split, config.max_length)
        for split in (take(dataset.train, used), dataset.validation)
    )
    return Job(config, checkpoint, dataset, tokenizer, train, validation, rows)


def train_and_evaluate(job: Job, workdir: Path) -> Outcome:
    """Trains the method's models one after the other, and fills ExitOutputs with what they say."""
    config, classes = job.config, len(job.dataset.classes)
    every = np.tile(np.arange(len(job.validation)), (len(job.rows), 1))  # [R, N]
    held_out = np.stack([rows for _, rows in job.rows])  # [R, N]
    found: list[tuple[Answer, Answer]] = []
    models: list[Model] = []
    timing = {"train_seconds": 0.0, "train_examples": 0.0, "evaluate_seconds": 0.0}
    for training in trainings(config):
        trained = [rows for rows, _ in job.rows]
        graphdef, params, spent = fit(
            config, job.checkpoint, training, classes, job.train, trained, workdir
        )
        began = time.perf_counter()
        mesh = mesh_of(params)
        answer = compile_evaluation(config, graphdef, mesh)
        on_validation = evaluate(config, answer, params, job.validation, every)
        match config.calibration:
            case "held_out":
                fitted = evaluate(config, answer, params, job.train, held_out)
            case "validation":
                fitted = on_validation
            case _:  # the release's: the validation rows with dropout left on
                answer = compile_evaluation(config, graphdef, mesh, dropout=True)
                fitted = evaluate(config, answer, params, job.validation, every)
        found.append((fitted, on_validation))
        models.append(Model(training.exits, params))
        timing["train_seconds"] += spent.seconds
        timing["train_examples"] += spent.examples
        timing["evaluate_seconds"] += time.perf_counter() - began
    fitted_on_held_out = config.calibration == "held_out"
    labels = job.train.labels[held_out] if fitted_on_held_out else job.validation.labels
    fitted_answers, answers = zip(*found, strict=True)
    return Outcome(
        _outputs(job, "calibration", fitted_answers, labels),
        _outputs(job, "validation", answers, job.validation.labels),
        models,
        timing,
    )


def _outputs(job: Job, split: str, answers: Sequence[Answer], labels: np.ndarray) -> ExitOutputs:
    config = job.config
    whole = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *answers)  # [R, E, N, ...]
    return ExitOutputs(
        whole.logits,
        labels,
        np.asarray(config.exits),
        layer_cost(config.exits, config.method),
        whole.exit_scores,
        identity={
            "split": split,
            "task": config.task,
            "method": config.method,
            "checkpoint": config.checkpoint,
            "preset": config.preset,
            "fitted_on": config.calibration,
            "policy": config.policy,
            "learning_to_exit": config.learning_to_exit,
            "metric": job.dataset.task.metric,
            "classes": list(job.dataset.classes),
            "replicas": [list(replica) for replica in config.replicas()],
        },
    )


def _finish(
    job: Job,
    outcome: Outcome,
    analysis: Analysis,
    best: Sequence[Model],
    workdir: Path,
    report: bool,
) -> dict[str, Any]:
    """Writes the outputs, what reports them, and results.json; `best` is the best replica."""
    config = job.config
    outcome.calibration.save(workdir / "exit_outputs" / "calibration.npz")
    outcome.validation.save(workdir / "exit_outputs" / "validation.npz")
    metrics = read_metrics(workdir)
    trained = {training.name: training.exits for training in trainings(config)}
    bad = diverged(metrics, trained, config.replicas(), outcome.validation.logits, config.exits)
    results = tables.build_results(
        config,
        analysis,
        bad,
        rows=len(job.rows[0][0]),
        timing=outcome.timing,
        versions={name: version(name) for name in ("jax", "flax", "optax", "transformers")},
    )
    if report:
        plots.write_figures(workdir / "figures", analysis, results, metrics, trained)
        page.write_report(workdir / "report.html", analysis, results, metrics, trained)
        save_model(
            workdir / "model",
            job.checkpoint,
            job.tokenizer,
            config,
            job.dataset,
            analysis,
            best,
            card=model_card(
                results,
                model_type=job.checkpoint.model_type,
                classes=job.dataset.classes,
                text_columns=job.dataset.task.text_columns,
                max_length=config.max_length,
            ),
            median_tokens=int(np.median(job.train.lengths)),
        )
    write_json(workdir / "results.json", results)  # last: it says that the run is whole
    for row in bad:
        log.warning(tables.describe_divergence(row))
    if report:
        print(tables.exit_table(results))
        print(f"report: {workdir / 'report.html'}")
    return results


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


def _describe(job: Job) -> None:
    train, calibration = job.rows[0]
    if job.dataset.left_out:
        log.info("%d training rows repeat a validation text: left out", job.dataset.left_out)
    log.info(
        "%s with %s: %d training and %d calibration rows of %d (train_size %d), %d validation "
        "rows, %d classes, %d replicas (seeds x learning rates), on %d %s device(s)",
        job.config.task,
        job.config.method,
        len(train),
        len(calibration),
        len(job.dataset.train.labels),
        job.config.train_size,
        len(job.validation),
        len(job.dataset.classes),
        len(job.rows),
        jax.device_count(),
        jax.default_backend(),
    )
