"""Tests of the report page, also in a browser, and of the results and figures beside it."""

import copy
import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from simulated import (
    NASTY,
    regression_analysis,
    save_replica,
    severe_errors,
    simulated_analysis,
    simulated_outputs,
    traces,
)

from sweet_jax import ExitOutputs, Run
from sweet_jax import simulate as simulate_curve
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse, scores_at_costs
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.resolver import ThresholdResolver
from sweet_jax.exits.simulation import Curve
from sweet_jax.exits.thresholds import format_threshold
from sweet_jax.files import write_json
from sweet_jax.report.baselines import Baseline
from sweet_jax.report.comparison import (
    check_replaceable,
    write_comparison,
)
from sweet_jax.report.console import exit_table
from sweet_jax.report.details import ExitTimes, ReportDetails
from sweet_jax.report.figures import curve_figure, exits_figure, write_figures
from sweet_jax.report.model_card import model_card
from sweet_jax.report.page import write_report
from sweet_jax.report.page_tables import _rounded, certificate_table, policy_series
from sweet_jax.report.results import TrainingRecord, build_results
from sweet_jax.report.shortfalls import Shortfall, describe_shortfall
from sweet_jax.report.traces import loss_traces
from sweet_jax.report.verdict import describe_training, verdict
from sweet_jax.simulate import main as simulate_command

END, HOME, RIGHT = "\ue010", "\ue011", "\ue014"  # WebDriver's names of keys
REGRESSION = from_mapping(
    {"objective": "regression", "exits": (1, 2, 4), "seeds": (0, 1)}
).resolved()


@pytest.fixture(scope="module")
def analysis():
    return simulated_analysis()


@pytest.fixture(scope="module")
def report(analysis, tmp_path_factory):
    config = from_mapping({"task": NASTY, "exits": (1, 2, 4), "seeds": (0, 1)}).resolved()
    failures = [
        {
            "replica": 1,
            "seed": 1,
            "learning_rate": 3e-4,
            "exit": 2,
            "what": "collapsed to class 'no'",
            "step": 7,
        }
    ]
    metrics = [
        {"training": "t", "step": step, "loss": [[1 / (step + 1), 0.5, None]] * 2}
        for step in range(30)
    ]
    results = build_results(config, analysis, TrainingRecord(900, failures=failures))
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "report.html", analysis, results, metrics, {"t": (1, 2, 4)})
    write_figures(folder / "figures", analysis, results, metrics, {"t": (1, 2, 4)})
    return folder, results


def displayed_values(browser) -> list[float]:
    names = ("at-threshold", "at-cost", "at-score")
    return [float(browser.find_element("id", name).text) for name in names]


def displayed_shares(browser) -> list[float]:
    cells = browser.find_elements("css selector", "#shares tr td:nth-child(2)")
    return [float(cell.text.rstrip("%")) / 100 for cell in cells]


def move_slider(browser, value: int) -> None:
    browser.execute_script(
        "const s = document.getElementById('threshold'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'));",
        value,
    )


def test_slider_shows_the_cost_metric_and_shares_of_the_curve(report, analysis, browser):
    folder, results = report
    browser.get((folder / "report.html").as_uri())
    for replica in (0, 1):
        browser.execute_script(
            "const c = document.getElementById('replica'); c.value = arguments[0];"
            "c.dispatchEvent(new Event('change'));",
            str(replica),
        )
        recommended = analysis.operating_point(replica)
        np.testing.assert_allclose(
            displayed_values(browser)[1:], recommended.validation, rtol=0, atol=6e-5
        )
        shown = browser.find_element("id", "at-threshold").text
        assert shown == format_threshold(recommended.threshold, analysis.breakpoints(replica))
        last = int(browser.find_element("id", "threshold").get_attribute("max"))
        for position in (0, last // 2, last):
            move_slider(browser, position)
            threshold, cost, score = displayed_values(browser)
            expected = simulate_curve(
                analysis.validation.replica(replica),
                calibrators=[analysis.calibrators[replica]],
                thresholds=np.asarray([threshold]),
            )
            assert (cost, score) == pytest.approx(
                (expected.cost[0, 0], expected.score[0, 0]), abs=6e-5
            )
            shares = displayed_shares(browser)
            assert sum(shares) == pytest.approx(1, abs=2e-3)
            assert cost == pytest.approx(np.dot(shares, [0.25, 0.5, 1.0]), abs=2e-3)
            marker = next(t for t in traces(browser, "curve") if t["name"] == "the slider")
            assert marker["x"] == [pytest.approx(cost, abs=1e-3)]
            aria_text = browser.find_element("id", "threshold").get_attribute("aria-valuetext")
            assert f"cost {cost:.4f}, accuracy {score:.4f}" in aria_text
        assert shares == [0, 0, 1]
    exit_scores = browser.find_element("css selector", "[aria-label='each exit alone'] table").text
    for row in results["replicas"][results["best_replica"]]["individual"]:
        assert f"{row['score']:.4f}" in exit_scores
    path_counts = browser.execute_script(
        "return [...document.querySelectorAll('.chart > svg')]"
        ".map(s => s.querySelectorAll('path').length)"
    )
    assert len(path_counts) == 2 + 3  # the curve, the losses, and the reliability of each exit
    assert all(path_counts)


def test_keyboard_moves_the_slider_of_the_report(report, browser):
    browser.get((report[0] / "report.html").as_uri())
    slider = browser.find_element("id", "threshold")
    first = slider.get_attribute("aria-valuetext")
    slider.send_keys(END)
    assert displayed_shares(browser) == [0, 0, 1]
    slider.send_keys(HOME, RIGHT)
    assert slider.get_attribute("value") == "1"
    browser.find_element("id", "recommended").click()
    assert slider.get_attribute("aria-valuetext") == first


def set_value(browser, name: str, value: str) -> None:
    browser.execute_script(
        "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
        "c.dispatchEvent(new Event('input')); c.dispatchEvent(new Event('change'));",
        name,
        value,
    )


def request_target(browser, target: str, value: float) -> str:
    set_value(browser, "target", target)
    set_value(browser, "target-value", str(value))
    return browser.find_element("id", "target-result").text


def test_page_and_simulate_command_choose_the_same_threshold(
    report, analysis, browser, tmp_path, capsys
):
    save_replica(analysis, analysis.best, tmp_path / "run")
    browser.get((report[0] / "report.html").as_uri())
    targets = {"cost": (0.1, 0.25, 0.6, 0.733, 1.0), "accuracy": (0.3, 0.7, 0.85, 0.995)}
    feasible = 0
    for policy in ("confidence", "entropy", "patience", "pcee_isotonic", "pcee_ws"):
        set_value(browser, "policy", policy)
        assert browser.find_element("id", "about").text == POLICIES[policy].about
        for target, value in ((name, v) for name, values in targets.items() for v in values):
            shown = request_target(browser, target, value)
            command = [f"--run={tmp_path / 'run'}", f"--policy={policy}", f"--{target}={value}"]
            assert simulate_command(command) == 0
            printed = capsys.readouterr().out
            if "cannot be met" in printed:
                (said,) = re.findall(r"cannot be met: .* rows is \S+ [.\d]+", printed)
                assert shown == said
                continue
            expected = re.findall(r"^threshold (\S+): .*; cost (\S+), accuracy (\S+) on", printed)
            actual = re.findall(r"^threshold (\S+); .*: cost (\S+), accuracy (\S+); ", shown)
            assert actual == expected
            threshold, cost, accuracy = (float(v) for v in expected[0])
            np.testing.assert_allclose(
                displayed_values(browser), (threshold, cost, accuracy), atol=6e-8
            )
            feasible += 1
    assert feasible > 30
    set_value(browser, "policy", "entropy")
    assert request_target(browser, "cost", 0.1) == (
        "cannot be met: the best on the calibration rows is cost 0.2500"
    )
    assert severe_errors(browser) == []


def test_page_and_resolver_certify_the_same_thresholds(report, analysis, browser):
    browser.get((report[0] / "report.html").as_uri())
    best = report[1]["best_replica"]
    for policy in ("confidence", "pcee_ws"):
        of_policy = analyse(analysis.calibration, analysis.validation, policy)
        set_value(browser, "policy", policy)
        for target, value in (("risk", 0.3), ("agreement", 0.75)):
            shown = request_target(browser, target, value)
            point = of_policy.operating_point(best, {target: value})
            (threshold,) = re.findall(r"at threshold (\S+); ", shown)
            calibrator = of_policy.resolver(best).half_calibrator
            assert threshold == format_threshold(
                point.threshold, of_policy.breakpoints(best, calibrator)
            )
            assert f"certified with 95% confidence: {target} {point.reachable:.4f} at" in shown
            assert "cost {:.4f}, accuracy {:.4f}".format(*point.validation) in shown
    assert "cannot be certified: the best is risk 0." in request_target(browser, "risk", 0.001)


def test_page_and_simulate_command_refuse_a_cost_above_that_of_all_layers(
    report, analysis, browser, tmp_path, capsys
):
    save_replica(analysis, analysis.best, tmp_path)
    assert simulate_command([f"--run={tmp_path}", "--cost=5"]) == 2
    said = "cost is a share of the full model's layers, which is at most 1"
    assert f"error: cost=5 is set, but {said}: set that or less\n" == capsys.readouterr().err
    browser.get((report[0] / "report.html").as_uri())
    assert request_target(browser, "cost", 5) == said
    assert request_target(browser, "cost", 1).startswith("threshold ")
    outputs = [
        dataclasses.replace(getattr(analysis, split), cost=np.asarray([0.25, 0.75, 1.75]))
        for split in ("calibration", "validation")
    ]  # as for Multi-Model
    several = analyse(*outputs)
    assert several.operating_point(0, {"cost": 1.75}).threshold is not None
    with pytest.raises(UserError, match=r"which is at most 1\.75: set that or less"):
        several.operating_point(0, {"cost": 1.8})


def test_page_and_simulate_command_bound_the_error_of_a_regression_alike(browser, tmp_path, capsys):
    analysis = regression_analysis()
    save_replica(analysis, analysis.best, tmp_path)
    results = build_results(REGRESSION, analysis, TrainingRecord(900))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    browser.get((tmp_path / "report.html").as_uri())
    option = browser.find_element("css selector", "#target [value=error]").text
    assert option == "mean absolute error at most"
    pattern = r"threshold (\S+?)[:;] .*cost (\S+), mean absolute error ([.\d]+).*?; ([.\d]+ \w+)"
    for value in (0.3, 0.5):
        shown = request_target(browser, "error", value)
        assert simulate_command([f"--run={tmp_path}", f"--error={value}"]) == 0
        (line,) = re.findall(r"threshold .* the target", capsys.readouterr().out)
        assert re.findall(pattern, shown) == re.findall(pattern, line) != []
    legend = [key.text for key in browser.find_elements("css selector", "#curve .legend button")]
    assert "stable oracle" not in legend  # a regression has none
    assert "floor: exits at random" in legend
    assert "cannot be met: the best on the calibration rows is error " in (
        request_target(browser, "error", 0.001)
    )


def test_errors_are_positive_and_have_one_name_wherever_people_read_them(tmp_path):
    """results.json keeps the negated error, of which larger is better."""
    analysis = regression_analysis()
    results = build_results(REGRESSION, analysis, TrainingRecord(900))
    best = results["best_replica"]
    last = results["replicas"][best]["individual"][-1]
    assert results["metric"] == "neg_mean_absolute_error"
    assert last["score"] < 0
    shown = f"{-last['score']:.4f}"
    interval = f"{-last['interval'][1]:.4f}", f"{-last['interval'][0]:.4f}"
    write_report(tmp_path / "report.html", analysis, results, [], {})
    page = (tmp_path / "report.html").read_text()
    kwargs = {"classes": ["y"], "text_columns": ["text"], "max_length": 32}
    card = model_card(results, model_type="bert", **kwargs)
    table = exit_table(results)
    write_comparison(tmp_path / "compare.html", [("a", analysis), ("b", analysis)])
    comparison = (tmp_path / "compare.html").read_text()
    for text in (page, card, table, comparison):
        assert "mean absolute error (lower is better)" in text
        assert not re.search("neg.mean.absolute.error", text)
    assert f"<td>{shown}</td>\n<td>{interval[0]} \N{EN DASH} {interval[1]}</td>" in page
    assert f"| {shown} | {interval[0]} to {interval[1]} |" in card
    assert re.search(rf"  4 .* {shown}  \[{interval[0]}, {interval[1]}\]", table)
    data, charts = (
        json.loads(re.search(rf'<script id="{name}" [^>]*>(.*?)</script>', page)[1])
        for name in ("data", "charts")
    )
    assert min(data["policies"][best]["stability"]["curve"]["score"]) > 0
    assert data["exits"][best][-1]["score"] == -last["score"]
    assert min(min(bound["score"]) for bound in data["bounds"][best].values()) > 0
    chart = json.loads(re.search(r'<script id="chart" [^>]*>(.*?)</script>', comparison)[1])
    for shown_traces in (charts["curve"]["traces"], chart["traces"]):
        assert min(value for trace in shown_traces for value in (*trace["y"], *trace["low"])) > 0
    (axes,) = curve_figure(analysis, results).axes
    assert axes.get_ylabel() == "mean absolute error (lower is better) (n = 60)"
    assert axes.get_ylim()[0] > 0


def test_comparison_shows_a_larger_error_as_a_positive_difference(tmp_path):
    better = regression_analysis()
    rows = better.validation
    worse = dataclasses.replace(rows, logits=rows.logits + 3)
    write_comparison(tmp_path / "compare.html", [("a", better), ("b", analyse(worse, worse))])
    page = (tmp_path / "compare.html").read_text()
    (gap, low, high) = re.search(r"<td>\+(\S+) \[\+(\S+), \+(\S+)\]</td>", page).groups()
    assert 1 < float(low) < float(gap) < float(high) < 4


def test_page_shows_certified_thresholds_oracles_and_the_seed_band(report, browser):
    browser.get((report[0] / "report.html").as_uri())
    text = browser.find_element("tag name", "body").text
    assert "Certified thresholds" in text
    said = "The agreement oracle leaves at the first exit that predicts the same as the last exit."
    assert said in text
    assert "cannot be certified: the best is" in text  # 1% of 100 rows
    assert "right at the last exit, wrong earlier" in text
    points = {trace["name"]: len(trace["x"]) for trace in traces(browser, "curve")}
    assert points["stable oracle"] == 4  # three exits, and on to the full cost
    assert points["any-correct oracle (inflated by luck)"] == 4
    assert points["2 seeds, lowest to highest"] == 200


def test_certified_limits_with_the_same_threshold_share_a_row(analysis, tmp_path):
    """With equal exits, every threshold certifies 5% and 10% of 100 rows, and none 1% and 2%."""
    splits = [
        dataclasses.replace(rows, logits=np.repeat(rows.logits[:, -1:], 3, axis=1))
        for rows in (analysis.calibration, analysis.validation)
    ]
    equal_exits = analyse(*splits)
    config = from_mapping({"exits": (1, 2, 4), "seeds": (0, 1)}).resolved()
    results = build_results(config, equal_exits, TrainingRecord(900))
    write_report(tmp_path / "report.html", equal_exits, results, [], {})
    page = (tmp_path / "report.html").read_text()
    harms = "right at the last exit, wrong earlier", "answered differently from the last exit"
    for harm in harms:
        lines = re.findall(rf"<tr><td>([^<]*)</td>\n<td>{harm}</td>", page)
        assert lines == ["1%, 2%", "5%, 10%"]
    first_limits = [row["limits"][0] for row in certificate_table(equal_exits, 0)]
    assert first_limits == [0.01, 0.05] * 2


@pytest.mark.parametrize(
    ("means", "words"),
    [
        (
            (0.81, 0.84, 0.9),
            "is 0.8100 with exits chosen at random, 0.8400 with confidence",
        ),
        ((0.81, 0.79, 0.8103), "Here it is no better than choosing exits at random"),
    ],
)
def test_page_compares_the_policy_with_random_exits(report, analysis, tmp_path, means, words):
    results = copy.deepcopy(report[1])
    mean_metrics = dict(zip(("floor", "policy", "stable"), means, strict=True))
    results["replicas"][results["best_replica"]]["mean_metrics"] = mean_metrics
    write_report(tmp_path / "report.html", analysis, results, [], {})
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert words in page


def test_report_escapes_text_from_the_data(report, browser):
    folder, _ = report
    browser.get((folder / "report.html").as_uri())
    assert browser.title.startswith(NASTY)
    assert NASTY in browser.find_element("css selector", "h1").text
    warning = browser.find_element("css selector", ".warning").text
    assert warning.startswith("collapsed: replica 1 ")
    assert warning.endswith("exit 2 predicts class 'no' for every row, since step 7")
    errors = severe_errors(browser)
    assert not errors


def test_report_is_written_for_a_file_name_that_is_not_utf_8(report, analysis, tmp_path):
    details = ReportDetails(title=os.fsdecode(b"caf\xe9.jsonl"))
    write_report(tmp_path / "report.html", analysis, report[1], [], {}, details)
    assert "<title>caf?.jsonl, " in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_without_javascript_shows_the_share_of_each_exit(report):
    page = (report[0] / "report.html").read_text()
    cells = re.findall(r"<td>([.\d]+)%</td><td [^>]*><span style=.*?; width: ([.\d]+)%", page)
    assert len(cells) == 3
    assert sum(float(text) for text, _ in cells) == pytest.approx(100, abs=0.2)
    assert all(float(text) == pytest.approx(float(width), abs=0.06) for text, width in cells)
    assert "<noscript>" in page


def test_folded_parts_of_the_page_are_opened_for_printing(report, browser):
    browser.get((report[0] / "report.html").as_uri())
    folded = "return document.querySelectorAll('details:not([open])').length"
    before = browser.execute_script(folded)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert before > browser.execute_script(folded) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(folded) == before


def test_numbers_of_the_page_are_rounded_to_four_decimals(analysis):
    series_by_use = policy_series(analysis, 0, 0.8, every=False)["confidence"]
    for series in (series_by_use["curve"], *series_by_use["targets"].values()):
        numbers = series.get("cost", []) + series.get("score", []) + series.get("reached", [])
        assert numbers == [float(f"{value:.4f}") for value in numbers]
    assert _rounded(np.asarray([0.03125, 0.09375])) == [0.0312, 0.0938]


def test_page_loads_nothing_from_the_network(report):
    page = (report[0] / "report.html").read_text()
    without_scripts = page[: page.index("<script>")] + page[page.index("<body>") :]
    assert "http" not in without_scripts.replace("http://www.w3.org", "")
    assert "src=" not in without_scripts


def test_training_losses_differ_by_more_than_their_color():
    metrics = [{"training": "t", "step": step, "loss": [[1.0] * 3]} for step in range(3)]
    lines = loss_traces(metrics, 0, {"t": (1, 2, 4)})
    assert len({line.dash for line in lines}) == 3


def test_figures_are_written_as_png_and_svg(report):
    for name in ("curve", "exits", "reliability", "loss"):
        assert (report[0] / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (report[0] / "figures" / f"{name}.svg").read_text()


def test_results_have_the_documented_keys(report):
    results = json.loads(json.dumps(report[1], allow_nan=False))
    assert {"task", "method", "checkpoint", "exits", "replicas", "mean", "ci95"} <= results.keys()
    replica = results["replicas"][0]
    assert {"seed", "learning_rate", "individual", "temperatures", "curve", "at_cost"} <= (
        replica.keys()
    )
    assert {"threshold", "cost", "score"} == replica["curve"].keys()
    assert results["mean"]["individual"][2]["score"] == pytest.approx(
        np.mean([r["individual"][2]["score"] for r in results["replicas"]])
    )
    documentation = (Path(__file__).parents[1] / "docs" / "reference" / "files.md").read_text()
    assert [key for key in results.keys() | replica.keys() if f"{key}`" not in documentation] == []
    assert any(row["score"] > 0 for row in results["ci95"]["individual"])
    assert " kept full accuracy on " in exit_table(results)
    results["replicas"][results["best_replica"]]["calibration_area"] = None  # as if it had diverged
    assert " kept full accuracy on " not in exit_table(results)


def test_operating_points_are_chosen_on_calibration_rows(analysis):
    curve = analysis.calibration_curve
    for replica in (0, 1):
        point = analysis.operating_point(replica, {"cost": 0.5})
        assert point.calibration[0] <= 0.5
        affordable = curve.cost[replica] <= 0.5
        assert point.calibration[1] == curve.score[replica][affordable].max()
        point = analysis.operating_point(replica, {"accuracy": 0.85})
        assert point.calibration[1] >= 0.85
        accurate = curve.score[replica] >= 0.85
        assert point.calibration[0] == curve.cost[replica][accurate].min()
        point = analysis.operating_point(replica, {"cost": 0.1})
        assert (point.threshold, point.validation, point.reachable) == (None, None, 0.25)
        point = analysis.operating_point(replica, {"accuracy": 1.0})
        assert (point.threshold, point.reachable) == (None, curve.score[replica].max())


def test_scores_at_costs_are_interpolated_between_grid_points(analysis):
    grid = analysis.grid
    scores = scores_at_costs(grid, 0, [0.1, 0.25, 0.5, 1.0])
    assert scores["0.1"] is None
    assert scores["0.25"] == grid.score[0, 0]
    assert scores["1"] == grid.score[0, -1]
    above = int(np.searchsorted(grid.cost[0], 0.5))
    low, high = grid.cost[0, above - 1 : above + 1]
    share = (0.5 - low) / (high - low)
    interpolated = (1 - share) * grid.score[0, above - 1] + share * grid.score[0, above]
    assert scores["0.5"] == pytest.approx(interpolated)
    assert grid.threshold[0].tolist() == pytest.approx(np.linspace(0.5, 1, 11).tolist())


def test_verdict_and_second_axis_show_milliseconds_for_a_time_target(report, analysis, tmp_path):
    best = report[1]["best_replica"]
    times = ExitTimes(np.asarray([1.0, 2.0, 5.0]), 32, "a machine")
    baseline = Baseline("tfidf", np.zeros(300, int), 0.0)
    details = ReportDetails(times=times, target={"milliseconds": 3.0}, baselines=[baseline])
    results = report[1] | {"baselines": {"tfidf": {"score": 0.5, "cost": 0.0, "n": 300}}}
    results["baselines"]["tfidf"]["interval"] = [0.4, 0.6]
    write_report(tmp_path / "report.html", analysis, results, [], {}, details)
    page = (tmp_path / "report.html").read_text()
    assert '"points": [[0.25, 1.0], [0.5, 2.0], [1.0, 5.0]]' in page
    (text,) = re.findall(r'class="verdict">(.*?)</p>', page)
    clock = times.milliseconds
    point = analysis.resolver(best).resolve("confidence", {"milliseconds": 3.0}, clock)
    exits = analysis.exits_taken(best, point.threshold)
    predictions = analysis.validation.predictions[best][exits, np.arange(300)]
    accuracy, last_accuracy = (
        100 * (answers == analysis.validation.labels[best]).mean()
        for answers in (predictions, analysis.validation.predictions[best, -1])
    )
    assert f"the model is right {accuracy:.1f}% of the time on 300 validation rows" in text
    assert (
        f" and on average {clock[exits].mean():.3g} ms per text of median length, instead of 5 ms"
        in text
    )
    assert f"; all layers give {last_accuracy:.1f}%: " in text
    baseline_accuracy = 100 * (analysis.validation.labels[best] == 0).mean()
    comparison = (
        "TF-IDF + logistic regression, the best baseline, is right 50.0% of the time: the model is "
    )
    gain = accuracy - baseline_accuracy
    assert f"{comparison}{gain:.1f} points better (95% interval of the difference +" in text


def test_page_names_exits_whose_temperature_worsens_calibration(report, analysis, tmp_path):
    results = copy.deepcopy(report[1])
    rows = results["replicas"][results["best_replica"]]["quality"]
    for row, after in zip(rows, (0.05, 0.0305, 0.01), strict=True):
        row["before"]["ece"], row["after"]["ece"] = 0.03, after
    write_report(tmp_path / "report.html", analysis, results, [], {})
    page = (tmp_path / "report.html").read_text()
    assert "on the validation rows: exit 1 from 0.0300 to 0.0500.\n" in page


def test_mean_and_best_replica_leave_out_diverged_replicas():
    splits = [simulated_outputs("calibration", 200, 4), simulated_outputs("validation", 300, 4)]
    replicas = ((0, 1e-4), (0, 3e-4), (1, 1e-4), (1, 3e-4))
    identity = dataclasses.replace(splits[1].identity, replicas=replicas)
    for rows in splits:
        rows.logits[[0, 1, 3]] = np.nan
    analysis = analyse(*(dataclasses.replace(rows, identity=identity) for rows in splits))
    assert (analysis.chosen, analysis.best) == ([2], 2)
    config = from_mapping({"exits": (1, 2, 4)}).resolved()
    results = build_results(config, analysis, TrainingRecord(900))
    assert results["mean"]["seeds"] == [1]
    assert results["mean"]["learning_rate"] == 1e-4
    assert None not in results["mean"]["at_cost"].values()
    json.dumps(results, allow_nan=False)


DIVERGED = {
    "a replica": (1, slice(None)),
    "all": (slice(None), slice(None)),
    "the first exit": (0, 0),
    "the first exit of both": (slice(None), 0),
    "the last of both": (slice(None), 2),
}


@pytest.mark.parametrize("diverged", DIVERGED.values(), ids=DIVERGED)
def test_diverged_regression_has_null_scores_and_complete_files(diverged, tmp_path):
    analysis = regression_analysis(diverged)
    constant = Baseline("constant", np.zeros((1, 60), np.float32), 0.0)
    training = TrainingRecord(900, baselines=[constant])
    results = build_results(REGRESSION, analysis, training)
    is_diverged = np.zeros((2, 3), bool)
    is_diverged[diverged] = True
    for replica, exits in zip(results["replicas"], is_diverged, strict=True):
        assert [row["score"] is None for row in replica["individual"]] == exits.tolist()
        assert (replica["calibration_area"] is None) == exits.any()
        assert (replica["full_score"] is None) == exits[2]
    write_json(tmp_path / "results.json", results)
    details = ReportDetails(baselines=[constant], target={"cost": 0.5})
    write_report(tmp_path / "report.html", analysis, results, [], {}, details)
    page = (tmp_path / "report.html").read_text()
    warning = "Training diverged: there is no operating point to recommend."
    assert (warning in page) == is_diverged.any(axis=1).all()
    for name in ("data", "charts"):
        (embedded,) = re.findall(f'id="{name}" type="application/json">(.*?)</script>', page)
        json.loads(embedded, parse_constant=pytest.fail)
    write_comparison(tmp_path / "compare.html", [("run", analysis)])
    check_replaceable(tmp_path / "compare.html")
    check_replaceable(tmp_path / "absent.html")
    (tmp_path / "kept.json").write_text("{}")
    with pytest.raises(UserError, match=r"kept.json' exists and is not a page of this command"):
        check_replaceable(tmp_path / "kept.json")
    assert "NaN" not in (tmp_path / "compare.html").read_text()
    exits_figure(results)
    described = {"classes": ["n"], "text_columns": ["text"], "max_length": 32}
    card = model_card(results, model_type="bert", **described)
    for text in (exit_table(results), card):
        assert ("\N{EN DASH}" in text) == is_diverged[results["best_replica"]].any()
    scores = Run.load(tmp_path).results["neg_mean_absolute_error"]
    assert scores[:3].isna().tolist() == is_diverged[results["best_replica"]].tolist()
    saved = json.dumps(analysis.resolver(0).as_dict(), allow_nan=False)
    resolver = ThresholdResolver.from_dict(json.loads(saved))
    clock = np.arange(1.0, 4)
    for target in ({}, {"cost": 1.0}, {"error": 5.0}, {"milliseconds": 3.0}):
        if not is_diverged[0, 2]:
            assert np.isfinite(resolver.threshold("stability", clock=clock, **target)[0])
            continue
        with pytest.raises(UserError, match=r"^the training of this model diverged"):
            resolver.threshold("stability", clock=clock, **target)


@pytest.mark.parametrize(("cost", "named"), [(0.2, True), (0.9, False)])
def test_verdict_names_a_cheaper_baseline_that_is_as_good(cost, named):
    """The best baseline costs more than the exits; the second best may cost less."""
    analysis = regression_analysis(DIVERGED["a replica"])
    validation = analysis.validation
    baselines = [
        Baseline("probe_4", validation.predictions[:, 0] + np.float32(1e-6), 1.0),
        Baseline("probe_1", validation.predictions[:, 0] + np.float32(2e-6), cost),
    ]
    results = build_results(REGRESSION, analysis, TrainingRecord(900, baselines=baselines))
    for name, score in (("probe_4", -0.1), ("probe_1", -0.2)):
        results["baselines"][name]["score"] = score
    details = ReportDetails(baselines=baselines)
    text = verdict(analysis, results, results["best_replica"], -np.inf, details)[1]
    assert "probe" in text
    assert ("costs no more than the exits and is simpler" in text) == named


def test_verdict_and_shortfall_of_a_regression_show_positive_errors():
    """The baseline is better here, so that every displayed difference is positive."""
    analysis = regression_analysis(DIVERGED["a replica"])
    baseline = Baseline("constant", analysis.validation.labels[:1] + np.float32(0.01), 0.0)
    training = TrainingRecord(900, baselines=[baseline])
    results = build_results(REGRESSION, analysis, training)
    details = ReportDetails(baselines=[baseline])
    comparison = verdict(analysis, results, 0, np.inf, details)[1]
    gap, low, high = map(float, re.findall(r"[+]?\d[.]\d+", comparison)[1:])
    assert "the model is " in comparison
    assert " worse (95% interval of the difference +" in comparison
    assert low < gap < high
    text = verdict(analysis, results, 0, 0.0, details)[0]
    assert re.search(r"all layers give 0[.]\d+: this threshold is 0[.]\d+ worse [(]", text)
    shortfall = (1, -0.9, "constant", -0.01, -0.89, (-1.0, -0.8), 60)
    line = describe_shortfall(Shortfall(*shortfall), results)
    assert line.startswith("exit 1 alone (mean absolute error 0.900) is above the baseline ")
    assert "(0.010) on the same 60 rows: difference 0.890, 95% interval 0.800 to 1.000; " in line
    text = describe_training(results, 1)
    assert "classes" not in text
    text = describe_training(results | {"epochs": 0}, 1)
    assert "its weights unchanged (epochs=0), and heads fitted on 900 rows" in text
    text = describe_training(results | {"exits": [1]}, 1)
    assert " with 1 layer, fine-tuned " in text
    assert text.endswith(" A text gets its answer after layer 1.")


@pytest.mark.parametrize(("gain", "tfidf"), [(0.0, -0.1), (0.0, 0.2), (0.2, 0.3)])
def test_verdict_of_a_model_that_is_no_better_than_a_constant(gain, tfidf):
    """Cases: the constant is the best baseline, another one is, or the model beats the constant.

    gain, tfidf: share of each number that the model and the other baseline predict.
    """
    rng = np.random.default_rng(0)
    labels, noise = rng.normal(size=(2, 300)).astype(np.float32)
    logits = np.tile((gain * labels + noise / 20)[:, None], (1, 3, 1, 1))
    identity = RunIdentity(
        objective="regression",
        metric="neg_mean_absolute_error",
        policy="stability",
        replicas=((0, 1e-4),),
    )
    rows = ExitOutputs(logits, labels, [1, 2, 4], identity=identity)
    baselines = [
        Baseline("constant", np.zeros_like(labels)[None], 0.0),
        Baseline("tfidf_ridge", tfidf * labels[None], 0.0),
    ]
    analysis = analyse(rows, rows)
    config = from_mapping({"objective": "regression", "exits": (1, 2, 4)}).resolved()
    results = build_results(config, analysis, TrainingRecord(900, baselines=baselines))
    text = verdict(analysis, results, 0, np.inf, ReportDetails(baselines=baselines))[1]
    if tfidf < 0:
        assert text.startswith("Same prediction for all rows, the best baseline, has mean absolute")
        assert "no difference that these rows can show" in text
        assert "It needs no encoder: on texts like these it is the cheaper choice" in text
    constant_is_second = (
        "Nor is the model shown to be better than the baseline same prediction for all rows, "
        "which has mean absolute error 0."
    )
    assert (constant_is_second in text) == (gain == 0 and tfidf > 0)


def test_pareto_front_ignores_rounding_differences_of_the_metric():
    """Sums in another order differ in the last digit, which is not worth a layer."""
    cost, score = np.asarray([[0.2, 0.4, 0.6]]), np.asarray([[0.5, np.nextafter(0.5, 1), 0.7]])
    curve = Curve(np.asarray([[0.1, 0.2, 0.3]]), cost, score, np.ones((1, 3, 2)))
    assert ParetoFront.from_curve(curve, 0).cost.tolist() == [0.2, 0.6]


def test_pareto_front_leaves_out_only_points_without_a_metric():
    cost, score = np.asarray([[0.2, 0.4, 0.6, 0.8]]), np.asarray([[0.5, np.nan, 0.4, 0.7]])
    curve = Curve(np.asarray([[0.1, 0.2, 0.3, 0.4]]), cost, score, np.ones((1, 4, 2)))
    assert ParetoFront.from_curve(curve, 0).cost.tolist() == [0.2, 0.8]


def test_page_of_a_diverged_regression_runs_without_errors(tmp_path, browser):
    analysis = regression_analysis(DIVERGED["all"])
    results = build_results(REGRESSION, analysis, TrainingRecord(900))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    browser.get_log("browser")
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.find_element("id", "at-score").text == "\N{EN DASH}"
    result = request_target(browser, "cost", 0.5)
    assert result == "cannot be met: the training of this replica diverged"
    assert browser.get_log("browser") == []


def test_score_at_a_cost_beyond_the_grid_is_none():
    logits = np.zeros((1, 2, 3, 2))
    logits[..., 0] = 60
    confident = ExitOutputs(logits, [0, 1, 1], [1, 2])
    grid = simulate_curve(confident, "confidence_float32", thresholds=np.linspace(0.5, 1, 11))
    assert scores_at_costs(grid, 0, [0.5, 1.0]) == {"0.5": 1 / 3, "1": None}


def test_figures_of_very_few_rows_raise_no_warning(tmp_path):
    analysis = analyse(
        simulated_outputs("calibration", 6, 1), simulated_outputs("validation", 2, 1)
    )
    config = from_mapping({"exits": (1, 2, 4)}).resolved()
    results = build_results(config, analysis, TrainingRecord(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if a layout fails
        write_figures(tmp_path, analysis, results, [], {"t": (1, 2, 4)})
