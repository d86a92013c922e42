"""Results per class and per text in a report: precision, recall, confusions, exits, mistakes.

Shape letters: N validation rows, E exit, C classes, V categorical variables with K outcomes each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.reliability import calibration_error_by_outcome
from sweet_jax.objectives.label_checks import cut_label
from sweet_jax.objectives.objective import log_softmax

_SHOWN = 20  # number of classes that are shown at once
_MATRIX = 12  # maximum number of classes for which the confusion matrix is drawn
_PAIRS = 20  # maximum number of pairs of confused classes that are listed
_TEXTS = 50  # maximum number of texts in each list
_CHARACTERS = 400  # characters shown of a text
_LISTED = 5  # maximum number of classes that are named in one line


def class_report(
    analysis: Analysis,
    replica: int,
    threshold: float,
    texts: Sequence[tuple[str, ...]] | None = None,
) -> dict[str, Any] | None:
    """Describes each class and the worst mistakes of a replica at a threshold.

    Args:
      analysis: analysis of the run.
      replica: index of the replica.
      threshold: threshold of the run's own policy; infinity for the last exit alone.
      texts: texts of the validation rows [N]; None to omit the mistakes.

    Returns:
      None if the outputs are not classes or labels, otherwise a dict:
      "classes" lists the number, name, support, precision, recall, f1 and shares of each class
      (shares: of its rows that leave at each exit), and under "last" the precision, recall and f1
      of the last exit; smallest f1 first. For a class without validation rows they are None, and it
      comes last.
      "matrices" holds the confusion matrices at the threshold and of the last exit as lists (rows:
      labels); None for many classes and for multi-label classification.
      "pairs" lists the cell (its index in the flattened matrix), label, prediction, count and last
      (the last exit's count) of the most frequent confusions.
      "mistakes" lists the label, prediction, probability, layer and text of the most confident
      mistakes; "suspects" lists the same for mistakes that every exit makes.
      "calibration" lists the name, support, probability (mean over rows), share (of rows with the
      class) and error of each class, for the calibrated probabilities of the last exit; largest
      calibration error first.

    """
    rows = analysis.validation.replica(replica)
    names = _shown_names(rows)
    if rows.objective.categorical is None or not names:
        return None
    exits = analysis.exits_taken(replica, threshold)  # [N]
    labels, predictions = rows.labels[0], rows.predictions[0]  # [N, ...], [E, N, ...]
    predicted = predictions[exits, np.arange(len(labels))]  # [N, ...]
    report = {
        "classes": _class_rows(
            labels, (predicted, predictions[-1]), exits, len(predictions), names
        ),
        "matrices": None,
        "names": names,
        "pairs": [],
        "shown": _SHOWN,
        "mistakes": [],
        "suspects": [],
        "calibration": _calibration_rows(rows, analysis.temperatures[replica, -1]),
    }
    if labels.ndim == 1:
        from sklearn.metrics import confusion_matrix

        numbers = np.arange(len(names))
        answers = predicted, predictions[-1]
        matrices = [confusion_matrix(labels, g, labels=numbers) for g in answers]  # [C, C] each
        report["matrices"] = [m.tolist() for m in matrices] if len(names) <= _MATRIX else None
        report["pairs"] = _confused_pairs(matrices[0], matrices[1], names)
    if texts is None:
        return report
    return report | _mistakes(rows, exits, analysis.temperatures[replica], texts)


def _shown_names(rows: ExitOutputs) -> list[str]:
    return [cut_label(name) for name in rows.identity.classes]


def _mistakes(
    rows: ExitOutputs, exits: np.ndarray, temperatures: np.ndarray, texts: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """Returns "mistakes" and "suspects", see `class_report`.

    Args:
      rows: outputs of one replica.
      exits: index of the exit that each row takes, int [N].
      temperatures: temperature of each exit, float64 [E]; NaN if it diverged.
      texts: texts of the rows [N].

    """
    names, labels, predictions = _shown_names(rows), rows.labels[0], rows.predictions[0]
    everywhere = np.arange(len(labels))
    predicted, same = predictions[exits, everywhere], rows.objective.same  # [N, ...]
    scales = np.where(np.isfinite(temperatures), temperatures, 1)[exits, None]  # [N, 1]
    chosen = rows.logits[0][exits, everywhere]  # [N, C]
    probability = _probabilities(chosen.astype(np.float64) / scales, rows)  # [N]
    wrong = np.flatnonzero(~same(predicted, labels) & np.isfinite(probability))
    wrong = wrong[np.argsort(-probability[wrong], kind="stable")]
    always = wrong[same(predictions[:, wrong], predicted[wrong]).all(axis=0)]

    def named(value: np.ndarray) -> str:
        if value.ndim == 0:
            return names[value]
        return ", ".join(np.asarray(names)[value].tolist()) or "no label"

    def describe(row: int) -> dict[str, Any]:
        text = " / ".join(texts[row])
        return {
            "label": named(labels[row]),
            "prediction": named(predicted[row]),
            "probability": float(probability[row]),
            "layer": int(rows.layers[exits[row]]),
            "text": text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…",
        }

    return {
        "mistakes": [describe(row) for row in wrong[:_TEXTS]],
        "suspects": [describe(row) for row in always[:_TEXTS]],
    }


def _probabilities(logits: np.ndarray, rows: ExitOutputs) -> np.ndarray:
    """Returns the probability of each row's answer, float64 [N], from calibrated logits [N, C]."""
    with np.errstate(invalid="ignore"):  # logits that diverged give NaN
        probabilities = rows.objective.probabilities(logits)  # [N, C]
    if rows.labels.ndim == 2:
        return probabilities.max(axis=-1)
    return np.maximum(probabilities, 1 - probabilities).min(axis=-1)


def _class_rows(
    labels: np.ndarray,
    answers: tuple[np.ndarray, np.ndarray],
    exits: np.ndarray,
    count: int,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns a dict for each class, see `class_report`.

    Args:
      labels: targets of the rows, int [N], or bool [N, C] for multi-label classification.
      answers: predictions at the threshold and of the last exit, each shaped like labels.
      exits: index of the exit that each row takes, int [N].
      count: number of exits, E.
      names: names of the classes [C].

    """
    # A command that ends with an error does not wait a second for this import.
    from sklearn.metrics import precision_recall_fscore_support

    numbers = np.arange(len(names))
    point, last = (
        precision_recall_fscore_support(labels, which, labels=numbers, zero_division=0)
        for which in answers
    )
    keys = ("precision", "recall", "f1")
    rows = []
    for c, name in enumerate(names):
        has = labels == c if labels.ndim == 1 else labels[:, c]
        taken, some = np.bincount(exits[has], minlength=count), bool(has.any())  # [E]
        rows.append(
            {"number": c, "name": name, "support": int(point[3][c])}
            | {key: float(point[k][c]) if some else None for k, key in enumerate(keys)}
            | {"last": {key: float(last[k][c]) if some else None for k, key in enumerate(keys)}}
            | {"shares": (taken / taken.sum()).tolist() if some else None}
        )
    return sorted(rows, key=lambda row: np.inf if row["f1"] is None else row["f1"])


def _calibration_rows(rows: ExitOutputs, temperature: float) -> list[dict[str, Any]]:
    """Returns "calibration", see `class_report`; [] if the last exit diverged.

    Args:
      rows: outputs of one replica.
      temperature: temperature of the last exit.

    """
    variables, logits = rows.objective.categorical, rows.logits[0, -1].astype(np.float64)
    if variables is None or not np.isfinite(logits).all() or not np.isfinite(temperature):
        return []
    probabilities = np.exp(log_softmax(variables.logits(logits / temperature)))  # [N, V, K]
    outcomes = variables.outcomes(rows.labels[0])  # [N, V]
    several = (
        rows.labels[0].ndim == 2
    )  # each label is a variable, and is present if its outcome is 1
    selected = np.s_[:, 1] if several else np.s_[0]
    errors = calibration_error_by_outcome(probabilities, outcomes)[selected]  # [C]
    mean = probabilities.mean(axis=0)[selected]  # [C]
    has = outcomes if several else outcomes == np.arange(len(mean))  # [N, C]
    calibration = [
        {
            "name": name,
            "support": int(has[:, c].sum()),
            "probability": float(mean[c]),
            "share": float(has[:, c].mean()),
            "error": float(errors[c]),
        }
        for c, name in enumerate(_shown_names(rows))
    ]
    return sorted(calibration, key=lambda row: -row["error"])


def describe_never_predicted(rows: ExitOutputs, exits: np.ndarray) -> str | None:
    """Describes the classes that validation rows have and that no row gets; None if there are none.

    Args:
      rows: outputs of one replica on the validation rows.
      exits: index of the exit that each row takes, int [N].

    """
    names, labels = _shown_names(rows), rows.labels[0]
    if rows.objective.categorical is None or not names:
        return None
    predicted = rows.predictions[0][exits, np.arange(len(exits))]  # [N, ...]
    if labels.ndim == 1:
        labels, predicted = (np.eye(len(names), dtype=bool)[x] for x in (labels, predicted))
    missing = np.flatnonzero(labels.any(axis=0) & ~predicted.any(axis=0))
    if not len(missing):
        return None
    listed = ", ".join(f"{names[c]!r} (in {labels[:, c].sum()})" for c in missing[:_LISTED])
    others = f" and {len(missing) - _LISTED} others" if len(missing) > _LISTED else ""
    return (
        f"never predicted at the recommended threshold, though validation rows have it: {listed}"
        f"{others}; more training rows may help, and for classes --config.class_weights=balanced"
    )


def _confused_pairs(
    matrix: np.ndarray, last: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the most frequent confusions of a matrix [C, C], with the last exit's counts."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        {
            "cell": int(i * len(names) + j),
            "label": names[i],
            "prediction": names[j],
            "count": int(wrong[i, j]),
            "last": int(last[i, j]),
        }
        for i, j in cells
        if wrong[i, j]
    ]
