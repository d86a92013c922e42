"""The text of the first screen: what was trained, and how good the recommended threshold is.

Shape letters: N validation rows, E exit.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.intervals import paired_difference, score_interval
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.thresholds import format_threshold
from sweet_jax.methods import METHODS
from sweet_jax.objectives import OBJECTIVES, Metric
from sweet_jax.objectives.objective import name_without_sign
from sweet_jax.report.baselines import baseline_title
from sweet_jax.report.details import ReportDetails
from sweet_jax.report.shortfalls import keeps_encoder


def describe_training(results: Mapping[str, Any], classes: int) -> str:
    """Describes what was trained on which data, from the contents of results.json."""
    layers = [str(layer) for layer in results["exits"]]
    several = ", ".join(layers[:-1]) + " or " + layers[-1] if len(layers) > 1 else layers[0]
    name = PurePath(results["checkpoint"].removeprefix("pkg://"))
    checkpoint = name.parent.name if name.name == "model" and name.parent.name else str(name)
    method = results["method"].replace("_", "-")
    objective = OBJECTIVES[results.get("objective") or "single_label"]
    kinds = f" of {classes:,} {objective.outputs}" if classes and objective.agrees else ""
    depth = "1 layer" if layers[-1] == "1" else f"{layers[-1]} layers"
    model = f"{checkpoint} with {depth}, fine-tuned ({method})"
    if keeps_encoder(results):
        trained = results.get("epochs") != 0
        reason = "no step of fine-tuning was better on the tuning rows" if trained else "epochs=0"
        model = f"{checkpoint} with {depth}, its weights unchanged ({reason}), and heads fitted"
    if METHODS[results["method"]].model_per_exit:
        model = f"{len(layers)} models from {checkpoint} ({method})"
    return (
        f"{model} on {results['n']['train']:,} rows{kinds}. A text gets its answer after layer "
        f"{several}{': the first at which the model is confident enough' * (len(layers) > 1)}."
    )


def verdict(
    analysis: Analysis,
    results: Mapping[str, Any],
    replica: int,
    threshold: float,
    details: ReportDetails,
) -> list[str]:
    """Compares, in a few sentences, a threshold with all layers and with the baselines.

    All numbers are measured on the validation rows. Their 95% intervals over rows are those of
    `score_interval` for the metric and of `paired_difference` for differences.
    """
    if not np.isfinite(analysis.area[replica]):
        return ["Training diverged: there is no operating point to recommend."]
    rows = analysis.validation.replica(replica)
    exits = analysis.exits_taken(replica, threshold)  # [N]
    predictions, labels, metric = rows.predictions[0], rows.labels[0], rows.metric
    predicted, last = predictions[exits, np.arange(len(exits))], predictions[-1]  # [N, ...]
    classes = rows.logits.shape[-1]
    score = compute_metric(metric, predicted, labels, classes)
    interval = score_interval(metric, predicted, labels, classes)
    if metric.is_error:
        interval = interval[::-1]
    whole = np.isinf(threshold) or len(rows.layers) == 1
    lead = "With all layers"
    if not whole:
        shown = format_threshold(threshold, analysis.breakpoints(replica))
        lead = f"At the recommended threshold {shown}"
    first = (
        f"{lead} the model {_reaches(metric, score)} on {len(labels):,} validation rows (95% "
        f"interval {_number(metric, interval[0])} to {_number(metric, interval[1])}), "
        f"{_spend(rows.cost, exits, details)}"
    )
    if not whole:
        value = compute_metric(metric, last, labels, classes)
        gap = paired_difference(metric, predicted, last, labels, classes)
        difference = _difference(metric, *gap, "this threshold is ")
        first += f"; all layers give {_number(metric, value)}: {difference}"
    theirs = {b.name: b.for_replica(replica) for b in details.baselines}
    spent = float(rows.cost[exits].mean())
    return [f"{first}.", _against_baselines(rows, results, (predicted, spent), theirs)]


def describe_spread(times: np.ndarray, exits: np.ndarray, target: Mapping[str, float]) -> str:
    """Describes the time of slow validation texts, and how many exceed a budget.

    Args:
      times: milliseconds until each exit for each single text, float64 [N, E].
      exits: index of the exit that each row takes, int [N].
      target: target of the operating point; its milliseconds, if set, are the budget.

    """
    taken = times[np.arange(len(exits)), exits]
    words = (
        f"estimated from each text's length and exit, the {len(exits):,} validation texts take "
        f"{format_milliseconds(float(taken.mean()))} on average in the model, and 95% of them at "
        f"most {format_milliseconds(float(np.quantile(taken, 0.95)))}"
    )
    limit = target.get("milliseconds")
    if limit is not None:
        kept = "kept" if taken.mean() <= limit else "NOT kept"
        words += (
            f": the budget of {limit:g} ms on average is {kept} ({(taken > limit).mean():.0%} of "
            "the texts take longer)"
        )
    return words


def _spend(cost: np.ndarray, exits: np.ndarray, details: ReportDetails) -> str:
    """Describes what rows that take these exits [N] spend, in layers and in time."""
    words = f"using {cost[exits].mean():.0%} of the layers"
    if details.times is None:
        return words
    clock = details.times.milliseconds
    mean = format_milliseconds(clock[exits].mean())
    words += f" and on average {mean} per text of median length"
    if exits.min() < len(clock) - 1:
        words += f", instead of {format_milliseconds(clock[-1])}"
    return words


def _against_baselines(
    rows: ExitOutputs,
    results: Mapping[str, Any],
    point: tuple[np.ndarray, float],
    baselines: Mapping[str, np.ndarray],
) -> str:
    """Compares predictions [N, ...] with the best baseline of results.json.

    Args:
      rows: outputs of the replica.
      results: contents of results.json.
      point: predictions, and their mean cost.
      baselines: predictions of each baseline, if available, by name.

    """
    tried, metric = results.get("baselines", {}), rows.metric
    known = {name: row for name, row in tried.items() if row["score"] is not None}
    if not known:
        return "No baseline was tried on these rows."
    name = max(known, key=lambda key: known[key]["score"])
    title = baseline_title(name)
    title = title if title == name else title[:1].upper() + title[1:]
    text = f"{title}, the best baseline, {_reaches(metric, known[name]['score'])}"
    if name in baselines:
        arguments = point[0], baselines[name], rows.labels[0], rows.logits.shape[-1]
        gap, low, high = paired_difference(metric, *arguments)
        text += f": {_difference(metric, gap, low, high, 'the model is ')}"
        if low <= 0 <= high:
            if name.startswith("probe_") and not keeps_encoder(results):
                text += ". Fine-tuning has not gained anything that these rows can show"
            text += f". {_decide(point[1], known[name]['cost'])}"
            text += _cheaper_baseline(rows, known, point, baselines, name)
    constant = rows.objective.linear.baselines[0]
    if constant in known and constant in baselines and constant != name:
        text += _no_better(rows, point[0], baselines[constant], constant, text)
    return f"{text}."


def _cheaper_baseline(
    rows: ExitOutputs,
    known: Mapping[str, Mapping[str, Any]],
    point: tuple[np.ndarray, float],
    baselines: Mapping[str, np.ndarray],
    best: str,
) -> str:
    """Describes another baseline that costs no more than the exits and is not shown to be worse.

    It matters where the best baseline costs more than the exits. Returns "" if there is none.

    Args:
      rows, point, baselines: see `_against_baselines`.
      known: the baselines of results.json that have a score.
      best: name of the best baseline.

    """
    predicted, cost = point
    if known[best]["cost"] <= cost:
        return ""
    arguments = rows.labels[0], rows.logits.shape[-1]
    as_good = [
        name
        for name in known.keys() & baselines.keys()
        if known[name]["cost"] <= cost
        and paired_difference(rows.metric, predicted, baselines[name], *arguments)[1] <= 0
    ]
    if not as_good:
        return ""
    name = max(as_good, key=lambda name: (known[name]["score"], name))
    reached = _reaches(rows.metric, known[name]["score"])
    return (
        f". But {baseline_title(name)} {reached}, costs no more than the exits and is simpler: "
        "these rows show no difference to it either"
    )


def _no_better(
    rows: ExitOutputs, predicted: np.ndarray, theirs: np.ndarray, name: str, text: str
) -> str:
    """Describes that predictions [N, ...] are not shown to be better than a baseline's.

    Returns "" if they are shown to be better, or if `text` already compares them with it.
    """
    arguments = rows.labels[0], rows.logits.shape[-1]
    title = baseline_title(name)
    if title in text or paired_difference(rows.metric, predicted, theirs, *arguments)[1] > 0:
        return ""
    reached = _reaches(rows.metric, compute_metric(rows.metric, theirs, *arguments))
    return f". Nor is the model shown to be better than the baseline {title}, which {reached}"


def _decide(cost: float, baseline: float) -> str:
    """Describes the consequence of a baseline being as good as the model, given both costs."""
    if baseline == 0:
        return "It needs no encoder: on texts like these it is the cheaper choice"
    if cost < baseline:
        return f"The exits save time: they use {cost / baseline:.0%} of that baseline's layers"
    return "That baseline costs no more and is simpler"


def _reaches(metric: Metric, value: float) -> str:
    if metric.is_share:
        return f"is right {_number(metric, value)} of the time"
    return f"has {name_without_sign(metric.name).replace('_', ' ')} {_number(metric, value)}"


def _number(metric: Metric, value: float) -> str:
    if metric.is_error:
        value = -value
    return f"{100 * value:.1f}%" if metric.is_share else f"{value:.3f}"


def _difference(metric: Metric, gap: float, low: float, high: float, subject: str = "") -> str:
    """Describes a difference between two metrics, with its 95% interval."""
    scale, unit, digits = (100, " points", 1) if metric.is_share else (1, "", 3)
    side = "better" if gap > 0 else "worse"
    if metric.is_error:  # the interval is for the errors, which are shown
        low, high = -high, -low
    # Uses a minus sign as wide as the plus sign; + 0.0 avoids a negative zero.
    ends = [f"{scale * v + 0.0:+.{digits}f}".replace("-", "\N{MINUS SIGN}") for v in (low, high)]
    span = f"95% interval of the difference {ends[0]} to {ends[1]}{unit}"
    if low <= 0 <= high:
        return f"no difference that these rows can show ({span})"
    return f"{subject}{scale * abs(gap):.{digits}f}{unit} {side} ({span})"


def format_milliseconds(value: float) -> str:
    """Returns milliseconds with three significant digits, without a fraction from 100 on."""
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"
