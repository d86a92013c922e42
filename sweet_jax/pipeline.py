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

from sweet_jax.baselines import run_baselines
from sweet_jax.config import Config
from sweet_jax.distributed import broadcast_number, claim_on_primary, is_primary, raise_on_all
from sweet_jax.exits.analysis import Analysis, analyse
from sweet_jax.exits.outputs import ExitOutputs, layer_cost
from sweet_jax.files import claim_run_directory, write_json
from sweet_jax.head_fitting import fit_probe, refit_heads
from sweet_jax.inference.artifact import TrainedModel, describe_exits, save_model
from sweet_jax.learning_rate_search import search_rate
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.preparation import PreparedRun, log_description, prepare
from sweet_jax.report import console, figures, page, shortfalls
from sweet_jax.report.baselines import Baseline, save_baselines
from sweet_jax.report.model_card import model_card
from sweet_jax.report.results import build_results
from sweet_jax.training.early_stopping import TuningRows
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.metrics import find_failures, read_metrics
from sweet_jax.training.probe import LinearClassifiers
from sweet_jax.training.sharding import mesh_of, select_replica

log = logging.getLogger(__name__)

# Keys that may differ when a run is gone on with: beyond rounding, they change no number. The rows
# are compared by their digest, wherever they lie.
FREE_KEYS = ("checkpoint_every", "segment_parallel", "data_dir", "baselines")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What training and evaluation leave."""

    calibration: ExitOutputs
    validation: ExitOutputs
    models: list[TrainedModel]
    timing: dict[str, float]
    tuning: ExitOutputs | None = None  # None where no rows were held out for tuning
    best_steps: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # by training


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
    with raise_on_all():
        job = prepare(config)
    # JSON has no infinity, which clip_norm may be.
    values = dataclasses.asdict(job.config) | {"data_sha256": job.dataset.digest()}
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
        analysis = None
        if is_primary():
            analysis = analyse(outcome.calibration, outcome.validation, tuning=outcome.tuning)
        # Part of the program that takes it: hosts whose last bits differ must not differ in it.
        number = broadcast_number(analysis.best if analysis else 0)
        best = [TrainedModel(m.exits, select_replica(m.params, number)) for m in outcome.models]
        with raise_on_all():
            if analysis is None:
                return {}
            return _finish(job, outcome, analysis, best, workdir, report, tried, search)


def train_and_evaluate(
    job: PreparedRun, workdir: Path, probe: LinearClassifiers | None = None
) -> Outcome:
    """Trains the method's models one after the other, and fills ExitOutputs with what they say.

    probe: what the heads of all exits begin with, of every replica; None for random ones.
    """
    config, classes = job.config, len(job.dataset.classes)
    every = np.tile(np.arange(len(job.validation)), (len(job.rows), 1))  # [R, N]
    held_out = np.stack([rows for _, rows in job.rows])  # [R, N]
    tuning = TuningRows(np.stack(job.tuning), job.dataset.task.metric)
    found: list[tuple[ModelOutput, ...]] = []
    models: list[TrainedModel] = []
    best_steps: dict[str, list[int]] = {}
    timing = {"train_seconds": 0.0, "train_examples": 0.0, "evaluate_seconds": 0.0}
    for training in model_specs(config):
        trained = [rows for rows, _ in job.rows]
        graphdef, params, spent = fit(
            config,
            job.checkpoint,
            training,
            classes,
            job.train,
            trained,
            workdir,
            tuning=tuning,
            probe=probe,
        )
        began = time.perf_counter()
        alone = config.epochs == 0 and probe is not None  # it was fitted on this very encoder
        if config.head_refit and not alone:
            params = refit_heads(job, training, graphdef, params, workdir)
            timing["refit_seconds"] = timing.get("refit_seconds", 0) + time.perf_counter() - began
            began = time.perf_counter()
        if spent.best_steps:
            best_steps[training.name] = list(spent.best_steps)
        mesh = mesh_of(params)
        answer = compile_evaluation(config, graphdef, mesh, features=config.tunes)
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
        if config.tunes:
            found[-1] += (evaluate(config, answer, params, job.train, tuning.rows),)
        models.append(TrainedModel(training.exits, params))
        timing["train_seconds"] += spent.seconds
        timing["train_examples"] += spent.examples
        timing["evaluate_seconds"] += time.perf_counter() - began
    fitted_on_held_out = config.calibration == "held_out"
    labels = job.train.labels[held_out] if fitted_on_held_out else job.validation.labels
    fitted_answers, answers, *tuned = zip(*found, strict=True)
    return Outcome(
        exit_outputs(job, "calibration", fitted_answers, labels),
        exit_outputs(job, "validation", answers, job.validation.labels),
        models,
        timing,
        exit_outputs(job, "tuning", tuned[0], job.train.labels[tuning.rows]) if tuned else None,
        best_steps,
    )


def exit_outputs(
    job: PreparedRun, split: str, answers: Sequence[ModelOutput], labels: np.ndarray
) -> ExitOutputs:
    """Returns the outputs of a split, of the answers of each of the method's models."""
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
    job: PreparedRun,
    outcome: Outcome,
    analysis: Analysis,
    best: Sequence[TrainedModel],
    workdir: Path,
    report: bool,
    tried: Sequence[Baseline],
    search: dict[str, Any] | None,
) -> dict[str, Any]:
    """Writes the outputs, what reports them, and results.json; `best` is the best replica."""
    config = job.config
    outcome.calibration.save(workdir / "exit_outputs" / "calibration.npz")
    outcome.validation.save(workdir / "exit_outputs" / "validation.npz")
    if outcome.tuning is not None:
        outcome.tuning.save(workdir / "exit_outputs" / "tuning.npz")
    metrics = read_metrics(workdir)
    trained = {training.name: training.exits for training in model_specs(config)}
    bad = find_failures(
        metrics,
        trained,
        config.replicas(),
        outcome.validation.logits,
        config.exits,
        job.dataset.classes,
    )
    results = build_results(
        config,
        analysis,
        bad,
        rows=len(job.rows[0][0]),
        baselines=tried,
        timing=outcome.timing,
        versions={name: version(name) for name in ("jax", "flax", "optax", "transformers")},
        pooling=config.pooling,
        head_init=config.head_init,
        head_refit=config.head_refit,
        rate_search=search,
        best_steps=outcome.best_steps,
    )
    results["n"]["tuning"] = 0 if outcome.tuning is None else outcome.tuning.labels.shape[1]
    if report:
        if tried:
            save_baselines(workdir / "exit_outputs" / "baselines.npz", tried)
        figures.write_figures(workdir / "figures", analysis, results, metrics, trained)
        page.write_report(workdir / "report.html", analysis, results, metrics, trained)
        save_model(
            workdir / "model",
            job.checkpoint,
            job.tokenizer,
            best,
            describe_exits(config, job.dataset, analysis, int(np.median(job.train.lengths))),
            card=model_card(
                results,
                model_type=job.checkpoint.model_type,
                classes=job.dataset.classes,
                text_columns=job.dataset.task.text_columns,
                max_length=config.max_length,
            ),
        )
    write_json(workdir / "results.json", results)  # last: it says that the run is whole
    for row in bad:
        log.warning(console.describe_divergence(row))
    if report and (shortfall := shortfalls.shortfall_warning(results)):
        log.warning(shortfall)
    if report:
        print(console.exit_table(results))
        print(f"report: {workdir / 'report.html'}")
    return results
