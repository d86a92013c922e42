"""The interface of an objective and of its metrics, and functions that objectives share.

Unless noted otherwise, array functions accept both JAX and NumPy arrays and do not import JAX, so
that trained models can be analyzed and served without it.

Shape letters: N rows (B in a batch), C outputs of an exit, V categorical variables with K outcomes
each, S statistics of a row, U statistics of a target.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.errors import UserError, check_choice
from sweet_jax.objectives.label_column import LabelColumn
from sweet_jax.objectives.linear_model import LinearModel
from sweet_jax.registry import import_entry

Array = Any  # jax.Array or np.ndarray


def share_standard_error(value: np.ndarray, rows: int) -> np.ndarray:
    """Computes the standard error of a share of `rows` rows, float [...].

    Two rows of either kind are added, so that the error is not 0 where all rows are right (Agresti
    and Coull 1998).
    """
    share = (np.clip(value, 0, 1) * rows + 2) / (rows + 4)
    return np.sqrt(share * (1 - share) / (rows + 4))


def correlation_standard_error(value: np.ndarray, rows: int) -> np.ndarray:
    """Computes the standard error of a correlation over `rows` rows, float [...]."""
    return (1 - np.clip(value, -1, 1) ** 2) / np.sqrt(rows)


def name_without_sign(metric: str) -> str:
    """Returns a metric's name without the "neg_" of a negated error, such as hamming_loss."""
    return metric.removeprefix("neg_")


class ShownMetric(NamedTuple):
    """Defines how a metric is shown to people: an error is positive, and lower is better."""

    name: str
    sign: int = 1  # -1 for a negated error

    @classmethod
    def of(cls, metric: str) -> "ShownMetric":
        """Returns how the metric of some name is shown."""
        name = name_without_sign(metric)
        return cls(metric) if name == metric else cls(name.replace("_", " "), -1)

    @property
    def better(self) -> str:
        """Returns a note for errors, otherwise ""."""
        return " (lower is better)" if self.sign < 0 else ""

    def value(self, value: Any) -> Any:
        """Returns a number or array as it is shown; None, for an unknown value, stays None."""
        return None if value is None else self.sign * value + 0.0  # no negative zero

    def values(self, values: Iterable[float | None]) -> list[Any]:
        """Returns values as they are shown."""
        return [self.value(value) for value in values]

    def interval(self, ends: Iterable[float | None]) -> list[Any]:
        """Returns an interval as it is shown, its lower end first."""
        return self.values(ends)[:: self.sign]

    def describe(self, value: float) -> str:
        """Returns the name and a value as they are shown, with four decimals."""
        return f"{self.name} {self.value(value):.4f}"


class TargetScaler(NamedTuple):
    """Standardizes targets, and converts predictions back to the targets' units."""

    mean: float
    std: float  # standard deviation

    def scale(self, targets: np.ndarray) -> np.ndarray:
        """Returns standardized targets, in their dtype."""
        return (targets - self.mean) / self.std

    def unscale(self, predictions: np.ndarray) -> np.ndarray:
        """Returns predictions of standardized targets in the targets' units, in their dtype."""
        return predictions * self.std + self.mean


@dataclasses.dataclass(frozen=True)
class Metric:
    """Defines a metric as a function of sums over rows, from which whole curves are computed.

    Larger is better. Targets have no axes before N; predictions may have some, such as the exits.

    Attributes:
      name: name of the metric, unique within its objective.
      row_statistics: function of (predictions, targets, C) that returns bool or numbers
        [..., N, S].
      target_statistics: function of (targets, C) that returns bool or numbers [N, U], which do not
        depend on the predictions.
      value: function of (sums of the row statistics [..., S], sums of the target statistics
        [..., U]) that returns the metric, float64 [...].
      is_share: whether the metric is the share of rows whose only statistic is True. Its intervals
        then have closed forms.
      standard_error: function of (values [...], number of rows) that returns the standard error,
        float [...], in closed form; None to use the jackknife, see
        `exits.metrics.jackknife_error`.
      is_error: whether the metric is a negated error, which the target `error` bounds.
      credit: function of (predictions, predictions or targets) that returns how right each row is,
        float [..., N] from 0 to 1; None if rows are either right or wrong. If set, PCEE and
        certificates use it.

    """

    name: str
    row_statistics: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    target_statistics: Callable[[np.ndarray, int], np.ndarray]
    value: Callable[[np.ndarray, np.ndarray], np.ndarray]
    is_share: bool = False
    standard_error: Callable[[np.ndarray, int], np.ndarray] | None = None
    is_error: bool = False
    credit: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class CategoricalVariables:
    """Defines the likelihood of targets: outputs are logits of independent categorical variables.

    Temperatures, confidences and the measures of calibration are computed from it. Single-label
    classification is one variable with C outcomes; multi-label classification is C variables with
    two outcomes each.

    Attributes:
      logits: function of the outputs [..., C] that returns the logits of the variables
        [..., V, K], for JAX and NumPy arrays.
      outcomes: function of the targets that returns the outcome of each variable, int [..., V].
      is_linear: whether `logits` is linear, so that the best temperature is the root of a monotone
        function.

    """

    logits: Callable[[Array], Array]
    outcomes: Callable[[np.ndarray], np.ndarray]
    is_linear: bool = False

    def outcome_count(self, outputs: int) -> int:
        """Returns K, the number of outcomes, for an exit with `outputs` outputs."""
        return self.logits(np.zeros(outputs)).shape[-1]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Defines what the outputs of an exit mean: loss, prediction, probabilities, metrics.

    The functions take logits float32 [..., N, C] and targets [N, ...], where the leading `...` of
    the logits may be the exits. Functions that accept JAX arrays can be traced by `jax.jit`.

    Attributes:
      name: key of the objective in OBJECTIVES.
      metrics: metrics that a model may be evaluated by, the default first.
      column: rules for reading the targets from a column of labels.
      linear: linear models for heads and baselines.
      row_loss: function of (logits, targets) that returns the loss of each row, float32 [..., N];
        JAX arrays only.
      predict: function of the logits that returns the predictions [..., N] or [..., N, C]; JAX and
        NumPy arrays.
      agrees: function of (predictions, predictions or targets) that returns whether they are the
        same, bool [..., N]; JAX and NumPy arrays. It defines accuracy, agreement between exits and
        the target of learning-to-exit. None for regression, which has no patience, oracles or
        certificates.
      probabilities: function of the logits that returns the probability of each output as answers
        show it, [..., N, C], or [..., N, 0] if outputs are not probabilities; JAX and NumPy arrays.
      answer: function of (logits [C], probabilities [C], names of the outputs) that returns (the
        prediction for one row in terms of its labels, its probability or None), as written to
        answers and files.
      constant_prediction: function of (logits, row_mask bool [N]) that returns a number for the
        prediction that all rows of the mask share, or -1 if they differ, int32 [...]; JAX and
        NumPy arrays. It is logged at every training step to detect collapsed exits.
      describe: function of (prediction, names of the outputs) that returns a description of the
        prediction, as in "collapsed to ...".
      read_targets: function of (targets, C) that returns the targets as NumPy arrays of the dtype
        used in files. Raises ValueError for invalid targets.
      target_per_output: whether a row has C targets, [N, C], rather than one, [N].
      categorical: likelihood of the targets; None if outputs are not logits of probabilities, so
        that policies that read probabilities cannot be used.
      default_policy: name of the exit policy of a run whose config names none; the preset's if
        empty.
      tuning_policy: name of the exit policy by which training states and learning rates are
        compared on tuning rows.
      exit_target: function of (logits, targets) that returns what learning-to-exit estimates, float
        [..., N] from 0 to 1; None if it estimates whether the prediction is right.
      measures: pairs of a name and a function of (predictions [N, ...], targets [N, ...]) that
        returns a float, reported for each exit in addition to the metric.
      fit_scaler: function of the targets that returns the scaler that standardizes them for
        training; None to train on the targets as they are. Saved models and outputs use the
        original units.
      decision_shifts: function of (logits float32 [N, C], targets) that returns what to subtract
        from the logits to maximize the metric on these rows, float [C]; None to subtract nothing.
      outputs: word for the C outputs of an exit.

    """

    name: str
    metrics: tuple[Metric, ...]
    column: LabelColumn
    linear: LinearModel
    row_loss: Callable[[Array, Array], Array]
    predict: Callable[[Array], Array]
    agrees: Callable[[Array, Array], Array] | None
    probabilities: Callable[[Array], Array]
    answer: Callable[[np.ndarray, np.ndarray, tuple[str, ...]], tuple[Any, float | None]]
    constant_prediction: Callable[[Array, Array], Array]
    describe: Callable[[np.ndarray, tuple[str, ...]], str]
    read_targets: Callable[[Any, int], np.ndarray]
    target_per_output: bool = False
    categorical: CategoricalVariables | None = None
    default_policy: str = ""
    tuning_policy: str = "raw_confidence"
    exit_target: Callable[[Array, Array], Array] | None = None
    measures: tuple[tuple[str, Callable[[np.ndarray, np.ndarray], float]], ...] = ()
    fit_scaler: Callable[[np.ndarray], TargetScaler] | None = None
    decision_shifts: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    outputs: str = "outputs"

    def mean_loss(self, logits: Array, targets: Array, row_mask: Array) -> Array:
        """Returns the loss averaged over the rows of row_mask bool [N], float32 [...]."""
        return masked_mean(self.row_loss(logits, targets), row_mask)

    def is_correct(self, logits: Array, targets: Array) -> Array:
        """Returns whether the prediction of each row equals its target, bool [..., N].

        Raises UserError for regression, whose predictions are not right or wrong.
        """
        predictions, xp = self.predict(logits), logits.__array_namespace__()
        return self.same(predictions, xp.broadcast_to(targets, predictions.shape))

    def same(self, predictions: Array, others: Array) -> Array:
        """Returns what `agrees` returns. Raises UserError if it is None."""
        if self.agrees is None:
            raise UserError(
                f"predictions of objective={self.name!r} are numbers, which are not right or "
                "wrong: patience, oracles and certificates apply only to classes and labels"
            )
        return self.agrees(predictions, others)

    def metric(self, metric: str | Metric) -> Metric:
        """Returns the metric with a name, or a Metric unchanged.

        The name "module:OBJECT" is that of a user-defined metric. Raises UserError if unknown.
        """
        if isinstance(metric, Metric):
            return metric
        if ":" in metric:
            return import_entry("metric", metric, Metric)
        named = {known.name: known for known in self.metrics}
        check_choice("metric", metric, named)
        return named[metric]


def accuracy_metric(agrees: Callable[[Array, Array], Array], name: str = "accuracy") -> Metric:
    """Returns a metric: the share of rows that are right according to `Objective.agrees`."""
    return Metric(
        name,
        lambda predictions, targets, outputs: agrees(predictions, targets)[..., None],
        lambda targets, outputs: np.ones((len(targets), 1), bool),
        lambda sums, totals: sums[..., 0] / totals[..., 0],
        is_share=True,
        standard_error=share_standard_error,
    )


def masked_mean(values: Array, row_mask: Array) -> Array:
    """Returns the mean of values [..., B] over the rows of row_mask bool [B], 0 without rows."""
    xp = values.__array_namespace__()
    present = xp.broadcast_to(row_mask, values.shape)  # [..., B]
    return xp.where(present, values, 0).sum(axis=-1) / xp.maximum(present.sum(axis=-1), 1)


def softmax(logits: Array) -> Array:
    """Returns the softmax over the last axis, in the dtype of the logits."""
    xp = logits.__array_namespace__()
    exponentials = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the log softmax over the last axis, like `scipy.special.log_softmax`."""
    largest = logits.max(axis=-1, keepdims=True)
    shifted = logits - np.where(np.isfinite(largest), largest, 0)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Computes numerator / denominator, 0 where the denominator is not positive."""
    above = denominator > 0
    return np.where(above, numerator / np.where(above, denominator, 1), 0.0)
