"""Regression: every row has one number, which an exit predicts with a single output.

Training uses standardized targets; saved models and outputs use the original units.

Shape letters: N rows (B in a batch), H features.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.errors import UserError, short_repr
from sweet_jax.objectives.label_checks import cut_label, is_number
from sweet_jax.objectives.label_column import LabelColumn, LabelError
from sweet_jax.objectives.linear_model import LinearModel, Solve
from sweet_jax.objectives.objective import (
    Array,
    Metric,
    Objective,
    TargetScaler,
    correlation_standard_error,
)

_STRATA = 10  # number of strata: groups of rows with similar targets
_ROUNDED = 0.01  # maximum rounding error in float32, in standard deviations of the targets
_CONSTANT = 1e-6  # relative difference below which predictions are considered equal


def squared_error(logits: Array, targets: Array) -> Array:
    """Returns the squared error of each row, float32 [..., B], of targets float32 [B]."""
    return _errors(logits, targets) ** 2


def _errors(logits: Array, targets: Array) -> Array:
    """Returns predictions minus targets [B], [..., B]."""
    values = logits[..., 0]
    return values - logits.__array_namespace__().broadcast_to(targets, values.shape)


def predicted_value(logits: Array) -> Array:
    """Returns the prediction, in the dtype of the logits, [..., B]."""
    return logits[..., 0]


def error_head_target(logits: Array, targets: Array) -> Array:
    """Returns 1 - tanh |error|, float32 [..., B], which learning-to-exit heads estimate.

    This is BERxiT's learning-to-exit for regression (Xin et al. 2021, section 3.3). The error is
    measured in standard deviations of the targets.
    """
    xp = logits.__array_namespace__()
    return 1 - xp.tanh(abs(_errors(logits, targets)))


def constant_value(logits: Array, row_mask: Array) -> Array:
    """Returns 0 if predictions for row_mask bool [B] are nearly equal, else -1; int32 [...]."""
    xp = logits.__array_namespace__()
    values = logits[..., 0]
    present = xp.broadcast_to(row_mask, values.shape)
    low = xp.where(present, values, xp.inf).min(axis=-1)
    high = xp.where(present, values, -xp.inf).max(axis=-1)
    close = high - low <= _CONSTANT * (xp.abs(high) + xp.abs(low))
    return xp.where(close, 0, -1).astype("int32")


def answer(
    logits: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...]
) -> tuple[float, None]:
    """Returns the number and None, since it has no probability."""
    return float(logits[0]), None


def read_targets(targets: Any, outputs: int) -> np.ndarray:
    """Returns targets as float32. Raises ValueError if one is not finite."""
    values = np.asarray(targets, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("targets must be finite")
    return values


def read_numbers(
    labels: Sequence[str], names: tuple[str, ...], texts: Sequence[tuple[str, ...]]
) -> np.ndarray:
    """Returns labels as numbers, float32 [N].

    Raises LabelError for a label that is not a number or too large for float32, and UserError for
    numbers that differ by so little that float32 would round most of them together.
    """
    numbers = np.asarray([float(text) if is_number(text) else np.nan for text in labels])
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    if not np.isfinite(rounded).all():
        row = int(np.isfinite(rounded).argmin())
        what = "is too large for float32" if np.isfinite(numbers[row]) else "is not a finite number"
        raise LabelError(
            f"label {cut_label(labels[row])!r} (the text {short_repr(texts[row][0], 40)}) {what}, "
            f"which objective=regression requires: {_cure(labels[row])}",
            row,
        )
    low, high = numbers.min(), numbers.max()
    if low < high and abs(rounded - numbers).max() > _ROUNDED * numbers.std():
        raise UserError(
            f"the numbers from {low:.16g} to {high:.16g} differ by too little for float32, which "
            f"would round them: subtract {low:.16g} from each"
        )
    return rounded


def _cure(label: str) -> str:
    """Returns what to do about a label that is not a number."""
    if "," in label and is_number(re.sub("[., ]", "", label)):
        return "write numbers with a decimal point and no other separator, such as 1234.5"
    return "correct it (classes need a model that is trained with another objective)"


def check_numbers(
    train: np.ndarray, validation: np.ndarray, names: tuple[str, ...], column: str
) -> None:
    """Raises UserError if all training targets, float [N], are equal."""
    if (train == train[0]).all():
        raise UserError(
            f"all training rows have the same number, {train[0]:g} (column {column!r}): there is "
            "nothing to learn"
        )


def quantile_strata(targets: np.ndarray) -> np.ndarray:
    """Returns the decile of each row's target, int [N] from 0 to 9.

    If at least nine tenths of the rows have the smallest target, they get 0 and the others 1.
    """
    inner = np.arange(1, _STRATA) / _STRATA
    limits = np.quantile(targets, inner, method="lower")
    if limits[-1] == targets.min():
        return (targets > limits[-1]).astype(int)
    return np.searchsorted(limits, targets, side="right")


def describe_numbers(targets: np.ndarray, names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Describes targets float [N], with a warning if they look like classes."""
    values = np.unique(targets)
    mean, spread = targets.mean(dtype=np.float64), targets.std(dtype=np.float64)
    said = (
        f"targets from {values[0]:g} to {values[-1]:g}, mean {mean:.4g}, standard deviation "
        f"{spread:.4g}, {len(values)} distinct numbers"
    )
    if len(values) > 2:
        return said, []
    return said, ["the targets have only two values: objective=single_label may fit better"]


def ridge(features: int, outputs: int) -> Solve:
    """Returns the solver of ridge regression in closed form, see `LinearModel`."""

    def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        mean = y.mean(dtype=np.float64)
        # Minimizes half the mean squared error + penalty / 2 |w|^2. Standardized features have
        # mean 0, so that the bias is the mean of the targets.
        gram = (x.T @ x).astype(np.float64) / len(x)
        moment = (x.T @ (y - mean).astype(np.float32)).astype(np.float64) / len(x)
        kernel = np.linalg.solve(gram + penalty * np.eye(features), moment)
        return kernel[:, None], np.asarray([mean])

    return solve


def mean_squared_error(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the mean squared error of logits [N, 1] for targets [N]."""
    return float(((logits[:, 0] - targets) ** 2).mean(dtype=np.float64))


def ridge_estimator(inverse_penalty: float, max_iter: int) -> Any:
    """Returns a ridge regression, see `LinearModel.text_model`."""
    from sklearn.linear_model import Ridge

    # The middle one of the usual inverse penalties, 10, gives scikit-learn's default of 1.
    return Ridge(alpha=10 / inverse_penalty, solver="sparse_cg")  # needs no limit of iterations


def fit_scaler(targets: np.ndarray) -> TargetScaler:
    """Returns the scaler of targets float [N]."""
    return TargetScaler(float(targets.mean(dtype=np.float64)), float(targets.std(dtype=np.float64)))


def absolute_error(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the absolute errors, float64 [..., N]."""
    return np.abs(np.asarray(predicted, np.float64) - targets)


def mean_absolute_error(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Returns the mean absolute error of predictions for targets [N]."""
    return float(absolute_error(predicted, targets).mean())


# Negated, and named as in scikit-learn, so that larger is better. If errors are normally
# distributed, the standard deviation of |error| is sqrt(pi / 2 - 1) times its mean.
NEG_MEAN_ABSOLUTE_ERROR = Metric(
    "neg_mean_absolute_error",
    lambda predicted, targets, outputs: absolute_error(predicted, targets)[..., None],
    lambda targets, outputs: np.ones((len(targets), 1), bool),
    lambda sums, totals: 0.0 - sums[..., 0] / totals[..., 0],  # no negative zero
    standard_error=lambda value, rows: math.sqrt((math.pi / 2 - 1) / rows) * np.abs(value),
    is_error=True,
)


def _products(predicted: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
    targets, centre = _centred(targets)
    predicted = np.asarray(predicted, np.float64) - centre
    return np.stack([predicted, predicted**2, predicted * targets], axis=-1)  # [..., N, 3]


def _moments(targets: np.ndarray, outputs: int) -> np.ndarray:
    targets, _ = _centred(targets)
    return np.stack([np.ones_like(targets), targets, targets**2], axis=-1)  # [N, 3]


def _centred(targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the targets minus their mean, and the mean.

    Centering does not change a correlation, but it avoids cancellation between large sums.
    """
    targets = np.asarray(targets, np.float64)
    centre = float(targets.mean())
    return targets - centre, centre


def correlation(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Computes Pearson's correlation: 0 if either side is constant, NaN if predictions are NaN.

    Predictions and targets are centered by the same number, see `_centred`. A side is also taken
    for constant if its variance is at most 1e-12 of its mean square after centering.

    Args:
      sums: sums of the predictions, of their squares, and of their products with the targets,
        [..., 3].
      totals: number of rows, sum of the targets, and sum of their squares, [..., 3].

    """
    count = totals[..., 0]
    means, centre = sums[..., 0] / count, totals[..., 1] / count
    covariance = sums[..., 2] / count - means * centre
    squares = sums[..., 1] / count, totals[..., 2] / count
    spreads = [np.maximum(s - m**2, 0) for s, m in zip(squares, (means, centre), strict=True)]
    # A spread below the rounding error of the sums counts as zero.
    sound = [s > 1e-12 * np.maximum(q, 1e-300) for s, q in zip(spreads, squares, strict=True)]
    product = np.sqrt(np.where(sound[0] & sound[1], spreads[0] * spreads[1], 1.0))
    correlation = np.where(sound[0] & sound[1], np.clip(covariance / product, -1, 1), 0.0)
    return np.where(np.isnan(covariance), np.nan, correlation)  # NaN for exits that diverged


PEARSON = Metric(
    "pearson", _products, _moments, correlation, standard_error=correlation_standard_error
)


def pearson(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Returns Pearson's correlation of predictions and targets [N].

    It is 0 if either is constant, or nearly so: see `correlation`.
    """
    return float(correlation(_products(predicted, targets, 1).sum(0), _moments(targets, 1).sum(0)))


def spearman(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Returns Spearman's correlation: Pearson's correlation of the ranks, with average ties."""
    from scipy.stats import rankdata  # imported here because a served model does not need SciPy

    return pearson(rankdata(predicted), rankdata(targets))


REGRESSION = Objective(
    name="regression",
    metrics=(NEG_MEAN_ABSOLUTE_ERROR, PEARSON),
    column=LabelColumn(
        read_names=lambda labels, declared, column: (column,),
        read=read_numbers,
        check=check_numbers,
        strata=quantile_strata,
        strata_name="small and large numbers",
        present=lambda targets: np.zeros(0, int),
        describe=describe_numbers,
    ),
    linear=LinearModel(
        solver=ridge,
        loss=mean_squared_error,
        constant=lambda targets, outputs: np.median(targets),
        text_model=ridge_estimator,
        baselines=("constant", "tfidf_ridge"),
    ),
    row_loss=squared_error,
    predict=predicted_value,
    agrees=None,
    probabilities=lambda logits: logits[..., :0],
    answer=answer,
    constant_prediction=constant_value,
    describe=lambda predicted, names: f"{predicted:g}",
    read_targets=read_targets,
    default_policy="stability",
    tuning_policy="stability",
    exit_target=error_head_target,
    measures=(
        ("mean_absolute_error", mean_absolute_error),
        ("pearson", pearson),
        ("spearman", spearman),
    ),
    fit_scaler=fit_scaler,
    outputs="output",
)
