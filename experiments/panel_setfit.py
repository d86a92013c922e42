r"""SetFit on the rows of the panel, beside the recipe: what one could use instead.

  python -m venv setfit && setfit/bin/pip install -e . setfit       # brings torch
  setfit/bin/python -m experiments.panel_setfit --cells=sst2-500,cola-500,banking77-1000 \
      --data_dir=GLUE --text_dir=TEXT --workdir=runs/panel

SetFit (Tunstall et al. 2022, arXiv 2209.11055) trains the same encoder, all of it, on pairs of
rows, to put those of one class close together, and fits a logistic regression on the means of their
tokens. With its own defaults (batches of 16, 2e-5, one epoch) and the paper's 20 pairs of each kind
for every row (--iterations). It trains on all rows of a cell, also on those that the recipe holds
out to choose its rate, its steps and its thresholds. Validation rows and seeds are the panel's.
Tasks of one text; the panel's `recipe` comes first (its outputs are in --workdir).

Writes a record for each cell, and the table of the panel's page. Cost: 5 to 10 minutes of one core
for a seed. Expected: experiments/results/panel/README.md.

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
from experiments.options import make_record_parser
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
    """Returns the scores of predictions int [S, N] on drawn rows, float64 [D, S]."""
    chosen, counts = SINGLE_LABEL.metric(metric), draw_counts(labels.shape[-1])
    rows = np.asarray(chosen.row_statistics(predictions, labels, classes), np.float64)  # [S, N, K]
    targets = np.asarray(chosen.target_statistics(labels, classes), np.float64)
    sums = np.einsum("dn,snk->dsk", counts, rows)
    return np.asarray([chosen.value(s, c @ targets) for s, c in zip(sums, counts, strict=True)])


def with_draws(metric: str, predictions: np.ndarray, labels: np.ndarray, classes: int) -> Scores:
    """Scores predictions int [S, N] of one exit, on all rows and on drawn ones."""
    scores = score_predictions(metric, predictions, labels, classes)
    drawn = drawn_scores(metric, predictions, labels, classes)
    return Scores(scores.exits, scores.area, drawn)


def all_rows(job: PreparedRun, replica: int) -> tuple[list[str], list[int]]:
    """Returns the texts and labels of a seed: what it trains on, and what it holds out."""
    rows = job.rows
    parts = [rows.training[replica], rows.tuning[replica], rows.calibration[replica]]
    used = np.concatenate(parts).tolist()
    return [job.texts[row][0] for row in used], [int(job.labels[row]) for row in used]


def fit_and_predict(job: PreparedRun, replica: int, iterations: int, workdir: Path) -> np.ndarray:
    """Trains SetFit on all rows of a seed; returns its predictions of validation rows, int [N]."""
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
    """Trains SetFit on a cell's seeds and scores it beside every exit of the recipe.

    Raises UserError for texts in pairs, where SetFit is not installed, and where the outputs of the
    panel's recipe are missing or of other rows.
    """
    began = time.process_time()
    config = config_of(name, "recipe", options)
    # A replica is a seed: which rows it draws does not depend on a rate.
    config = dataclasses.replace(config, learning_rates=config.learning_rates[:1])
    job = with_fewer_validation_rows(prepare(config), VALIDATION_ROWS)
    if len(job.texts[0]) > 1:
        raise UserError(f"SetFit here is for tasks of one text; {name} has pairs")
    if importlib.util.find_spec("setfit") is None:
        raise UserError("SetFit is not installed: pip install setfit, in an environment of its own")
    stored = options.workdir / "outputs" / name / f"recipe-{RECIPE_KIND}-validation.npz"
    recipe, seeds = ExitOutputs.load(stored), list(range(options.seeds))
    labels, metric, classes = job.validation.labels, recipe.identity.metric, recipe.logits.shape[-1]
    if not np.array_equal(recipe.labels[0], labels):
        raise UserError(f"{str(stored)!r} is of other validation rows: run the panel's recipe anew")
    with tempfile.TemporaryDirectory(prefix="setfit_") as folder:
        given = [fit_and_predict(job, seed, options.iterations, Path(folder)) for seed in seeds]
    versions = {package: version(package) for package in ("setfit", "sentence-transformers")}
    about = {"iterations": options.iterations, "seeds": seeds, "versions": versions}
    about |= {"metric": metric, "cpu_seconds": round(time.process_time() - began)}
    scores = {"setfit": with_draws(metric, np.stack(given), labels, classes)}
    for place, layer in enumerate(recipe.layers.tolist()):
        predicted = recipe.predictions[seeds, place]  # [S, N]
        scores[f"recipe exit {layer}"] = with_draws(metric, predicted, labels, classes)
    values = {k: v for k, v in identity(job.config).items() if k != "data_files"}
    return Record(values, row_counts(job), scores, about)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the cells that have no record; returns the exit status."""
    made = make_record_parser("panel_setfit", __doc__)
    made.set_defaults(workdir=Path("runs/panel"), output=Path("experiments/results/panel"))
    made.add_argument("--cells", default="sst2-500,cola-500,banking77-1000")
    made.add_argument("--iterations", type=int, default=20, help="pairs of a row, of each kind")
    made.add_argument("--seeds", type=int, default=3, help="the first of the panel's; default: 3")

    def command() -> bool:
        options = made.parse_args(argv)
        for name in split_names(options.cells):
            check_choice("cell", name, CELLS)
            if read_record(options.output, name, SETFIT) is None and not options.render_only:
                write_record(options.output, name, SETFIT, run_cell(name, options))
        render(options.output)
        return True

    return run_resumable(command)


if __name__ == "__main__":
    sys.exit(run())
