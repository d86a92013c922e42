"""Statistics of an audit: agreement with the full model, shift of confidences, exits and cost.

Shape letters: E exit, N texts, C classes.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.policies import UnlabeledOutputs, exit_confidences, policy_name
from sweet_jax.exits.sequential import ConfidenceSequence, MeanTest, ShiftTest
from sweet_jax.exits.shift import (
    calibration_histograms,
    comparable_front,
    population_stability_index,
    two_sample_p_value,
)
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.audit_log import AuditRow
from sweet_jax.inference.scheduler import ExitRule, Request

_WINDOW = 1000  # number of newest audited texts that shares and shifts are computed from


class ExitAudit(NamedTuple):
    """Holds the statistics of one exit.

    Attributes:
      layer: layer of the exit.
      agreement: share of all audited texts for which this exit predicts what the last exit does;
        their mean credit if the metric gives partial credit, see `AuditRow`.
      share, expected_share: share of the newest audited texts, and of the calibration rows, that
        exit here; NaN if unknown, see `comparable_front`.
      stability, p_value: population stability index, and p-value of a two-sample test, of the
        newest audited texts against the calibration rows, see `exits/shift.py`; NaN if unknown, and
        for the last exit, where all remaining texts exit.

    """

    layer: int
    agreement: float
    share: float
    expected_share: float
    stability: float
    p_value: float


class AuditSummary(NamedTuple):
    """Holds the statistics of an audit so far.

    Attributes:
      audited: number of texts computed by all exits.
      exits: statistics of each exit.
      agreement: agreement of the served answers with the last exit over all audited texts; NaN if
        there are none.
      low, high: confidence sequence of the agreement; NaN if the agreement has changed.
      cost, expected_cost: mean share of the layers computed for the newest audited texts, and for
        the calibration rows; NaN if unknown.
      target: minimum agreement; None for no alarm.
      level: level of the confidence sequence, and of both alarms together.
      capital: largest capital so far of the test against the target; the alarm is raised at
        2 / (1 - level).
      alarm: time of the alarm, in seconds since 1970; None if it was not raised.
      shift_capital, shift_alarm: capital and alarm of the test that the answered texts have not
        changed.

    """

    audited: int
    exits: list[ExitAudit]
    agreement: float
    low: float
    high: float
    cost: float
    expected_cost: float
    target: float | None
    level: float
    capital: float
    alarm: float | None
    shift_capital: float
    shift_alarm: float | None


class AuditStatistics:
    """Accumulates statistics of audited texts that were answered with one exit rule.

    Args:
      model: the model that answered.
      rule: the exit rule that it answered with.
      target: minimum share of answers that equal the full model's; None for no alarm.
      level: 1 - the probability that either alarm is ever raised falsely.

    Raises UserError for a regression.

    Attributes:
      alarm, shift_alarm: times at which the test found that the target is missed, and that the
        texts have changed, in seconds since 1970; None if it did not.

    """

    def __init__(self, model: ModelArtifact, rule: ExitRule, target: float | None, level: float):
        if model.objective.agrees is None:
            raise UserError(
                "an audit counts how often an exit agrees with the last one, but the numbers of a "
                f"regression such as {model.task} are hardly ever equal: leave --audit out"
            )
        self._model, self._rule, self._target, self._level = model, rule, target, level
        # Certificates count agreement in the same way, and the target may come from one.
        objective = model.objective
        metric = objective.metric(model.resolver.metric or objective.metrics[0])
        self._agrees = metric.credit or objective.same
        name = policy_name(rule.policy)
        self._front = comparable_front(model.resolver, name, rule.calibrator)
        self._histograms = calibration_histograms(self._front) if self._front else []
        losses = model.resolver.losses.get(name)
        # Certificates are tested on half of the calibration rows; the other half fitted the
        # temperatures and candidate thresholds that they are tested with.
        self._calibration_rows = 2 * losses["agreement"].rows if losses else 0
        self._agreeing = np.zeros(len(model.layers))  # [E], sum over all audited texts
        self._newest: deque[AuditRow] = deque(maxlen=_WINDOW)
        self._sequence = ConfidenceSequence(level)
        test_level = 1 - (1 - level) / 2  # level of each of two tests, which together have `level`
        self._test = None if target is None else MeanTest(target, test_level)
        self._shift = ShiftTest(test_level)
        self.alarm: float | None = None
        self.shift_alarm: float | None = None

    def answer_confidences(self, requests: Sequence[Request]) -> np.ndarray:
        """Computes the confidence of answered texts at the exit that answered, float64 [N]."""
        confidences = np.empty(len(requests))
        counts = np.asarray([len(request.logits) for request in requests])
        for count in set(counts.tolist()):
            indices = np.flatnonzero(counts == count).tolist()
            group = [requests[index] for index in indices]
            logits = np.stack([request.logits for request in group], axis=1)[None]  # [1, E', N, C]
            learned = [request.exit_scores for request in group]
            scores = np.asarray(learned, np.float32).T[None] if learned[0] else None
            layers = np.asarray(self._rule.layers[:count])
            outputs = UnlabeledOutputs(logits, layers, scores, self._rule.objective)
            calibrator = self._rule.calibrator.first_exits(count)
            confidences[indices] = exit_confidences(outputs, self._rule.policy, [calibrator])[0, -1]
        return confidences

    def add_answered(self, confidences: Iterable[float], draws: Iterable[float]) -> bool:
        """Adds the `answer_confidences` of texts, each with a uniform draw.

        Returns whether they raise the alarm that the texts have changed.
        """
        for confidence, draw in zip(confidences, draws, strict=True):
            self._shift = self._shift.observe(confidence, draw)
        raised = self._shift.rejected and self.shift_alarm is None
        if raised:
            self.shift_alarm = time.time()
        return raised

    def row(
        self, logits: np.ndarray, scores: np.ndarray | None, exit: int, text: Any = None
    ) -> AuditRow:
        """Returns the row of an audited text.

        Args:
          logits: logits of all exits, float32 [E, C].
          scores: learning-to-exit scores of all exits, float32 [E], or None.
          exit: index of the exit that answered.
          text: the text or pair of texts, if the row keeps it.

        """
        outputs = UnlabeledOutputs(
            logits[None, :, None],
            np.asarray(self._rule.layers),
            None if scores is None else scores[None, :, None],
            self._rule.objective,
        )
        confidences = exit_confidences(outputs, self._rule.policy, [self._rule.calibrator])
        predictions = outputs.predictions[0]  # [E, 1] or [E, 1, C]
        agrees = self._agrees(predictions, predictions[-1])[:, 0]
        return AuditRow(time.time(), exit, agrees, confidences[0, :, 0], logits, scores, text)

    def add(self, row: AuditRow) -> bool:
        """Adds a row; returns whether it raises the alarm that the target is missed."""
        self._agreeing += row.agrees
        self._newest.append(row)
        value = float(row.agrees[row.exit])
        self._sequence = self._sequence.observe(value)
        if self._test is None:
            return False
        self._test = self._test.observe(value)
        raised = self._test.rejected and self.alarm is None
        if raised:
            self.alarm = row.time
        return raised

    def summary(self) -> AuditSummary:
        """Returns the statistics so far."""
        cost, audited = self._model.cost, self._sequence.count
        counts = np.bincount([row.exit for row in self._newest], minlength=len(cost))
        shares = counts / len(self._newest) if audited else np.full(len(cost), np.nan)
        expected = np.full(len(cost), np.nan)
        if self._front is not None:
            expected = self._front.shares_at(self._rule.threshold)
        return AuditSummary(
            audited,
            self._exits(shares, expected),
            self._sequence.mean,
            *self._sequence.interval,
            float(shares @ cost),
            float(expected @ cost),
            self._target,
            self._level,
            1.0 if self._test is None else self._test.largest,
            self.alarm,
            self._shift.largest,
            self.shift_alarm,
        )

    def _exits(self, shares: np.ndarray, expected: np.ndarray) -> list[ExitAudit]:
        """Returns the statistics of each exit; shares and expected are float64 [E]."""
        layers, exits = self._rule.layers, []
        rows = [row.confidence for row in self._newest]
        reached = np.maximum.accumulate(np.asarray(rows).reshape(-1, len(layers)), axis=1)  # [N, E]
        agreement = self._agreeing / self._sequence.count if rows else np.full(len(layers), np.nan)
        for e, layer in enumerate(layers):
            stability = p_value = np.nan
            if e < len(self._histograms):
                histogram = self._histograms[e]
                counts = histogram.count_in_bins(reached[:, e])
                stability = population_stability_index(histogram.shares, counts)
                p_value = two_sample_p_value(histogram.shares, self._calibration_rows, counts)
            values = (agreement[e], shares[e], expected[e], stability, p_value)
            exits.append(ExitAudit(layer, *map(float, values)))
        return exits


def certified_agreement(model: ModelArtifact, rule: ExitRule, level: float) -> float | None:
    """Returns a lower confidence bound of a rule's agreement with the full model.

    The bound is computed on the calibration rows that certificates are tested on; None if there are
    none. Its level is approximate, since these rows may have chosen the threshold too. Raises
    UserError if SciPy is not installed.
    """
    resolver = model.resolver
    losses = resolver.losses.get(policy_name(rule.policy))
    if not losses:
        return None
    return losses["agreement"].kept_at(rule.threshold, level, resolver.compared)
