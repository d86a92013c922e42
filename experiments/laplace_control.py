r"""Which confidence is an accuracy? PCEE beside temperature, Laplace and an oracle, on ten tasks.

  python -m experiments.laplace_control --checkpoint=MPNET --data_dir=GLUE --text_dir=TEXT
  python -m experiments.laplace_control --render_only

What PCEE (Mofakhami et al. 2024) is compared with, on the same rows: the target is the threshold of
a confidence as it is, after temperature, or of a last-layer Laplace approximation; or a threshold
is chosen on held-out rows to reach it; or, the oracle, on the reported rows themselves. Otherwise
as experiments.pcee_control: of each seed the rows that were not trained on (calibration and
validation, 1,100 at most) are split anew --splits times, half fits what a rule needs, half is
reported; five targets between the first exit's accuracy and the last one's.

Models: MiniLM (exits 1, 2, 4, 6) and MPNet-base (1, 4, 6, 12), frozen, logistic regressions on
1,000 rows: the features of experiments.probes, in --workdir, computed where it lacks them. Runs
whose last exit gains less than a point on the first are left out.

Cost: with the features at hand about 20 minutes of one core. Writes OUTPUT/control.csv and
README.md. Expected, if the claim carries over: PCEE's error below that of the other rules that read
the target as a threshold.

Shape letters: T target, S seed, E exit, N rows, V held-out rows, H hidden, C classes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import probes
from experiments.comparison import format_interval
from experiments.frozen_features import Features
from experiments.laplace import laplace_confidences
from experiments.options import make_record_parser
from experiments.pcee_measurements import LEAST_GAIN, RULES, TARGETS, control, join_outputs
from experiments.records import read_table, write_table
from experiments.rendering import table_lines
from experiments.runner import run_resumable
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.errors import UserError
from sweet_jax.files import write_text
from sweet_jax.training.probe import LinearClassifiers

EXITS = {"minilm-l6": (1, 2, 4, 6), "mpnet-base": (1, 4, 6, 12)}
LAPLACE, ORACLE = "confidence, Laplace", "oracle: threshold chosen on the reported rows"
TITLES = (*(title for title, _, _ in RULES), LAPLACE, ORACLE)
COLUMNS = ("model", "task", "seed", "rule", "splits", "asked", "achieved", "error", "cost")


def measure(model: str, task: str, options: argparse.Namespace) -> list[dict]:
    """Returns rows of control.csv: of every seed, rule and target the means over splits."""
    fitted = probes.fit_exits(model, task, EXITS[model], options)
    found = []
    for number, seed in enumerate(probes.SEEDS):
        rows = join_outputs(fitted.calibration.replica(number), fitted.validation.replica(number))
        right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)  # [E]
        if right[-1] - right[0] < LEAST_GAIN:
            print(f"left out: {model} {task} seed {seed}", flush=True)
            continue
        targets = right[0] + TARGETS * (right[-1] - right[0])
        confidences = _laplace(fitted.features, fitted.classifiers, number)
        points = control(rows, targets, options.splits, seed, [confidences], oracle=True)
        for title, of_rule in zip(TITLES, points, strict=True):
            for target, at in zip(targets, of_rule, strict=True):  # [splits, 2]
                achieved, cost = at.mean(axis=0)
                error = np.abs(at[:, 0] - target).mean()
                given = (model, task, seed, title, options.splits, target, achieved, error, cost)
                found.append(dict(zip(COLUMNS, given, strict=True)))
    return found


def _laplace(features: Features, classifiers: LinearClassifiers, s: int) -> np.ndarray:
    """Returns the confidences of the rows that are not trained on, float64 [E, V]."""
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
    """Writes README.md of what is done."""
    rows = read_table(output / "control.csv")
    if not rows:
        return
    lines = ["# Which confidence is an accuracy?", "", _ABOUT, ""]
    for model in EXITS:
        tasks = list(dict.fromkeys(r["task"] for r in rows if r["model"] == model))
        if not tasks:
            continue
        errors = {title: _by_task(rows, model, title, tasks) for title in TITLES}
        table = []
        for title, of_tasks in errors.items():
            values = np.asarray([v.mean(axis=0) for v in of_tasks.values()])  # [tasks, 3]
            error, signed, cost = values.T
            cells = [f"{v[:, 0].mean():.1f}, {v[:, 1].mean():+z.1f}" for v in of_tasks.values()]
            means = [
                format_interval(error),
                format_interval(signed, sign=True),
                f"{cost.mean():.3f}",
            ]
            table.append([title, *means, *cells])
        heading = ["rule", "error", "achieved - asked", "cost", *tasks]
        lines += [f"## {model}", "", *table_lines(heading, table), ""]
    write_text(output / "README.md", "\n".join(lines))


def _by_task(
    rows: Sequence[dict[str, str]], model: str, title: str, tasks: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns (error, achieved - asked, cost), means over targets, of the seeds, [S, 3]."""
    found = {}
    for task in tasks:
        own = [r for r in rows if (r["model"], r["task"], r["rule"]) == (model, task, title)]
        by_seed: dict[str, list[tuple[float, float, float]]] = {}
        for r in own:
            asked, achieved, error, cost = (float(r[key]) for key in COLUMNS[5:])
            point = (100 * error, 100 * (achieved - asked), cost)
            by_seed.setdefault(r["seed"], []).append(point)
        found[task] = np.asarray([np.mean(points, axis=0) for points in by_seed.values()])
    return found


_ABOUT = """Made by `python -m experiments.laplace_control` (its docstring says more): frozen
encoders, logistic regressions on 1,000 rows. Points of accuracy. Error: achieved against asked,
absolute, mean over splits, five targets, seeds and tasks, with the 95% interval over tasks. Half of
the rows are reported on: a rule that hit its target in all rows exactly would still err by about a
standard error of that half. Then the same signed, and the cost as a share of the layers; at each
task error and signed error. Tasks and seeds whose last exit gains less than a point on the first
are left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, and renders; returns the exit status, see runner.run_resumable."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("laplace_control", __doc__)
    parser.add_argument("--checkpoint", help="MPNet-base; without it, MiniLM alone")
    parser.add_argument("--splits", type=int, default=50, help="of the held-out rows (50)")
    options = parser.parse_args(argv)
    if not options.render_only:
        if options.data_dir is None or options.text_dir is None:
            raise UserError("give --data_dir and --text_dir, or --render_only")
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
