r"""The panel: methods, read-outs, starts and refits on ten tasks with 100 to 6,000 rows.

  python -m experiments.panel --data_dir=GLUE --text_dir=TEXT --workdir=runs/panel
  python -m experiments.panel --list
  python -m experiments.panel --render_only

Cells: SST-2, CoLA, MRPC, RTE, QQP, QNLI, MNLI, AG News, Banking77 and BBC news with 100, 500, 2,000
and 6,000 rows, where there are so many (Banking77 from 1,000 on, so that every class has rows; BBC
news has 1,780). Five seeds with 500 to 2,000 rows, three with 100 and 6,000; every seed draws its
own rows, which all variants share: a tenth of a cell's rows is for calibration, a tenth of the rest
for tuning. Scores (accuracy; CoLA: Matthews correlation) are of 1,000 validation rows at most, the
same for all variants and seeds. MiniLM (all-MiniLM-L6-v2 of sentence-transformers, trained on a
billion pairs, MNLI, SNLI and QQP among them), exits 1, 2, 4, 6, at most 64 tokens (MRPC, RTE
and QNLI 96), batches of similar lengths.

Variants: {Early-Exit, SWEET, Multi-Model} x {first token and pooler, mean} x {random heads, probe},
and with a probe of what "auto" reads, which compares the texts of a pair (pooling), two epochs;
`recipe` is configs/own.py, `recipe-mean` the same with the mean of a pair's tokens, `recipe-decay`
with layer_decay=0.8, `recipe-scaling` with layer_scaling=0.5 (its heads as trained are the
recipe's); `plain` is the full model fine-tuned alone, with the recipe's steps; `frozen`
is the probe of the frozen encoder as a model with exits; CHANGES of panel_variants.py are
Early-Exit and SWEET with mean and probe, in which one thing differs. Each has its heads as trained,
and refitted on the same trunk. `baselines`: the frozen probe at every exit, which compares the
texts of a pair too (mean_probe_1 to _6 do not), and TF-IDF. Where a row is one text, "auto" is the
mean, and one run stands for both. Learning rates are chosen of 5e-5, 1e-4, 3e-4 by short runs (40
steps, or a tenth) of the first seed on its tuning rows: the first rate, 1e-4, or 3e-4 of the plain
model and the methods as they are, unless another is better by more than a standard error. `recipe`
and `plain` search in every cell, the others with 2,000 and 6,000 rows; below, the tuning rows (90
at most) cannot tell rates apart, and they keep the first.

Area is the mean score between the cost of exit 1, a sixth of the full model's, and the full
model's, under the exact curve: one range for all variants. docs/reproduction.md has the criterion
of the default, written before the panel ran; the tables have their statistics.

A second start runs what is missing, in stages of which each has all tasks. What was stopped or
killed resumes from its checkpoints; what failed is left until --retry. Several processes, on hosts
that share --workdir and --output, share the work: each locks the cell that it is in. Cost: --list
has the estimate, which learns from what is done. Before any variant was timed it was 46 hours of
one core for the core (--core: baselines, recipe, plain, and the methods as they are and with mean
and probe, on all tasks with 500 to 2,000 rows) and 143 for all, with a process a core; the variants
of "auto", layer_decay and layer_scaling came later, and are not in these numbers:

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
from experiments.options import make_record_parser
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
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.report.baselines import Baseline

Unit = tuple[str, str]  # cell, variant
_WAIT = 20.0  # seconds until cells that other processes are in are looked at again
_SECONDS = 7e-5  # of one core, for a layer of a token: before any record says
_OVERHEAD = 20.0  # seconds of one core to read a checkpoint, compile and so on


def run_variant(name: str, variant: str, options: argparse.Namespace) -> Record:
    """Trains and scores a variant of a cell."""
    began = time.process_time()
    config = config_of(name, variant, options)
    job = with_fewer_validation_rows(prepare(config), VALIDATION_ROWS)
    shared = options.workdir / name
    metric, about = job.dataset.task.metric, dict[str, Any]()
    job, first = with_probe(job, shared)
    if variant == BASELINES:
        found = run_baselines(first, config.learning_rates, shared / variant)
        if first.config.pooling == "pair":
            found += _mean_probes(first, shared)
        labels, classes = job.validation.labels, len(job.dataset.classes)
        scores = {}
        for one in found:
            given = np.stack([one.for_replica(s) for s in range(len(config.seeds))])  # [S, N]
            scores[one.name] = score_predictions(metric, given, labels, classes)
    else:
        analyses, about = train_variant(job, shared / variant)
        kept = options.workdir / "outputs" / name
        for kind, analysis in analyses.items():
            analysis.calibration.save(kept / f"{variant}-{kind}-calibration.npz")
            analysis.validation.save(kept / f"{variant}-{kind}-validation.npz")
        scores = {kind: score_run(analysis) for kind, analysis in analyses.items()}
    about |= {"metric": metric, "cpu_seconds": round(time.process_time() - began)}
    values = {k: v for k, v in identity(job.config).items() if k != "data_files"}
    return Record(values, row_counts(job), scores, about)


def _mean_probes(job: PreparedRun, folder: Path) -> list[Baseline]:
    """Returns the frozen probe at every exit that does not compare the texts of a pair."""
    config = dataclasses.replace(job.config, pooling="mean")
    _, first = with_probe(dataclasses.replace(job, config=config, probe=None), folder)
    assert first.probe is not None, "with_probe fits one"
    each = zip(config.exits, first.probe.predictions.swapaxes(0, 1), strict=True)
    return [
        Baseline(f"mean_probe_{layer}", given, layer / config.exits[-1]) for layer, given in each
    ]


def run_missing(wanted: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Runs what has no record yet, in order; returns whether none has failed.

    A cell that another process is in is passed over, and looked at again later.
    """
    for unit in wanted if options.retry else ():
        _failure(options, unit).unlink(missing_ok=True)
    while True:
        missing = [u for u in wanted if _state(options, u) == "missing"]
        if not missing:
            return all(_state(options, u) == "done" for u in wanted)
        for name, variant in missing:
            with _locked(options.workdir / name) as mine:
                if mine and _state(options, (name, variant)) == "missing":
                    print(f"[{len(missing)} left] {name} {variant}", flush=True)
                    _run_one(name, variant, options)
                    break
        else:
            time.sleep(_WAIT)


def _run_one(name: str, variant: str, options: argparse.Namespace) -> None:
    """Runs a variant of a cell and writes its record, or why it failed."""
    try:
        record = run_variant(name, variant, options)
    except PreemptedError:
        raise
    except Exception:  # one that fails must not stop the others
        traceback.print_exc()
        write_text(_failure(options, (name, variant)), traceback.format_exc())
        return
    write_record(options.output, name, variant, record)
    shutil.rmtree(options.workdir / name / variant, ignore_errors=True)
    jax.clear_caches()  # of hundreds of programs that no other unit uses
    for kind, scores in record.scores.items():
        exits = " ".join(f"{100 * v:.1f}" for v in scores.exits.mean(axis=0))
        print(f"  {kind}: {exits}, area {100 * scores.area.mean():.2f}", flush=True)


def _check_folders(options: argparse.Namespace) -> None:
    """Raises UserError where the data or the encoder are not there, which would fail every unit."""
    for name in ("data_dir", "text_dir"):
        if not getattr(options, name).is_dir():
            raise UserError(f"--{name} {str(getattr(options, name))!r} is not a directory")
    resolve_path(config_of("sst2-500", "recipe", options).checkpoint)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a cell for this process; yields False where another process is in it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock_directory(folder, "--workdir"))
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
    """Prints the state of every unit, and how many hours of one core are left by estimate."""
    spent = trained = worked = 0.0
    for unit in units():
        if (record := read_record(options.output, *unit)) is not None:
            spent += (own := record.about["cpu_seconds"])
            trained += own - _OVERHEAD if unit[1] != BASELINES else 0
            worked += estimate_work(*unit) if unit[1] != BASELINES else 0
    scale = trained / worked if worked else _SECONDS
    hours = {unit: (_OVERHEAD + estimate_work(*unit) * scale) / 3600 for unit in wanted}
    for unit in wanted:
        print(f"{_state(options, unit):>8}  {hours[unit]:5.2f} h  {' '.join(unit)}")
    left = [u for u in wanted if _state(options, u) != "done"]
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} done, {spent / 3600:.1f} hours of one core; "
        f"{sum(hours[u] for u in left):.1f} hours left by estimate"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, and renders; returns the exit status, see runner.run_resumable."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("panel", __doc__)
    parser.add_argument("--cells", default="", help="comma-separated; default: all")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--core", action="store_true", help="the first stages only")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--list", action="store_true", help="print what is done, and the rest")
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
    sound = True
    if not options.render_only:
        if options.data_dir is None or options.text_dir is None:
            raise UserError("give --data_dir and --text_dir, or --list or --render_only")
        _check_folders(options)
        enable_compilation_cache(least_seconds=1.0)
        sound = run_missing(wanted, options)
    render(options.output)
    return sound


if __name__ == "__main__":
    sys.exit(main())
