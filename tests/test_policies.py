"""Every policy against a plain loop over examples; reliability curves and what PCEE promises."""

import dataclasses
import json
import math

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

# That single-label outputs can be given.
OF_CLASSES = [name for name, rule in POLICIES.items() if rule.suits(SINGLE_LABEL)]


def softmax(logits, temperature):
    above = [math.exp((z - max(logits)) / temperature) for z in logits]
    return [a / sum(above) for a in above]


def plain(policy, logits, temperatures, curves, learned, sures, e):
    """The confidence of one example at exit e, from its logits [E][C] alone.

    Curves are read at the confidences `sures` [E] that the code gives: a rounding away from a step,
    another would stand on its other side.
    """
    p = [softmax(z, t) for z, t in zip(logits, temperatures, strict=True)]
    given = [z.index(max(z)) for z in logits]
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
            while run <= e and given[e - run] == given[e]:
                run += 1
            return run
        case "voting":
            return sum(max(p[j]) for j in range(e + 1) if given[j] == given[e])
        case "learning_to_exit":
            return learned[e]
    kind = {"pcee": "equal_width", "pcee_ws": "kernel"}.get(policy) or policy.removeprefix("pcee_")
    curve, sure = curves[kind][e], float(sures[e])
    if not curve.steps:
        return float(np.interp(sure, curve.x, curve.y))
    return curve.y[max(0, sum(x <= sure for x in curve.x) - 1)]


@settings(deadline=None, max_examples=60)
@given(tables(), tables(), st.sampled_from([p for p in OF_CLASSES if not p.endswith("min_max")]))
def test_every_policy_equals_a_loop_over_examples(outputs, other, policy):
    r, e, n, c = outputs.logits.shape
    rng = np.random.default_rng(n)
    learned = rng.choice([0.0, 0.25, 0.5, 0.9], (r, e, n))
    outputs = dataclasses.replace(outputs, exit_scores=learned)
    low = 1 / c
    temperatures = rng.choice([0.5, 1.0, 2.0], (r, e))
    sures = exit_confidences(outputs, "confidence", [Calibrator(t) for t in temperatures])
    # Knots at scores that occur, where left and right of a step differ.
    sure = np.append(rng.uniform(low, 1, 20), sures[0, :, 0])
    calibrators = [
        Calibrator(
            t,
            {
                kind: tuple(
                    fit_reliability_curve(kind, sure, rng.random(len(sure)) < sure, low)
                    for _ in range(e)
                )
                for kind in CURVES
            },
        )
        for t in temperatures
    ]
    found = exit_confidences(outputs, policy, calibrators)
    for i in range(r):
        ours = calibrators[i].curves
        logits = outputs.logits[i].astype(float).transpose(1, 0, 2).tolist()  # [N, E, C]
        wanted = [
            [
                plain(
                    policy,
                    logits[k],
                    temperatures[i].tolist(),
                    ours,
                    learned[i, :, k],
                    sures[i, :, k],
                    j,
                )
                for k in range(n)
            ]
            for j in range(e)
        ]
        np.testing.assert_allclose(found[i], wanted, rtol=1e-6, atol=1e-9)
        for so_far in range(1, e):  # what is served has seen no later exit
            seen = UnlabeledOutputs(
                outputs.logits[i : i + 1, :so_far],
                outputs.layers[:so_far],
                outputs.exit_scores[i : i + 1, :so_far],
            )
            served = exit_confidences(seen, policy, [calibrators[i].first_exits(so_far)])
            np.testing.assert_array_equal(served[0], found[i, :so_far])
    curve = simulate(outputs, policy, calibrators=calibrators)
    for t, threshold in enumerate(curve.threshold[0]):
        cost, score, shares = brute_force(
            found[0], outputs.predictions[0], outputs.labels[0], outputs.cost, threshold, "accuracy"
        )
        np.testing.assert_allclose(curve.cost[0, t], cost, atol=1e-12)
        np.testing.assert_allclose(curve.score[0, t], score, atol=1e-12)
        np.testing.assert_allclose(curve.shares[0, t], shares, atol=1e-12)


def known_table(count: int, seed: int = 0, exits: int = 3) -> tuple[ExitOutputs, np.ndarray]:
    """Random logits whose labels are drawn so that each answer's accuracy is known, [E, N].

    An exit is right with a chance that is a rising function of its confidence, each its own; exits
    err on their own, and where one errs the label is another class: five, so that this is free.
    """
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.3, 1.0, (exits, count))
    labels = rng.integers(0, 5, count)
    right = rng.random((exits, count)) < chance
    given = np.where(right, labels, (labels + rng.integers(1, 5, (exits, count))) % 5)
    # Logits with the largest probability `chance` ** 2: confidence that is not an accuracy.
    sure = np.maximum(chance**2, 0.21)
    logits = np.log((1 - sure) / 4)[..., None] * np.ones(5)
    np.put_along_axis(logits, given[..., None], np.log(sure)[..., None], axis=-1)
    return ExitOutputs(logits, labels, np.arange(exits) + 1), chance


@pytest.mark.parametrize("kind", CURVES)
def test_curves_find_a_known_accuracy(kind):
    outputs, chance = known_table(20_000)
    (calibrator,) = fit_calibrators(outputs)
    sure = calibrator.curves[kind][0]
    levels = exit_confidences(outputs, "confidence", [calibrator])[0, 0]
    # Of bins, the mean over a bin is right; ten of them stand 0.04 off at their ends.
    assert np.abs(sure(levels) - chance[0])[chance[0] > 0.5].mean() < 0.03


@pytest.mark.parametrize("kind", CURVES)
def test_the_surest_rows_read_what_the_surest_rows_had(kind):
    """Two rows in three have a probability of 1 in float64 and are right, of the others 60%."""
    rows = np.arange(300)
    labels, sure = rows % 2, rows < 200
    given = np.where(sure | (rows % 10 < 6), labels, 1 - labels)
    logits = np.zeros((1, 300, 2))
    logits[0, rows, given] = np.where(sure, 5.0, 0.005)
    outputs = ExitOutputs(logits, labels, np.asarray([1]))
    (fitted,) = fit_calibrators(outputs)
    found = outcome_probabilities(outputs.logits[0], fitted.temperatures)  # [E, N, 1, C]
    assert (found[0, sure].max(axis=-1) == 1).all()
    policy = next(name for name, rule in POLICIES.items() if rule.curve == kind)
    assert (exit_confidences(outputs, policy, [fitted])[0, 0, sure] > 0.99).all()


def test_small_bins_shrink_towards_the_mean():
    score = np.asarray([0.55] * 60 + [0.97])
    right = np.asarray([True] * 30 + [False] * 30 + [True])
    mean = right.mean()
    curve = fit_reliability_curve("equal_width", score, right, 0.5)
    assert curve(0.55) == pytest.approx((30 + 5 * mean) / 65)
    assert curve(0.99) == pytest.approx((1 + 5 * mean) / 6)  # one row does not say 100%
    assert curve(0.75) == pytest.approx(mean)  # an empty bin says what the exit says


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_isotonic_curves_rise_and_all_stay_within_zero_and_one(count, seed):
    rng = np.random.default_rng(seed)
    score = rng.choice(np.linspace(0.2, 1, 12), count)
    right = rng.random(count) < score
    probes = np.linspace(0, 1, 300)
    for kind in CURVES:
        values = fit_reliability_curve(kind, score, right, 0.2)(probes)
        assert values.min() >= 0
        assert values.max() <= 1
        if kind == "isotonic":
            assert np.diff(values).min() >= -1e-12


def test_a_rising_curve_is_a_threshold_for_each_exit():
    """Every example leaves where per-exit thresholds of confidence would send it."""
    outputs, _ = known_table(500, seed=1)
    (fitted,) = fit_calibrators(known_table(300, seed=2)[0])
    scores = exit_confidences(outputs, "pcee_isotonic", [fitted])[0]
    levels = exit_confidences(outputs, "confidence", [fitted])[0]
    for delta in (0.4, 0.6, 0.75, 0.9):
        limits = []
        for curve in fitted.curves["isotonic"]:
            reached = curve.x[curve.y >= delta]
            # The first step holds below its own beginning too.
            first = -np.inf if curve.y[0] >= delta else np.inf
            limits.append(first if first < 0 else min(reached, default=np.inf))
        by_limit = (levels >= np.asarray([*limits[:2], -np.inf])[:, None]).argmax(axis=0)
        by_curve = np.append(scores[:2] >= delta, [np.full(500, True)], axis=0).argmax(axis=0)
        np.testing.assert_array_equal(by_limit, by_curve)
        point = simulate(
            outputs, "pcee_isotonic", calibrators=[fitted], thresholds=np.asarray([delta])
        )
        assert point.cost[0, 0] == pytest.approx(outputs.cost[by_limit].mean())


@pytest.mark.parametrize("delta", [0.7, 0.9])
def test_a_perfect_curve_achieves_its_accuracy(delta):
    """Exits whose answers have the accuracy delta, or a hopeless one; the last has delta."""
    rng, count = np.random.default_rng(3), 40_000
    high = rng.random((3, count)) < np.asarray([0.4, 0.6, 1.1])[:, None]
    chance = np.where(high, delta, 0.3)
    labels = rng.integers(0, 5, count)
    right = rng.random((3, count)) < chance
    given = np.where(right, labels, (labels + 1) % 5)
    sure = np.where(high, 0.8, 0.5)
    logits = np.log((1 - sure) / 4)[..., None] * np.ones(5)
    np.put_along_axis(logits, given[..., None], np.log(sure)[..., None], axis=-1)
    outputs = ExitOutputs(logits, labels, [1, 2, 3])
    perfect = ReliabilityCurve(np.asarray([0.0, 0.65]), np.asarray([0.3, delta]), True)
    fitted = Calibrator(np.ones(3), {"equal_width": (perfect,) * 3})
    point = simulate(outputs, "pcee", calibrators=[fitted], thresholds=np.asarray([delta]))
    error = 3 * math.sqrt(delta * (1 - delta) / count)
    assert point.score[0, 0] == pytest.approx(delta, abs=error)
    np.testing.assert_allclose(point.shares[0, 0], [0.4, 0.36, 0.24], atol=0.01)


def test_cross_fitting_uses_no_row_s_own_label():
    outputs, _ = known_table(60, seed=4)
    before = cross_fitted_confidences(outputs, "pcee_isotonic")
    labels = outputs.labels.copy()
    labels[0, 7] = (labels[0, 7] + 1) % 5
    after = cross_fitted_confidences(dataclasses.replace(outputs, labels=labels), "pcee_isotonic")
    np.testing.assert_array_equal(before[..., 7], after[..., 7])
    assert (before != after).any()
    assert np.isfinite(cross_fitted_confidences(outputs.rows(np.asarray([0])), "pcee")).all()


def test_the_threshold_of_pcee_is_the_accuracy_asked_for():
    calibration, validation = known_table(400, seed=5)[0], known_table(900, seed=6)[0]
    for policy in (p for p in POLICIES if p.startswith("pcee")):
        analysis = analyse(calibration, validation, policy)
        found = analysis.operating_point(0, {"accuracy": 0.7})
        point = simulate(validation, policy, calibration=calibration, thresholds=np.asarray([0.7]))
        assert found.threshold == 0.7
        np.testing.assert_allclose(found.validation, (point.cost[0, 0], point.score[0, 0]))


def test_what_was_fitted_is_saved_and_read_back_exactly():
    outputs, _ = known_table(300, seed=7)
    (fitted,) = fit_calibrators(outputs)
    again = Calibrator.from_dict(json.loads(json.dumps(fitted.as_dict())))
    for policy in OF_CLASSES:
        if not policy.startswith("learning"):
            ours, theirs = (exit_confidences(outputs, policy, [f]) for f in (fitted, again))
            np.testing.assert_array_equal(ours, theirs)


def test_a_diverged_exit_never_answers_early_and_fits_nothing():
    outputs, _ = known_table(50, seed=8)
    logits = outputs.logits.copy()
    logits[0, 0] = np.nan
    outputs = dataclasses.replace(outputs, logits=logits)
    (fitted,) = fit_calibrators(outputs)
    assert fitted.as_dict()["temperatures"][0] is None
    quality = confidence_quality(outputs.logits[0], outputs.labels[0], fitted.temperatures)
    assert quality[0]["ece"] is None
    for policy in OF_CLASSES:
        if not policy.startswith("learning"):
            scores = exit_confidences(outputs, policy, [fitted])
            assert np.isneginf(scores[0, 0]).all(), policy
            assert np.isfinite(scores[0, 2]).all(), policy
    # Nobody is seen to agree with an exit that diverged.
    assert exit_confidences(outputs, "patience", [fitted])[0, 1].max() == 1


@pytest.mark.parametrize("policy", ["pcee", "pcee_ws"])
def test_policies_that_need_calibration_rows_say_so(policy):
    with pytest.raises(UserError, match=f"'{policy}' needs calibration rows"):
        simulate(known_table(9)[0], policy)


def test_grids_span_the_scores():
    outputs, _ = known_table(200, seed=9)
    for policy in OF_CLASSES:
        if policy.startswith("learning"):
            continue
        grid = grid_thresholds(policy, 5, 3)
        scores = exit_confidences(outputs, policy, fit_calibrators(outputs))
        assert grid[0] <= scores[:, :-1].min() + 0.1
        assert scores.max() <= grid[-1]
        assert len(grid) == (3 if policy == "patience" else 11)


def classwise_error(outputs, e: int, temperature: float) -> float:
    """The mean over classes of the gaps of ten bins, weighted by their rows, by plain loops."""
    n, classes, total = outputs.labels.shape[1], outputs.logits.shape[-1], 0.0
    for c in range(classes):
        bins = [[0.0, 0] for _ in range(10)]
        for k in range(n):
            p = softmax(outputs.logits[0, e, k].astype(float).tolist(), temperature)[c]
            place = bins[min(int(10 * p), 9)]
            place[0] += p
            place[1] += outputs.labels[0, k] == c
        total += sum(abs(p - right) for p, right in bins) / n
    return total / classes


def test_quality_equals_plain_sums():
    outputs, _ = known_table(80, seed=10)
    temperatures = np.asarray([0.5, 1.0, 2.0])
    levels = outcome_probabilities(outputs.logits[0], temperatures).max(axis=(2, 3))  # [E, N]
    quality = confidence_quality(outputs.logits[0], outputs.labels[0], temperatures)
    for e, row in enumerate(quality):
        nll, brier, pairs, n = 0.0, 0.0, [], outputs.labels.shape[1]
        sure = []
        for k in range(n):
            p = softmax(outputs.logits[0, e, k].astype(float).tolist(), temperatures[e])
            label = outputs.labels[0, k]
            nll -= math.log(p[label]) / n
            brier += sum((q - (c == label)) ** 2 for c, q in enumerate(p)) / n
            assert levels[e, k] == pytest.approx(max(p))
            # Compared are those that the code gives: a tie is one to the last digit.
            sure.append((levels[e, k], outputs.predictions[0, e, k] == label))
        pairs = [(a > b) + 0.5 * (a == b) for a, yes in sure if yes for b, also in sure if not also]
        assert row["nll"] == pytest.approx(nll)
        assert row["brier"] == pytest.approx(brier)
        assert row["auroc"] == pytest.approx(np.mean(pairs))
        assert 0 <= row["ece"] <= 1
        assert row["classwise_ece"] == pytest.approx(classwise_error(outputs, e, temperatures[e]))


def test_entropy_is_never_below_zero():
    for classes in range(2, 12):
        outputs = ExitOutputs(np.zeros((2, 3, classes)), [0, 1, 0], [1, 2])
        assert exit_confidences(outputs, "entropy").min() == pytest.approx(0, abs=1e-12)
        assert simulate(outputs, "entropy", thresholds=np.zeros(1)).cost[0, 0] == 0.5


def test_what_does_not_fit_the_outputs_is_refused():
    two = ExitOutputs(np.zeros((2, 2, 3, 2)), [0, 1, 0], [1, 2])
    one = ExitOutputs(np.zeros((1, 2, 3, 2)), [0, 1, 0], [1, 2])
    for policy in ("confidence", "pcee"):
        with pytest.raises(ValueError, match="need calibrators for as many replicas and exits"):
            simulate(two, policy, calibrators=fit_calibrators(one))
    with pytest.raises(UserError, match="did you mean 'confidence'"):
        cross_fitted_confidences(one, "confidense")


def test_calibration_rows_of_another_model_are_refused(tmp_path):
    logits, labels = np.zeros((1, 2, 3, 2)), [0, 1, 0]
    ours = ExitOutputs(logits, labels, [1, 2], identity=RunIdentity(classes=("a", "b")))
    simulate(ours, "pcee", calibration=ExitOutputs(logits, labels, [1, 2]))  # names are not known
    for message, theirs in (
        (r"layers \[1, 3\], but \[1, 2\] for", ExitOutputs(logits, labels, [1, 3])),
        ("outputs of an exit 3, but 2 for", ExitOutputs(np.zeros((1, 2, 3, 3)), labels, [1, 2])),
        ("number of replicas 2", ExitOutputs(np.zeros((2, 2, 3, 2)), labels, [1, 2])),
        ("costs ", ExitOutputs(logits, labels, [1, 2], [0.4, 1.0])),
        ("classes ", dataclasses.replace(ours, identity=RunIdentity(classes=("a", "c")))),
    ):
        for call in (
            lambda c: simulate(ours, "pcee", calibration=c),
            lambda c: analyse(c, ours),
            lambda c: analyse(ours, ours, tuning=c),
        ):
            with pytest.raises(UserError, match=f"not from the same run: {message}"):
                call(theirs)
    for split in ("calibration", "validation"):
        path = tmp_path / "exit_outputs" / f"{split}.npz"
        dataclasses.replace(ours, identity=RunIdentity(split="validation")).save(path)
    with pytest.raises(UserError, match=r"calibration.npz' holds the outputs of validation rows"):
        load_analysis(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
def test_a_threshold_in_few_digits_sends_every_row_to_the_same_exit(confidences, anywhere):
    points = breakpoints(np.asarray(confidences))
    for threshold in (*points.tolist(), anywhere, np.nextafter(points[-1], np.inf)):
        text = format_threshold(threshold, points)
        assert ((points >= float(text)) == (points >= threshold)).all()
        assert len(text) <= max(8, len(repr(threshold)))
    assert format_threshold(0.9500615703388785, np.asarray([0.91, 0.9500615703388785])) == "0.95"
    assert format_threshold(np.inf, points) == "inf"


def test_a_policy_of_scores_is_left_out_where_there_are_none(monkeypatch):
    scores = lambda given: given.learned.astype(np.float64)
    learned = Policy(scores, "", needs_probabilities=False, needs_exit_scores=True)
    monkeypatch.setitem(POLICIES, "own_scores", learned)
    logits = np.random.default_rng(0).normal(size=(1, 2, 20, 3))
    outputs = ExitOutputs(logits, np.arange(20) % 3, np.asarray([1, 2]))
    assert "own_scores" not in make_resolver(outputs).fronts
    scored = dataclasses.replace(outputs, exit_scores=np.zeros((1, 2, 20), np.float32))
    assert "own_scores" in make_resolver(scored).fronts
