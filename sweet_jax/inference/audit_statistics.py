"""Statistics of an audit: agreement with the full model, the shift of confidences, exits and cost.

Shape letters: E exit, N texts, C classes.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.exits.policies import UnlabeledOutputs, exit_confidences, policy_name
from sweet_jax.exits.sequential import ConfidenceSequence, MeanTest, ShiftTest
from sweet_jax.exits.shift import (
    calibration_histograms,
    population_stability_index,
    two_sample_p_value,
)
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.audit_log import AuditRow
from sweet_jax.inference.scheduler import ExitRule, Request

_WINDOW = 1000  # audited texts that shares and shifts are of: the newest


class ExitAudit(NamedTuple):
    """Holds what an audit has found of one exit.

    Attributes:
      layer: of the exit.
      agreement: share of all audited texts with the last exit's prediction; their mean credit, see
        `AuditRow`.
      share, expected_share: of the newest audited texts, and of the calibration rows, that leave
        here; NaN where not known.
      stability, p_value: of the newest against the calibration rows, see `exits/shift.py`; NaN of
        the last exit, which takes what is left.

    """

    layer: int
    agreement: float
    share: float
    expected_share: float
    stability: float
    p_value: float


class AuditSummary(NamedTuple):
    """Holds what an audit has found so far.

    Attributes:
      audited: texts computed by all exits.
      exits: of each exit.
      agreement: likewise, of the audited answers; NaN of none.
      low, high: its confidence sequence.
      cost, expected_cost: mean share of the layers, of the newest and of the calibration rows.
      target: the agreement to be kept, None for none.
      level: of the confidence sequence, and of both alarms together.
      capital: the largest so far of the test against the target; 2 / (1 - level) is an alarm.
      alarm: when it was raised, in seconds since 1970; None where it was not.
      shift_capital, shift_alarm: likewise, of the test that the answered texts do not change.

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
    """Adds up audited texts that were answered by one rule.

    Args:
      model: that answered.
      rule: by which it did.
      target: share of the answers that are to be the full model's; None: no alarm.
      level: 1 - the chance of a false alarm of either kind, ever.

    Raises UserError for a regression.

    Attributes:
      alarm, shift_alarm: when the target was found to be missed, and the texts to have changed, in
        seconds since 1970; None before.

    """

    def __init__(self, model: ModelArtifact, rule: ExitRule, target: float | None, level: float):
        if model.objective.agrees is None:
            raise UserError(
                f"an audit counts how often an exit agrees with the last one: {model.task} is a "
                "regression, whose numbers hardly ever do; leave --audit out"
            )
        self._model, self._rule, self._target, self._level = model, rule, target, level
        # As certificates, which the target may come from, count it.
        objective = model.objective
        metric = objective.metric(model.resolver.metric or objective.metrics[0])
        self._agrees = metric.credit or objective.same
        name = policy_name(rule.policy)
        self._front = model.resolver.fronts.get(name)
        self._histograms = calibration_histograms(self._front) if self._front else []
        losses = model.resolver.losses.get(name)
        # Half of the calibration rows fitted what the counts are of.
        self._calibration_rows = 2 * losses["agreement"].rows if losses else 0
        self._agreeing = np.zeros(len(model.layers))  # [E], of all audited texts
        self._newest: deque[AuditRow] = deque(maxlen=_WINDOW)
        self._sequence = ConfidenceSequence(level)
        each = 1 - (1 - level) / 2  # of two tests, so that both together err at most at the level
        self._test = None if target is None else MeanTest(target, each)
        self._shift = ShiftTest(each)
        self.alarm: float | None = None
        self.shift_alarm: float | None = None

    def answer_confidences(self, requests: Sequence[Request]) -> np.ndarray:
        """Returns the exit confidence of answered texts at the exit that answered, float64 [N]."""
        found = np.empty(len(requests))
        counts = np.asarray([len(request.logits) for request in requests])
        for count in set(counts.tolist()):
            places = np.flatnonzero(counts == count).tolist()
            own = [requests[place] for place in places]
            logits = np.stack([request.logits for request in own], axis=1)[None]  # [1, E', N, C]
            learned = [request.exit_scores for request in own]
            scores = np.asarray(learned, np.float32).T[None] if learned[0] else None
            layers = np.asarray(self._rule.layers[:count])
            outputs = UnlabeledOutputs(logits, layers, scores, self._rule.objective)
            calibrator = self._rule.calibrator.first_exits(count)
            found[places] = exit_confidences(outputs, self._rule.policy, [calibrator])[0, -1]
        return found

    def add_answered(self, confidences: Iterable[float], draws: Iterable[float]) -> bool:
        """Adds the `answer_confidences` of texts, each with a uniform draw.

        Returns whether the alarm that texts have changed is raised by them.
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
        """Returns the row of a text that was answered at an exit, by its index.

        logits, scores: of all exits, float32 [E, C] and [E], see `AuditRow`.
        """
        outputs = UnlabeledOutputs(
            logits[None, :, None],
            np.asarray(self._rule.layers),
            None if scores is None else scores[None, :, None],
            self._rule.objective,
        )
        found = exit_confidences(outputs, self._rule.policy, [self._rule.calibrator])
        given = outputs.predictions[0]  # [E, 1] or [E, 1, C]
        agrees = self._agrees(given, given[-1])[:, 0]
        return AuditRow(time.time(), exit, agrees, found[0, :, 0], logits, scores, text)

    def add(self, row: AuditRow) -> bool:
        """Adds a row; returns whether the alarm is raised by it."""
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
        """Returns what was found so far."""
        cost, audited = self._model.cost, self._sequence.count
        taken = np.bincount([row.exit for row in self._newest], minlength=len(cost))
        shares = taken / len(self._newest) if audited else np.full(len(cost), np.nan)
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
        """Returns what was found of each exit; shares and expected are float64 [E]."""
        layers, found = self._rule.layers, []
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
            one = (agreement[e], shares[e], expected[e], stability, p_value)
            found.append(ExitAudit(layer, *map(float, one)))
        return found


def certified_agreement(model: ModelArtifact, rule: ExitRule, level: float) -> float | None:
    """Returns a lower confidence bound of the agreement with the full model at a rule's threshold.

    By the calibration rows that certificates are tested on; None where there are none. The level is
    approximate: these rows may have chosen the threshold too. Raises UserError without SciPy.
    """
    resolver = model.resolver
    losses = resolver.losses.get(policy_name(rule.policy))
    if not losses:
        return None
    return losses["agreement"].kept_at(rule.threshold, level, resolver.compared)
