"""Oracles and floors compared with enumeration, and certificates with their promised levels."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from test_policies import known_table
from test_simulation import tables

from sweet_jax import ExitOutputs, simulate
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.bounds import best_thresholds, oracle, share_of_gap, single_exit_hull
from sweet_jax.exits.certificates import (
    NEVER,
    candidate_thresholds,
    certify,
    count_losses,
    exit_losses,
    upper_bound,
)
from sweet_jax.exits.operating_point import ThresholdResolver, make_resolver
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import POLICIES, exit_confidences


def naive_oracle(kind, predicted, label):
    """Returns (index of the exit, answer) of an oracle for one example, from its predictions."""
    for e in range(len(predicted)):
        if kind == "any_correct" and predicted[e] == label:
            return e, label
        if kind == "stable" and all(prediction == label for prediction in predicted[e:]):
            return e, label
        if kind == "agreement" and predicted[e] == predicted[-1]:
            return e, predicted[e]
    return 0, predicted[-1] if kind == "stable" else predicted[0]


@settings(deadline=None, max_examples=60)
@given(tables())
def test_oracles_equal_loop_over_examples(outputs):
    predicted, labels = outputs.predictions[0].T.tolist(), outputs.labels[0].tolist()
    examples = list(zip(predicted, labels, strict=True))
    for kind in ("stable", "agreement", "any_correct"):
        frontier = oracle(outputs, 0, kind)
        points = []
        for count in range(1, len(outputs.layers) + 1):
            pairs = [naive_oracle(kind, row[:count], label) for row, label in examples]
            cost = np.mean([outputs.cost[e] for e, _ in pairs])
            score = np.mean(np.equal([answer for _, answer in pairs], labels))
            points.append((cost, score))
            last_exit_score = np.mean([row[count - 1] == label for row, label in examples])
            # Only any_correct may exceed the score of the last exit.
            assert kind == "any_correct" or score == last_exit_score
            assert np.interp(cost, frontier.cost, frontier.score) >= score - 1e-12
        for corner in zip(frontier.cost, frontier.score, strict=True):
            assert any(np.allclose(corner, point) for point in points)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_stable_oracle_is_never_below_the_single_exit_hull(outputs):
    hull, frontier = single_exit_hull(outputs, 0), oracle(outputs, 0, "stable")
    costs = np.linspace(outputs.cost[0], outputs.cost[-1], 9)
    scores = np.interp(costs, frontier.cost, frontier.score)
    assert np.all(scores >= np.interp(costs, hull.cost, hull.score) - 1e-12)
    assert np.all(np.diff(frontier.score) > 0)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_no_choice_of_exits_beats_the_any_correct_oracle(outputs):
    outputs = outputs.rows(np.arange(min(4, outputs.labels.shape[1])))
    exits, count = outputs.logits.shape[1:3]
    frontier = oracle(outputs, 0, "any_correct")
    correct = outputs.predictions[0] == outputs.labels[0]
    for choice in itertools.product(range(exits), repeat=count):
        cost = np.mean([outputs.cost[e] for e in choice])
        score = np.mean([correct[e, n] for n, e in enumerate(choice)])
        assert score <= np.interp(cost, frontier.cost, frontier.score) + 1e-9


@settings(deadline=None, max_examples=60)
@given(tables())
def test_single_exit_hull_is_concave_and_above_all_exits(outputs):
    hull = single_exit_hull(outputs, 0)
    exit_scores = (outputs.predictions[0] == outputs.labels[0]).mean(axis=1)
    assert np.all(np.interp(outputs.cost, hull.cost, hull.score) >= exit_scores - 1e-12)
    assert {*hull.cost} <= {*outputs.cost}  # its corners are exits
    assert np.all(np.diff(np.diff(hull.score) / np.diff(hull.cost)) < 1e-12)  # it is concave


def test_share_of_gap_is_0_at_the_floor_and_1_at_the_oracle():
    floor = ParetoFront(np.asarray([0.25, 1.0]), np.asarray([0.5, 0.8]))
    ceiling = ParetoFront(np.asarray([0.25, 0.4]), np.asarray([0.5, 0.9]))
    assert share_of_gap(floor.cost, floor.score, floor, ceiling) == 0
    assert share_of_gap(ceiling.cost, ceiling.score, floor, ceiling) == 1
    half = ParetoFront(np.asarray([0.25, 0.4, 1.0]), np.asarray([0.5, 0.73, 0.85]))
    assert share_of_gap(half.cost, half.score, floor, ceiling) == pytest.approx(0.5)
    assert share_of_gap(floor.cost, floor.score, floor, floor) is None


def test_best_thresholds_are_near_the_optimum_of_enumeration():
    """The confidences of the two early exits are opposite, so each needs its own threshold."""
    outputs, _ = known_table(60, seed=3)
    scores = exit_confidences(outputs, "confidence")[0].round(1)
    scores[1] = 1 - scores[1]  # the second exit is confident when it is wrong
    frontier = best_thresholds(outputs, 0, scores)
    correct = (outputs.predictions[0] == outputs.labels[0]).astype(float)
    levels = [[*np.unique(scores[e]), np.inf] for e in range(2)]

    def point(pair):
        exits = (scores >= np.asarray([*pair, -np.inf])[:, None]).argmax(axis=0)
        return outputs.cost[exits].mean(), correct[exits, np.arange(60)].mean()

    points = np.asarray([point(pair) for pair in itertools.product(*levels)])
    for (cost, score), pair in zip(
        zip(frontier.cost, frontier.score, strict=True), frontier.threshold, strict=True
    ):
        np.testing.assert_allclose((cost, score), point(pair))
    for slope in (0.05, 0.3, 1.0):
        best = (points[:, 1] - slope * points[:, 0]).max()
        assert best - 0.02 <= (frontier.score - slope * frontier.cost).max() <= best + 1e-12


@settings(deadline=None, max_examples=60)
@given(tables())
def test_shared_threshold_never_beats_the_best_thresholds(outputs):
    scores = exit_confidences(outputs, "confidence")[0]
    frontier = best_thresholds(outputs, 0, scores)
    curve = simulate(outputs)
    bound = np.interp(curve.cost[0], frontier.cost, frontier.score)
    assert np.all(curve.score[0] <= bound + 1e-12)


def test_diverged_exit_is_ignored_by_bounds():
    outputs, _ = known_table(50, seed=18)
    logits = outputs.logits.copy()
    logits[0, 0] = np.nan
    diverged = dataclasses.replace(outputs, logits=logits)
    without_exit = ExitOutputs(outputs.logits[:, 1:], outputs.labels, [2, 3])
    for kind in ("stable", "agreement", "any_correct"):
        actual, expected = oracle(diverged, 0, kind), oracle(without_exit, 0, kind)
        np.testing.assert_allclose(actual.cost, expected.cost)
        np.testing.assert_allclose(actual.score, expected.score)
    actual, expected = (single_exit_hull(o, 0) for o in (diverged, without_exit))
    np.testing.assert_allclose(actual.score, expected.score)
    frontier = best_thresholds(diverged, 0, exit_confidences(diverged, "confidence")[0])
    assert frontier.cost.min() >= 2 / 3 - 1e-12
    assert np.isfinite(frontier.threshold).any()


def naive_loss(kind, predicted, label, e):
    last = predicted[-1]
    return (last == label and predicted[e] != label) if kind == "risk" else predicted[e] != last


@settings(deadline=None, max_examples=40)
@given(tables())
def test_exit_losses_equal_loop_over_examples(outputs):
    for kind in ("risk", "agreement"):
        losses = exit_losses(outputs, 0, kind)
        for n, label in enumerate(outputs.labels[0]):
            column = outputs.predictions[0][:, n].tolist()
            for e in range(len(column)):
                assert losses[e, n] == naive_loss(kind, column, label, e)
    relabeled = ExitOutputs(outputs.logits, 0 * outputs.labels, outputs.layers)
    np.testing.assert_array_equal(
        exit_losses(outputs, 0, "agreement"), exit_losses(relabeled, 0, "agreement")
    )


def test_upper_bound_is_that_of_clopper_and_pearson():
    """Checks the definition: at the bound, so few hits have a probability of exactly alpha."""
    from scipy.stats import binom

    for hits, total in ((0, 50), (3, 50), (49, 50)):
        bound = upper_bound(hits, total, 0.9)
        assert binom.cdf(hits, total, bound) == pytest.approx(0.1)
    assert upper_bound(7, 7, 0.9) == 1.0


@pytest.mark.parametrize(("kind", "limit"), [("risk", 0.05), ("agreement", 0.12)])
def test_certificates_are_violated_no_more_often_than_promised(kind, limit):
    """Over 1,000 draws of calibration rows from a large known population."""
    population, _ = known_table(20_000, seed=11)
    # Exits that agree more than independent ones: each copies the next one in 80% of rows.
    rng, logits = np.random.default_rng(0), population.logits.copy()
    for e in (1, 0):
        copied = rng.random(20_000) < 0.8
        logits[0, e, copied] = logits[0, e + 1, copied]
    population = ExitOutputs(logits, population.labels, population.layers)
    scores = exit_confidences(population, "confidence")[0]
    losses = exit_losses(population, 0, kind)
    points = np.maximum.accumulate(scores[:-1], axis=0)
    thresholds = candidate_thresholds(scores[:, :500])
    alpha, draws, violated, certified = 0.1, 1000, 0, 0
    for _ in range(draws):
        rows = rng.integers(500, 20_000, 300)
        counts = count_losses(population.rows(rows), 0, scores[:, rows], thresholds, kind)
        certificate = certify(counts, limit, 1 - alpha)
        if certificate.threshold is None:
            continue
        certified += 1
        exits = (points < certificate.threshold).sum(axis=0)
        risk = np.take_along_axis(losses, exits[None], axis=0).mean()
        violated += risk > limit
    # Three standard errors of the count beyond alpha.
    assert violated / draws <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / draws)
    assert certified > 0.5 * draws  # the promise is not empty


def test_infeasible_certificate_has_no_threshold_but_the_best_bound():
    outputs, _ = known_table(40, seed=12)
    scores = exit_confidences(outputs, "confidence")[0]
    counts = count_losses(outputs, 0, scores, candidate_thresholds(scores), "risk")
    certificate = certify(counts, 0.01)
    assert certificate.threshold is None
    assert certificate.bound >= upper_bound(0, 40, 0.95) > 0.01


def test_certified_loss_is_zero_without_early_exits():
    outputs, _ = known_table(40, seed=12)
    single_exit = ExitOutputs(outputs.logits[:, :1], outputs.labels, [1])
    for limit in (0.0, 0.5):
        certificate = make_resolver(single_exit).certificate("confidence", "risk", limit, 0.95)
        assert (certificate.bound, certificate.harmed) == (0, 0)
        curve = simulate(single_exit, thresholds=np.asarray([certificate.threshold]))
        assert curve.cost[0, 0] == 1
    json.dumps(make_resolver(single_exit).as_dict(), allow_nan=False)


def test_resolver_certificates_are_violated_no_more_than_promised():
    """Certifies the luckiest of three equal models in each of 400 draws, as a run does."""
    population, _ = known_table(5000, seed=19)
    logits = population.logits.copy()
    copied = np.random.default_rng(1).random(5000) < 0.85
    logits[0, :2, copied] = logits[0, 2:, copied]
    population = ExitOutputs(logits, population.labels, population.layers)
    losses, limit = exit_losses(population, 0, "risk"), 0.03
    points = np.maximum.accumulate(exit_confidences(population, "patience")[0][:-1], axis=0)
    rng, violated = np.random.default_rng(2), 0
    for _ in range(400):
        drawn = [population.rows(rng.integers(0, 5000, 200)) for _ in range(3)]
        luckiest = min(drawn, key=lambda rows: exit_losses(rows, 0, "risk")[0].sum())
        resolver = make_resolver(luckiest, ("patience",), compared=3)
        threshold = resolver.certificate("patience", "risk", limit, 0.9).threshold
        if threshold is not None:
            exits = (points < threshold).sum(axis=0)
            violated += np.take_along_axis(losses, exits[None], axis=0).mean() > limit
    assert violated / 400 <= 0.1 + 3 * np.sqrt(0.09 / 400)


def test_policy_that_reads_other_rows_cannot_be_certified():
    outputs, _ = known_table(40, seed=20)
    outputs = dataclasses.replace(outputs, exit_scores=np.full((1, 3, 40), 0.5))
    analysis = analyse(outputs, outputs, "learning_to_exit_min_max")
    with pytest.raises(UserError, match="cannot be certified"):
        analysis.operating_point(0, {"risk": 0.3})


def test_certificate_tests_rows_that_fitted_no_calibrator():
    calibration, validation = known_table(2000, seed=13)[0], known_table(2000, seed=14)[0]
    analysis = analyse(calibration, validation, "pcee_isotonic")
    operating_point = analysis.operating_point(0, {"risk": 0.3, "level": 0.9})
    assert operating_point.certificate.rows == 1000
    assert operating_point.certificate.bound <= 0.3
    half = make_resolver(calibration, ("pcee_isotonic",)).half_calibrator
    threshold = np.asarray([operating_point.threshold])
    point = simulate(validation, "pcee_isotonic", calibrators=[half], thresholds=threshold)
    np.testing.assert_allclose(operating_point.validation, (point.cost[0, 0], point.score[0, 0]))
    reported = dataclasses.replace(calibration, identity=RunIdentity(fitted_on="validation"))
    with pytest.raises(UserError, match="at least two held-out calibration rows"):
        analyse(reported, validation).operating_point(0, {"risk": 0.3})


@settings(deadline=None, max_examples=60)
@given(tables())
def test_resolver_equals_search_over_every_threshold(outputs):
    outputs = outputs.replica(0)
    curve, resolver = simulate(outputs), make_resolver(outputs, ("raw_confidence",))
    front, cost, score = ParetoFront.from_curve(curve, 0), curve.cost[0], curve.score[0]
    assert np.all(np.diff(front.cost) > 0)
    assert np.all(np.diff(front.score) > 0)
    for name, value in vars(front).items():
        np.testing.assert_array_equal(getattr(resolver.fronts["raw_confidence"], name), value)
    for limit in (*cost, cost.min() - 0.1, 0.5):
        feasible = score[cost <= limit + 1e-12]
        threshold = resolver.resolve("raw_confidence", {"cost": max(limit, 0)}).threshold
        assert (threshold is None) == (len(feasible) == 0)
        if threshold is not None:
            assert score[curve.threshold[0] == threshold].max() == feasible.max()
    for target in (*score, min(score.max() + 0.1, 1)):
        feasible = cost[score >= target - 1e-12]
        threshold = resolver.resolve("raw_confidence", {"accuracy": target}).threshold
        assert (threshold is None) == (len(feasible) == 0)
        if threshold is not None:
            assert cost[curve.threshold[0] == threshold].min() == feasible.min()


def test_leaving_shares_are_fractions_of_rows_that_reach_an_exit():
    calibration = known_table(300, seed=17)[0]
    front = ParetoFront.from_curve(simulate(calibration), 0)
    assert len(front.levels) == 65
    for threshold in (*front.levels[::16], front.levels[5:7].mean(), 0.0, 2.0):
        leaving = front.leaving(threshold)
        at_or_above = front.levels[front.levels >= threshold]
        level = at_or_above[0] if len(at_or_above) else front.levels[-1]
        scores = exit_confidences(calibration, "confidence")[0]  # [E, N]
        staying = np.full(scores.shape[1], True)
        for exit_scores, share in zip(scores[:-1], leaving[:-1], strict=True):
            leaves = staying & (exit_scores >= level)
            assert share == pytest.approx(leaves.sum() / max(1, staying.sum()))
            staying &= ~leaves
        assert leaving[-1] == pytest.approx(float(staying.any()))


def test_saved_resolver_chooses_the_same_thresholds():
    calibration = known_table(400, seed=15)[0]
    resolver = make_resolver(calibration)
    restored = ThresholdResolver.from_dict(json.loads(json.dumps(resolver.as_dict())))
    inapplicable = {"stability", "min_confidence"}  # for regression and multi-label tasks
    assert {*resolver.fronts} == {
        p for p in POLICIES if not p.startswith("learning") and p not in inapplicable
    }
    rows = known_table(50, seed=16)[0]
    targets = ({"cost": 0.7}, {"accuracy": 0.6}, {}, {"risk": 0.5})
    targets += ({"agreement": 0.3, "level": 0.9},)
    for policy in resolver.fronts:
        for target in targets:
            threshold, calibrator = resolver.threshold(policy, **target)
            restored_threshold, restored_calibrator = restored.threshold(policy, **target)
            assert threshold == restored_threshold
            np.testing.assert_array_equal(
                exit_confidences(rows, policy, [calibrator]),
                exit_confidences(rows, policy, [restored_calibrator]),
            )


def test_invalid_targets_are_refused_and_unreachable_ones_name_the_best():
    resolver = make_resolver(known_table(100, seed=17)[0])
    assert resolver.threshold("confidence") == resolver.threshold(
        "confidence", accuracy=resolver.full
    )
    for target, message in (
        ({"cost": "0.5"}, "cost must be a number; got '0.5'"),
        ({"accuracy": 1.2}, "accuracy must be from 0 to 1; got 1.2"),
        ({"cost": 5}, "cost=5 is set, but .* the full model's layers, which is at most 1: "),
        ({"cost": 0.5, "risk": 0.1}, "set one target, not 2: cost, risk"),
        ({"level": 0.9}, "level applies to certified targets: also set risk or agreement"),
        (
            {"cost": 0.5, "level": 0.9},
            "level applies to certified targets: also set risk or agreement",
        ),
    ):
        with pytest.raises(UserError, match=message):
            resolver.threshold("pcee", **target)
    for target, message in (
        ({"cost": 0.1}, r"cost=0.1 cannot be met: the best on .* is 0\.\d{4}; raise cost$"),
        ({"accuracy": 0.999}, r"accuracy=0.999 cannot be met: .* is 0\.\d{4}; lower accuracy$"),
        ({"risk": 1e-4}, r"certified: the best is 0\.\d{4} with confidence 0.95; raise risk, or"),
        (
            {"agreement": 0.9999, "level": 0.9},
            r"agreement=0.9999 cannot be certified: .* 0.9; lower agreement, or train with more ca",
        ),
    ):
        with pytest.raises(UserError, match=message):
            resolver.threshold("confidence", **target)
    with pytest.raises(UserError, match="was not calibrated for the policy 'learning_to_exit'"):
        resolver.threshold("learning_to_exit", cost=0.5)


@pytest.mark.parametrize("policy", ["confidence", "patience", "pcee"])
def test_target_table_equals_choices_of_the_resolver(policy):
    calibration = known_table(300, seed=21)[0]
    resolver = make_resolver(calibration, (policy,))
    for name in ("cost", "accuracy", "risk", "agreement"):
        table, chosen = resolver.table(policy, name), 0
        order = np.diff(table.value)
        assert np.all(order >= 0 if table.at_most else order <= 0)
        # In steps of 0.005, as in the table of PCEE's accuracies.
        for value in np.arange(0, 201) / 200:
            resolution, row = resolver.resolve(policy, {name: value}), table.choose(value)
            assert resolution.threshold == (None if row is None else table.threshold[row])
            if row is None:
                assert resolution.reachable == table.value[0]
            elif name in ("risk", "agreement"):
                assert resolution.reachable == table.reached[row]
            chosen += row is not None
        assert chosen > 10


def test_time_target_equals_search_over_the_front():
    resolver = make_resolver(known_table(300, seed=22)[0], ("confidence",))
    front = resolver.fronts["confidence"]
    milliseconds = np.asarray([3.0, 1.0, 2.5])  # not ascending
    times = front.shares @ milliseconds
    assert (np.diff(times) > 0).any()
    assert (np.diff(times) < 0).any()
    for limit in (*times, times.min() - 0.1, 1.9, 9.0):
        feasible = np.flatnonzero(times <= limit)
        resolution = resolver.resolve("confidence", {"milliseconds": limit}, milliseconds)
        assert resolution.threshold == (front.threshold[feasible[-1]] if len(feasible) else None)
        assert resolution.reachable == times.min()
    with pytest.raises(UserError, match="milliseconds are not known for this model"):
        resolver.resolve("confidence", {"milliseconds": 3})


def test_infinite_confidence_is_certified_like_any_other():
    """A user's policy may return +inf to answer at an exit, and losses there count too."""
    labels = np.arange(200) % 2
    first = np.where(np.arange(200) % 5 == 0, 1 - labels, labels)  # a fifth is wrong
    logits = np.stack([np.eye(2)[first], np.eye(2)[labels]]).astype(np.float32)
    outputs = ExitOutputs(logits=logits, labels=labels, layers=np.array([1, 2]))

    def decide(outputs, temperatures):
        return np.where(outputs.logits[..., 0] >= 0, np.inf, -np.inf)  # everywhere +inf

    confidences = exit_confidences(outputs, decide)[0]
    counts = count_losses(outputs, 0, confidences, candidate_thresholds(confidences), "risk")
    assert counts.harmed.tolist() == [40]
    assert certify(counts, 0.1).threshold is None
    assert certify(counts, 0.3).harmed == 40
    curve = simulate(outputs, decide)
    np.testing.assert_allclose(curve.cost, [[0.5, 1]])
    np.testing.assert_allclose(curve.score, [[0.8, 1]])
    assert curve.threshold[0, -1] == NEVER
    # An infinite threshold means the full model, as in predict.
    assert simulate(outputs, decide, thresholds=[np.inf]).cost == 1
    with pytest.raises(UserError, match="thresholds must be numbers; got nan"):
        simulate(outputs, decide, thresholds=[0.5, np.nan])
