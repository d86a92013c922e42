r"""Which recipe should be the default? Read-out, start and refit of the heads, on five tasks.

  python -m experiments.recipe --data_dir=GLUE --text_dir=TEXT --workdir=runs/recipe
  python -m experiments.recipe --render_only

Cells: AG News, Banking77, BBC news, SST-2 and MRPC with 500 (Banking77 1,000, so that every class
has rows) and 2,000 rows (BBC has 1,780 in all), three seeds; every seed draws its own rows, which
all variants share: of a cell's rows a tenth is for calibration, and a tenth of the rest for tuning.
MiniLM (all-MiniLM-L6-v2 of sentence-transformers, contrastively trained on a billion pairs, MNLI,
SNLI and QQP among them), exits 1, 2, 4, 6, at most 64 or 128 tokens.

Variants, two epochs each: {Early-Exit, SWEET} x {first token and pooler, mean} x {random heads,
probe}, Multi-Model as it is and with mean and probe; `recipe` is configs/own.py with pooling=mean,
of pairs (MRPC) too; `plain` is the full model fine-tuned alone, with the recipe's steps. Each with
its heads as trained, and refitted on the same trunk. The learning rate of `recipe` and `plain` is
chosen of 5e-5, 1e-4, 3e-4 by short runs (40 steps, or a tenth) of the first seed, on its tuning
rows: 1e-4, or 3e-4 of the plain model, unless another is better there by more than a standard
error. To save a third of the time, the other variants have one rate, 1e-4, or 3e-4 of the methods
as they are: in the first cell, where all of them searched, each kept that one.

Scores are of the whole validation files (1,600, 3,080, 445, 872, 408 rows). Area is the mean score
between the cost of exit 1 and of the full model, under the exact curve. Intervals: 95%, of the mean
over seeds and rows together, by a bootstrap that draws seeds, and rows within them.

The criterion, written before the study ran: the variant with the largest mean area over the ten
cells, among those that are in no cell significantly below the best of Early-Exit, SWEET and
Multi-Model as they are.

Cut for time from what is reported: BBC news with all its rows, and the variants that tell mean
pooling and probe apart, but for one. A second start runs what is missing; a variant of a cell that
was stopped resumes from its checkpoints. Cost: 12 hours on 2 cores; a process a core, pinned and
with one thread each (XLA_FLAGS=--xla_cpu_multi_thread_eigen=false), takes two thirds of that.
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
from experiments.options import make_record_parser
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
    """Trains and scores a variant of a cell."""
    began = time.monotonic()
    job = prepare(config_of(name, variant, options))
    config, shared = job.config, options.workdir / name
    job, first = with_probe(job, shared)
    about: dict[str, Any] = {}
    if variant == BASELINES:
        tried = run_baselines(first, config.learning_rates, shared / variant)
        scores = {b.name: _score_baseline(first, b) for b in tried}
    else:
        analyses, about = train_variant(job, shared / variant)
        scores = {kind: score_run(analysis) for kind, analysis in analyses.items()}
    about["seconds"] = round(time.monotonic() - began, 1)
    values = {k: v for k, v in identity(config).items() if k != "data_files"}  # where they lie
    return CellRecord(values, row_counts(job), scores, about)


def _score_baseline(job: PreparedRun, baseline: Baseline) -> Scores:
    """Returns the scores of a baseline: one exit, whose accuracy is its area."""
    seeds = range(len(job.config.seeds))
    correct = [baseline.for_replica(s) == job.validation.labels for s in seeds]  # [S][N]
    return score_predictions(np.stack(correct)[:, None])


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
        for kind, scores in record.scores.items():
            exits = " ".join(f"{100 * v:.1f}" for v in scores.exits.mean(axis=0))
            print(f"  {kind}: {exits}, area {100 * scores.area.mean():.2f}", flush=True)
    return sound


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, and renders; returns the exit status, see runner.run_resumable."""
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
    sound = True
    if not options.render_only:
        if options.data_dir is None or options.text_dir is None:
            raise UserError("give --data_dir and --text_dir, or --render_only")
        enable_compilation_cache(least_seconds=1.0)
        with lock_directory(options.workdir, "--workdir"):
            sound = run_missing(options)
    render(options.output, (BASELINES, *VARIANTS))
    return sound


if __name__ == "__main__":
    sys.exit(main())
