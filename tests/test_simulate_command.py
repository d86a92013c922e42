"""Tests of `sweet-jax simulate` and of the page that compares several runs."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

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

from sweet_jax import ExitOutputs
from sweet_jax import simulate as simulate_curve
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.bootstrap import bootstrap_areas, mean_between
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import POLICIES
from sweet_jax.exits.thresholds import format_threshold
from sweet_jax.report.comparison import (
    area_differences,
    shared_costs,
    write_comparison,
)
from sweet_jax.simulate import _describe_gap
from sweet_jax.simulate import main as simulate_command


@pytest.fixture(scope="module")
def analysis():
    return simulated_analysis()


def test_comparison_gives_every_run_its_own_color_and_dash(analysis, tmp_path):
    write_comparison(tmp_path / "x.html", [(f"run {n}", analysis) for n in range(12)])
    (chart,) = re.findall(r'id="chart" .*?>(.*?)</script>', (tmp_path / "x.html").read_text())
    lines = [t for t in json.loads(chart)["traces"] if re.fullmatch(r"run \d+", t["name"])]
    assert len({(line["color"], line["dash"]) for line in lines}) == 12
    assert len({line["dash"] for line in lines[:4]}) == 4
    bounds = [t for t in json.loads(chart)["traces"] if re.search(r"oracle|floor", t["name"])]
    assert len(bounds) == 24
    assert not {line["dash"] for line in lines} & {bound["dash"] for bound in bounds}
    assert json.loads(chart)["y"] == "accuracy"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run directories that hold nothing but their outputs."""
    folders = []
    for name, replicas in (("one <b>", 1), ("two", 2)):
        folder = tmp_path_factory.mktemp("runs") / name
        for split, rows in (("calibration", 200), ("validation", 300)):
            simulated_outputs(split, rows, replicas).save(folder / "exit_outputs" / f"{split}.npz")
        folders.append(folder)
    return folders


def run_simulate(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sweet_jax.simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_simulate_prints_the_operating_point_of_saved_outputs(runs, analysis):
    completed = run_simulate(f"--run={runs[1]}", "--cost=0.5")
    assert completed.returncode == 0, completed.stderr
    point = analysis.operating_point(0, {"cost": 0.5})
    shown = format_threshold(point.threshold, analysis.breakpoints(0))
    assert f"seed 0: threshold {shown}: cost {point.calibration[0]:.4f}" in completed.stdout
    assert f"accuracy {point.validation[1]:.4f} on 300 validation rows" in completed.stdout
    completed = run_simulate(f"--run={runs[0]}", "--accuracy=0.999")
    assert completed.returncode == 0
    said = "accuracy 0.999 cannot be met: the best on the calibration rows is accuracy 0."
    assert said in completed.stdout
    assert "exit   cost" in run_simulate(f"--run={runs[0]}").stdout
    completed = run_simulate(f"--run={runs[0]}", "--policy=pcee", "--accuracy=0.8")
    assert "threshold 0.8: cost" in completed.stdout
    assert "the target" in completed.stdout
    completed = run_simulate(f"--run={runs[0]}", "--policy=pcee", "--accuracy=0.999")
    assert "(out of reach: the calibration rows reach at most 0." in completed.stdout


def test_simulate_prints_a_certificate_or_the_best_certifiable_target(runs):
    completed = run_simulate(f"--run={runs[0]}", "--risk=0.2")
    assert "right at the last exit, wrong earlier, with confidence 0.95 (" in completed.stdout, (
        completed.stderr
    )
    completed = run_simulate(f"--run={runs[0]}", "--agreement=0.999", "--level=0.9")
    said = "agreement 0.999 cannot be certified: the best is agreement 0."
    assert said in completed.stdout


def test_simulate_says_by_how_many_models_a_certificate_is_corrected(runs, capsys):
    """They are the replicas that were compared on the calibration rows, for lack of tuning rows."""
    for target in ("--risk=0.2", "--agreement=0.999"):  # which can be certified, and which cannot
        for run, corrected in ((runs[0], False), (runs[1], True)):
            assert simulate_command([f"--run={run}", target]) == 0
            said = ", corrected for 2 models compared on these rows (" in capsys.readouterr().out
            assert said == corrected


@pytest.mark.parametrize(("target", "value"), [("cost", 0.1), ("accuracy", 0.999), ("error", 0.01)])
def test_simulate_prints_the_closest_point_to_an_unreachable_target(
    runs, tmp_path, capsys, target, value
):
    """The printed numbers must be those of its threshold."""
    folder = runs[0]
    if target == "error":
        folder = tmp_path
        save_replica(regression_analysis(), 0, folder)
    assert simulate_command([f"--run={folder}", f"--{target}={value}"]) == 0
    refusal, point = capsys.readouterr().out.split(", at ")
    assert refusal.startswith(f"{target} {value} cannot be met: the best on the calibration rows ")
    (threshold,) = re.findall(r"^threshold (\S+): cost ", point)
    assert simulate_command([f"--run={folder}", f"--threshold={threshold}"]) == 0
    assert capsys.readouterr().out.split(": ", 1)[1] == point.split(": ", 1)[1]
    (reachable,) = re.findall(r"rows is \S+ (\S+)$", refusal)
    assert reachable in point.split(" calibration rows")[0]


@pytest.mark.parametrize(("target", "value"), [("risk", 0.01), ("agreement", 0.99)])
def test_simulate_prints_the_point_of_the_best_certifiable_target(runs, capsys, target, value):
    assert simulate_command([f"--run={runs[0]}", f"--{target}={value}"]) == 0
    refusal = capsys.readouterr().out
    found = rf"^{target} {value} cannot be certified: the best is {target} (\S+) with"
    (best,) = re.findall(found, refusal)
    threshold, numbers = refusal.split("; at ")[1].split(" calibration rows: ")
    feasible = float(best) + (1e-4 if target == "risk" else -1e-4)  # it is rounded
    assert simulate_command([f"--run={runs[0]}", f"--{target}={feasible}"]) == 0
    certified = capsys.readouterr().out
    assert certified.startswith(threshold)
    assert certified.endswith(f"; {numbers}")


def test_simulate_help_explains_every_policy_and_target():
    text = run_simulate("--help").stdout
    for name, rule in POLICIES.items():
        assert f" {name} {rule.about} " in " ".join(text.split())
    for target in ("--cost", "--accuracy", "--threshold", "--risk", "--agreement", "--level"):
        assert f"  {target}" in text


def test_simulate_describes_the_gap_between_an_error_and_its_target():
    point = SimpleNamespace(reachable=-0.34)
    above = _describe_gap(point, -0.35, {"error": 0.3})
    assert above.startswith("; 0.0500 above the target (out of reach: the calibration")
    assert above.endswith(" rows reach at least 0.3400)")
    assert _describe_gap(point, -0.3, {"error": 0.4}) == "; 0.1000 below the target"
    assert _describe_gap(point, -0.40001, {"error": 0.4}) == "; at the target"


def test_simulate_refuses_to_compare_runs_of_different_metrics(monkeypatch, capsys, tmp_path):
    def load_stub(folder, policy):
        identity = RunIdentity(metric="matthews" if folder.name == "b" else "accuracy")
        return SimpleNamespace(validation=SimpleNamespace(identity=identity))

    monkeypatch.setattr("sweet_jax.simulate.load_analysis", load_stub)
    page = tmp_path / "page.html"
    assert simulate_command(["--run=a", "--run=b", f"--output={page}"]) == 2
    assert "different metrics (accuracy of a, matthews of b): pass --run only once" in (
        capsys.readouterr().err
    )
    assert not page.exists()


def test_simulate_writes_a_comparison_page_of_several_runs(runs, tmp_path, browser):
    page = tmp_path / "compare.html"
    for _ in range(2):  # the second time, its own page is replaced
        completed = run_simulate(f"--run={runs[0]}", f"--run={runs[1]}", f"--output={page}")
        assert completed.returncode == 0, completed.stderr
    browser.get(page.as_uri())
    names = [trace["name"] for trace in traces(browser, "curves")]
    assert len(names) == 2 * 3 + 1  # each with its floor and its stable oracle, and a band
    assert str(runs[0]) in browser.find_element("css selector", "table").text
    assert severe_errors(browser) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accuracy=1.2"], "--accuracy must be from 0 to 1; got 1.2"),
        (["--cost=-1"], "--cost must be 0 or more; got -1"),
        (["--cost=half"], "invalid float value: 'half'"),
        (["--policy=confidense"], "did you mean 'confidence'"),
        (["--cost=0.5", "--threshold=0.5"], "not allowed with argument"),
        (["--risk=2"], "--risk must be from 0 to 1; got 2"),
        (["--risk=0.1", "--level=1"], "--level must be from 0.5 to 0.9999; got 1"),
        (["--policy=learning_to_exit"], "have no learning-to-exit scores: train with"),
        (["--output=x.html"], "--output applies only to several runs"),
        (["--run=nowhere"], "'nowhere' is not a finished run"),
    ],
)
def test_simulate_refuses_invalid_arguments_in_one_line(runs, arguments, message):
    completed = run_simulate(f"--run={runs[0]}", *arguments)
    assert completed.returncode == 2
    assert completed.stderr.startswith("error: ")
    assert message in completed.stderr
    assert completed.stderr.count("\n") == 1


def test_page_that_cannot_be_written_is_refused_with_a_fix(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    page = tmp_path / "file" / "x.html"
    assert simulate_command([*(f"--run={run}" for run in runs), f"--output={page}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output '{page}' cannot be written (")
    assert error.endswith("): choose another file\n")


def test_simulate_is_refused_without_calibration_outputs(runs, tmp_path):
    folder = tmp_path / "run" / "exit_outputs"
    folder.mkdir(parents=True)
    shutil.copy(runs[0] / "exit_outputs" / "validation.npz", folder)
    completed = run_simulate(f"--run={tmp_path / 'run'}", "--policy=pcee", "--accuracy=0.9")
    assert completed.returncode == 2
    assert completed.stderr.startswith("error: there are no exit outputs at")
    assert completed.stderr.count("\n") == 1


def test_simulate_imports_neither_jax_nor_transformers(runs):
    code = (
        "import sys, runpy; sys.argv = ['simulate', '--run=' + sys.argv[1], '--cost=0.5']\n"
        "try: runpy.run_module('sweet_jax.simulate', run_name='__main__')\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'jax', 'flax', 'transformers'} & sys.modules.keys()"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, str(runs[0])], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr


def test_comparison_pairs_areas_over_shared_costs_by_row():
    """One run is worse than the first in 20 rows, one is the same, and one has higher costs."""
    outputs = simulated_outputs("validation", 300)
    logits = outputs.logits.copy()
    logits[:, :, :20] *= -1
    worse = dataclasses.replace(outputs, logits=logits)
    dear = dataclasses.replace(outputs, cost=np.asarray([0.5, 1.0, 1.5]))
    fitted = simulated_outputs("calibration", 200)
    first = analyse(fitted, outputs)
    runs = [("a", first), ("b", analyse(fitted, worse)), ("c", first)]
    assert shared_costs([*runs, ("d", analyse(dear, dear))]) == (0.5, 1.0)
    none, gap, equal = area_differences(runs)
    assert none is None
    assert equal == (0, 0, 0)  # without pairing, the interval would not be empty
    areas = [
        [mean_between(c, s, (0.25, 1.0)) for c, s in zip(a.curve.cost, a.curve.score, strict=True)]
        for _, a in runs[:2]
    ]
    difference, low, high = gap
    assert difference == pytest.approx(np.mean(areas[1]) - np.mean(areas[0]))
    assert low < difference < high < 0


@pytest.mark.parametrize("policy", ["confidence", "pcee"])
def test_bootstrap_areas_equal_curves_of_drawn_rows(analysis, policy):
    outputs, calibrators = analysis.validation, analysis.calibrators
    areas = bootstrap_areas(outputs, policy, calibrators, (0.3, 0.9), points=10_000, draws=3)
    drawn = np.random.default_rng(0).integers(0, 300, (3, 300))
    for d, rows in enumerate(drawn):
        chosen = dataclasses.replace(
            outputs, logits=outputs.logits[:, :, rows], labels=outputs.labels[:, rows]
        )
        curve = simulate_curve(chosen, policy, calibrators=calibrators)
        for r, area in enumerate(areas[:, d]):
            expected = mean_between(curve.cost[r], curve.score[r], (0.3, 0.9))
            assert area == pytest.approx(expected, abs=1e-9)


def test_simulate_warns_of_runs_on_other_rows_and_shows_no_difference(runs, tmp_path, capsys):
    page = tmp_path / "compare.html"
    assert simulate_command([f"--run={runs[0]}", f"--run={runs[1]}", f"--output={page}"]) == 0
    assert capsys.readouterr().err == ""
    assert re.search(r"<td>[+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\]</td>", page.read_text())
    for split, rows in (("calibration", 200), ("validation", 299)):
        outputs = simulated_outputs(split, rows)
        identity = dataclasses.replace(outputs.identity, task="other")
        outputs = dataclasses.replace(outputs, identity=identity)
        outputs.save(tmp_path / "run" / "exit_outputs" / f"{split}.npz")
    other = tmp_path / "run"
    assert simulate_command([f"--run={runs[0]}", f"--run={other}", f"--output={page}"]) == 0
    assert capsys.readouterr().err == (
        f"warning: {runs[0]} and {other} have different validation rows (300 of task {NASTY!r} and "
        "299 of task 'other'): their curves cannot be compared, and no difference is shown\n"
    )
    assert page.read_text().count("<td>\N{EN DASH}</td>") == 2


def test_comparison_shows_a_run_with_one_exit_as_a_point(analysis, tmp_path):
    validation = analysis.validation
    last = ExitOutputs(
        validation.logits[:, -1:], validation.labels, [4], identity=validation.identity
    )
    write_comparison(tmp_path / "x.html", [("all", analysis), ("one", analyse(last, last))])
    (chart,) = re.findall(
        r'id="chart" type="application/json">(.*?)</script>', (tmp_path / "x.html").read_text()
    )
    (point,) = (t for t in json.loads(chart)["traces"] if t["name"].startswith("one"))
    accuracy = (validation.predictions[:, -1] == validation.labels).mean()
    assert (point["symbol"], point["x"], point["y"]) == ("diamond", [1.0], [round(accuracy, 6)])


def test_comparison_page_escapes_names(analysis, tmp_path):
    write_comparison(tmp_path / "x.html", [(NASTY, analysis)])
    page = (tmp_path / "x.html").read_text()
    assert "<script>document.title" not in page


def test_importing_the_simulate_command_keeps_the_simulate_function():
    code = "import sweet_jax.simulate; from sweet_jax import simulate, ExitOutputs;"
    code += "print(simulate(ExitOutputs([[[[1.0, 0.0]]]], [0], [1])).score)"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout == "[[1.]]\n"
