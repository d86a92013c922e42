"""Shows the statistics of an audit, as an HTML page and as Prometheus metrics."""

import datetime
import html
import math
import string
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sweet_jax.inference.audit_statistics import AuditSummary, ExitAudit
from sweet_jax.server.audit import Audit

_PAGE = Path(__file__).parent / "audit.html"
# The saved confidences of calibration rows are then not those of the calibrator that answers.
_KNOWN = "calibration rows; NaN under PCEE and with a target of risk or agreement"


def render_page(audit: Audit, task: str) -> str:
    """Returns the HTML page of an audit."""
    summary, counts = audit.summary(), audit.counts()
    state, kind = _state(audit, summary)
    agreement = f"{_number(summary.agreement)}, {summary.level:.0%} confidence sequence "
    bounds = f"{_number(summary.low)} to {_number(summary.high)}"
    agreement += "unknown: the agreement has changed" if math.isnan(summary.low) else bounds
    if summary.target is not None:
        agreement += f"; the target is at least {_number(summary.target)}"
    values = {
        "title": f"{task}: audit",
        "state": state,
        "class": kind,
        "agreement": agreement,
        "cost": f"{_number(summary.cost)} of the layers; {_number(summary.expected_cost)} on "
        "calibration rows",
        "texts": f"{counts.answered:,} answered at the server's own operating point, "
        f"{summary.audited:,} audited, {counts.waiting:,} waiting, {counts.dropped:,} dropped",
    }
    escaped = {name: html.escape(value) for name, value in values.items()}
    escaped["rows"] = "\n".join(map(_row, summary.exits))
    return string.Template(_PAGE.read_text(encoding="utf-8")).substitute(escaped)


def _state(audit: Audit, summary: AuditSummary) -> tuple[str, str]:
    """Returns the state of the audit in words, and its CSS class: "good", "bad" or ""."""
    if not audit.running:
        return "The audit has ended with an error; see the server's log.", "bad"
    alarms = [
        (summary.alarm, "agreement is below its target"),
        (summary.shift_alarm, "the texts have changed"),
    ]
    sentences = [
        f"Alarm since {datetime.datetime.fromtimestamp(when, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC: "
        f"{event}."
        for when, event in alarms
        if when is not None
    ]
    if sentences:
        return " ".join(sentences), "bad"
    if summary.target is None:
        return (
            "No alarm. No target was set for the agreement, so only a change of the texts raises "
            "an alarm.",
            "",
        )
    return "No alarm.", "good"


def _row(exit: ExitAudit) -> str:
    cells = "".join(f"<td>{_number(value)}</td>" for value in exit[1:])
    return f'<tr><th scope="row">layer {exit.layer}</th>{cells}</tr>'


def _number(value: float) -> str:
    if 0 < value < 0.00005:
        return "below 0.0001"
    return f"{value:.4f}" if math.isfinite(value) else "unknown"


class AuditCollector:
    """Collects the metrics of an audit for Prometheus; register it in a `CollectorRegistry`."""

    def __init__(self, audit: Audit):
        self._audit = audit

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics; unknown values are NaN."""
        summary, counts = self._audit.summary(), self._audit.counts()
        for name, text, count in (
            ("texts", "Texts computed by all exits", summary.audited),
            ("dropped_texts", "Texts drawn but dropped: too many were waiting", counts.dropped),
        ):
            yield CounterMetricFamily(f"sweet_jax_audit_{name}", text, count)
        gauges: tuple[tuple[str, str, float | None], ...] = (
            ("answer_agreement", "Agreement of answers with the full model", summary.agreement),
            ("answer_agreement_low", "Lower end of its confidence sequence", summary.low),
            ("answer_agreement_high", "Upper end of its confidence sequence", summary.high),
            ("agreement_target", "Minimum agreement", summary.target),
            ("capital", "Largest capital of the test against the target", summary.capital),
            ("alarm", "1 once agreement was found below its target", summary.alarm is not None),
            ("shift_capital", "Largest capital of the shift test", summary.shift_capital),
            (
                "shift_alarm",
                "1 once a shift of the texts was found",
                summary.shift_alarm is not None,
            ),
            ("running", "0 once an error has ended the audit", self._audit.running),
            ("cost", "Mean share of layers computed, newest texts", summary.cost),
            ("expected_cost", f"Mean share of layers, {_KNOWN}", summary.expected_cost),
        )
        for name, text, number in gauges:
            value = math.nan if number is None else float(number)
            yield GaugeMetricFamily(f"sweet_jax_audit_{name}", text, value)
        for name, text, field in (
            ("exit_agreement", "Agreement of an exit with the full model", "agreement"),
            ("exit_share", "Share of the newest texts that exit at an exit", "share"),
            ("expected_exit_share", f"The same share, {_KNOWN}", "expected_share"),
            ("stability_index", f"Population stability index against {_KNOWN}", "stability"),
            ("shift_p_value", f"P-value of a shift, for one look, against {_KNOWN}", "p_value"),
        ):
            family = GaugeMetricFamily(f"sweet_jax_audit_{name}", text, labels=["exit"])
            for exit in summary.exits:
                family.add_metric([str(exit.layer)], getattr(exit, field))
            yield family
