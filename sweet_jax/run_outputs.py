"""The outputs of a run, and the files to which they are written.

Shape letters: R replica, E exit, N examples, C classes.
"""

import dataclasses
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sweet_jax.data.batches import longer_than
from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity, layer_cost
from sweet_jax.files import write_json
from sweet_jax.inference.artifact_writer import TrainedModel, describe_exits, save_model
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.preparation import PreparedRun
from sweet_jax.report import console, figures, page, shortfalls
from sweet_jax.report.baselines import Baseline, save_baselines
from sweet_jax.report.details import ReportDetails, describe_split, report_title
from sweet_jax.report.model_card import model_card
from sweet_jax.report.results import TrainingRecord, build_results
from sweet_jax.standard_output import print_text
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.metrics import find_failures, read_metrics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Holds the results of training and evaluation, before the analysis."""

    calibration: ExitOutputs
    validation: ExitOutputs
    tuning: ExitOutputs | None  # None if no rows were held out for tuning
    models: list[TrainedModel]
    timing: dict[str, float]
    best_steps: dict[str, list[int]]  # by model: each replica's kept step, if the best is kept
    baselines: Sequence[Baseline] = ()
    rate_search: dict[str, Any] | None = None


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
            objective=job.objective.name,
            replicas=tuple(config.replicas()),
        ),
    )


def write_run(
    job: PreparedRun,
    outcome: Outcome,
    analysis: Analysis,
    best: Sequence[TrainedModel],
    workdir: Path,
    *,
    report: bool,
) -> dict[str, Any]:
    """Writes all files of a trained run; returns the contents of results.json.

    best: the models of the best replica.
    workdir: the run directory.
    report: whether to write report.html, figures/ and model/, and to print the table of exits.
    """
    for split in ("calibration", "validation", "tuning"):
        outputs: ExitOutputs | None = getattr(outcome, split)
        if outputs is not None:
            outputs.save(workdir / "exit_outputs" / f"{split}.npz")
    config, metrics = job.config, read_metrics(workdir)
    trained = {model.name: model.exits for model in model_specs(config)}
    failures = find_failures(metrics, trained, outcome.validation)
    results = _results(job, outcome, analysis, failures)
    if report:
        if outcome.baselines:
            save_baselines(workdir / "exit_outputs" / "baselines.npz", outcome.baselines)
        figures.write_figures(workdir / "figures", analysis, results, metrics, trained)
        details = _details(job, outcome)
        page.write_report(workdir / "report.html", analysis, results, metrics, trained, details)
        _save_model(job, analysis, best, results, workdir / "model")
    write_json(workdir / "results.json", results)  # last: its presence marks a complete run
    for row in failures:
        log.warning(console.describe_divergence(row))
    if report:
        if shortfall := shortfalls.shortfall_warning(results):
            log.warning(shortfall)
        print_text(console.exit_table(results))
        print_text(f"report: {workdir / 'report.html'}")
    return results


def _details(job: PreparedRun, outcome: Outcome) -> ReportDetails:
    """Returns what the report shows in addition to the outputs; a new model has no times yet."""
    texts, most = job.dataset.validation.texts, job.config.max_length
    return ReportDetails(
        title=report_title(job.config),
        texts=texts if job.config.report_texts else None,
        baselines=outcome.baselines,
        cut=longer_than(job.tokenizer, texts, most, job.validation.lengths),
        max_length=most,
        split=describe_split(job.config),
    )


def _results(
    job: PreparedRun, outcome: Outcome, analysis: Analysis, failures: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the contents of results.json."""
    training = TrainingRecord(
        rows=job.rows.training.shape[1],
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
        describe_exits(job.config, job.dataset, analysis, job.train.lengths),
        card=model_card(
            results,
            model_type=job.checkpoint.model_type,
            classes=job.dataset.classes,
            text_columns=job.dataset.task.text_columns,
            max_length=job.config.max_length,
        ),
    )
