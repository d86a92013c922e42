"""Tests which confidence is an accuracy: PCEE, temperature scaling, Laplace or an oracle.

  python -m experiments.laplace_control --checkpoint=MPNET --data_dir=GLUE --text_dir=TEXT
  python -m experiments.laplace_control --render_only

It compares PCEE (Mofakhami et al. 2024) with other exit rules on the same rows of ten tasks. The
target is used as a threshold of the raw confidence, of the confidence after temperature scaling, or
of that from a last-layer Laplace approximation; or a threshold is chosen on held-out rows to reach
the target; or, for the oracle, on the reported rows themselves. As in experiments.pcee_control, the
rows of each seed that were not trained on (calibration and validation rows, at most 1,100) are
split --splits times: one half fits what a rule needs, and accuracy and cost are reported on the
other. There are five targets between the first and the last exit's accuracy.

The models are MiniLM (exits 1, 2, 4, 6) and MPNet-base (exits 1, 4, 6, 12), frozen, with logistic
regressions on 1,000 rows: the features of experiments.probes, which are read from --workdir or
computed. Runs whose last exit gains less than a point over the first are left out.

Cost: if the features exist, about 20 minutes of one core. It writes OUTPUT/control.csv and
README.md. Expected, if PCEE's claim holds: its error is below that of the other rules that use the
target as a threshold.

Shape letters: T target, S seed, E exit, N rows, V held-out rows, H hidden, C classes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import probes
from experiments.comparison_tables import format_interval
from experiments.frozen_features import Features
from experiments.laplace import laplace_confidences
from experiments.options import check_data_folders, make_record_parser
from experiments.pcee_measurements import RULES, control, join_outputs, reachable_targets
from experiments.records import read_table, write_table
from experiments.rendering import table_lines
from experiments.runner import run_resumable
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.files import write_text
from sweet_jax.training.probe import LinearClassifiers

EXITS = {"minilm-l6": (1, 2, 4, 6), "mpnet-base": (1, 4, 6, 12)}
LAPLACE, ORACLE = "confidence, Laplace", "oracle: threshold chosen on the reported rows"
TITLES = (*(title for title, _, _ in RULES), LAPLACE, ORACLE)
COLUMNS = ("model", "task", "seed", "rule", "splits", "asked", "achieved", "error", "cost")


def measure(model: str, task: str, options: argparse.Namespace) -> list[dict]:
    """Returns the rows of control.csv for a task: means over splits by seed, rule and target."""
    fitted = probes.fit_exits(model, task, EXITS[model], options)
    measured = []
    for number, seed in enumerate(probes.SEEDS):
        rows = join_outputs(fitted.calibration.replica(number), fitted.validation.replica(number))
        targets = reachable_targets(rows)
        if targets is None:
            print(f"left out: {model} {task} seed {seed}", flush=True)
            continue
        confidences = _laplace(fitted.features, fitted.classifiers, number)
        points = control(rows, targets, options.splits, seed, [confidences], oracle=True)
        for title, of_rule in zip(TITLES, points, strict=True):
            for target, at in zip(targets, of_rule, strict=True):  # [splits, 2]
                achieved, cost = at.mean(axis=0)
                error = np.abs(at[:, 0] - target).mean()
                values = (model, task, seed, title, options.splits, target, achieved, error, cost)
                measured.append(dict(zip(COLUMNS, values, strict=True)))
    return measured


def _laplace(features: Features, classifiers: LinearClassifiers, s: int) -> np.ndarray:
    """Returns the confidences on a seed's calibration and validation rows, float64 [E, V]."""
    training, held = features.training[s], features.calibration[s]
    return np.stack(
        [
            laplace_confidences(
                features.train[e, training],
                classifiers.kernel[s, e],
                classifiers.bias[s, e],
                float(classifiers.penalty[s, e]),
                np.concatenate([features.train[e, held], features.validation[e]]),
            )
            for e in range(len(features.train))
        ]
    )


def render(output: Path) -> None:
    """Writes README.md from control.csv."""
    rows = read_table(output / "control.csv")
    if not rows:
        return
    lines = ["# Which confidence is an accuracy?", "", _ABOUT, ""]
    for model in EXITS:
        tasks = list(dict.fromkeys(r["task"] for r in rows if r["model"] == model))
        if not tasks:
            continue
        table = []
        for title in TITLES:
            by_task = _by_task(rows, model, title, tasks)
            values = np.asarray([v.mean(axis=0) for v in by_task.values()])  # [tasks, 3]
            error, signed, cost = values.T
            cells = [f"{v[:, 0].mean():.1f}, {v[:, 1].mean():+z.1f}" for v in by_task.values()]
            means = [
                format_interval(error),
                format_interval(signed, sign=True),
                f"{cost.mean():.3f}",
            ]
            table.append([title, *means, *cells])
        heading = ["rule", "error", "achieved - target", "cost", *tasks]
        lines += [f"## {model}", "", *table_lines(heading, table), ""]
    write_text(output / "README.md", "\n".join(lines))


def _by_task(
    rows: Sequence[dict[str, str]], model: str, title: str, tasks: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns (error, achieved - target, cost), means over targets [S, 3], of a rule by task."""
    by_task = {}
    for task in tasks:
        own = [r for r in rows if (r["model"], r["task"], r["rule"]) == (model, task, title)]
        by_seed: dict[str, list[tuple[float, float, float]]] = {}
        for r in own:
            target, achieved, error, cost = (float(r[key]) for key in COLUMNS[5:])
            point = (100 * error, 100 * (achieved - target), cost)
            by_seed.setdefault(r["seed"], []).append(point)
        by_task[task] = np.asarray([np.mean(points, axis=0) for points in by_seed.values()])
    return by_task


_ABOUT = """Made by `python -m experiments.laplace_control`, whose docstring has the details: frozen
encoders with logistic regressions on 1,000 rows. Errors are in points of accuracy. The error is the
absolute difference between achieved accuracy and target, mean over splits, five targets, seeds and
tasks, with the 95% interval over tasks. Since half of the rows are reported on, a rule that is
exactly right on all rows would still have an error of about a standard error of that half. The next
columns have the signed error, and the cost as a share of the layers; the columns of the tasks have
the error and the signed error. Tasks and seeds whose last exit gains less than a point over the
first are left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the missing tasks and writes the tables; returns the exit status."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("laplace_control", __doc__)
    parser.add_argument("--checkpoint", help="checkpoint of MPNet-base; default: only MiniLM")
    parser.add_argument(
        "--splits",
        type=int,
        default=50,
        help="number of splits of the held-out rows; default: %(default)s",
    )
    options = parser.parse_args(argv)
    if not options.render_only:
        check_data_folders(options)
        enable_compilation_cache(least_seconds=1.0)
        path, models = options.output / "control.csv", list(EXITS)
        rows = list(read_table(path))
        for model in models if options.checkpoint else models[:1]:
            for task in probes.TASKS:
                if not any((r["model"], r["task"]) == (model, task) for r in rows):
                    rows += measure(model, task, options)
                    write_table(path, COLUMNS, rows)
                    print(model, task, flush=True)
    render(options.output)
    return True


if __name__ == "__main__":
    sys.exit(main())
