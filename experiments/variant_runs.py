"""Trains a variant of a cell and analyses it with its heads as trained and refitted.

The studies experiments.recipe, panel and probes share these functions.

Shape letters: R replica, S seed, E exit, N rows, U rows with features, C classes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.data.batches import tokenize
from sweet_jax.data.splits import select_rows
from sweet_jax.exits.analysis import Analysis, analyse
from sweet_jax.head_fitting import fit_probe
from sweet_jax.learning_rate_search import search_rate
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.preparation import PreparedRun
from sweet_jax.run_outputs import exit_outputs
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.layer_scaling import scale_layer_updates
from sweet_jax.training.probe import fit_classifiers
from sweet_jax.training.sharding import mesh_of
from sweet_jax.training.step import Params


def with_fewer_validation_rows(job: PreparedRun, most: int) -> PreparedRun:
    """Returns the run with at most `most` validation rows, drawn with a fixed seed."""
    rows = job.dataset.validation
    if len(rows.labels) <= most:
        return job
    drawn = np.random.default_rng(0).permutation(len(rows.labels))[:most]
    rows = select_rows(rows, np.sort(drawn))
    return dataclasses.replace(
        job,
        dataset=dataclasses.replace(job.dataset, validation=rows),
        validation=tokenize(job.tokenizer, rows, job.config.max_length),
    )


def with_probe(job: PreparedRun, folder: Path) -> tuple[PreparedRun, PreparedRun]:
    """Fits the probe of a run whose heads are initialized from one.

    Args:
      job: the run.
      folder: folder for the probe of each pooling, which all variants of a cell share.

    Returns:
      The run with its probe; and the same with the replicas of its first learning rate only, for
      probes and baselines, which do not depend on the rate.

    """
    config = job.config
    rates = config.learning_rates
    replicas = [seed * len(rates) for seed in range(len(config.seeds))]
    first = job.select_replicas(dataclasses.replace(config, learning_rates=rates[:1]), replicas)
    if config.head_init == "probe":
        probe = fit_probe(first, folder / f"probe-{config.pooling}")  # [S]
        first = dataclasses.replace(first, probe=probe)
        seeds = [s for s in range(len(config.seeds)) for _ in rates]
        job = dataclasses.replace(job, probe=probe.select_replicas(seeds))  # [R]
    return job, first


def train_variant(job: PreparedRun, workdir: Path) -> tuple[dict[str, Analysis], dict[str, Any]]:
    """Trains a variant.

    Returns:
      Its analyses by kind of heads, "trained" and "refit"; and the learning-rate search and the
      best steps, as JSON values.

    """
    job, search = search_rate(job, workdir)
    by_kind: dict[str, list[tuple[ModelOutput, ModelOutput]]] = {"trained": [], "refit": []}
    steps: list[list[int]] = []
    for model in model_specs(job.config):
        graphdef, params, timing = fit(job.training_job(model, workdir))
        steps.append(list(timing.best_steps))
        outputs = _exit_outputs(job, graphdef, params)
        first, depth = job.config.layer_scaling, model.exits[-1]
        if first != 1:  # only for the refit, since the trained heads belong to the unscaled layers
            pretrained = job.checkpoint.weights.first_layers(depth)
            scaled = scale_layer_updates(params, pretrained, depth, first)
            outputs["refit"] = _exit_outputs(job, graphdef, scaled)["refit"]
        for kind, pair in outputs.items():
            by_kind[kind].append(pair)
    labels = job.train.labels[job.rows.calibration]
    analyses = {}
    for kind, pairs in by_kind.items():
        calibration, validation = zip(*pairs, strict=True)
        analyses[kind] = analyse(
            exit_outputs(job, "calibration", calibration, labels),
            exit_outputs(job, "validation", validation, job.validation.labels),
        )
    return analyses, {"search": search, "best_steps": steps}


def _exit_outputs(
    job: PreparedRun, graphdef: nnx.GraphDef, params: Params
) -> dict[str, tuple[ModelOutput, ModelOutput]]:
    """Returns the exit logits of calibration and validation rows, by kind of heads.

    One pass over all rows computes both kinds, which share the trunk and its features.
    """
    program = compile_evaluation(job.config, graphdef, mesh_of(params), features=True)
    parts = (job.rows.training, job.rows.tuning, job.rows.calibration)
    rows = np.concatenate(parts, axis=1)  # [R, U]
    train = evaluate(job.config, program, params, job.train, rows, features=True)
    validation = evaluate(
        job.config, program, params, job.validation, job.validation_rows, features=True
    )
    places = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
    tuning, calibration = np.cumsum([part.shape[1] for part in parts])[:2]  # first places
    refitted = fit_classifiers(
        np.asarray(train.features),
        job.train.labels[rows],
        places[:, :tuning],
        places[:, tuning:calibration],
        len(job.dataset.classes),
    )

    def by_refit(output: ModelOutput) -> ModelOutput:
        logits = np.asarray(output.features) @ refitted.kernel  # [R, E, N, C]
        return ModelOutput(jnp.asarray(logits + refitted.bias[:, :, None]))

    held_out = jax.tree.map(lambda x: x[:, :, calibration:], train)
    return {
        "trained": (held_out._replace(features=None), validation._replace(features=None)),
        "refit": (by_refit(held_out), by_refit(validation)),
    }


def row_counts(job: PreparedRun) -> dict[str, int]:
    """Returns the number of rows of each kind and the number of classes."""
    training, calibration, tuning = (rows.shape[1] for rows in job.rows)
    return {
        "train": training,
        "tuning": tuning,
        "calibration": calibration,
        "validation": len(job.validation),
        "classes": len(job.dataset.classes),
    }
