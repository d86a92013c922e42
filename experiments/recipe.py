"""Compares recipes on five tasks: read-outs, initializations and refits of the heads.

  python -m experiments.recipe --data_dir=GLUE --text_dir=TEXT --workdir=runs/recipe
  python -m experiments.recipe --render_only

Cells: AG News, Banking77, BBC news, SST-2 and MRPC with 500 rows (Banking77: 1,000, so that every
class has rows) and with 2,000 (BBC news: all 1,780), and three seeds. Every seed draws its own
rows, which all variants share: a tenth of a cell's rows is for calibration, a tenth of the rest for
tuning. The encoder is MiniLM (sentence-transformers' all-MiniLM-L6-v2, contrastively trained on a
billion pairs, among them MNLI, SNLI and QQP), with exits 1, 2, 4, 6 and at most 64 or 128 tokens.

Variants, for two epochs each: {Early-Exit, SWEET} x {first token and pooler, mean} x {random heads,
probe}, and Multi-Model as published and with mean and probe. `recipe` is configs/own.py with
pooling=mean, for pairs of texts (MRPC) too; `plain` is the full model fine-tuned alone, for the
recipe's steps. Each has its heads as trained, and refitted on the same trunk. (The stored cells of
the methods as published held out no tuning rows, so that the penalty of their refit was not chosen,
except on SST-2 with 500 rows.) The learning rate of
`recipe` and `plain` is chosen from 5e-5, 1e-4 and 3e-4 by short runs (40 steps, or a tenth) of the
first seed, on its tuning rows: 1e-4 (3e-4 for the plain model), unless another rate is better by
more than a standard error. To save a third of the time, the other variants have one rate, 1e-4
(3e-4 for the methods as published), which all of them chose in the first cell, where they searched.

Scores are on all validation rows (1,600, 3,080, 445, 872 and 408). Area is the mean score under the
exact curve between the cost of exit 1 and that of the full model. The 95% intervals are of the mean
over seeds and rows, from a bootstrap that resamples both.

The criterion, written before the study ran: the default is the variant with the largest mean area
over the ten cells, among those that are in no cell significantly below the best of Early-Exit,
SWEET and Multi-Model as published.

To save time, BBC news with all its rows was not run, nor, except for one cell, the variants that
separate the effects of mean pooling and of the probe. When the command is run again, it runs the
missing variants; an interrupted variant resumes from its checkpoints. Cost: 12 hours on 2 cores, or
8 with one process for each core, pinned and with one thread
(XLA_FLAGS=--xla_cpu_multi_thread_eigen=false).
"""

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.cells import identity
from experiments.options import check_data_folders, make_record_parser
from experiments.recipe_results import (
    CELLS,
    CellRecord,
    Scores,
    record_path,
    score_predictions,
    score_run,
    write_record,
)
from experiments.recipe_tables import render
from experiments.recipe_variants import BASELINES, VARIANTS, config_of
from experiments.runner import run_resumable
from experiments.variant_runs import row_counts, train_variant, with_probe
from sweet_jax.baselines import run_baselines
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.config import split_names
from sweet_jax.directories import lock_directory
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError, check_choice
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.report.baselines import Baseline


def run_variant(name: str, variant: str, options: argparse.Namespace) -> CellRecord:
    """Trains and scores a variant of a cell; returns its record."""
    began = time.monotonic()
    job = prepare(config_of(name, variant, options))
    config, shared = job.config, options.workdir / name
    job, first = with_probe(job, shared)
    about: dict[str, Any] = {}
    if variant == BASELINES:
        baselines = run_baselines(first, config.learning_rates, shared / variant)
        scores = {baseline.name: _score_baseline(first, baseline) for baseline in baselines}
    else:
        analyses, about = train_variant(job, shared / variant)
        scores = {kind: score_run(analysis) for kind, analysis in analyses.items()}
    about["seconds"] = round(time.monotonic() - began, 1)
    values = {k: v for k, v in identity(config).items() if k != "data_files"}
    return CellRecord(values, row_counts(job), scores, about)


def _score_baseline(job: PreparedRun, baseline: Baseline) -> Scores:
    """Returns the scores of a baseline, which has one exit."""
    seeds = range(len(job.config.seeds))
    correct = [baseline.for_replica(s) == job.validation.labels for s in seeds]  # [S][N]
    return score_predictions(np.stack(correct)[:, None])


def run_missing(options: argparse.Namespace) -> bool:
    """Runs the variants without a record, baselines first; returns whether none failed."""
    names = [name for name in CELLS if not options.cells or name in options.cells]
    variants = [v for v in (BASELINES, *VARIANTS) if not options.variants or v in options.variants]
    wanted = [(name, variant) for variant in variants for name in names]
    missing = [w for w in wanted if not record_path(options.output, *w).exists()]
    succeeded = True
    for number, (name, variant) in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {name} {variant}", flush=True)
        try:
            record = run_variant(name, variant, options)
        except (UserError, PreemptedError):
            raise
        except Exception:  # a failure must not stop the other variants
            traceback.print_exc()
            succeeded = False
            continue
        write_record(options.output, name, variant, record)
        shutil.rmtree(options.workdir / name / variant, ignore_errors=True)
        for kind, scores in record.scores.items():
            exits = " ".join(f"{100 * v:.1f}" for v in scores.exits.mean(axis=0))
            print(f"  {kind}: {exits}, area {100 * scores.area.mean():.2f}", flush=True)
    return succeeded


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing variants and writes the tables; returns the exit status."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("recipe", __doc__)
    parser.add_argument("--cells", default="", help="comma-separated; default: all")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    options = parser.parse_args(argv)
    options.cells, options.variants = split_names(options.cells), split_names(options.variants)
    for name in options.cells:
        check_choice("cell", name, CELLS)
    for name in options.variants:
        check_choice("variant", name, (BASELINES, *VARIANTS))
    succeeded = True
    if not options.render_only:
        check_data_folders(options)
        enable_compilation_cache(least_seconds=1.0)
        with lock_directory(options.workdir, "--workdir"):
            succeeded = run_missing(options)
    render(options.output, (BASELINES, *VARIANTS))
    return succeeded


if __name__ == "__main__":
    sys.exit(main())
