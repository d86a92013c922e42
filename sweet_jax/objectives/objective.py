"""The interface of an objective and of its metrics, and functions that objectives share.

Functions of arrays take JAX and NumPy arrays alike and import neither library: what has been
trained is analysed and served without JAX.

Shape letters: N rows (B in a batch), C outputs of an exit, V categorical variables with K outcomes
each, S statistics of a row, U statistics of a target.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from sweet_jax.config import UserError, check_choice
from sweet_jax.objectives.label_column import LabelColumn
from sweet_jax.objectives.linear_model import LinearModel

Array = Any  # jax.Array or np.ndarray


def share_standard_error(value: np.ndarray, rows: int) -> np.ndarray:
    """Computes the standard error of a share of so many rows, float [...].

    Two rows more of either kind, so that it is not 0 where all rows are right (Agresti and Coull
    1998).
    """
    share = (np.clip(value, 0, 1) * rows + 2) / (rows + 4)
    return np.sqrt(share * (1 - share) / (rows + 4))


def correlation_standard_error(value: np.ndarray, rows: int) -> np.ndarray:
    """Computes the standard error of a correlation over so many rows, float [...]."""
    return (1 - np.clip(value, -1, 1) ** 2) / np.sqrt(rows)


@dataclasses.dataclass(frozen=True)
class Metric:
    """Defines a metric as a function of sums over rows, so that sums alone give a whole curve.

    Larger is better. Targets have no axes in front of N; predictions may have more (the exits).

    Attributes:
      name: unique among the metrics of its objective.
      row_statistics: (predictions, targets, C) → bool or numbers [..., N, S].
      target_statistics: (targets, C) → bool or numbers [N, U]: what predictions do not change.
      value: (sums of the row statistics [..., S], of the target statistics [..., U]) → float64
        [...], the metric.
      is_share: the metric is the share of rows whose one statistic is True: there are closed forms
        of its intervals.
      standard_error: (values [...], number of rows) → float [...], where there is a closed form;
        None: by the jackknife, see `exits.metrics.jackknife_error`.
      is_error: the metric is the negative of an error, which the target `error` bounds.
      credit: (predictions, predictions or targets) → float [..., N], from 0 to 1: how right each
        row is, where that is more than right or wrong. PCEE and certificates are then of it.

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

    Temperatures, confidences and the quality of a calibration follow from it. Single-label
    classification is one variable of C outcomes, multi-label classification C of two.

    Attributes:
      logits: outputs [..., C] → the logits of V variables [..., V, K]; on both kinds of array.
      outcomes: targets → the outcome of each variable, int [..., V].

    """

    logits: Callable[[Array], Array]
    outcomes: Callable[[np.ndarray], np.ndarray]

    def outcome_count(self, outputs: int) -> int:
        """Returns K for so many outputs of an exit."""
        return self.logits(np.zeros(outputs)).shape[-1]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Defines what the outputs of an exit mean: loss, prediction, probabilities, metrics.

    Functions of logits float32 [..., N, C] and targets [N, ...] without the axes in front of N, as
    rows of a split have them; `...` may be the exits. Those on JAX arrays trace under `jax.jit`.

    Attributes:
      name: its key in OBJECTIVES.
      metrics: that it may be evaluated by, the default first.
      column: how its targets are read from a column of labels.
      linear: the linear models of its heads and baselines.
      row_loss: (logits, targets) → float32 [..., N], the loss of each row; on JAX arrays.
      predict: logits → the predictions [..., N] or [..., N, C]; on both kinds of array.
      agrees: (predictions, predictions or targets) → bool [..., N], whether they are the same:
        accuracy, agreement of exits and the target of learning-to-exit; on both kinds. None where
        predictions are numbers: there is no patience, oracle or certificate then.
      probabilities: logits → what an answer shows of each output, [..., N, C]; on both kinds.
        Without outputs, [..., N, 0], where they are no probabilities.
      answer: (logits [C], probabilities [C], names of the outputs) → (the prediction of one row in
        the terms of its labels, its probability or None), as answers and files have them.
      constant_prediction: (logits, row_mask bool [N]) → int32 [...], a number for the one
        prediction that all rows of the mask have, -1 where they differ; on both kinds. It is
        logged with every training step: by it an exit that has collapsed is found.
      describe: (prediction, names of the outputs) → words for it, as in "collapsed to ...".
      read_targets: (targets, C) → NumPy targets of the dtype that files have. Raises ValueError
        for impossible ones.
      target_per_output: a row has C targets, [N, C], rather than one, [N].
      categorical: the likelihood of targets; None where outputs are not logits of probabilities,
        and policies that read a probability cannot be used.
      tuning_policy: name of the exit policy that compares states and rates on tuning rows.
      exit_target: (logits, targets) → float [..., N] from 0 to 1, what learning-to-exit estimates;
        None: whether the prediction is right.
      measures: (name, function of predictions [N, ...] and targets [N, ...] → float), reported of
        each exit beside the metric.
      units: targets → (mean, standard deviation), by which they are standardised for training;
        None where they are trained on as they are. Saved models and outputs are in the targets'
        own units.
      decision_shifts: (logits float32 [N, C], targets) → float [C], what is subtracted from the
        logits so that predictions have the best metric on these rows; None where nothing is.
      outputs: the word for the C outputs of an exit.

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
    tuning_policy: str = "raw_confidence"
    exit_target: Callable[[Array, Array], Array] | None = None
    measures: tuple[tuple[str, Callable[[np.ndarray, np.ndarray], float]], ...] = ()
    units: Callable[[np.ndarray], tuple[float, float]] | None = None
    decision_shifts: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    outputs: str = "outputs"

    def mean_loss(self, logits: Array, targets: Array, row_mask: Array) -> Array:
        """Returns the loss averaged over the rows of row_mask bool [N], float32 [...]."""
        return masked_mean(self.row_loss(logits, targets), row_mask)

    def is_correct(self, logits: Array, targets: Array) -> Array:
        """Returns whether each row is predicted as its target says, bool [..., N].

        Raises UserError where predictions are numbers, which are not right or wrong.
        """
        predictions, xp = self.predict(logits), logits.__array_namespace__()
        return self.same(predictions, xp.broadcast_to(targets, predictions.shape))

    def same(self, predictions: Array, others: Array) -> Array:
        """Returns what `agrees` does. Raises UserError where it is None."""
        if self.agrees is None:
            raise UserError(
                f"predictions of the objective {self.name!r} are numbers, which are not right or "
                "wrong: patience, oracles and certificates are of classes and labels"
            )
        return self.agrees(predictions, others)

    def metric(self, metric: str | Metric) -> Metric:
        """Returns the metric of this name; a Metric as it is. Raises UserError for other names."""
        if isinstance(metric, Metric):
            return metric
        named = {known.name: known for known in self.metrics}
        check_choice("metric", metric, named)
        return named[metric]


def accuracy_metric(agrees: Callable[[Array, Array], Array], name: str = "accuracy") -> Metric:
    """Returns the share of rows that `agrees` (see `Objective`) calls right."""
    return Metric(
        name,
        lambda predictions, targets, outputs: agrees(predictions, targets)[..., None],
        lambda targets, outputs: np.ones((len(targets), 1), bool),
        lambda sums, totals: sums[..., 0] / totals[..., 0],
        is_share=True,
        standard_error=share_standard_error,
    )


def masked_mean(values: Array, row_mask: Array) -> Array:
    """Returns the mean of values [..., B] over the rows of row_mask bool [B]; 0 of no rows."""
    xp = values.__array_namespace__()
    present = xp.broadcast_to(row_mask, values.shape)  # [..., B]
    return xp.where(present, values, 0).sum(axis=-1) / xp.maximum(present.sum(axis=-1), 1)


def softmax(logits: Array) -> Array:
    """Returns softmax over the last axis, in the dtype of the logits."""
    xp = logits.__array_namespace__()
    exponentials = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax over the last axis, as `scipy.special.log_softmax` does."""
    largest = logits.max(axis=-1, keepdims=True)
    shifted = logits - np.where(np.isfinite(largest), largest, 0)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Computes numerator / denominator, 0 where the denominator is not positive."""
    above = denominator > 0
    return np.where(above, numerator / np.where(above, denominator, 1), 0.0)
