r"""Trains SetFit, an alternative to the recipe, on the rows of the panel.

  python -m venv setfit && setfit/bin/pip install -e . setfit       # installs torch
  setfit/bin/python -m experiments.panel_setfit --cells=sst2-500,cola-500,banking77-1000 \
      --data_dir=GLUE --text_dir=TEXT --workdir=runs/panel

SetFit (Tunstall et al. 2022, arXiv 2209.11055) fine-tunes the whole encoder on pairs of rows, so
that rows of one class are close together, and then fits a logistic regression on the means of their
tokens. Here it has its own defaults (batches of 16, learning rate 2e-5, one epoch) and the paper's
20 pairs of each kind for every row (--iterations). It trains on all rows of a cell, including those
that the recipe holds out to choose its learning rate, steps and thresholds. The encoder, the
validation rows and the seeds are the panel's. Tasks must have a single text in each row, and the
panel's `recipe` must have run before, since its outputs are read from --workdir.

It writes a record for each cell and the panel's page, experiments/results/panel/README.md.
Cost: 5 to 10 minutes of one core for each seed.

Shape letters: S seed, D bootstrap draws, N validation rows, K statistics of a row.
"""

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from experiments.cells import identity
from experiments.options import check_data_folders, make_record_parser
from experiments.panel_records import (
    Record,
    Scores,
    draw_counts,
    read_record,
    score_predictions,
    write_record,
)
from experiments.panel_tables import render
from experiments.panel_variants import CELLS, SETFIT, VALIDATION_ROWS, config_of
from experiments.runner import run_resumable
from experiments.variant_runs import row_counts, with_fewer_validation_rows
from sweet_jax.config import split_names
from sweet_jax.errors import UserError, check_choice
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.preparation import PreparedRun, prepare

RECIPE_KIND = "refit"


def drawn_scores(
    metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    """Returns the metric of predictions int [S, N] on the drawn rows of each draw, [D, S]."""
    chosen, counts = SINGLE_LABEL.metric(metric), draw_counts(labels.shape[-1])
    rows = np.asarray(chosen.row_statistics(predictions, labels, classes), np.float64)  # [S, N, K]
    targets = np.asarray(chosen.target_statistics(labels, classes), np.float64)
    sums = np.einsum("dn,snk->dsk", counts, rows)
    return np.asarray([chosen.value(s, c @ targets) for s, c in zip(sums, counts, strict=True)])


def with_draws(metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int) -> Scores:
    """Returns the scores of predictions int [S, N] of one exit, with those on drawn rows."""
    scores = score_predictions(metric, predictions, labels, classes)
    drawn = drawn_scores(metric, predictions, labels, classes)
    return Scores(scores.exits, scores.area, drawn)


def all_rows(job: PreparedRun, replica: int) -> tuple[list[str], list[int]]:
    """Returns the texts and labels of all rows of a seed: training, tuning and calibration."""
    parts = [job.rows.training, job.rows.tuning, job.rows.calibration]
    rows = np.concatenate([part[replica] for part in parts]).tolist()
    return [job.texts[row][0] for row in rows], [int(job.labels[row]) for row in rows]


def fit_and_predict(job: PreparedRun, replica: int, iterations: int, workdir: Path) -> np.ndarray:
    """Trains SetFit on all rows of a seed; returns its predictions on validation rows, int [N]."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    texts, labels = all_rows(job, replica)
    model = SetFitModel.from_pretrained(str(job.checkpoint.folder))
    model.model_body.max_seq_length = job.config.max_length
    arguments = TrainingArguments(
        output_dir=str(workdir),
        batch_size=16,
        num_epochs=1,
        num_iterations=iterations,
        seed=job.config.seeds[replica],
        report_to="none",
        save_strategy="no",
    )
    data = Dataset.from_dict({"text": texts, "label": labels})
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return np.asarray(model.predict([text for (text,) in job.dataset.validation.texts]), np.int64)


def run_cell(name: str, options: argparse.Namespace) -> Record:
    """Trains SetFit with a cell's seeds; returns its scores and those of every exit of the recipe.

    Raises UserError if the task has pairs of texts, if SetFit is not installed, or if the outputs
    of the panel's recipe do not exist or have other rows.
    """
    began = time.process_time()
    config = config_of(name, "recipe", options)
    # One rate, so that replicas are seeds; rows do not depend on the rate.
    config = dataclasses.replace(config, learning_rates=config.learning_rates[:1])
    job = with_fewer_validation_rows(prepare(config), VALIDATION_ROWS)
    if len(job.texts[0]) > 1:
        raise UserError(f"SetFit needs a task with one text in each row; {name} has pairs of texts")
    if importlib.util.find_spec("setfit") is None:
        raise UserError("SetFit is not installed: pip install setfit, in an environment of its own")
    stored = options.workdir / "outputs" / name / f"recipe-{RECIPE_KIND}-validation.npz"
    recipe, seeds = ExitOutputs.load(stored), list(range(options.seeds))
    labels, metric, classes = job.validation.labels, recipe.identity.metric, recipe.logits.shape[-1]
    if not np.array_equal(recipe.labels[0], labels):
        raise UserError(
            f"{str(stored)!r} has other validation rows: run the panel's recipe on {name} again"
        )
    with tempfile.TemporaryDirectory(prefix="setfit_") as folder:
        predictions = [
            fit_and_predict(job, seed, options.iterations, Path(folder)) for seed in seeds
        ]
    versions = {package: version(package) for package in ("setfit", "sentence-transformers")}
    about = {"iterations": options.iterations, "seeds": seeds, "versions": versions}
    about |= {"metric": metric, "cpu_seconds": round(time.process_time() - began)}
    scores = {"setfit": with_draws(metric, np.stack(predictions), labels, classes)}
    for place, layer in enumerate(recipe.layers.tolist()):
        predicted = recipe.predictions[seeds, place]  # [S, N]
        scores[f"recipe exit {layer}"] = with_draws(metric, predicted, labels, classes)
    values = {k: v for k, v in identity(job.config).items() if k != "data_files"}
    return Record(values, row_counts(job), scores, about)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cells that have no record and writes the tables; returns the exit status."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("panel_setfit", __doc__)
    parser.set_defaults(workdir=Path("runs/panel"), output=Path("experiments/results/panel"))
    parser.add_argument(
        "--cells", default="sst2-500,cola-500,banking77-1000", help="default: %(default)s"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=20,
        help="pairs of each kind for every row; default: %(default)s",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of the panel's seeds; default: %(default)s"
    )
    options = parser.parse_args(argv)
    names = split_names(options.cells)
    for name in names:
        check_choice("cell", name, CELLS)
    if not options.render_only:
        check_data_folders(options)
        for name in names:
            if read_record(options.output, name, SETFIT) is None:
                write_record(options.output, name, SETFIT, run_cell(name, options))
    render(options.output)
    return True


if __name__ == "__main__":
    sys.exit(main())
