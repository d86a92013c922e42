"""Multi-label classification: a row may have any number of labels, each with its own logit.

Shape letters: N rows (B in a batch), H features, C labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.errors import UserError, short_repr
from sweet_jax.objectives.decision_thresholds import best_f1_shifts
from sweet_jax.objectives.label_checks import (
    cut_label,
    describe_classes,
    is_written_list,
    label_warnings,
    list_labels,
)
from sweet_jax.objectives.label_column import LabelColumn, LabelError, ordered_names, split_labels
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

_ITERATIONS = 500  # maximum number of L-BFGS iterations
_DIGITS = 20  # maximum number of labels that `constant_labels` can distinguish


def binary_cross_entropy(logits: Array, targets: Array) -> Array:
    """Returns the mean over labels of the binary cross-entropy, float32 [..., B]; targets [B, C].

    It is a mean rather than a sum, so that a learning rate suits any number of labels.
    """
    import jax.numpy as jnp  # imported here because curves and served models do not need JAX
    import optax

    targets = jnp.broadcast_to(targets, logits.shape).astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


def two_outcomes(logits: Array) -> Array:
    """Returns the logits of each label's absence, always 0, and of its presence, [..., C, 2]."""
    xp = logits.__array_namespace__()
    return xp.stack([xp.zeros_like(logits), logits], axis=-1)


def sigmoid(logits: Array) -> Array:
    """Returns the sigmoid, in the dtype of the logits."""
    xp = logits.__array_namespace__()
    small = xp.exp(-abs(logits))  # at most 1: no overflow
    return xp.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def constant_labels(logits: Array, row_mask: Array) -> Array:
    """Returns a number for the labels predicted for all rows of row_mask [B], or -1; int32 [...].

    It is -1 if the predictions differ. Its binary digits are the labels if there are at most 20.
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
    """Returns the labels with a positive logit, and the confidence in the least certain label."""
    chosen = [name for name, logit in zip(names, logits.tolist(), strict=True) if logit > 0]
    return chosen, float(np.maximum(probabilities, 1 - probabilities).min())


def describe_prediction(pred: np.ndarray, names: tuple[str, ...]) -> str:
    """Returns a description of the labels of a row, bool [C]."""
    return " and ".join(repr(cut_label(n)) for n in np.asarray(names)[pred].tolist()) or "no label"


def read_names(labels: Sequence[str], declared: tuple[str, ...], column: str) -> tuple[str, ...]:
    """Returns the label names that the file declares, otherwise those of all rows in order.

    Raises UserError if no row has a label.
    """
    names = {name for text in labels for name in split_labels(text)}
    if not names:
        raise UserError(f"no row has a label in column {column!r}: write labels as a|b")
    return declared or ordered_names(names)


def read_label_sets(
    labels: Sequence[str], names: tuple[str, ...], texts: Sequence[tuple[str, ...]]
) -> np.ndarray:
    """Returns which labels each row has, bool [N, C].

    Raises LabelError for an unknown label, and for a list that is written as text in one field.
    """
    index = {name: number for number, name in enumerate(names)}
    targets = np.zeros((len(labels), len(names)), bool)
    for row, text in enumerate(labels):
        for name in split_labels(text):
            if is_written_list(name):
                raise LabelError(
                    f"label {cut_label(name)!r} (the text {short_repr(texts[row][0], 40)}) is a "
                    "list that is written as text: write it as a|b, or save the rows as JSONL or "
                    "Parquet",
                    row,
                )
            if name not in index:
                raise LabelError(
                    f"label {cut_label(name)!r} (the text {short_repr(texts[row][0], 40)}) is not "
                    f"among the training labels {list_labels(names)}: correct it, or add training "
                    "rows with this label",
                    row,
                )
            targets[row, index[name]] = True
    return targets


def check_label_sets(
    train: np.ndarray, validation: np.ndarray, names: tuple[str, ...], column: str
) -> None:
    """Checks that a model can be trained and evaluated on targets, bool [N, C].

    Raises UserError if all training rows have the same labels, or if a label occurs in validation
    rows only.
    """
    if (train == train[0]).all():
        raise UserError(
            f"all training rows have the same labels (column {column!r}): there is nothing to learn"
        )
    unseen = np.flatnonzero(validation.any(axis=0) & ~train.any(axis=0))
    if len(unseen):
        raise UserError(
            f"label {cut_label(names[unseen[0]])!r} occurs in validation rows but in no training "
            "row: add training rows with this label, or remove it from the validation rows"
        )


def rarest_labels(targets: np.ndarray) -> np.ndarray:
    """Returns the rarest label of each row of targets bool [N, C], int [N]; C for rows without one.

    Stratifying by these keeps rare labels on both sides of a split: a simple form of iterative
    stratification (Sechidis et al. 2011).
    """
    counts = np.where(targets, targets.sum(axis=0), len(targets) + 1)  # [N, C]
    return np.where(targets.any(axis=1), counts.argmin(axis=1), targets.shape[1])


def describe_labels(targets: np.ndarray, names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Returns the number of rows of each label, as text, and warnings about suspicious labels."""
    counts = dict(zip(names, targets.sum(axis=0).tolist(), strict=True))
    without = int((~targets.any(axis=1)).sum())
    said = describe_classes(counts).replace("classes", "labels", 1)
    more = f"; {targets.sum(axis=1).mean():.2f} labels per row, {without} rows without a label"
    warnings = label_warnings(counts)
    joined = next((name for name in names if "," in name or ";" in name), None)
    if joined is not None and targets.sum(axis=1).max() == 1:
        warnings.append(
            f"no row has several labels, and {cut_label(joined)!r} is read as one label: if it "
            "names several, write them as a|b"
        )
    if without > len(targets) / 2:
        warnings.append(f"{without} of {len(targets)} rows have no label: is the column filled in?")
    return said + more, warnings


def one_vs_rest(features: int, labels: int) -> Solve:
    """Returns the solver of one logistic regression for each label, see `LinearModel`.

    L-BFGS fits all labels at once and starts from the last result.
    """
    from scipy.optimize import minimize  # imported here because a served model does not need SciPy

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


def one_vs_rest_estimator(inverse_penalty: float, max_iter: int) -> Any:
    """Returns one logistic regression for each label, see `LinearModel.text_model`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(LogisticRegression(C=inverse_penalty, max_iter=max_iter))


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
        is_linear=True,
    ),
    default_policy="min_confidence",
    measures=(
        ("micro_f1", as_measure(MICRO_F1)),
        ("macro_f1", as_measure(MACRO_F1)),
        ("subset_accuracy", as_measure(SUBSET_ACCURACY)),
        ("hamming_loss", as_measure(NEG_HAMMING_LOSS, -1.0)),
    ),
    decision_shifts=best_f1_shifts,
    outputs="labels",
)
