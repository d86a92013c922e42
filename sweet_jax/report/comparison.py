"""The page that overlays the curves of several runs.

Shape letters: T points, R' replicas of the chosen learning rate, D bootstrap draws of rows, P draws
of rows and seeds.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.bootstrap import bootstrap_areas, mean_between
from sweet_jax.exits.metrics import TAILS
from sweet_jax.files import write_text
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.charts import COST_AXIS, make_chart
from sweet_jax.report.page import ENVIRONMENT, read_script
from sweet_jax.report.results import bound_curve, bound_kinds
from sweet_jax.report.traces import (
    BOUNDS,
    Trace,
    common_curves,
    exit_color,
    line_dash,
    metric_title,
    seed_band,
    with_shown_metric,
)

_TITLE = "sweet_jax: runs compared"
_SEED_DRAWS = 20  # draws of seeds for each draw of rows


def check_replaceable(path: Path) -> None:
    """Raises UserError for a file that is not a comparison page, OSError if it cannot be read."""
    if not path.exists():
        return
    with path.open("rb") as file:
        beginning = file.read(1000)
    if f"<title>{_TITLE}</title>".encode() not in beginning:
        raise UserError(
            f"--output {str(path)!r} exists and is not a page of this command: choose another path "
            "or remove the file"
        )


def write_comparison(path: Path, runs: Sequence[tuple[str, Analysis]]) -> None:
    """Writes one page that overlays the curves of several runs, (name, analysis) each.

    A run's line is the mean over the replicas of its chosen learning rate, read at common costs,
    with a band from the lowest to the highest replica. The means of its floor and of its stable
    oracle have the same color and are hidden until their names are clicked. A run with the same
    cost for every text, such as one with a single exit, is a point. Areas are means over the costs
    that all runs reach, and each run on the rows of the first has its difference from the first.
    """
    traces: list[Trace | None] = []
    costs, gaps = shared_costs(runs), area_differences(runs)
    rows = []
    of_all = runs[0][1].validation.identity.metric  # all runs have the same
    shown, title = ShownMetric.of(of_all), metric_title(of_all)
    for number, (name, analysis) in enumerate(runs):
        color, identity = exit_color(number), analysis.validation.identity
        cost, each = common_curves(analysis)  # [T], [R', T]
        mean = each.mean(axis=0)
        if cost[0] == cost[-1]:
            at = cost[:1].tolist(), mean[:1].tolist()
            traces.append(Trace(f"{name}: one exit", color, *at, symbol="diamond", size=12))
        else:
            points = cost.tolist(), mean.tolist()
            traces += [Trace(name, color, *points, dash=line_dash(number), width=2.5)]
            traces += [seed_band(analysis, color), *_bounds(name, analysis, color, cost)]
        rows.append(
            {
                "name": name,
                **{key: getattr(identity, key) for key in ("task", "method")},
                "metric": shown.name + shown.better,
                "seeds": len(each),
                "n": analysis.validation.labels.shape[1],
                "area": None if costs is None else shown.value(_areas(analysis, costs).mean()),
                "difference": _shown_difference(gaps[number], shown),
                "first": shown.value(each[:, 0].mean()),
                "last": shown.value(each[:, -1].mean()),
            }
        )
    page = ENVIRONMENT.get_template("comparison.html").render(
        title=_TITLE,
        rows=rows,
        costs=costs,
        scripts={"charts": read_script("charts")},
        chart=make_chart(
            f"{title} against cost", COST_AXIS, title, with_shown_metric(traces, of_all)
        ),
    )
    write_text(path, page)


def _shown_difference(
    gap: tuple[float, float, float] | None, metric: ShownMetric
) -> list[float] | None:
    """Returns a difference and its interval as they are shown; None stays None."""
    return None if gap is None else [metric.value(gap[0]), *metric.interval(gap[1:])]


def shared_costs(runs: Sequence[tuple[str, Analysis]]) -> tuple[float, float] | None:
    """Returns the lowest and the highest cost that the curves of all runs reach, None if none."""
    low = max(float(analysis.validation.cost[0]) for _, analysis in runs)
    high = min(float(analysis.validation.cost[-1]) for _, analysis in runs)
    return (low, high) if low <= high else None


def other_rows(first: Analysis, other: Analysis) -> str:
    """Returns in what the validation rows of two runs differ; "" if they have the same labels."""
    pair = (first.validation, other.validation)
    tasks, counts = [v.identity.task for v in pair], [v.labels.shape[1] for v in pair]
    if tasks[0] != tasks[1] or counts[0] != counts[1]:
        each = (f"{n} of task {task!r}" for task, n in zip(tasks, counts, strict=True))
        return " and ".join(each)
    classes = {v.identity.classes for v in pair} - {()}  # () if unknown
    if np.array_equal(*(v.labels[0] for v in pair)) and len(classes) < 2:
        return ""
    return f"{counts[0]} of task {tasks[0]!r} with other labels"


def area_differences(
    runs: Sequence[tuple[str, Analysis]],
) -> list[tuple[float, float, float] | None]:
    """Returns the difference of each run's area from the first run's, and its 95% interval.

    The area is the mean metric over `shared_costs` and over the replicas of the chosen learning
    rate. The interval is that of a bootstrap over rows, the same for both runs, and over seeds with
    replacement, which are the same for both runs if these have the same seeds.

    Returns:
      (difference, low, high) for each run; None for the first run, for runs on other rows than the
      first, for runs that diverged, and if the runs share no costs.

    """
    costs = shared_costs(runs)
    first, *others = (analysis for _, analysis in runs)
    compared = [costs is not None and not other_rows(first, other) for other in others]
    if costs is None or not any(compared):
        return [None] * len(runs)
    area, drawn = _areas(first, costs), _drawn_areas(first, costs)
    found: list[tuple[float, float, float] | None] = [None]
    for other, sound in zip(others, compared, strict=True):
        gap = float(_areas(other, costs).mean() - area.mean()) if sound else np.nan
        if not np.isfinite(gap):
            found.append(None)
            continue
        seeds = [[a.replicas[r][0] for r in a.chosen] for a in (first, other)]
        own, theirs = _seed_means(_drawn_areas(other, costs), drawn, paired=seeds[0] == seeds[1])
        low, high = np.quantile(own - theirs, TAILS)
        found.append((gap, float(low), float(high)))
    return found


def _areas(analysis: Analysis, costs: tuple[float, float]) -> np.ndarray:
    """Returns the mean metric of each chosen replica's exact curve between two costs, [R']."""
    curve = analysis.curve
    return np.asarray([mean_between(curve.cost[r], curve.score[r], costs) for r in analysis.chosen])


def _drawn_areas(analysis: Analysis, costs: tuple[float, float]) -> np.ndarray:
    """Returns the same for each draw of rows, float64 [R', D]."""
    outputs, policy = analysis.validation, analysis.function or analysis.policy
    each = (
        bootstrap_areas(outputs.replica(r), policy, [analysis.calibrators[r]], costs)
        for r in analysis.chosen
    )
    return np.concatenate(list(each))


def _seed_means(
    first: np.ndarray, second: np.ndarray, *, paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over drawn seeds of two areas [R', D], float64 [P] each.

    paired: whether both have the same seeds, of which the same are drawn for both.
    """
    rng, means = np.random.default_rng(1), list[np.ndarray]()
    for areas in (first, second):
        if not (means and paired):
            seeds = rng.integers(0, len(areas), (_SEED_DRAWS, areas.shape[1], len(areas)))
        means.append(np.take_along_axis(areas.T[None], seeds, axis=2).mean(axis=2).ravel())
    return means[0], means[1]


def _bounds(name: str, analysis: Analysis, color: str, cost: np.ndarray) -> Iterable[Trace]:
    """Yields the mean floor and the mean stable oracle of a run at costs [T]."""
    for kind in ("floor", "stable"):
        if kind not in bound_kinds(analysis.validation):
            continue
        title, _, dash = BOUNDS[kind]
        bounds = [bound_curve(analysis, r, kind) for r in analysis.chosen]
        mean = np.mean([np.interp(cost, b.cost, b.score) for b in bounds], axis=0)
        points = cost.tolist(), mean.tolist()
        yield Trace(f"{name}: {title}", color, *points, dash=dash, width=1, optional=True)
