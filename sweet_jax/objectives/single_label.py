"""Single-label classification: every row has exactly one class.

Shape letters: N rows (B in a batch), C classes.
"""

import dataclasses
import numbers
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sweet_jax.errors import UserError, short_repr
from sweet_jax.objectives.class_metrics import BALANCED_ACCURACY, F1, MACRO_F1, MATTHEWS
from sweet_jax.objectives.label_checks import (
    check_label_column,
    cut_label,
    describe_classes,
    label_warnings,
    list_labels,
    without_fraction,
)
from sweet_jax.objectives.label_column import LabelColumn, LabelError, ordered_names
from sweet_jax.objectives.linear_model import LinearModel, Solve
from sweet_jax.objectives.objective import (
    Array,
    CategoricalVariables,
    Objective,
    accuracy_metric,
    softmax,
)

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_ITERATIONS = 1000  # maximum number of L-BFGS iterations; 10 to 300 are usual
_NEWTON = 1024  # maximum number of coefficients for Newton's method, which factorizes the Hessian


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross-entropy of each row, float32 [..., B], for labels int32 [B]."""
    import jax.numpy as jnp  # imported here because curves and served models do not need JAX
    import optax

    labels = jnp.broadcast_to(labels, logits.shape[:-1])  # [..., B]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def predicted_class(logits: Array) -> Array:
    """Returns the class with the largest logit, int [..., B]."""
    return logits.argmax(axis=-1)


def same_class(classes: Array, others: Array) -> Array:
    """Returns whether two arrays have the same class in each row, bool [..., B]."""
    return classes == others


def single_predicted_class(logits: Array, row_mask: Array) -> Array:
    """Returns the class predicted for all rows of row_mask bool [B], -1 if several; int32 [...]."""
    xp = logits.__array_namespace__()
    classes = logits.argmax(axis=-1)  # [..., B]
    present = xp.broadcast_to(row_mask, classes.shape)
    low = xp.where(present, classes, logits.shape[-1]).min(axis=-1)
    high = xp.where(present, classes, -1).max(axis=-1)
    return xp.where(low == high, low, -1).astype("int32")


def read_labels(labels: Any, classes: int) -> np.ndarray:
    """Returns labels as int64. Raises ValueError for labels that are not indices of classes."""
    values = np.asarray(labels)
    if values.dtype.kind not in "biuf":  # text, or objects that may be integers
        for label in values.ravel().tolist():
            if not isinstance(label, numbers.Integral):
                raise ValueError(f"labels must be indices of classes; got {short_repr(label, 60)}")
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.trunc(values))).all():
        raise ValueError("labels must be integers: the indices of their classes")
    labels = np.asarray(labels, np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be between 0 and {classes - 1}")
    return labels


def read_names(labels: Sequence[str], declared: tuple[str, ...], column: str) -> tuple[str, ...]:
    """Returns the class names that the file declares, otherwise the distinct labels in order.

    Raises UserError for a column of IDs.
    """
    check_label_column(labels, column)
    return declared or ordered_names(set(labels))


def read_classes(
    labels: Sequence[str], names: tuple[str, ...], texts: Sequence[tuple[str, ...]]
) -> np.ndarray:
    """Returns the class index of each label, int32 [N]. Raises LabelError for an unknown label."""
    index = {name: number for number, name in enumerate(names)}
    # 1 in one file and 1.0 in another are the same label, unless the names contain both.
    whole = {without_fraction(name): number for name, number in index.items()}
    whole = whole if len(whole) == len(index) else {}
    indices = [index.get(name, whole.get(without_fraction(name), -1)) for name in labels]
    if -1 in indices:
        row = indices.index(-1)
        count = labels.count(labels[row])
        raise LabelError(
            f"label {cut_label(labels[row])!r} ({count} row{'s' * (count > 1)}, the text "
            f"{short_repr(texts[row][0], 40)}) is not among the training labels "
            f"{list_labels(names)}: correct it, or add training rows with this label",
            row,
        )
    return np.asarray(indices, np.int32)


def check_classes(
    train: np.ndarray, validation: np.ndarray, names: tuple[str, ...], column: str
) -> None:
    """Checks that a model can be trained and evaluated on labels, int [N].

    Raises UserError if training rows have fewer than two classes, or if a class occurs in
    validation rows only.
    """
    present = set(train.tolist())
    if len(present) < 2:
        raise UserError(
            f"all training rows have the label {cut_label(names[train[0]])!r} (column {column!r}): "
            "a classifier needs at least two classes"
        )
    unseen = sorted(set(validation.tolist()) - present)
    if unseen:
        raise UserError(
            f"label {cut_label(names[unseen[0]])!r} occurs in validation rows but in no training "
            "row: add training rows with this label, or remove it from the validation rows"
        )


def describe_labels(classes: np.ndarray, names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Returns the number of rows of each class, as text, and warnings about suspicious labels."""
    each = np.bincount(classes, minlength=len(names))
    counts = dict(zip(names, each.tolist(), strict=True))
    return describe_classes(counts), label_warnings(counts)


def multinomial_logistic(
    features: int, classes: int, class_weight: dict[int, float] | None = None
) -> Solve:
    """Returns the solver of multinomial logistic regression, see `LinearModel`.

    Labels int [N] must have at least two classes; a class without rows gets the smallest logit.
    """
    # Imported here because it takes a second, and runs without a probe do not need it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    coefficients = features * (classes if classes > 2 else 1)
    solver = "newton-cholesky" if coefficients <= _NEWTON else "lbfgs"
    model = LogisticRegression(
        solver=solver, max_iter=_ITERATIONS, warm_start=True, class_weight=class_weight
    )

    def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        model.C = 1 / (penalty * len(y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # good enough after _ITERATIONS
            model.fit(x, y)
        return _softmax_form(model, classes)

    return solve


def _softmax_form(model: "LogisticRegression", classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel [H, C] and bias [C] of a fitted model, float64.

    For two classes, scikit-learn stores only the difference of the logits.
    """
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    kernel = np.zeros((weight.shape[1], classes))
    # Classes without rows lose to all others by a wide but finite margin.
    full = np.full(classes, bias.min() - 20.0)
    kernel[:, model.classes_], full[model.classes_] = weight.T, bias
    return kernel, full


def mean_cross_entropy(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Returns the mean cross-entropy of labels int [N], weighted by class weights [C] if given."""
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    losses = total - logits[np.arange(len(labels)), labels]
    return float((losses if weights is None else weights[labels] * losses).mean())


def most_frequent(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns the most frequent class of labels int [N], the first among ties, int64 []."""
    return np.asarray(np.bincount(np.asarray(labels, np.int64), minlength=classes).argmax())


def logistic_regression(inverse_penalty: float, max_iter: int) -> Any:
    """Returns a logistic regression, see `LinearModel.text_model`."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=inverse_penalty, max_iter=max_iter)


def balanced_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """Returns the weight N / (C N_c) of each class, like scikit-learn's "balanced".

    The mean weight over the rows is then 1. C counts the classes that occur in labels int [N]; the
    weight of any other class is 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = int((counts > 0).sum())
    return tuple((len(labels) / (present * np.maximum(counts, 1)) * (counts > 0)).tolist())


def reweighted(
    objective: Objective, weights: tuple[float, ...] = (), focal_gamma: float = 0.0
) -> Objective:
    """Returns single-label classification with class weights and the focal loss.

    Each row's cross-entropy is multiplied by the weight of its class and by (1 - p)^gamma, where p
    is the probability of its label (focal loss, Lin et al. 2017, arXiv 1708.02002, eq. 4). The
    class weights also apply to the linear models of the heads.

    Args:
      objective: SINGLE_LABEL.
      weights: weight of each class [C]; () weights all classes equally.
      focal_gamma: the focal loss's gamma; 0 for the plain cross-entropy.

    """

    def row_loss(logits: Array, labels: Array) -> Array:
        import jax.numpy as jnp

        losses = cross_entropy(logits, labels)
        labels = jnp.broadcast_to(labels, losses.shape)
        if focal_gamma:
            # The lower limit keeps the gradient finite: at 0 it is infinite for gamma below 1.
            losses = losses * jnp.maximum(-jnp.expm1(-losses), 1e-7) ** focal_gamma
        return losses * jnp.asarray(weights, jnp.float32)[labels] if weights else losses

    linear = objective.linear
    if weights:
        by_class, array = dict(enumerate(weights)), np.asarray(weights)
        linear = dataclasses.replace(
            linear,
            solver=lambda features, classes: multinomial_logistic(features, classes, by_class),
            loss=lambda logits, labels: mean_cross_entropy(logits, labels, array),
        )
    return dataclasses.replace(objective, row_loss=row_loss, linear=linear)


def answer(
    logits: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...]
) -> tuple[str, float]:
    """Returns the name of the class with the largest probability, and that probability."""
    return names[int(probabilities.argmax())], float(probabilities.max())


SINGLE_LABEL = Objective(
    name="single_label",
    metrics=(accuracy_metric(same_class), MATTHEWS, F1, MACRO_F1, BALANCED_ACCURACY),
    column=LabelColumn(
        read_names=read_names,
        read=read_classes,
        check=check_classes,
        strata=lambda labels: labels,
        strata_name="each class",
        present=np.unique,
        describe=describe_labels,
    ),
    linear=LinearModel(
        solver=multinomial_logistic,
        loss=mean_cross_entropy,
        constant=most_frequent,
        text_model=logistic_regression,
    ),
    row_loss=cross_entropy,
    predict=predicted_class,
    agrees=same_class,
    probabilities=softmax,
    answer=answer,
    constant_prediction=single_predicted_class,
    describe=lambda predicted, classes: f"class {cut_label(str(classes[int(predicted)]))!r}",
    read_targets=read_labels,
    categorical=CategoricalVariables(
        logits=lambda logits: logits[..., None, :],
        outcomes=lambda labels: labels[..., None],
        is_linear=True,
    ),
    outputs="classes",
)
