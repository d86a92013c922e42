"""Finds exits that are below a baseline of the same or lower cost on the same validation rows.

Shape letters: R replica, E exit, N examples.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.exits.intervals import paired_difference, score_interval
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.methods import METHODS
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.baselines import Baseline, baseline_title

_TOLERANCE = 1e-9  # for costs that differ only by rounding, such as 2 / 12 and 1 / 6
_FIX_BELOW_TFIDF = (
    "word counts may be enough for this task: raise max_length if texts are truncated, or try a "
    "larger checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """Describes an exit that is below a baseline."""

    exit: int  # layer number of the exit
    score: float  # metric of the exit
    baseline: str  # name of the baseline
    baseline_score: float  # metric of the baseline
    difference: float  # score - baseline_score, below zero
    interval: Sequence[float]  # (low, high), 95% interval of the difference, entirely below zero
    n: int  # number of validation rows


def find_shortfalls(
    outputs: ExitOutputs, replica: int, baselines: Sequence[Baseline], metric: str
) -> list[Shortfall]:
    """Finds the exits that are significantly below a baseline of the same or lower cost.

    An exit is compared with each baseline whose cost is at most its own, and with the probe at its
    own layer. It is reported if the 95% interval of the paired difference lies below zero. The
    intervals are not corrected for multiple comparisons: 1 in 40 comparisons between equals is
    reported.

    Returns the shortfalls in order of depth, and for each exit the largest first. Raises ValueError
    for a baseline with other rows, replicas or classes than the outputs.
    """
    labels, classes = outputs.labels[replica], outputs.logits.shape[-1]
    predictions, chosen = outputs.replica(replica).predictions[0], outputs.objective.metric(metric)
    findings: list[Shortfall] = []
    for layer, cost, ours in zip(outputs.layers, outputs.cost, predictions, strict=True):
        value, of_exit = compute_metric(chosen, ours, labels, classes), []
        for baseline in baselines:
            if baseline.cost > cost + _TOLERANCE and baseline.name != f"probe_{layer}":
                continue
            theirs = _predictions(baseline, outputs, replica)
            other = compute_metric(chosen, theirs, labels, classes)
            if not value < other:  # also skips the bootstrap if either is NaN
                continue
            gap, low, high = paired_difference(chosen, ours, theirs, labels, classes)
            if high < 0:
                row = (int(layer), value, baseline.name, other, gap, (low, high), len(labels))
                of_exit.append(Shortfall(*row))
        findings += sorted(of_exit, key=lambda f: f.difference)
    return findings


def shortfall_results(
    outputs: ExitOutputs, replica: int, baselines: Sequence[Baseline], metric: str
) -> dict[str, Any]:
    """Returns the keys `baselines` and `below_baseline` of results.json for one replica.

    `baselines` is {name: {score, cost, n, interval}}, with the score's 95% interval over rows.
    `below_baseline` has an entry for each Shortfall, in the order of `find_shortfalls`. Both are
    empty without baselines. Raises ValueError for a baseline with other rows, replicas or classes,
    or for two baselines of the same name.
    """
    labels, classes = outputs.labels[replica], outputs.logits.shape[-1]
    rows: dict[str, Any] = {}
    chosen = outputs.objective.metric(metric)
    for baseline in baselines:
        if baseline.name in rows:
            raise ValueError(f"there are two baselines {baseline.name!r}: names must be unique")
        predicted = _predictions(baseline, outputs, replica)
        rows[baseline.name] = {
            "score": compute_metric(chosen, predicted, labels, classes),
            "cost": float(baseline.cost),
            "n": len(labels),
            "interval": list(score_interval(chosen, predicted, labels, classes)),
        }
    shortfalls = find_shortfalls(outputs, replica, baselines, metric)
    entries = [dataclasses.asdict(f) | {"interval": list(f.interval)} for f in shortfalls]
    return {"baselines": rows, "below_baseline": entries}


def describe_shortfall(finding: Shortfall, results: Mapping[str, Any]) -> str:
    """Describes, in one line, which exit is below which baseline, by how much, and what to do."""
    name, worse, sign = _shown_metric(results["metric"])
    low, high = sorted(sign * end for end in finding.interval)
    return (
        f"exit {finding.exit} alone ({name} {sign * finding.score:.3f}) is {worse} the baseline "
        f"{baseline_title(finding.baseline)} ({sign * finding.baseline_score:.3f}) on the same "
        f"{finding.n:,} rows: difference {sign * finding.difference:.3f}, 95% interval {low:.3f} "
        f"to {high:.3f}; {_advice(finding, results)}"
    )


def _shown_metric(metric: str) -> tuple[str, str, int]:
    """Returns a metric's name, the word for worse and the sign, as shown: errors are positive."""
    name, sign = ShownMetric.of(metric)
    return name, "below" if sign > 0 else "above", sign


def _advice(finding: Shortfall, results: Mapping[str, Any]) -> str:
    """Returns advice on a shortfall: the recommended settings that this run does not use."""
    if keeps_encoder(results):
        return "the saved encoder is the pretrained one: only the fit of the heads differs"
    fitted = results.get("head_init") == "probe" and bool(results.get("head_refit"))
    if fitted and finding.baseline.startswith("tfidf"):
        return _FIX_BELOW_TFIDF
    advice = []
    if not results.get("best_steps"):
        advice.append("train longer (epochs=auto)")
    if not results.get("rate_search"):
        advice.append("search the learning rate")
    if not fitted and finding.baseline != "fine_tuned":
        advice.append("use head_init=probe and head_refit")
    if any(METHODS[results["method"]].isolation):
        advice.append("lower isolation")
    if not advice:
        advice.append("more labeled rows or a larger checkpoint may help")
        if finding.exit != results["exits"][-1]:
            advice.append("leave the exit out (exits)")
    return ", or ".join([", ".join(advice[:-1]), advice[-1]] if len(advice) > 1 else advice)


def keeps_encoder(results: Mapping[str, Any]) -> bool:
    """Returns whether the best replica kept the pretrained encoder unchanged.

    This happens with `epochs=0`, and with `epochs="auto"` if every later state was worse on the
    tuning rows.
    """
    if results.get("epochs") == 0:
        return True
    steps = list((results.get("best_steps") or {}).values())
    return bool(steps) and not any(each[results["best_replica"]] for each in steps)


class Effect(NamedTuple):
    """Describes how an exit that is below a baseline affects an operating point."""

    text: str
    harmless: bool  # the operating point is not below that baseline


def describe_effects(
    findings: Sequence[Shortfall], rows: ExitOutputs, exits: np.ndarray
) -> dict[int, Effect]:
    """Describes how each finding affects the operating point at which rows take these exits.

    Args:
      findings: shortfalls, at most one for each exit.
      rows: outputs of one replica on the validation rows.
      exits: index of the exit that each row takes, int [N].

    Returns the effects by the layer number of the exit.

    """
    predicted = rows.predictions[0][exits, np.arange(len(exits))]  # [N, ...]
    value = compute_metric(rows.metric, predicted, rows.labels[0], rows.logits.shape[-1])
    name, worse, sign = _shown_metric(rows.metric.name)
    layers, effects = np.asarray(rows.layers), {}
    for finding in findings:
        share = float((layers[exits] == finding.exit).mean())
        harmless = value >= finding.baseline_score
        effects[finding.exit] = Effect(
            f"{share:.0%} of the texts leave there at the recommended threshold, where the overall "
            f"{name} is {sign * value:.3f}: {'not ' if harmless else ''}{worse} that "
            f"baseline ({sign * finding.baseline_score:.3f})",
            harmless,
        )
    return effects


def worst_shortfalls(results: Mapping[str, Any]) -> list[Shortfall]:
    """Returns the largest shortfall of each exit in results.json; [] for runs without baselines."""
    worst: dict[int, Shortfall] = {}
    for row in results.get("below_baseline", []):  # the largest shortfall of an exit comes first
        worst.setdefault(row["exit"], Shortfall(**row))
    return list(worst.values())


def shortfall_warning(results: Mapping[str, Any]) -> str | None:
    """Returns one line for the terminal about the exit with the largest shortfall.

    It also counts the other exits below a baseline. None if no exit is below a baseline.
    """
    shortfalls = worst_shortfalls(results)
    if not shortfalls:
        return None
    worst = min(shortfalls, key=lambda f: f.difference)
    line = describe_shortfall(worst, results)
    others = len(shortfalls) - 1
    if not others:
        return line
    return f"{line} ({others} other exit{'s are' if others > 1 else ' is'} below a baseline too)"


def _predictions(baseline: Baseline, outputs: ExitOutputs, replica: int) -> np.ndarray:
    """Returns the baseline's predictions on the rows of outputs; class indices are int64 [N]."""
    replicas, _, rows, classes = outputs.logits.shape
    if baseline.predictions.shape[:2] not in ((1, rows), (replicas, rows)):
        raise ValueError(
            f"baseline {baseline.name!r} has predictions of shape {baseline.predictions.shape}, "
            f"but the outputs have [R, N] = {(replicas, rows)}"
        )
    predicted = baseline.for_replica(replica)
    if predicted.dtype.kind == "i" and predicted.max() >= classes:
        raise ValueError(
            f"baseline {baseline.name!r} predicts class {predicted.max()}, but there are only "
            f"{classes} classes"
        )
    return predicted
