"""Policies against loops over examples, reliability curves, and the accuracy of PCEE."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulation import brute_force, tables

from sweet_jax import ExitOutputs, simulate
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse, load_analysis
from sweet_jax.exits.calibration import Calibrator, fit_calibrators, outcome_probabilities
from sweet_jax.exits.confidences import Policy
from sweet_jax.exits.cross_fitting import cross_fitted_confidences
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import (
    POLICIES,
    UnlabeledOutputs,
    exit_confidences,
    grid_thresholds,
)
from sweet_jax.exits.reliability import (
    CURVES,
    ReliabilityCurve,
    confidence_quality,
    fit_reliability_curve,
)
from sweet_jax.exits.thresholds import breakpoints, format_threshold
from sweet_jax.objectives import SINGLE_LABEL

# Policies that apply to single-label outputs.
SINGLE_LABEL_POLICIES = [name for name, rule in POLICIES.items() if rule.suits(SINGLE_LABEL)]


def softmax(logits, temperature):
    above = [math.exp((z - max(logits)) / temperature) for z in logits]
    return [a / sum(above) for a in above]


def confidence_by_loop(policy, logits, temperatures, curves, learned, levels, e):
    """Returns the confidence of one example at exit e, from its logits [E][C] up to there.

    Curves are read at the computed confidences `levels` [E]: recomputed ones, which may differ by
    rounding, could lie on the other side of a step.
    """
    p = [softmax(z, t) for z, t in zip(logits, temperatures, strict=True)]
    predicted = [z.index(max(z)) for z in logits]
    match policy:
        case "confidence" | "confidence_float32" | "min_confidence":
            return max(p[e])
        case "raw_confidence":
            return max(softmax(logits[e], 1.0))
        case "entropy":
            return 1 + sum(q * math.log(q) for q in p[e] if q) / math.log(len(p[e]))
        case "margin":
            return sorted(p[e])[-1] - sorted(p[e])[-2]
        case "patience":
            run = 1
            while run <= e and predicted[e - run] == predicted[e]:
                run += 1
            return run
        case "voting":
            return sum(max(p[j]) for j in range(e + 1) if predicted[j] == predicted[e])
        case "learning_to_exit":
            return learned[e]
    kind = {"pcee": "equal_width", "pcee_ws": "kernel"}.get(policy) or policy.removeprefix("pcee_")
    curve, level = curves[kind][e], float(levels[e])
    if not curve.steps:
        return float(np.interp(level, curve.x, curve.y))
    return curve.y[max(0, sum(x <= level for x in curve.x) - 1)]


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from([p for p in SINGLE_LABEL_POLICIES if not p.endswith("min_max")]))
def test_every_policy_equals_a_loop_over_examples(outputs, policy):
    r, e, n, c = outputs.logits.shape
    rng = np.random.default_rng(n)
    learned = rng.choice([0.0, 0.25, 0.5, 0.9], (r, e, n))
    outputs = dataclasses.replace(outputs, exit_scores=learned)
    temperatures = rng.choice([0.5, 1.0, 2.0], (r, e))
    levels = exit_confidences(outputs, "confidence", [Calibrator(t) for t in temperatures])
    # Some knots equal scores that occur, where both sides of a step differ.
    scores = np.append(rng.uniform(1 / c, 1, 20), levels[0, :, 0])

    def fit_curve(kind):
        return fit_reliability_curve(kind, scores, rng.random(len(scores)) < scores, 1 / c)

    calibrators = [
        Calibrator(t, {kind: tuple(fit_curve(kind) for _ in range(e)) for kind in CURVES})
        for t in temperatures
    ]
    actual = exit_confidences(outputs, policy, calibrators)
    for i in range(r):
        logits = outputs.logits[i].astype(float).transpose(1, 0, 2).tolist()  # [N, E, C]
        fitted = temperatures[i].tolist(), calibrators[i].curves
        expected = [
            [
                confidence_by_loop(policy, logits[k], *fitted, learned[i, :, k], levels[i, :, k], j)
                for k in range(n)
            ]
            for j in range(e)
        ]
        np.testing.assert_allclose(actual[i], expected, rtol=1e-6, atol=1e-9)
        for so_far in range(1, e):  # in serving, later exits are not yet known
            earlier_exits = UnlabeledOutputs(
                outputs.logits[i : i + 1, :so_far],
                outputs.layers[:so_far],
                outputs.exit_scores[i : i + 1, :so_far],
            )
            served = exit_confidences(earlier_exits, policy, [calibrators[i].first_exits(so_far)])
            np.testing.assert_array_equal(served[0], actual[i, :so_far])
    curve = simulate(outputs, policy, calibrators=calibrators)
    for t, threshold in enumerate(curve.threshold[0]):
        cost, score, shares = brute_force(
            actual[0],
            outputs.predictions[0],
            outputs.labels[0],
            outputs.cost,
            threshold,
            "accuracy",
        )
        np.testing.assert_allclose(curve.cost[0, t], cost, atol=1e-12)
        np.testing.assert_allclose(curve.score[0, t], score, atol=1e-12)
        np.testing.assert_allclose(curve.shares[0, t], shares, atol=1e-12)


def known_table(count: int, seed: int = 0, exits: int = 3) -> tuple[ExitOutputs, np.ndarray]:
    """Returns random outputs and the known accuracy of each prediction, float64 [E, N].

    The accuracy is drawn for each exit and row, and the confidence rises with it. Exits err
    independently: with five classes, a wrong prediction can be any of the others.
    """
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.3, 1.0, (exits, count))
    labels = rng.integers(0, 5, count)
    correct = rng.random((exits, count)) < chance
    predicted = np.where(correct, labels, (labels + rng.integers(1, 5, (exits, count))) % 5)
    # The largest probability is `chance` ** 2, so that confidence differs from accuracy.
    confidence = np.maximum(chance**2, 0.21)
    logits = np.log((1 - confidence) / 4)[..., None] * np.ones(5)
    np.put_along_axis(logits, predicted[..., None], np.log(confidence)[..., None], axis=-1)
    return ExitOutputs(logits, labels, np.arange(exits) + 1), chance


@pytest.mark.parametrize("kind", CURVES)
def test_reliability_curves_recover_known_accuracy(kind):
    outputs, chance = known_table(20_000)
    (calibrator,) = fit_calibrators(outputs)
    curve = calibrator.curves[kind][0]
    levels = exit_confidences(outputs, "confidence", [calibrator])[0, 0]
    # A bin gives the mean over its width: with ten bins, 0.04 off at its ends.
    assert np.abs(curve(levels) - chance[0])[chance[0] > 0.5].mean() < 0.03


@pytest.mark.parametrize("kind", CURVES)
def test_rows_of_probability_one_get_their_calibration_accuracy(kind):
    """Two rows in three have probability 1 in float64 and are correct, of the others 60%."""
    rows = np.arange(300)
    labels, certain = rows % 2, rows < 200
    predicted = np.where(certain | (rows % 10 < 6), labels, 1 - labels)
    logits = np.zeros((1, 300, 2))
    logits[0, rows, predicted] = np.where(certain, 5.0, 0.005)
    outputs = ExitOutputs(logits, labels, np.asarray([1]))
    (calibrator,) = fit_calibrators(outputs)
    temperatures = calibrator.temperatures
    probabilities = outcome_probabilities(outputs.logits[0], temperatures)  # [E, N, 1, C]
    assert (probabilities[0, certain].max(axis=-1) == 1).all()
    policy = next(name for name, rule in POLICIES.items() if rule.curve == kind)
    assert (exit_confidences(outputs, policy, [calibrator])[0, 0, certain] > 0.99).all()


def test_reliability_of_small_bins_shrinks_towards_the_mean():
    score = np.asarray([0.55] * 60 + [0.97])
    correct = np.asarray([True] * 30 + [False] * 30 + [True])
    mean = correct.mean()
    curve = fit_reliability_curve("equal_width", score, correct, 0.5)
    assert curve(0.55) == pytest.approx((30 + 5 * mean) / 65)
    assert curve(0.99) == pytest.approx((1 + 5 * mean) / 6)  # a single row does not give 100%
    assert curve(0.75) == pytest.approx(mean)  # an empty bin has the mean of the exit


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_reliability_curves_stay_within_zero_and_one_and_isotonic_ones_rise(count, seed):
    rng = np.random.default_rng(seed)
    score = rng.choice(np.linspace(0.2, 1, 12), count)
    correct = rng.random(count) < score
    probes = np.linspace(0, 1, 300)
    for kind in CURVES:
        values = fit_reliability_curve(kind, score, correct, 0.2)(probes)
        assert values.min() >= 0
        assert values.max() <= 1
        if kind == "isotonic":
            assert np.diff(values).min() >= -1e-12


def test_isotonic_pcee_equals_confidence_thresholds_per_exit():
    """Every example leaves at the exit that per-exit confidence thresholds give."""
    outputs, _ = known_table(500, seed=1)
    (calibrator,) = fit_calibrators(known_table(300, seed=2)[0])
    scores = exit_confidences(outputs, "pcee_isotonic", [calibrator])[0]
    levels = exit_confidences(outputs, "confidence", [calibrator])[0]
    for accuracy in (0.4, 0.6, 0.75, 0.9):
        limits = []
        for curve in calibrator.curves["isotonic"]:
            reached = curve.x[curve.y >= accuracy]
            # The first step also applies below its knot.
            first = -np.inf if curve.y[0] >= accuracy else np.inf
            limits.append(first if first < 0 else min(reached, default=np.inf))
        by_limit = (levels >= np.asarray([*limits[:2], -np.inf])[:, None]).argmax(axis=0)
        by_curve = np.append(scores[:2] >= accuracy, [np.full(500, True)], axis=0).argmax(axis=0)
        np.testing.assert_array_equal(by_limit, by_curve)
        point = simulate(
            outputs, "pcee_isotonic", calibrators=[calibrator], thresholds=np.asarray([accuracy])
        )
        assert point.cost[0, 0] == pytest.approx(outputs.cost[by_limit].mean())


@pytest.mark.parametrize("delta", [0.7, 0.9])
def test_pcee_achieves_its_accuracy_with_a_perfect_curve(delta):
    """Predictions of an exit have accuracy delta or 0.3; all of the last exit have delta."""
    rng, count = np.random.default_rng(3), 40_000
    high = rng.random((3, count)) < np.asarray([0.4, 0.6, 1.1])[:, None]
    chance = np.where(high, delta, 0.3)
    labels = rng.integers(0, 5, count)
    correct = rng.random((3, count)) < chance
    predicted = np.where(correct, labels, (labels + 1) % 5)
    confidence = np.where(high, 0.8, 0.5)
    logits = np.log((1 - confidence) / 4)[..., None] * np.ones(5)
    np.put_along_axis(logits, predicted[..., None], np.log(confidence)[..., None], axis=-1)
    outputs = ExitOutputs(logits, labels, [1, 2, 3])
    perfect = ReliabilityCurve(np.asarray([0.0, 0.65]), np.asarray([0.3, delta]), True)
    calibrator = Calibrator(np.ones(3), {"equal_width": (perfect,) * 3})
    point = simulate(outputs, "pcee", calibrators=[calibrator], thresholds=np.asarray([delta]))
    error = 3 * math.sqrt(delta * (1 - delta) / count)
    assert point.score[0, 0] == pytest.approx(delta, abs=error)
    np.testing.assert_allclose(point.shares[0, 0], [0.4, 0.36, 0.24], atol=0.01)


def test_cross_fitted_confidence_is_independent_of_the_label_of_its_row():
    outputs, _ = known_table(60, seed=4)
    before = cross_fitted_confidences(outputs, "pcee_isotonic")
    labels = outputs.labels.copy()
    labels[0, 7] = (labels[0, 7] + 1) % 5
    after = cross_fitted_confidences(dataclasses.replace(outputs, labels=labels), "pcee_isotonic")
    np.testing.assert_array_equal(before[..., 7], after[..., 7])
    assert (before != after).any()
    assert np.isfinite(cross_fitted_confidences(outputs.rows(np.asarray([0])), "pcee")).all()


def test_pcee_threshold_is_the_target_accuracy():
    calibration, validation = known_table(400, seed=5)[0], known_table(900, seed=6)[0]
    for policy in (p for p in POLICIES if p.startswith("pcee")):
        analysis = analyse(calibration, validation, policy)
        operating_point = analysis.operating_point(0, {"accuracy": 0.7})
        point = simulate(validation, policy, calibration=calibration, thresholds=np.asarray([0.7]))
        assert operating_point.threshold == 0.7
        np.testing.assert_allclose(
            operating_point.validation, (point.cost[0, 0], point.score[0, 0])
        )


def test_calibrator_round_trips_through_json_exactly():
    outputs, _ = known_table(300, seed=7)
    (calibrator,) = fit_calibrators(outputs)
    loaded = Calibrator.from_dict(json.loads(json.dumps(calibrator.as_dict())))
    for policy in SINGLE_LABEL_POLICIES:
        if not policy.startswith("learning"):
            expected, actual = (
                exit_confidences(outputs, policy, [fitted]) for fitted in (calibrator, loaded)
            )
            np.testing.assert_array_equal(expected, actual)


def test_no_row_leaves_at_a_diverged_exit_and_its_temperature_is_none():
    outputs, _ = known_table(50, seed=8)
    logits = outputs.logits.copy()
    logits[0, 0] = np.nan
    outputs = dataclasses.replace(outputs, logits=logits)
    (calibrator,) = fit_calibrators(outputs)
    assert calibrator.as_dict()["temperatures"][0] is None
    quality = confidence_quality(outputs.logits[0], outputs.labels[0], calibrator.temperatures)
    assert quality[0]["ece"] is None
    for policy in SINGLE_LABEL_POLICIES:
        if not policy.startswith("learning"):
            scores = exit_confidences(outputs, policy, [calibrator])
            assert np.isneginf(scores[0, 0]).all(), policy
            assert np.isfinite(scores[0, 2]).all(), policy
    # No exit agrees with a diverged one.
    assert exit_confidences(outputs, "patience", [calibrator])[0, 1].max() == 1


@pytest.mark.parametrize("policy", ["pcee", "pcee_ws"])
def test_pcee_without_calibration_rows_is_refused(policy):
    with pytest.raises(UserError, match=f"'{policy}' needs calibration rows"):
        simulate(known_table(9)[0], policy)


def test_threshold_grids_span_the_confidences():
    outputs, _ = known_table(200, seed=9)
    for policy in SINGLE_LABEL_POLICIES:
        if policy.startswith("learning"):
            continue
        grid = grid_thresholds(policy, 5, 3)
        scores = exit_confidences(outputs, policy, fit_calibrators(outputs))
        assert grid[0] <= scores[:, :-1].min() + 0.1
        assert scores.max() <= grid[-1]
        assert len(grid) == (3 if policy == "patience" else 11)


def test_threshold_grid_of_unknown_range_spans_the_breakpoints(monkeypatch):
    outputs, _ = known_table(200, seed=9)

    def from_ten(outputs, temperatures):
        confidences = 10 + outputs.logits.max(axis=-1).astype(np.float64)
        confidences[:, 0, 0] = np.inf
        return confidences

    grid = analyse(outputs, outputs, from_ten).grid.threshold[0]
    confidences = exit_confidences(outputs, from_ten)[0, :-1]
    finite = np.maximum.accumulate(confidences, axis=0)[:, 1:]
    np.testing.assert_allclose(grid, np.linspace(finite.min(), finite.max(), 11), rtol=1e-12)
    unknown = grid_thresholds(from_ten, 5, 3, np.full((1, 4), np.inf))
    np.testing.assert_allclose(unknown, np.linspace(0, 1, 11))
    declared = Policy(lambda inputs: inputs.logits[..., 0], "", low=2.0, high=4.0)
    monkeypatch.setitem(POLICIES, "declared", declared)
    grid = grid_thresholds("declared", 5, 3, np.zeros(3))
    np.testing.assert_allclose(grid, np.linspace(2, 4, 11))


def classwise_error(outputs, e: int, temperature: float) -> float:
    """Returns the mean over classes of the row-weighted gaps of ten bins, by loops."""
    n, classes, total = outputs.labels.shape[1], outputs.logits.shape[-1], 0.0
    for c in range(classes):
        bins = [[0.0, 0] for _ in range(10)]
        for k in range(n):
            p = softmax(outputs.logits[0, e, k].astype(float).tolist(), temperature)[c]
            bin_sums = bins[min(int(10 * p), 9)]
            bin_sums[0] += p
            bin_sums[1] += outputs.labels[0, k] == c
        total += sum(abs(p - correct) for p, correct in bins) / n
    return total / classes


def test_confidence_quality_equals_loops_over_rows():
    outputs, _ = known_table(80, seed=10)
    temperatures = np.asarray([0.5, 1.0, 2.0])
    levels = outcome_probabilities(outputs.logits[0], temperatures).max(axis=(2, 3))  # [E, N]
    quality = confidence_quality(outputs.logits[0], outputs.labels[0], temperatures)
    for e, row in enumerate(quality):
        nll, brier, pairs, n = 0.0, 0.0, [], outputs.labels.shape[1]
        ranked = []
        for k in range(n):
            p = softmax(outputs.logits[0, e, k].astype(float).tolist(), temperatures[e])
            label = outputs.labels[0, k]
            nll -= math.log(p[label]) / n
            brier += sum((q - (c == label)) ** 2 for c, q in enumerate(p)) / n
            assert levels[e, k] == pytest.approx(max(p))
            # Ranks use the computed confidences, as ties are exact.
            ranked.append((levels[e, k], outputs.predictions[0, e, k] == label))
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, correct in ranked
            if correct
            for b, other_correct in ranked
            if not other_correct
        ]
        assert row["nll"] == pytest.approx(nll)
        assert row["brier"] == pytest.approx(brier)
        assert row["auroc"] == pytest.approx(np.mean(pairs))
        assert 0 <= row["ece"] <= 1
        assert row["classwise_ece"] == pytest.approx(classwise_error(outputs, e, temperatures[e]))


def test_entropy_of_infinite_logits_never_leaves_and_emits_no_warning():
    logits = np.asarray([[[[np.inf, 0.0], [-np.inf, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confidences = exit_confidences(ExitOutputs(logits, [0, 1], [1, 2]), "entropy")
    assert np.isneginf(confidences[0, 0, 0])
    assert confidences[0, 0, 1] == np.nextafter(1.0, 0.0)


def test_entropy_confidence_of_uniform_probabilities_is_not_negative():
    for classes in range(2, 12):
        outputs = ExitOutputs(np.zeros((2, 3, classes)), [0, 1, 0], [1, 2])
        assert exit_confidences(outputs, "entropy").min() == pytest.approx(0, abs=1e-12)
        assert simulate(outputs, "entropy", thresholds=np.zeros(1)).cost[0, 0] == 0.5


def test_calibrators_of_other_shape_and_unknown_policy_are_refused():
    two_replicas = ExitOutputs(np.zeros((2, 2, 3, 2)), [0, 1, 0], [1, 2])
    one_replica = ExitOutputs(np.zeros((1, 2, 3, 2)), [0, 1, 0], [1, 2])
    for policy in ("confidence", "pcee"):
        with pytest.raises(ValueError, match="need calibrators for as many replicas and exits"):
            simulate(two_replicas, policy, calibrators=fit_calibrators(one_replica))
    with pytest.raises(UserError, match="did you mean 'confidence'"):
        cross_fitted_confidences(one_replica, "confidense")


def test_calibration_rows_of_another_run_or_split_are_refused(tmp_path):
    logits, labels = np.zeros((1, 2, 3, 2)), [0, 1, 0]
    outputs = ExitOutputs(logits, labels, [1, 2], identity=RunIdentity(classes=("a", "b")))
    # Unknown class names are not compared.
    simulate(outputs, "pcee", calibration=ExitOutputs(logits, labels, [1, 2]))
    for message, calibration in (
        (r"layers \[1, 3\], but \[1, 2\] for", ExitOutputs(logits, labels, [1, 3])),
        ("outputs of an exit 3, but 2 for", ExitOutputs(np.zeros((1, 2, 3, 3)), labels, [1, 2])),
        ("number of replicas 2", ExitOutputs(np.zeros((2, 2, 3, 2)), labels, [1, 2])),
        ("costs ", ExitOutputs(logits, labels, [1, 2], [0.4, 1.0])),
        ("classes ", dataclasses.replace(outputs, identity=RunIdentity(classes=("a", "c")))),
    ):
        for call in (
            lambda rows: simulate(outputs, "pcee", calibration=rows),
            lambda rows: analyse(rows, outputs),
            lambda rows: analyse(outputs, outputs, tuning=rows),
        ):
            with pytest.raises(UserError, match=f"not from the same run: {message}"):
                call(calibration)
    for split in ("calibration", "validation"):
        path = tmp_path / "exit_outputs" / f"{split}.npz"
        dataclasses.replace(outputs, identity=RunIdentity(split="validation")).save(path)
    with pytest.raises(UserError, match=r"calibration.npz' holds the outputs of validation rows"):
        load_analysis(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
def test_formatted_threshold_sends_every_row_to_the_same_exit(confidences, anywhere):
    points = breakpoints(np.asarray(confidences))
    for threshold in (*points.tolist(), anywhere, np.nextafter(points[-1], np.inf)):
        text = format_threshold(threshold, points)
        assert ((points >= float(text)) == (points >= threshold)).all()
        assert len(text) <= max(8, len(repr(threshold)))
    assert format_threshold(0.9500615703388785, np.asarray([0.91, 0.9500615703388785])) == "0.95"
    assert format_threshold(np.inf, points) == "inf"


def test_policy_that_needs_exit_scores_is_omitted_without_them(monkeypatch):
    scores = lambda outputs: outputs.learned.astype(np.float64)
    learned = Policy(scores, "", needs_probabilities=False, needs_exit_scores=True)
    monkeypatch.setitem(POLICIES, "own_scores", learned)
    logits = np.random.default_rng(0).normal(size=(1, 2, 20, 3))
    outputs = ExitOutputs(logits, np.arange(20) % 3, np.asarray([1, 2]))
    assert "own_scores" not in make_resolver(outputs).fronts
    scored_outputs = dataclasses.replace(outputs, exit_scores=np.zeros((1, 2, 20), np.float32))
    assert "own_scores" in make_resolver(scored_outputs).fronts
