"""Classification where every row has any number of labels: a logit and a sigmoid for each label.

Shape letters: N rows (B in a batch), H features, C labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.data.label_checks import (
    cut_label,
    describe_classes,
    is_written_list,
    label_warnings,
    list_labels,
)
from sweet_jax.objectives.decision_thresholds import best_f1_shifts
from sweet_jax.objectives.label_column import LabelColumn, ordered_names, split_labels
from sweet_jax.objectives.label_metrics import (
    MACRO_F1,
    MICRO_F1,
    NEG_HAMMING_LOSS,
    SUBSET_ACCURACY,
    as_measure,
    same_labels,
)
from sweet_jax.objectives.linear_model import LinearModel, Solve
from sweet_jax.objectives.objective import Array, CategoricalVariables, Objective

_ITERATIONS = 500  # at most, of L-BFGS
_DIGITS = 20  # labels that a number for a prediction tells apart, see `constant_labels`


def binary_cross_entropy(logits: Array, targets: Array) -> Array:
    """Returns the mean over labels of the binary cross-entropy, float32 [..., B]; targets [B, C].

    The mean, so that learning rates suit any number of labels.
    """
    import jax.numpy as jnp  # here: curves and served models need no JAX
    import optax

    targets = jnp.broadcast_to(targets, logits.shape).astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


def two_outcomes(logits: Array) -> Array:
    """Returns the logits of each label's absence, 0, and presence, [..., C, 2]."""
    xp = logits.__array_namespace__()
    return xp.stack([xp.zeros_like(logits), logits], axis=-1)


def sigmoid(logits: Array) -> Array:
    """Returns the sigmoid, in the dtype of the logits."""
    xp = logits.__array_namespace__()
    small = xp.exp(-abs(logits))  # at most 1: no overflow
    return xp.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def constant_labels(logits: Array, row_mask: Array) -> Array:
    """Returns a number for the labels that all rows of row_mask [B] get, or -1; int32 [...].

    The labels are its binary digits, where there are no more than 20 of them.
    """
    xp = logits.__array_namespace__()
    present = xp.broadcast_to(row_mask[:, None], logits.shape)  # [..., B, C]
    every = ((logits > 0) | ~present).all(axis=-2)  # [..., C]
    none = ((logits <= 0) | ~present).all(axis=-2)
    digits = xp.broadcast_to(2 ** (xp.arange(logits.shape[-1]) % _DIGITS), every.shape)
    return xp.where((every | none).all(axis=-1), (every * digits).sum(axis=-1), -1).astype("int32")


def answer(
    logits: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...]
) -> tuple[list[str], float]:
    """Returns the labels with a positive logit, and the certainty of the least certain label."""
    given = [name for name, logit in zip(names, logits.tolist(), strict=True) if logit > 0]
    return given, float(np.maximum(probabilities, 1 - probabilities).min())


def describe_prediction(given: np.ndarray, names: tuple[str, ...]) -> str:
    """Returns words for the labels bool [C] of a row."""
    return " and ".join(repr(cut_label(n)) for n in np.asarray(names)[given].tolist()) or "no label"


def read_names(labels: Sequence[str], declared: tuple[str, ...], column: str) -> tuple[str, ...]:
    """Returns the label names that the file declares, else those of all rows in order.

    Raises UserError where no row has a label.
    """
    found = {name for text in labels for name in split_labels(text)}
    if not found:
        raise UserError(f"no row has a label in column {column!r}: name the labels as a|b")
    return declared or ordered_names(found)


def read_label_sets(
    labels: Sequence[str], names: tuple[str, ...], texts: Sequence[tuple[str, ...]]
) -> np.ndarray:
    """Returns which labels each row has, bool [N, C].

    Raises UserError for an unknown label, and for a list that stands in one field as text.
    """
    index = {name: number for number, name in enumerate(names)}
    found = np.zeros((len(labels), len(names)), bool)
    for row, text in enumerate(labels):
        for name in split_labels(text):
            if is_written_list(name):
                raise UserError(
                    f"label {cut_label(name)!r} (the text {texts[row][0]!r:.40}) is a list that is "
                    "written as text: write it as a|b, or save the rows as JSONL or Parquet"
                )
            if name not in index:
                raise UserError(
                    f"label {cut_label(name)!r} (the text {texts[row][0]!r:.40}) is not among the "
                    f"training labels {list_labels(names)}: correct it, or add such training rows"
                )
            found[row, index[name]] = True
    return found


def check_label_sets(
    train: np.ndarray, validation: np.ndarray, names: tuple[str, ...], column: str
) -> None:
    """Raises UserError unless training rows bool [N, C] differ, and have all labels validated."""
    if (train == train[0]).all():
        raise UserError(
            f"all training rows have the same labels (column {column!r}): there is nothing to learn"
        )
    unseen = np.flatnonzero(validation.any(axis=0) & ~train.any(axis=0))
    if len(unseen):
        raise UserError(
            f"label {cut_label(names[unseen[0]])!r} occurs in validation rows but in no training "
            "row: give training rows of it, or remove it"
        )


def rarest_labels(targets: np.ndarray) -> np.ndarray:
    """Returns the rarest label of each row, int [N], of bool [N, C]; C where it has none.

    Rows split in proportion to these keep rare labels on both sides: a simple form of iterative
    stratification (Sechidis et al. 2011).
    """
    counts = np.where(targets, targets.sum(axis=0), len(targets) + 1)  # [N, C]
    return np.where(targets.any(axis=1), counts.argmin(axis=1), targets.shape[1])


def describe_labels(targets: np.ndarray, names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Returns the labels with their numbers of rows, and warnings of labels that look wrong."""
    counts = dict(zip(names, targets.sum(axis=0).tolist(), strict=True))
    without = int((~targets.any(axis=1)).sum())
    said = describe_classes(counts).replace("classes", "labels", 1)
    more = f"; {targets.sum(axis=1).mean():.2f} labels a row, {without} rows have none"
    warnings = label_warnings(counts)
    joined = next((name for name in names if "," in name or ";" in name), None)
    if joined is not None and targets.sum(axis=1).max() == 1:
        warnings.append(
            f"no row has several labels, and labels such as {cut_label(joined)!r} are one label "
            "each: if they name several, write them as a|b"
        )
    if without > len(targets) / 2:
        warnings.append(f"{without} of {len(targets)} rows have no label: is the column filled in?")
    return said + more, warnings


def one_vs_rest(features: int, labels: int) -> Solve:
    """Returns the solver of one logistic regression for each label, see `LinearModel`.

    All labels at once, by L-BFGS from the last result.
    """
    from scipy.optimize import minimize  # here: a served model needs no SciPy

    start = np.zeros((features + 1, labels))

    def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        nonlocal start
        targets = y.astype(np.float32)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            kernel, bias = flat.reshape(start.shape)[:-1], flat.reshape(start.shape)[-1]
            logits = x @ kernel.astype(np.float32) + bias.astype(np.float32)  # [N, C]
            slope = (sigmoid(logits) - targets) / targets.size
            grad = np.concatenate([x.T @ slope + penalty / labels * kernel, slope.sum(0)[None]])
            size = penalty / labels / 2 * float((kernel**2).sum())
            return mean_binary_cross_entropy(logits, y) + size, grad.astype(np.float64).ravel()

        options = {"maxiter": _ITERATIONS, "gtol": 1e-6}
        start = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options).x
        start = start.reshape(features + 1, labels)
        return start[:-1].copy(), start[-1].copy()

    return solve


def mean_binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the mean binary cross-entropy of targets bool [N, C], over rows and labels."""
    signed = np.where(targets, logits, -logits).astype(np.float64)
    return float(np.logaddexp(0, -signed).mean())


def one_vs_rest_estimator(strength: float, iterations: int) -> Any:
    """Returns scikit-learn's logistic regressions, see `LinearModel.text_model`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(LogisticRegression(C=strength, max_iter=iterations))


MULTI_LABEL = Objective(
    name="multi_label",
    metrics=(MICRO_F1, MACRO_F1, SUBSET_ACCURACY, NEG_HAMMING_LOSS),
    column=LabelColumn(
        read_names=read_names,
        read=read_label_sets,
        check=check_label_sets,
        strata=rarest_labels,
        strata_name="each row's rarest label",
        present=lambda targets: np.flatnonzero(targets.any(axis=0)),
        describe=describe_labels,
        several=True,
    ),
    linear=LinearModel(
        solver=one_vs_rest,
        loss=mean_binary_cross_entropy,
        constant=lambda targets, labels: targets.mean(axis=0) > 0.5,
        text_model=one_vs_rest_estimator,
        baselines=("constant", "tfidf_one_vs_rest"),
    ),
    row_loss=binary_cross_entropy,
    predict=lambda logits: logits > 0,
    agrees=same_labels,
    probabilities=sigmoid,
    answer=answer,
    constant_prediction=constant_labels,
    describe=describe_prediction,
    read_targets=lambda targets, labels: np.asarray(targets, bool),
    target_per_output=True,
    categorical=CategoricalVariables(
        logits=two_outcomes,
        outcomes=lambda targets: targets.astype(int),
    ),
    measures=(
        ("micro_f1", as_measure(MICRO_F1)),
        ("macro_f1", as_measure(MACRO_F1)),
        ("subset_accuracy", as_measure(SUBSET_ACCURACY)),
        ("hamming_loss", as_measure(NEG_HAMMING_LOSS, -1.0)),
    ),
    decision_shifts=best_f1_shifts,
    outputs="labels",
)
