"""Classes and single texts in a report: precision and recall, confusions, mistakes.

Shape letters: N validation rows, E exit, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.outputs import ExitOutputs

_SHOWN = 20  # classes that are listed at once, and up to which their confusion matrix is drawn
_PAIRS = 30  # of classes that are confused most, where there are more
_TEXTS = 50
_CHARACTERS = 400  # of a text


def class_report(
    analysis: Analysis, replica: int, texts: Sequence[tuple[str, ...]] | None
) -> dict[str, Any] | None:
    """Describes each class and the worst mistakes at the replica's operating point.

    The operating point is the cheapest threshold that keeps the last exit's metric on calibration
    rows; where there is none, the last exit.

    Args:
      analysis: of the run.
      replica: its number.
      texts: of the validation rows [N]; None leaves the mistakes out.

    Returns:
      None where the outputs are not of classes or labels. Else a dict: "classes" lists name,
      support, precision, recall, f1, cost (mean share of the layers) and last_f1 (of the last
      exit), the least f1 first; "matrix", the confusion matrix as lists (row: label), or None for
      many classes and where rows have several labels; "pairs" lists label, prediction and count of
      the most frequent confusions; "mistakes" and "suspects" list label, prediction, probability,
      layer and text of the most confident mistakes, and of those among them that every exit makes.

    """
    rows = analysis.validation.replica(replica)
    names = rows.identity.classes
    if rows.objective.categorical is None or not names:
        return None
    threshold = analysis.resolver(replica).resolve(analysis.policy).threshold
    exits = analysis.exits_taken(replica, np.inf if threshold is None else threshold)  # [N]
    labels, each = rows.labels[0], rows.predictions[0]  # [N, ...], [E, N, ...]
    given = each[exits, np.arange(len(labels))]  # [N, ...]
    found = {
        "classes": _class_rows(labels, given, each[-1], np.asarray(rows.cost)[exits], names),
        "matrix": None,
        "names": list(names),
        "pairs": [],
        "shown": _SHOWN,
    }
    if labels.ndim == 1:
        matrix = confusion_matrix(labels, given, labels=np.arange(len(names)))  # [C, C]
        found["matrix"] = matrix.tolist() if len(names) <= _SHOWN else None
        found["pairs"] = _confused_pairs(matrix, names)
    if texts is None:
        return found | {"mistakes": [], "suspects": []}
    return found | _mistakes(rows, exits, analysis.temperatures[replica], texts)


def _mistakes(
    rows: ExitOutputs, exits: np.ndarray, temperatures: np.ndarray, texts: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """Returns "mistakes" and "suspects", see `class_report`.

    Args:
      rows: of one replica.
      exits: index of the exit that each row takes, int [N].
      temperatures: of each exit, float64 [E], NaN where it diverged.
      texts: of the rows [N].

    """
    names, labels, each = rows.identity.classes, rows.labels[0], rows.predictions[0]
    everywhere = np.arange(len(labels))
    given, same = each[exits, everywhere], rows.objective.same  # [N, ...]
    scales = np.where(np.isfinite(temperatures), temperatures, 1)[exits, None]  # [N, 1]
    chosen = rows.logits[0][exits, everywhere]  # [N, C]
    probability = _probabilities(chosen.astype(np.float64) / scales, rows)  # [N]
    wrong = np.flatnonzero(~same(given, labels) & np.isfinite(probability))
    wrong = wrong[np.argsort(-probability[wrong], kind="stable")]
    always = wrong[same(each[:, wrong], given[wrong]).all(axis=0)]

    def named(value: np.ndarray) -> str:
        if value.ndim == 0:
            return names[value]
        return ", ".join(np.asarray(names)[value].tolist()) or "no label"

    def describe(row: int) -> dict[str, Any]:
        text = " / ".join(texts[row])
        return {
            "label": named(labels[row]),
            "prediction": named(given[row]),
            "probability": float(probability[row]),
            "layer": int(rows.layers[exits[row]]),
            "text": text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…",
        }

    return {
        "mistakes": [describe(row) for row in wrong[:_TEXTS]],
        "suspects": [describe(row) for row in always[:_TEXTS]],
    }


def _probabilities(logits: np.ndarray, rows: ExitOutputs) -> np.ndarray:
    """Returns the probability of each row's answer, float64 [N], by calibrated logits [N, C]."""
    with np.errstate(invalid="ignore"):  # logits that diverged give NaN
        found = rows.objective.probabilities(logits)  # [N, C]
    if rows.labels.ndim == 2:
        return found.max(axis=-1)
    return np.maximum(found, 1 - found).min(axis=-1)


def _class_rows(
    labels: np.ndarray, given: np.ndarray, last: np.ndarray, cost: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns a dict for each class, see `class_report`; arrays are [N], or [N, C] of labels."""
    numbers = np.arange(len(names))
    point, whole = (
        precision_recall_fscore_support(labels, which, labels=numbers, zero_division=0)
        for which in (given, last)
    )
    found = [
        {
            "name": name,
            "support": int(point[3][c]),
            "precision": float(point[0][c]),
            "recall": float(point[1][c]),
            "f1": float(point[2][c]),
            "last_f1": float(whole[2][c]),
            "cost": float(cost[has].mean()) if has.any() else None,
        }
        for c, name in enumerate(names)
        for has in [labels == c if labels.ndim == 1 else labels[:, c]]
    ]
    return sorted(found, key=lambda row: row["f1"])


def _confused_pairs(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns label, prediction and count of the most frequent confusions of a matrix [C, C]."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        {"label": names[i], "prediction": names[j], "count": int(wrong[i, j])}
        for i, j in cells
        if wrong[i, j]
    ]
