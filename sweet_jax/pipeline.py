"""Runs one config: data, training, evaluation, calibration, simulation and report.

Shape letters: R replica, E exit, N examples.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from sweet_jax.baselines import run_baselines
from sweet_jax.config import AUTO, Config, with_current_keys
from sweet_jax.distributed import (
    broadcast_from_primary,
    claim_on_primary,
    is_primary,
    raise_on_all,
)
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.operating_point import calibration_halves
from sweet_jax.files import read_json
from sweet_jax.head_fitting import fit_probe, refit_heads, transform_outputs
from sweet_jax.inference.artifact_writer import TrainedModel
from sweet_jax.input_digest import check_inputs, input_digests
from sweet_jax.learning_rate_search import search_rate
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.run_description import log_description
from sweet_jax.run_directory import claim_run_directory
from sweet_jax.run_outputs import Outcome, exit_outputs, write_run
from sweet_jax.saved_config import config_values
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.layer_scaling import scale_layer_updates
from sweet_jax.training.schedule import training_steps
from sweet_jax.training.sharding import mesh_of, select_replica
from sweet_jax.training.step import Params
from sweet_jax.training.trackers import check_trackers, track_results

# Keys that may differ when a run is resumed: they change no results beyond rounding. The rows
# themselves, with or without labels, are compared by their digest, wherever the files are.
FREE_KEYS = (
    *("data_dir", "data_files", "unlabeled_files", "dataset"),
    *("checkpoint_every", "segment_parallel", "baselines", "report_texts", "log_to"),
)


class SplitOutputs(NamedTuple):
    """Holds one model's outputs on the rows of each split, as `evaluate` returns them."""

    calibration: ModelOutput
    validation: ModelOutput
    tuning: ModelOutput | None  # None where no rows were held out for tuning


def run(config: Config, workdir: Path, *, report: bool = True) -> dict[str, Any]:
    """Runs one config in one directory; returns the contents of results.json.

    Args:
      config: the config of the run.
      workdir: the run directory.
      report: whether to write report.html, figures/ and model/, and to print the table of exits.

    With several processes, only the primary one writes; the others return an empty dict.

    Raises:
      UserError: the config, the data, the checkpoint or the workdir is invalid; nothing was
        written.
      PreemptedError: SIGTERM was received; the same call resumes where this one stopped.

    """
    with raise_on_all():
        check_trackers(config.log_to)
        job = prepare(_with_earlier_pooling(config, workdir))
    identity = config_values(job.config, job.digest)
    with claim_on_primary(
        workdir,
        lambda: check_inputs(input_digests(job, identity), identity),
        lambda: claim_run_directory(
            workdir, identity, FREE_KEYS, functools.partial(_upgrade, config)
        ),
    ):
        log_description(job)
        if job.config.head_init == "probe":
            job = dataclasses.replace(job, probe=fit_probe(job, workdir))
        job, search = search_rate(job, workdir)
        outcome = train_and_evaluate(job, workdir)
        tried = run_baselines(job, config.learning_rates, workdir) if report else []
        outcome = dataclasses.replace(outcome, baselines=tried, rate_search=search)
        analysis = None
        if is_primary():
            analysis = analyse(outcome.calibration, outcome.validation, tuning=outcome.tuning)
        # The index is a constant of a jitted program: all hosts must use the same one even if their
        # results differ by rounding.
        number = int(broadcast_from_primary(analysis.best if analysis else 0))
        best = [TrainedModel(m.exits, select_replica(m.params, number)) for m in outcome.models]
        with raise_on_all():
            if analysis is None:
                return {}
            results = write_run(job, outcome, analysis, best, workdir, report=report)
            if report:
                track_results(config.log_to, workdir, results)
            return results


def _with_earlier_pooling(config: Config, workdir: Path) -> Config:
    """Returns the config with the pooling of the run in a directory if that is older.

    For pairs of texts, older versions chose "pair" for "auto".
    """
    # Claiming the directory reports a file that cannot be read.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if config.pooling == AUTO and read_json(workdir / "config.json")["pooling"] == "pair":
            return dataclasses.replace(config, pooling="pair")
    return config


def _upgrade(config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a config.json, which an older version may have written.

    They have today's keys. What a version without some key did is the default of that key.
    """
    usual = Config(preset=config.preset, method=config.method)
    defaults = dataclasses.asdict(usual.resolved()) | {"pooling": "first"}
    return defaults | with_current_keys(values)


def train_and_evaluate(job: PreparedRun, workdir: Path) -> Outcome:
    """Trains the method's models one after another, and evaluates all of their exits."""
    config = job.config
    found: list[SplitOutputs] = []
    models: list[TrainedModel] = []
    best_steps: dict[str, list[int]] = {}
    timing = {"train_seconds": 0.0, "train_examples": 0.0, "evaluate_seconds": 0.0}
    specs = model_specs(job.config)
    total = training_steps(config.epochs, job.rows.training.shape[1], config.batch_size)
    for number, model in enumerate(specs):
        training = job.training_job(model, workdir)
        layers = sum(later.exits[-1] for later in specs[number + 1 :])
        following = float(total * layers * len(config.replicas()))
        graphdef, params, spent = fit(dataclasses.replace(training, following=following))
        began = time.perf_counter()
        if config.layer_scaling != 1:
            pretrained = job.checkpoint.weights.first_layers(model.exits[-1])
            params = scale_layer_updates(params, pretrained, model.exits[-1], config.layer_scaling)
        # With 0 epochs, a probe was fitted on this very encoder.
        if job.config.head_refit and not (job.config.epochs == 0 and job.probe):
            params = refit_heads(job, model, graphdef, params, workdir, spent.best_steps)
            timing["refit_seconds"] = timing.get("refit_seconds", 0) + time.perf_counter() - began
            began = time.perf_counter()
        if spent.best_steps:
            best_steps[model.name] = list(spent.best_steps)
        if job.scaler:  # from here on, outputs are in the targets' own units
            params = transform_outputs(params, model.exits, job.scaler.std, job.scaler.mean)
        outputs = _evaluate_splits(job, graphdef, params)
        if job.fits_decisions:
            params, outputs = _with_decisions(job, model.exits, params, outputs)
        found.append(outputs)
        models.append(TrainedModel(model.exits, params))
        timing["train_seconds"] += spent.seconds
        timing["train_examples"] += spent.examples
        timing["evaluate_seconds"] += time.perf_counter() - began
    calibration, validation, tuning = zip(*found, strict=True)
    labels, shown, rows = job.labels, job.validation.labels, job.rows
    fitted, tunes = _calibration_targets(job), job.config.tunes
    return Outcome(
        calibration=exit_outputs(job, "calibration", calibration, fitted),
        validation=exit_outputs(job, "validation", validation, shown),
        tuning=exit_outputs(job, "tuning", tuning, labels[rows.tuning]) if tunes else None,
        models=models,
        timing=timing,
        best_steps=best_steps,
    )


def _calibration_targets(job: PreparedRun) -> np.ndarray:
    """Returns the targets of the calibration rows, [R, K, ...] or [K, ...]."""
    held_out = job.config.calibration == "held_out"
    return job.labels[job.rows.calibration] if held_out else job.validation.labels


def _with_decisions(
    job: PreparedRun, exits: tuple[int, ...], params: Params, outputs: SplitOutputs
) -> tuple[Params, SplitOutputs]:
    """Returns parameters and outputs whose logits are 0 at each label's decision threshold.

    The thresholds are fitted for each replica, exit and label, and subtracted from the bias of the
    classifiers, so that every user of the model decides at 0. They are fitted on the half of the
    calibration rows that no certificate is tested on.
    """
    fit_shifts = job.objective.decision_shifts
    assert fit_shifts is not None
    logits, targets = np.asarray(outputs.calibration.logits), _calibration_targets(job)
    targets = np.broadcast_to(targets, (len(logits), *targets.shape[-2:]))  # [R, K, C]
    rows, _ = calibration_halves(targets.shape[1])
    logits, targets = logits[:, :, rows], targets[:, rows]
    shifts = np.stack(
        [[fit_shifts(z, t) for z in each] for each, t in zip(logits, targets, strict=True)]
    )  # [R, E, C]
    shifts = broadcast_from_primary(shifts.astype(np.float32))

    def moved(output: ModelOutput) -> ModelOutput:
        return output._replace(logits=np.asarray(output.logits) - shifts[:, :, None])

    params = transform_outputs(params, exits, 1.0, -shifts)
    calibration, validation, tuning = outputs
    tuning = moved(tuning) if tuning else None
    return params, SplitOutputs(moved(calibration), moved(validation), tuning)


def _evaluate_splits(job: PreparedRun, graphdef: nnx.GraphDef, params: Params) -> SplitOutputs:
    """Evaluates a model's exits on the rows of each split.

    Dropout is off, except for calibration="validation_dropout", which the preset of the authors'
    release uses.
    """
    config, mesh, shown = job.config, mesh_of(params), (job.validation, job.validation_rows)
    program = compile_evaluation(config, graphdef, mesh, features=config.tunes)
    validation = evaluate(config, program, params, *shown)
    tuning = None
    if config.tunes:
        tuning = evaluate(config, program, params, job.train, job.rows.tuning)
    match config.calibration:
        case "held_out":
            calibration = evaluate(config, program, params, job.train, job.rows.calibration)
        case "validation":
            calibration = validation
        case _:  # "validation_dropout"
            program = compile_evaluation(config, graphdef, mesh, dropout=True)
            calibration = evaluate(config, program, params, *shown)
    return SplitOutputs(calibration, validation, tuning)
