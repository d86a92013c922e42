"""Compares methods, read-outs, initializations and refits on ten tasks with 100 to 6,000 rows.

  python -m experiments.panel --data_dir=GLUE --text_dir=TEXT --workdir=runs/panel
  python -m experiments.panel --list
  python -m experiments.panel --render_only

Cells: SST-2, CoLA, MRPC, RTE, QQP, QNLI, MNLI, AG News, Banking77 and BBC news with 100, 500, 2,000
and 6,000 rows, as far as they have so many. (Banking77 starts at 1,000, so that every class has
rows; BBC news has 1,780.) There are five seeds with 500 to 2,000 rows and three with 100 and 6,000.
Every seed draws its own rows, which all variants share: a tenth of a cell's rows is for
calibration, a tenth of the rest for tuning. Scores (accuracy; for CoLA, Matthews correlation) are
on at most 1,000 validation rows, the same for all variants and seeds. The encoder is MiniLM
(sentence-transformers' all-MiniLM-L6-v2, trained on a billion pairs, among them MNLI, SNLI and
QQP), with exits 1, 2, 4, 6, at most 64 tokens (MRPC, RTE and QNLI: 96) and batches of similar
lengths.

Variants, each with its heads as trained and refitted on the same trunk:

- {Early-Exit, SWEET, Multi-Model} x {first token and pooler, mean} x {random heads, probe}, and
  with a probe and the poolings "pair" and "auto", which compare the texts of a pair, for two
  epochs;
- `recipe` is configs/own.py; `recipe-pair` has the pooling "pair" (an earlier recipe),
  `recipe-mean` the mean of a pair's tokens, and with "pair", `recipe-decay` has layer_decay=0.8 and
  `recipe-scaling` layer_scaling=0.5 (its heads as trained are those of `recipe-pair`);
- `plain` is the full model fine-tuned alone, for the recipe's steps;
- `frozen` is the probe of the frozen encoder as a model with exits, `frozen-pair` that with "pair";
- CHANGES of panel_variants.py are Early-Exit and SWEET with mean and probe and one change;
- `baselines` are TF-IDF and the frozen probe at every exit, which also compares the texts of a pair
  ("auto"; pair_probe_1 to _6 with "pair", mean_probe_1 to _6 without comparing them).

If a row is one text, "pair" and "auto" are the mean, and one run stands for all.

Learning rates are chosen from 5e-5, 1e-4 and 3e-4 by short runs (40 steps, or a tenth) of the first
seed, on its tuning rows: 1e-4 (3e-4 for the plain model and the methods as published), unless
another rate is better by more than a standard error. `recipe` and `plain` search in every cell, the
others with 2,000 and 6,000 rows. With fewer, the tuning rows (90 at most) cannot distinguish rates,
and the others use the first rate.

Area is the mean score under the exact curve between a sixth of the full model's cost, which is the
cost of exit 1, and the full model's cost: one range for all variants. docs/reproduction.md has the
criterion for the default, written before the panel ran, and the statistics.

When the command is run again, it runs the missing variants, in stages that each contain all tasks.
An interrupted variant resumes from its checkpoints; a failed one is only run again with --retry.
Several processes, on hosts that share --workdir and --output, share the work: each locks the cell
that it works on.

Cost: see --list, whose estimate uses the times of finished variants. Before any had been timed, it
was 143 hours of one core, 46 of them for --core (baselines, recipe, plain, and the methods as
published and with mean and probe, on all tasks with 500 to 2,000 rows), without the variants with
"pair" and "auto", layer_decay and layer_scaling, which were added later. Run one process for each
core:

  XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 python -m experiments.panel ...
"""

import argparse
import contextlib
import dataclasses
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.cells import identity
from experiments.options import check_data_folders, make_record_parser
from experiments.panel_records import (
    Record,
    read_record,
    record_path,
    score_predictions,
    score_run,
    write_record,
)
from experiments.panel_tables import render
from experiments.panel_variants import (
    BASELINES,
    CELLS,
    CORE,
    STAGES,
    VALIDATION_ROWS,
    VARIANTS,
    config_of,
    estimate_work,
    units,
)
from experiments.runner import run_resumable
from experiments.variant_runs import (
    row_counts,
    train_variant,
    with_fewer_validation_rows,
    with_probe,
)
from sweet_jax.baselines import run_baselines
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.config import split_names
from sweet_jax.directories import lock_directory
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError, check_choice
from sweet_jax.files import write_text
from sweet_jax.paths import resolve_path
from sweet_jax.poolings import POOLINGS
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.report.baselines import Baseline

Unit = tuple[str, str]  # cell, variant
_WAIT = 20.0  # seconds before cells that other processes have locked are tried again
_SECONDS = 7e-5  # of one core for a token in a layer, until records have measured it
_OVERHEAD = 20.0  # seconds of one core to read the checkpoint, compile and so on


def run_variant(name: str, variant: str, options: argparse.Namespace) -> Record:
    """Trains and scores a variant of a cell; returns its record.

    Unless it is the baselines, also writes its outputs to WORKDIR/outputs/CELL.
    """
    began = time.process_time()
    config = config_of(name, variant, options)
    job = with_fewer_validation_rows(prepare(config), VALIDATION_ROWS)
    shared = options.workdir / name
    metric, about = job.dataset.task.metric, dict[str, Any]()
    job, first = with_probe(job, shared)
    if variant == BASELINES:
        baselines = run_baselines(first, config.learning_rates, shared / variant)
        if POOLINGS[first.config.pooling].pairs:
            for pooling in ("mean", "pair"):
                baselines += _probes(first, pooling, shared)
        labels, classes = job.validation.labels, len(job.dataset.classes)
        scores = {}
        for each in baselines:
            predictions = np.stack(
                [each.for_replica(s) for s in range(len(config.seeds))]
            )  # [S, N]
            scores[each.name] = score_predictions(metric, predictions, labels, classes)
    else:
        analyses, about = train_variant(job, shared / variant)
        folder = options.workdir / "outputs" / name
        for kind, analysis in analyses.items():
            analysis.calibration.save(folder / f"{variant}-{kind}-calibration.npz")
            analysis.validation.save(folder / f"{variant}-{kind}-validation.npz")
        scores = {kind: score_run(analysis) for kind, analysis in analyses.items()}
    about |= {"metric": metric, "cpu_seconds": round(time.process_time() - began)}
    values = {k: v for k, v in identity(job.config).items() if k != "data_files"}
    return Record(values, row_counts(job), scores, about)


def _probes(job: PreparedRun, pooling: str, folder: Path) -> list[Baseline]:
    """Returns the frozen probes of all exits with another pooling."""
    config = dataclasses.replace(job.config, pooling=pooling)
    _, first = with_probe(dataclasses.replace(job, config=config, probe=None), folder)
    assert first.probe is not None, "with_probe fits one"
    predictions = first.probe.predictions.swapaxes(0, 1)  # [E, S, N]
    return [
        Baseline(f"{pooling}_probe_{layer}", predicted, layer / config.exits[-1])
        for layer, predicted in zip(config.exits, predictions, strict=True)
    ]


def run_missing(wanted: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Runs the units without a record, in order; returns whether none failed.

    Skips the cells that other processes have locked, and tries them again later.
    """
    for unit in wanted if options.retry else ():
        _failure(options, unit).unlink(missing_ok=True)
    while True:
        missing = [u for u in wanted if _state(options, u) == "missing"]
        if not missing:
            return all(_state(options, u) == "done" for u in wanted)
        for name, variant in missing:
            with _try_lock(options.workdir / name) as locked:
                if locked and _state(options, (name, variant)) == "missing":
                    print(f"[{len(missing)} left] {name} {variant}", flush=True)
                    _run_unit(name, variant, options)
                    break
        else:
            time.sleep(_WAIT)


def _run_unit(name: str, variant: str, options: argparse.Namespace) -> None:
    """Runs a variant of a cell and writes its record, or the traceback of its failure."""
    try:
        record = run_variant(name, variant, options)
    except PreemptedError:
        raise
    except Exception:  # a failure must not stop the other variants
        traceback.print_exc()
        write_text(_failure(options, (name, variant)), traceback.format_exc())
        return
    write_record(options.output, name, variant, record)
    shutil.rmtree(options.workdir / name / variant, ignore_errors=True)
    jax.clear_caches()  # no other unit uses its hundreds of programs
    for kind, scores in record.scores.items():
        exits = " ".join(f"{100 * v:.1f}" for v in scores.exits.mean(axis=0))
        print(f"  {kind}: {exits}, area {100 * scores.area.mean():.2f}", flush=True)


@contextlib.contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Locks a cell for this process; yields False if another process has locked it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_directory(folder, "--workdir"))
        except UserError:
            yield False
            return
        yield True


def _failure(options: argparse.Namespace, unit: Unit) -> Path:
    return options.workdir / "failed" / f"{'-'.join(unit)}.txt"


def _state(options: argparse.Namespace, unit: Unit) -> str:
    if record_path(options.output, *unit).exists():
        return "done"
    return "failed" if _failure(options, unit).exists() else "missing"


def print_states(wanted: Sequence[Unit], options: argparse.Namespace) -> None:
    """Prints the state of every unit and the estimated hours of one core that are left."""
    spent = training = work = 0.0  # seconds, those of training alone, and its estimated work
    for unit in units():
        if (record := read_record(options.output, *unit)) is not None:
            seconds = record.about["cpu_seconds"]
            spent += seconds
            if unit[1] != BASELINES:
                training += seconds - _OVERHEAD
                work += estimate_work(*unit)
    scale = training / work if work else _SECONDS
    hours = {unit: (_OVERHEAD + estimate_work(*unit) * scale) / 3600 for unit in wanted}
    for unit in wanted:
        print(f"{_state(options, unit):>8}  {hours[unit]:5.2f} h  {' '.join(unit)}")
    left = [unit for unit in wanted if _state(options, unit) != "done"]
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} done in {spent / 3600:.1f} hours of one core; "
        f"estimate for the rest: {sum(hours[unit] for unit in left):.1f} hours"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing variants and writes the tables; returns the exit status."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("panel", __doc__)
    parser.add_argument("--cells", default="", help="comma-separated; default: all")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--core", action="store_true", help="run only the first stages")
    parser.add_argument("--retry", action="store_true", help="run failed variants again")
    parser.add_argument(
        "--list",
        action="store_true",
        help="run nothing; print what is done, failed and missing, with the estimated time",
    )
    options = parser.parse_args(argv)
    cells, variants = split_names(options.cells), split_names(options.variants)
    for name in cells:
        check_choice("cell", name, CELLS)
    for name in variants:
        check_choice("variant", name, (BASELINES, *VARIANTS))
    wanted = [
        (name, variant)
        for name, variant in units(CORE if options.core else STAGES)
        if name in (cells or CELLS) and variant in (variants or (BASELINES, *VARIANTS))
    ]
    if options.list:
        print_states(wanted, options)
        return True
    succeeded = True
    if not options.render_only:
        check_data_folders(options, "--list or --render_only")
        # A missing encoder would fail every unit.
        resolve_path(config_of("sst2-500", "recipe", options).checkpoint)
        enable_compilation_cache(least_seconds=1.0)
        succeeded = run_missing(wanted, options)
    render(options.output)
    return succeeded


if __name__ == "__main__":
    sys.exit(main())
