"""The page that overlays the curves of several runs.

Shape letters: T points, R' replicas of the chosen learning rate.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import Analysis, curve_area
from sweet_jax.files import write_text
from sweet_jax.report.charts import COST_AXIS, make_chart
from sweet_jax.report.page import ENVIRONMENT, read_script
from sweet_jax.report.results import bound_curve, bound_kinds
from sweet_jax.report.traces import BOUNDS, Trace, common_curves, exit_color, line_dash, seed_band

_TITLE = "sweet_jax: runs compared"


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
    cost for every text, such as one with a single exit, is a point.
    """
    traces: list[Trace | None] = []
    rows = []
    for number, (name, analysis) in enumerate(runs):
        color, identity = exit_color(number), analysis.validation.identity
        cost, each = common_curves(analysis)  # [T], [R', T]
        mean = each.mean(axis=0)
        if cost[0] == cost[-1]:
            at = cost[:1].tolist(), mean[:1].tolist()
            traces.append(Trace(f"{name}: one exit", color, *at, symbol="diamond", size=12))
        else:
            points = cost.tolist(), mean.tolist()
            traces += [Trace(name, color, *points, dash=line_dash(number, each=True), width=2.5)]
            traces += [seed_band(analysis, color), *_bounds(name, analysis, color, cost)]
        rows.append(
            {
                "name": name,
                **{key: getattr(identity, key) for key in ("task", "method", "metric")},
                "seeds": len(each),
                "n": analysis.validation.labels.shape[1],
                "area": float(np.mean([curve_area(cost, metric) for metric in each])),
                "first": float(each[:, 0].mean()),
                "last": float(each[:, -1].mean()),
            }
        )
    metric = runs[0][1].validation.identity.metric.replace("_", " ")  # all runs have the same
    page = ENVIRONMENT.get_template("comparison.html").render(
        title=_TITLE,
        rows=rows,
        scripts={"charts": read_script("charts")},
        chart=make_chart(f"{metric} against cost", COST_AXIS, metric, traces),
    )
    write_text(path, page)


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
