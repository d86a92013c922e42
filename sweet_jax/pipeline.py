"""The run of one config: data, training, evaluation, calibration, simulation, report.

Shape letters: R replica, E exit, N examples, C classes.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from sweet_jax.baselines import run_baselines
from sweet_jax.config import Config
from sweet_jax.distributed import (
    broadcast_from_primary,
    claim_on_primary,
    is_primary,
    raise_on_all,
)
from sweet_jax.exits.analysis import Analysis, analyse
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity, layer_cost
from sweet_jax.files import claim_run_directory, write_json
from sweet_jax.head_fitting import fit_probe, refit_heads
from sweet_jax.inference.artifact import TrainedModel, describe_exits, save_model
from sweet_jax.learning_rate_search import search_rate
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.preparation import PreparedRun, log_description, prepare
from sweet_jax.report import console, figures, page, shortfalls
from sweet_jax.report.baselines import Baseline, save_baselines
from sweet_jax.report.model_card import model_card
from sweet_jax.report.results import TrainingRecord, build_results
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import ModelSpec, model_specs
from sweet_jax.training.job import TrainingJob, TuningRows
from sweet_jax.training.metrics import find_failures, read_metrics
from sweet_jax.training.probe import LinearClassifiers
from sweet_jax.training.sharding import mesh_of, select_replica
from sweet_jax.training.step import Params

log = logging.getLogger(__name__)

# Keys that may differ when a run is resumed: beyond rounding, they change no number. The rows are
# compared by their digest, wherever they lie.
FREE_KEYS = ("checkpoint_every", "segment_parallel", "data_dir", "baselines")


class SplitOutputs(NamedTuple):
    """Holds one model's outputs on the rows of each split, as `evaluate` returns them."""

    calibration: ModelOutput
    validation: ModelOutput
    tuning: ModelOutput | None  # None where no rows were held out for tuning


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds the results of training and evaluation, before the analysis."""

    calibration: ExitOutputs
    validation: ExitOutputs
    models: list[TrainedModel]
    timing: dict[str, float]
    tuning: ExitOutputs | None = None  # None where no rows were held out for tuning
    best_steps: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # by training
    baselines: Sequence[Baseline] = ()
    rate_search: dict[str, Any] | None = None


def run(config: Config, workdir: Path, *, report: bool = True) -> dict[str, Any]:
    """Runs one config in one directory; returns the contents of results.json.

    Args:
      config: of the run.
      workdir: its directory.
      report: also write report.html, figures/ and model/, and print the table of exits.

    Of several processes, the first writes; the others return an empty dict.

    Raises:
      UserError: the config, the data, the checkpoint or the workdir will not do; nothing was
        written.
      PreemptedError: SIGTERM came; the same call resumes where this one stopped.

    """
    with raise_on_all():
        job = prepare(config)
    # JSON has no infinity, which clip_norm may be.
    values = dataclasses.asdict(job.config) | {"data_sha256": job.digest}
    identity = {k: str(v) if v == math.inf else v for k, v in values.items()}
    # A run made before there was a key did what the key's default stands for.
    usual = Config(preset=config.preset, method=config.method)
    before = dataclasses.asdict(usual.resolved()) | {"pooling": "first"}
    with claim_on_primary(
        workdir, identity, lambda: claim_run_directory(workdir, identity, FREE_KEYS, before)
    ):
        log_description(job)
        probe = fit_probe(job, workdir) if job.config.head_init == "probe" else None
        job, probe, search = search_rate(job, probe, workdir)
        outcome = train_and_evaluate(job, workdir, None if probe is None else probe.classifiers)
        tried = run_baselines(job, probe, workdir) if report else []
        outcome = dataclasses.replace(outcome, baselines=tried, rate_search=search)
        analysis = None
        if is_primary():
            analysis = analyse(outcome.calibration, outcome.validation, tuning=outcome.tuning)
        # Part of the program that takes it: hosts whose last bits differ must not differ in it.
        number = int(broadcast_from_primary(analysis.best if analysis else 0))
        best = [TrainedModel(m.exits, select_replica(m.params, number)) for m in outcome.models]
        with raise_on_all():
            if analysis is None:
                return {}
            return _finish(job, outcome, analysis, best, workdir, report=report)


def train_and_evaluate(
    job: PreparedRun, workdir: Path, probe: LinearClassifiers | None = None
) -> Outcome:
    """Trains the method's models one after the other, and evaluates all their exits.

    probe: the start of the heads of all exits, of every replica; None for random ones.
    """
    found: list[SplitOutputs] = []
    models: list[TrainedModel] = []
    best_steps: dict[str, list[int]] = {}
    timing = {"train_seconds": 0.0, "train_examples": 0.0, "evaluate_seconds": 0.0}
    for model in model_specs(job.config):
        graphdef, params, spent = fit(_training_job(job, model, workdir, probe))
        began = time.perf_counter()
        alone = job.config.epochs == 0 and probe is not None  # it was fitted on this very encoder
        if job.config.head_refit and not alone:
            params = refit_heads(job, model, graphdef, params, workdir)
            timing["refit_seconds"] = timing.get("refit_seconds", 0) + time.perf_counter() - began
            began = time.perf_counter()
        if spent.best_steps:
            best_steps[model.name] = list(spent.best_steps)
        found.append(_evaluate_splits(job, graphdef, params))
        models.append(TrainedModel(model.exits, params))
        timing["train_seconds"] += spent.seconds
        timing["train_examples"] += spent.examples
        timing["evaluate_seconds"] += time.perf_counter() - began
    calibration, validation, tuning = zip(*found, strict=True)
    labels, shown = job.train.labels, job.validation.labels
    held_out = job.config.calibration == "held_out"
    return Outcome(
        exit_outputs(
            job, "calibration", calibration, labels[_calibration_rows(job)] if held_out else shown
        ),
        exit_outputs(job, "validation", validation, shown),
        models,
        timing,
        exit_outputs(job, "tuning", tuning, labels[np.stack(job.tuning)])
        if job.config.tunes
        else None,
        best_steps,
    )


def _training_job(
    job: PreparedRun, model: ModelSpec, workdir: Path, probe: LinearClassifiers | None
) -> TrainingJob:
    return TrainingJob(
        job.config,
        job.checkpoint,
        model,
        len(job.dataset.classes),
        job.train,
        [rows for rows, _ in job.rows],
        workdir,
        tuning=TuningRows(np.stack(job.tuning), job.dataset.task.metric),
        probe=probe,
    )


def _calibration_rows(job: PreparedRun) -> np.ndarray:
    """Returns the training rows held out for calibration, int [R, N]."""
    return np.stack([rows for _, rows in job.rows])


def _evaluate_splits(job: PreparedRun, graphdef: nnx.GraphDef, params: Params) -> SplitOutputs:
    """Evaluates a model's exits on the rows of each split.

    Tuning rows are evaluated as calibration rows are, with dropout under the release's preset.
    """
    config, mesh = job.config, mesh_of(params)
    every = np.tile(np.arange(len(job.validation)), (len(job.rows), 1))  # [R, N]
    program = compile_evaluation(config, graphdef, mesh, features=config.tunes)
    validation = evaluate(config, program, params, job.validation, every)
    match config.calibration:
        case "held_out":
            calibration = evaluate(config, program, params, job.train, _calibration_rows(job))
        case "validation":
            calibration = validation
        case _:  # the release's: the validation rows with dropout left on
            program = compile_evaluation(config, graphdef, mesh, dropout=True)
            calibration = evaluate(config, program, params, job.validation, every)
    tuning = None
    if config.tunes:
        tuning = evaluate(config, program, params, job.train, np.stack(job.tuning))
    return SplitOutputs(calibration, validation, tuning)


def exit_outputs(
    job: PreparedRun, split: str, outputs: Sequence[ModelOutput], labels: np.ndarray
) -> ExitOutputs:
    """Joins the outputs of the method's models on the rows of a split."""
    config = job.config
    whole = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *outputs)  # [R, E, N, ...]
    return ExitOutputs(
        whole.logits,
        labels,
        np.asarray(config.exits),
        layer_cost(config.exits, config.method),
        whole.exit_scores,
        identity=RunIdentity(
            split=split,
            task=config.task,
            method=config.method,
            checkpoint=config.checkpoint,
            preset=config.preset,
            fitted_on=config.calibration,
            policy=config.policy,
            learning_to_exit=config.learning_to_exit,
            metric=job.dataset.task.metric,
            classes=tuple(job.dataset.classes),
            replicas=tuple(config.replicas()),
        ),
    )


def _finish(
    job: PreparedRun,
    outcome: Outcome,
    analysis: Analysis,
    best: Sequence[TrainedModel],
    workdir: Path,
    *,
    report: bool,
) -> dict[str, Any]:
    """Writes the outputs, their report, and results.json; `best` is the best replica."""
    for split in ("calibration", "validation", "tuning"):
        outputs: ExitOutputs | None = getattr(outcome, split)
        if outputs is not None:
            outputs.save(workdir / "exit_outputs" / f"{split}.npz")
    metrics = read_metrics(workdir)
    trained = {model.name: model.exits for model in model_specs(job.config)}
    failures = find_failures(metrics, trained, outcome.validation)
    results = _results(job, outcome, analysis, failures)
    if report:
        if outcome.baselines:
            save_baselines(workdir / "exit_outputs" / "baselines.npz", outcome.baselines)
        figures.write_figures(workdir / "figures", analysis, results, metrics, trained)
        page.write_report(workdir / "report.html", analysis, results, metrics, trained)
        _save_model(job, analysis, best, results, workdir / "model")
    write_json(workdir / "results.json", results)  # last: its presence means a complete run
    for row in failures:
        log.warning(console.describe_divergence(row))
    if report and (shortfall := shortfalls.shortfall_warning(results)):
        log.warning(shortfall)
    if report:
        print(console.exit_table(results))
        print(f"report: {workdir / 'report.html'}")
    return results


def _results(
    job: PreparedRun, outcome: Outcome, analysis: Analysis, failures: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the contents of results.json."""
    training = TrainingRecord(
        rows=len(job.rows[0][0]),
        tuning_rows=0 if outcome.tuning is None else outcome.tuning.labels.shape[1],
        failures=failures,
        baselines=outcome.baselines,
        timing=outcome.timing,
        versions={name: version(name) for name in ("jax", "flax", "optax", "transformers")},
        rate_search=outcome.rate_search,
        best_steps=outcome.best_steps,
    )
    return build_results(job.config, analysis, training)


def _save_model(
    job: PreparedRun,
    analysis: Analysis,
    best: Sequence[TrainedModel],
    results: dict[str, Any],
    folder: Path,
) -> None:
    """Writes the best replica's model, with its card, for inference."""
    save_model(
        folder,
        job.checkpoint,
        job.tokenizer,
        best,
        describe_exits(job.config, job.dataset, analysis, int(np.median(job.train.lengths))),
        card=model_card(
            results,
            model_type=job.checkpoint.model_type,
            classes=job.dataset.classes,
            text_columns=job.dataset.task.text_columns,
            max_length=job.config.max_length,
        ),
    )
