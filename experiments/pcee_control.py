"""Is the dial an accuracy? Targets against what is achieved, by rule, on untouched rows.

  python -m experiments.pcee_control --model=minilm-l6 --data_dir=DIR

PCEE's first claim (Mofakhami et al. 2024): its threshold, an accuracy, is closer to the accuracy
achieved than a threshold of confidence is. For every finished cell of the grid the held-out rows,
calibration and validation alike, are split anew many times: half fits what a rule needs, half is
untouched and reported. Targets are five accuracies from the first exit's to the last one's, so that
all are within reach. Beside it the certified dial: calibration rows are drawn with replacement from
all held-out rows, which are then the population that the certificate speaks of, and what is counted
is how often more of them are harmed than it allowed.

Cost: that of experiments.individual, whose cells it trains where they are missing (--render_only:
none), then minutes for --splits=100. Writes OUTPUT/tables/pcee_control.md and the figure. Expected,
if the claim carries over to text: PCEE's error below confidence's; the certified dial broken in at
most 5% of the draws. Seen with minilm-l6 (2,000 rows): the second (at most 3.3%); not the first,
whose errors are alike, but on SST-2 under Early-Exit, whose first exits collapsed there: all but a
chosen threshold give far more than they are asked for.
"""

import argparse
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import grid, paper
from experiments.comparison import Records, chosen, interval
from experiments.options import chosen_tasks, method_cells
from experiments.rendering import Section, legend, panels, renderer
from sweet_jax import ExitOutputs, simulate
from sweet_jax.config import UserError
from sweet_jax.exits.certificates import exit_losses
from sweet_jax.exits.metrics import wilson_interval
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.policies import exit_confidences

# Title, policy, and whether the threshold is chosen on calibration rows (else it is the target).
RULES = (
    ("confidence, as it is", "raw_confidence", False),
    ("confidence, after temperature", "confidence", False),
    ("confidence, threshold chosen", "confidence", True),
    ("PCEE, equal width", "pcee", False),
    ("PCEE, equal mass", "pcee_equal_mass", False),
    ("PCEE, isotonic", "pcee_isotonic", False),
    ("PCEE-WS", "pcee_ws", False),
)
MEASURES = ("error", "achieved - asked", "cost")
# Of the figure, and in the order of the table's columns.
LINES = {"sweet": "-", "multi_model": "--", "early_exit": ":"}
COLOURS = ("#c0392b", "#e8833a", "#7f7f7f", "#440154", "#3b528b", "#21918c", "#5ec962")
TARGETS = np.linspace(0.1, 0.9, 5)  # of the way from the first exit's accuracy to the last one's
LIMITS, LEVEL = (0.02, 0.05, 0.1), 0.95
# By task and method, of each seed [rules, measures].
Errors = dict[tuple[str, str], dict[int, np.ndarray]]
_LEAST_GAIN = 0.01  # of the last exit on the first: below, no target is worth asking for


def pooled(folder: Path, replica: int) -> ExitOutputs:
    """All held-out rows of one replica, R = 1: its calibration rows, then the validation rows."""
    parts = [
        ExitOutputs.load(folder / f"{split}.npz").replica(replica)
        for split in ("calibration", "validation")
    ]
    if parts[0].identity.fitted_on != "held_out":
        raise UserError(
            f"{str(folder)!r} holds no rows out: its preset fits on the validation rows"
        )
    logits, labels = (
        np.concatenate([getattr(p, name) for p in parts], axis=axis)
        for name, axis in (("logits", 2), ("labels", 1))
    )
    return ExitOutputs(logits, labels, parts[0].layers, parts[0].cost)


def control(rows: ExitOutputs, targets: np.ndarray, splits: int, seed: int = 0) -> np.ndarray:
    """(achieved accuracy, cost) on untouched rows by rule and target, [rules, T, splits, 2]."""
    count, found = rows.labels.shape[1], np.empty((len(RULES), len(targets), splits, 2))
    for split in range(splits):
        order = np.random.default_rng([seed, split]).permutation(count)
        fitting, untouched = rows.rows(order[: count // 2]), rows.rows(order[count // 2 :])
        dials = make_resolver(fitting, tuple(policy for _, policy, choose in RULES if choose))
        for number, (_, policy, choose) in enumerate(RULES):
            thresholds = targets
            if choose:
                wanted = [dials.resolve(policy, {"accuracy": t}).threshold for t in targets]
                best = dials.fronts[policy].threshold[
                    -1
                ]  # where the calibration rows do not reach the target
                thresholds = np.asarray([best if t is None else t for t in wanted])
            point = simulate(
                untouched, policy, calibrators=[dials.calibrator], thresholds=thresholds
            )
            found[number, :, split] = np.stack([point.score[0], point.cost[0]], axis=-1)
    return found


def violations(rows: ExitOutputs, size: int, draws: int, seed: int = 0) -> np.ndarray:
    """Of each limit on the loss, [limits, 3]: certified, broken (counts over draws), mean cost.

    Calibration rows, `size` of them, are drawn with replacement; the truth is known: it is the
    share harmed of all rows.
    """
    count, harmful = rows.labels.shape[1], exit_losses(rows, 0, "risk")
    found = np.zeros((len(LIMITS), 3))
    for draw in range(draws):
        drawn = np.random.default_rng([seed, draw]).integers(0, count, size)
        dials = make_resolver(rows.rows(drawn), ("confidence",))
        points = np.maximum.accumulate(
            exit_confidences(rows, "confidence", [dials.half_calibrator])[0, :-1]
        )
        for number, limit in enumerate(LIMITS):
            threshold = dials.certificate("confidence", "risk", limit, LEVEL).threshold
            place = np.full(count, len(rows.layers) - 1)
            if threshold is not None:
                place = (points < threshold).sum(axis=0)
            broken = np.take_along_axis(harmful, place[None], axis=0).mean() > limit
            found[number] += (threshold is not None, broken, rows.cost[place].mean())
    found[:, 2] /= draws
    return found


def sections(options: argparse.Namespace, records: Records) -> list[Section]:
    """Control error by rule, task and method, its figure, and the certificates."""
    figure, axes = panels(len(chosen_tasks(options)))
    errors: Errors = {}
    counted: dict[tuple[str, str, float], list[np.ndarray]] = {}
    left_out: list[str] = []
    for task, one in zip(chosen_tasks(options), axes, strict=True):
        for method in paper.NAMES:
            curves, name = [], f"{task}-{method}"
            for replica in chosen(records[name]) if name in records else ():
                index = records[name]["replicas"].index(replica)
                rows = pooled(options.output / "outputs" / name, index)
                seed = zlib.crc32(f"{name} {index}".encode())  # draws of cells are independent
                right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
                drawn = violations(rows, 400, options.splits, seed)
                for limit, found in zip(LIMITS, drawn, strict=True):
                    counted.setdefault((task, method, limit), []).append(found)
                if right[-1] - right[0] < _LEAST_GAIN:
                    left_out.append(f"{name} seed {replica['seed']}")
                    continue
                targets = right[0] + TARGETS * (right[-1] - right[0])
                found = control(rows, targets, options.splits, seed)
                curves.append((targets, found[..., 0].mean(axis=-1)))
                errors.setdefault((task, method), {})[replica["seed"]] = _errors(found, targets)
            _draw(one, method, curves)
        _finish(one, task, done=any(f"{task}-{m}" in records for m in paper.NAMES))
    legend(axes, size=6)
    omitted = f" Left out, the last exit gains less than a point: {', '.join(left_out)}."
    return [
        Section(
            "pcee_control",
            f"Is the dial an accuracy? {options.model}",
            f"Points of accuracy, over {options.splits} splits and five targets between the first "
            "and the last exit's accuracy; mean and 95% interval over seeds. Error: achieved "
            "against asked, absolute. Cost: share of the full model's layers, which Multi-Model "
            "may exceed. Rows are finite: a rule that hit its target exactly would still err by "
            "about a standard error of the rows. In the figure Early-Exit is dotted and "
            f"Multi-Model dashed.{omitted if left_out else ''}{_whole_note(errors)}",
            (
                *("task", "rule"),
                *(f"{paper.NAMES[method]}: {what}" for method in LINES for what in MEASURES),
            ),
            _error_rows(errors),
            figure if errors else None,
        ),
        Section(
            "certified",
            f"Certified thresholds, {options.model}",
            f"Loss against the last exit of at most the limit, confidence {LEVEL:g}: how often "
            f"400 calibration rows drawn anew ({options.splits} draws of each seed) certify a "
            "threshold at all, how often the promise is broken in all held-out rows (Wilson's 95% "
            "interval; it must not lie above 5%), and the mean cost, the last exit's where nothing "
            "was certified (Multi-Model's is above 1).",
            ("task", "method", "loss at most", "certified", "broken", "cost"),
            _violation_rows(counted, options.splits),
        ),
    ]


def _draw(axes, method: str, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Achieved against asked: of each seed targets [T], and what the rules got [rules, T]."""
    for number, (title, _, _) in enumerate(RULES):
        for targets, achieved in curves:
            known = axes.get_legend_handles_labels()[1]
            axes.plot(
                100 * targets,
                100 * achieved[number],
                LINES[method],
                marker="o",
                ms=2,
                lw=0.8,
                color=COLOURS[number],
                label=None if title in known else title,
            )


def _finish(axes, task: str, *, done: bool) -> None:
    """The diagonal, names, and why there is nothing where there is nothing."""
    asked = [x for line in axes.lines for x in line.get_xdata()]
    if not asked:
        why = "no last exit gains a point" if done else "not done yet"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center")
    start = min(asked, default=50)  # within the axes, which it widens
    axes.axline((start, start), slope=1, color="#bbbbbb", lw=1, zorder=0)
    axes.set_title(task)
    axes.set_xlabel("accuracy asked for (%)")
    axes.set_ylabel("accuracy on untouched rows (%)")


def _errors(found: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(error, signed error, cost) of each rule, [rules, 3], of `control`'s answer."""
    gap = found[..., 0] - targets[:, None]  # [rules, T, splits]
    each = (100 * np.abs(gap), 100 * gap, found[..., 1])
    return np.stack([value.mean(axis=(1, 2)) for value in each], axis=-1)


def _whole(errors: Errors) -> dict[str, list[str]]:
    """Of each method the tasks of which no seed is left out: means over them are comparable."""
    every = {seed for of_seed in errors.values() for seed in of_seed}
    found: dict[str, list[str]] = {}
    for (task, method), of_seed in errors.items():
        if set(of_seed) == every:
            found.setdefault(method, []).append(task)
    return found


def _whole_note(errors: Errors) -> str:
    if len({task for task, _ in errors}) < 2:
        return ""
    said = (f"{paper.NAMES[m]} {', '.join(tasks)}" for m, tasks in _whole(errors).items())
    return f" Mean of tasks, those without a seed left out: {'; '.join(said)}."


def _error_rows(errors: Errors) -> list[list[str]]:
    """A row for each task and rule, and the mean over tasks, taken seed by seed."""
    tasks = list(dict.fromkeys(task for task, _ in errors))
    whole = _whole(errors)
    rows = []
    for title in [*tasks, *(["mean of tasks"] if len(tasks) > 1 else [])]:
        for number, (rule, _, _) in enumerate(RULES):
            texts: list[str] = []
            for method in LINES:
                of = [title] if title in tasks else whole.get(method, [])
                every = [errors[task, method] for task in of if (task, method) in errors]
                if not every:
                    texts += ["", "", ""]
                    continue
                values = np.mean([[e[seed][number] for seed in e] for e in every], axis=0)  # [S, 3]
                error, signed, cost = values.T
                texts += [interval(error), interval(signed, sign=True), f"{cost.mean():.3f}"]
            rows.append([title, rule, *texts])
    return rows


def _violation_rows(
    counted: dict[tuple[str, str, float], list[np.ndarray]], draws: int
) -> list[list[str]]:
    rows = []
    for (task, method, limit), every in counted.items():
        certified, broken, cost = np.stack(every).T
        total = draws * len(every)
        low, high = wilson_interval(np.asarray(broken.sum()), total)
        rows.append(
            [
                *(task, paper.NAMES[method], f"{100 * limit:g}%"),
                f"{100 * certified.sum() / total:.0f}%",
                f"{100 * broken.sum() / total:.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
                f"{cost.mean():.3f}",
            ]
        )
    return rows


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    extra = {"--splits": {"type": int, "default": 100, "help": "of the held-out rows (100)"}}
    return grid.main(
        __doc__, method_cells, renderer("pcee_control", sections, keep=True), argv, extra
    )


if __name__ == "__main__":
    sys.exit(run())
