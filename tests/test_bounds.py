"""Oracles and floors against enumeration; certificates against their own promise."""

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


def plain_oracle(kind, given, label):
    """(exit from 0, answer) of an oracle for one example, from what each exit says."""
    for e in range(len(given)):
        if kind == "any_correct" and given[e] == label:
            return e, label
        if kind == "stable" and all(g == label for g in given[e:]):
            return e, label
        if kind == "agreement" and given[e] == given[-1]:
            return e, given[e]
    return 0, given[-1] if kind == "stable" else given[0]


@settings(deadline=None, max_examples=60)
@given(tables())
def test_oracles_equal_a_loop_over_examples(outputs):
    given, labels = outputs.predictions[0].T.tolist(), outputs.labels[0].tolist()
    for kind in ("stable", "agreement", "any_correct"):
        frontier = oracle(outputs, 0, kind)
        points = []
        for count in range(1, len(outputs.layers) + 1):
            pairs = [
                plain_oracle(kind, g[:count], label) for g, label in zip(given, labels, strict=True)
            ]
            cost = np.mean([outputs.cost[e] for e, _ in pairs])
            score = np.mean([a == label for (_, a), label in zip(pairs, labels, strict=True)])
            points.append((cost, score))
            alone = np.mean([g[count - 1] == label for g, label in zip(given, labels, strict=True)])
            # Neither of these has luck: of a model cut off there, the score is its last exit's.
            assert kind == "any_correct" or score == alone
            assert np.interp(cost, frontier.cost, frontier.score) >= score - 1e-12
        for corner in zip(frontier.cost, frontier.score, strict=True):
            assert any(np.allclose(corner, point) for point in points)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_the_stable_oracle_is_never_below_the_floor(outputs):
    low, high = single_exit_hull(outputs, 0), oracle(outputs, 0, "stable")
    probes = np.linspace(outputs.cost[0], outputs.cost[-1], 9)
    above = np.interp(probes, high.cost, high.score)
    assert np.all(above >= np.interp(probes, low.cost, low.score) - 1e-12)
    assert np.all(np.diff(high.score) > 0)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_no_way_to_choose_exits_beats_the_any_correct_oracle(outputs):
    outputs = outputs.rows(np.arange(min(4, outputs.labels.shape[1])))
    exits, count = outputs.logits.shape[1:3]
    frontier = oracle(outputs, 0, "any_correct")
    right = outputs.predictions[0] == outputs.labels[0]
    for places in itertools.product(range(exits), repeat=count):
        cost = np.mean([outputs.cost[p] for p in places])
        score = np.mean([right[p, n] for n, p in enumerate(places)])
        assert score <= np.interp(cost, frontier.cost, frontier.score) + 1e-9


@settings(deadline=None, max_examples=60)
@given(tables())
def test_the_floor_is_the_upper_hull_of_the_exits(outputs):
    low = single_exit_hull(outputs, 0)
    alone = (outputs.predictions[0] == outputs.labels[0]).mean(axis=1)
    assert np.all(np.interp(outputs.cost, low.cost, low.score) >= alone - 1e-12)
    assert {*low.cost} <= {*outputs.cost}  # its corners are exits
    assert np.all(np.diff(np.diff(low.score) / np.diff(low.cost)) < 1e-12)  # and it is concave


def test_the_share_of_the_gap_is_0_at_the_floor_and_1_at_the_oracle():
    low = ParetoFront(np.asarray([0.25, 1.0]), np.asarray([0.5, 0.8]))
    high = ParetoFront(np.asarray([0.25, 0.4]), np.asarray([0.5, 0.9]))
    assert share_of_gap(low.cost, low.score, low, high) == 0
    assert share_of_gap(high.cost, high.score, low, high) == 1
    half = ParetoFront(np.asarray([0.25, 0.4, 1.0]), np.asarray([0.5, 0.73, 0.85]))
    assert share_of_gap(half.cost, half.score, low, high) == pytest.approx(0.5)
    assert share_of_gap(low.cost, low.score, low, low) is None


def test_thresholds_of_their_own_are_at_least_as_good_as_one_for_all():
    """On exits whose confidences mean different things, much better; enumeration finds no more."""
    outputs, _ = known_table(60, seed=3)
    scores = exit_confidences(outputs, "confidence")[0].round(1)
    scores[1] = 1 - scores[1]  # the second exit is sure where it is wrong
    frontier = best_thresholds(outputs, 0, scores)
    right = (outputs.predictions[0] == outputs.labels[0]).astype(float)
    levels = [[*np.unique(scores[e]), np.inf] for e in range(2)]

    def point(pair):
        place = (scores >= np.asarray([*pair, -np.inf])[:, None]).argmax(axis=0)
        return outputs.cost[place].mean(), right[place, np.arange(60)].mean()

    every = np.asarray([point(pair) for pair in itertools.product(*levels)])
    for (cost, score), pair in zip(
        zip(frontier.cost, frontier.score, strict=True), frontier.threshold, strict=True
    ):
        np.testing.assert_allclose((cost, score), point(pair))
    for slope in (0.05, 0.3, 1.0):
        best = (every[:, 1] - slope * every[:, 0]).max()
        assert best - 0.02 <= (frontier.score - slope * frontier.cost).max() <= best + 1e-12


@settings(deadline=None, max_examples=60)
@given(tables())
def test_no_single_threshold_lies_above_the_best_thresholds(outputs):
    scores = exit_confidences(outputs, "confidence")[0]
    frontier = best_thresholds(outputs, 0, scores)
    curve = simulate(outputs)
    bound = np.interp(curve.cost[0], frontier.cost, frontier.score)
    assert np.all(curve.score[0] <= bound + 1e-12)


def test_an_exit_that_diverged_bounds_nothing():
    outputs, _ = known_table(50, seed=18)
    logits = outputs.logits.copy()
    logits[0, 0] = np.nan
    broken = dataclasses.replace(outputs, logits=logits)
    deeper = ExitOutputs(outputs.logits[:, 1:], outputs.labels, [2, 3])
    for kind in ("stable", "agreement", "any_correct"):
        ours, theirs = oracle(broken, 0, kind), oracle(deeper, 0, kind)
        np.testing.assert_allclose(ours.cost, theirs.cost)
        np.testing.assert_allclose(ours.score, theirs.score)
    np.testing.assert_allclose(single_exit_hull(broken, 0).score, single_exit_hull(deeper, 0).score)
    frontier = best_thresholds(broken, 0, exit_confidences(broken, "confidence")[0])
    assert frontier.cost.min() >= 2 / 3 - 1e-12
    assert np.isfinite(frontier.threshold).any()


def plain_harm(kind, given, label, e):
    last = given[-1]
    return (last == label and given[e] != label) if kind == "risk" else given[e] != last


@settings(deadline=None, max_examples=40)
@given(tables())
def test_harms_equal_a_loop(outputs):
    for kind in ("risk", "agreement"):
        found = exit_losses(outputs, 0, kind)
        for n, label in enumerate(outputs.labels[0]):
            column = outputs.predictions[0][:, n].tolist()
            for e in range(len(column)):
                assert found[e, n] == plain_harm(kind, column, label, e)
    other = ExitOutputs(outputs.logits, 0 * outputs.labels, outputs.layers)
    np.testing.assert_array_equal(
        exit_losses(outputs, 0, "agreement"), exit_losses(other, 0, "agreement")
    )


def test_the_bound_is_clopper_and_pearson_s():
    """Its defining property: at the bound, so few hits have a chance of exactly alpha."""
    from scipy.stats import binom

    for hits, total in ((0, 50), (3, 50), (49, 50)):
        bound = upper_bound(hits, total, 0.9)
        assert binom.cdf(hits, total, bound) == pytest.approx(0.1)
    assert upper_bound(7, 7, 0.9) == 1.0


@pytest.mark.parametrize(("kind", "limit"), [("risk", 0.05), ("agreement", 0.12)])
def test_certificates_are_broken_no_more_often_than_promised(kind, limit):
    """Over 1,000 draws of calibration rows from a large known population."""
    population, _ = known_table(20_000, seed=11)
    # Exits that agree more than independent ones do: the second copies the third in four of five.
    rng, logits = np.random.default_rng(0), population.logits.copy()
    for e in (1, 0):
        copied = rng.random(20_000) < 0.8
        logits[0, e, copied] = logits[0, e + 1, copied]
    population = ExitOutputs(logits, population.labels, population.layers)
    scores, harmful = (
        exit_confidences(population, "confidence")[0],
        exit_losses(population, 0, kind),
    )
    points = np.maximum.accumulate(scores[:-1], axis=0)
    thresholds = candidate_thresholds(scores[:, :500])
    alpha, draws, broken, certified_any = 0.1, 1000, 0, 0
    for _ in range(draws):
        rows = rng.integers(500, 20_000, 300)
        drawn = count_losses(population.rows(rows), 0, scores[:, rows], thresholds, kind)
        found = certify(drawn, limit, 1 - alpha)
        if found.threshold is None:
            continue
        certified_any += 1
        place = (points < found.threshold).sum(axis=0)
        true = np.take_along_axis(harmful, place[None], axis=0).mean()
        broken += true > limit
    # Three standard errors of the count beyond alpha.
    assert broken / draws <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / draws)
    assert certified_any > 0.5 * draws  # and it does promise something


def test_what_cannot_be_certified_is_refused_with_the_best_that_can():
    outputs, _ = known_table(40, seed=12)
    scores = exit_confidences(outputs, "confidence")[0]
    found = certify(count_losses(outputs, 0, scores, candidate_thresholds(scores), "risk"), 0.01)
    assert found.threshold is None
    assert found.bound >= upper_bound(0, 40, 0.95) > 0.01


def test_where_nothing_leaves_early_nothing_is_lost():
    outputs, _ = known_table(40, seed=12)
    one = ExitOutputs(outputs.logits[:, :1], outputs.labels, [1])
    for limit in (0.0, 0.5):
        found = make_resolver(one).certificate("confidence", "risk", limit, 0.95)
        assert (found.bound, found.harmed) == (0, 0)
        curve = simulate(one, thresholds=np.asarray([found.threshold]))
        assert curve.cost[0, 0] == 1
    json.dumps(make_resolver(one).as_dict(), allow_nan=False)


def test_a_resolver_certifies_no_more_often_wrongly_than_promised():
    """The whole way, halves and all: 400 draws, and the best of three equal models each time."""
    population, _ = known_table(5000, seed=19)
    logits = population.logits.copy()
    copied = np.random.default_rng(1).random(5000) < 0.85
    logits[0, :2, copied] = logits[0, 2:, copied]
    population = ExitOutputs(logits, population.labels, population.layers)
    harmful, limit = exit_losses(population, 0, "risk"), 0.03
    points = np.maximum.accumulate(exit_confidences(population, "patience")[0][:-1], axis=0)
    rng, broken = np.random.default_rng(2), 0
    for _ in range(400):
        drawn = [population.rows(rng.integers(0, 5000, 200)) for _ in range(3)]
        luckiest = min(drawn, key=lambda rows: exit_losses(rows, 0, "risk")[0].sum())
        found = make_resolver(luckiest, ("patience",), compared=3)
        threshold = found.certificate("patience", "risk", limit, 0.9).threshold
        if threshold is not None:
            place = (points < threshold).sum(axis=0)
            broken += np.take_along_axis(harmful, place[None], axis=0).mean() > limit
    assert broken / 400 <= 0.1 + 3 * np.sqrt(0.09 / 400)


def test_policies_that_read_other_rows_are_not_certified():
    outputs, _ = known_table(40, seed=20)
    outputs = dataclasses.replace(outputs, exit_scores=np.full((1, 3, 40), 0.5))
    analysis = analyse(outputs, outputs, "learning_to_exit_min_max")
    with pytest.raises(UserError, match="cannot be certified"):
        analysis.operating_point(0, {"risk": 0.3})


def test_a_run_s_certificate_tests_rows_that_fitted_nothing():
    calibration, validation = known_table(2000, seed=13)[0], known_table(2000, seed=14)[0]
    analysis = analyse(calibration, validation, "pcee_isotonic")
    found = analysis.operating_point(0, {"risk": 0.3, "level": 0.9})
    assert found.certificate.rows == 1000
    assert found.certificate.bound <= 0.3
    half = make_resolver(calibration, ("pcee_isotonic",)).half_calibrator
    threshold = np.asarray([found.threshold])
    point = simulate(validation, "pcee_isotonic", calibrators=[half], thresholds=threshold)
    np.testing.assert_allclose(found.validation, (point.cost[0, 0], point.score[0, 0]))
    reported = dataclasses.replace(calibration, identity=RunIdentity(fitted_on="validation"))
    with pytest.raises(UserError, match="at least two held-out calibration rows"):
        analyse(reported, validation).operating_point(0, {"risk": 0.3})


@settings(deadline=None, max_examples=60)
@given(tables())
def test_the_resolver_chooses_as_a_search_over_every_threshold(outputs):
    outputs = outputs.replica(0)
    curve, resolver = simulate(outputs), make_resolver(outputs, ("raw_confidence",))
    front, cost, score = ParetoFront.from_curve(curve, 0), curve.cost[0], curve.score[0]
    assert np.all(np.diff(front.cost) > 0)
    assert np.all(np.diff(front.score) > 0)
    for name, value in vars(front).items():
        np.testing.assert_array_equal(getattr(resolver.fronts["raw_confidence"], name), value)
    for limit in (*cost, cost.min() - 0.1, 0.5):
        fits = score[cost <= limit + 1e-12]
        found = resolver.resolve("raw_confidence", {"cost": max(limit, 0)}).threshold
        assert (found is None) == (len(fits) == 0)
        if found is not None:
            assert score[curve.threshold[0] == found].max() == fits.max()
    for wanted in (*score, min(score.max() + 0.1, 1)):
        fits = cost[score >= wanted - 1e-12]
        found = resolver.resolve("raw_confidence", {"accuracy": wanted}).threshold
        assert (found is None) == (len(fits) == 0)
        if found is not None:
            assert cost[curve.threshold[0] == found].min() == fits.min()


def test_shares_leaving_of_those_that_come():
    calibration = known_table(300, seed=17)[0]
    front = ParetoFront.from_curve(simulate(calibration), 0)
    assert len(front.levels) == 65
    for threshold in (*front.levels[::16], front.levels[5:7].mean(), 0.0, 2.0):
        found = front.leaving(threshold)
        near = front.levels[front.levels >= threshold]
        level = near[0] if len(near) else front.levels[-1]
        scores = exit_confidences(calibration, "confidence")[0]  # [E, N]
        staying = np.full(scores.shape[1], True)
        for own, share in zip(scores[:-1], found[:-1], strict=True):
            leaves = staying & (own >= level)
            assert share == pytest.approx(leaves.sum() / max(1, staying.sum()))
            staying &= ~leaves
        assert found[-1] == pytest.approx(float(staying.any()))


def test_a_resolver_is_saved_read_back_and_chooses_the_same():
    calibration = known_table(400, seed=15)[0]
    resolver = make_resolver(calibration)
    again = ThresholdResolver.from_dict(json.loads(json.dumps(resolver.as_dict())))
    others = {"stability", "min_confidence"}  # of numbers, of several labels
    assert {*resolver.fronts} == {
        p for p in POLICIES if not p.startswith("learning") and p not in others
    }
    rows = known_table(50, seed=16)[0]
    asked = ({"cost": 0.7}, {"accuracy": 0.6}, {}, {"risk": 0.5}, {"agreement": 0.3, "level": 0.9})
    for policy in resolver.fronts:
        for target in asked:
            threshold, fitted = resolver.threshold(policy, **target)
            ours, theirs = again.threshold(policy, **target)
            assert threshold == ours
            np.testing.assert_array_equal(
                exit_confidences(rows, policy, [fitted]), exit_confidences(rows, policy, [theirs])
            )


def test_targets_that_cannot_be_met_name_the_best():
    resolver = make_resolver(known_table(100, seed=17)[0])
    assert resolver.threshold("confidence") == resolver.threshold(
        "confidence", accuracy=resolver.full
    )
    for target, message in (
        ({"cost": "0.5"}, "cost must be a number; got '0.5'"),
        ({"accuracy": 1.2}, "accuracy must be from 0 to 1; got 1.2"),
        ({"cost": 0.5, "risk": 0.1}, "set one target, not 2: cost, risk"),
        ({"level": 0.9}, "level applies to certified targets: also set risk or agreement"),
        (
            {"cost": 0.5, "level": 0.9},
            "level applies to certified targets: also set risk or agreement",
        ),
    ):
        with pytest.raises(UserError, match=message):
            resolver.threshold("pcee", **target)
    for target in ({"cost": 0.1}, {"accuracy": 0.999}, {"risk": 1e-4}, {"agreement": 0.9999}):
        with pytest.raises(UserError, match="infeasible: the best"):
            resolver.threshold("confidence", **target)
    with pytest.raises(UserError, match="was not calibrated for the policy 'learning_to_exit'"):
        resolver.threshold("learning_to_exit", cost=0.5)


@pytest.mark.parametrize("policy", ["confidence", "patience", "pcee"])
def test_a_table_of_targets_is_what_the_resolver_chooses(policy):
    calibration = known_table(300, seed=21)[0]
    resolver = make_resolver(calibration, (policy,))
    for name in ("cost", "accuracy", "risk", "agreement"):
        table, chosen = resolver.table(policy, name), 0
        order = np.diff(table.value)
        assert np.all(order >= 0 if table.at_most else order <= 0)
        # Steps of 0.005, in which the table of PCEE's accuracies is.
        for value in np.arange(0, 201) / 200:
            found, row = resolver.resolve(policy, {name: value}), table.choose(value)
            assert found.threshold == (None if row is None else table.threshold[row])
            if row is None:
                assert found.reachable == table.value[0]
            elif name in ("risk", "agreement"):
                assert found.reachable == table.reached[row]
            chosen += row is not None
        assert chosen > 10


def test_a_time_chooses_as_a_search_over_the_front():
    resolver = make_resolver(known_table(300, seed=22)[0], ("confidence",))
    front, clock = resolver.fronts["confidence"], np.asarray([3.0, 1.0, 2.5])  # not ascending
    times = front.shares @ clock
    assert (np.diff(times) > 0).any()
    assert (np.diff(times) < 0).any()
    for limit in (*times, times.min() - 0.1, 1.9, 9.0):
        quick = np.flatnonzero(times <= limit)
        found = resolver.resolve("confidence", {"milliseconds": limit}, clock)
        assert found.threshold == (front.threshold[quick[-1]] if len(quick) else None)
        assert found.reachable == times.min()
    with pytest.raises(UserError, match="milliseconds are not known for this model"):
        resolver.resolve("confidence", {"milliseconds": 3})


def test_a_confidence_of_infinity_is_tested_like_any_other():
    """By +inf a rule of one's own says "answer here": what is lost there counts too."""
    labels = np.arange(200) % 2
    first = np.where(np.arange(200) % 5 == 0, 1 - labels, labels)  # a fifth is wrong
    logits = np.stack([np.eye(2)[first], np.eye(2)[labels]]).astype(np.float32)
    outputs = ExitOutputs(logits=logits, labels=labels, layers=np.array([1, 2]))

    def hard(outputs, temperatures):
        return np.where(outputs.logits[..., 0] >= 0, np.inf, -np.inf)  # all

    confidences = exit_confidences(outputs, hard)[0]
    counts = count_losses(outputs, 0, confidences, candidate_thresholds(confidences), "risk")
    assert counts.harmed.tolist() == [40]
    assert certify(counts, 0.1).threshold is None
    assert certify(counts, 0.3).harmed == 40
    curve = simulate(outputs, hard)
    np.testing.assert_allclose(curve.cost, [[0.5, 1]])
    np.testing.assert_allclose(curve.score, [[0.8, 1]])
    assert curve.threshold[0, -1] == NEVER
    assert (
        simulate(outputs, hard, thresholds=[np.inf]).cost == 1
    )  # the full model, as predict has it
    with pytest.raises(UserError, match="thresholds must be numbers; got nan"):
        simulate(outputs, hard, thresholds=[0.5, np.nan])
