"""Tests of `sweet-jax train FILE`, its report and the operating point that it recommends."""

import html
import json
import logging
import os
import platform
import re
import shlex
import shutil

import numpy as np
import pytest

from sweet_jax import cli
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.latency_table import LatencyTable, write_tables
from sweet_jax.main import parse, parse_budget
from sweet_jax.recipe import OWN_DATA
from sweet_jax.recommendation import recommend

pytestmark = pytest.mark.usefixtures("restored_logging", "one_device_in_module")


@pytest.fixture(scope="module", autouse=True)
def brief_timing():
    """Shortens measurements of latency, whose times no test asserts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweet_jax.inference.latency._SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def quick_arguments(tiny_run) -> list[str]:
    """Returns command-line arguments that shorten the default recipe to seconds."""
    reused = ("checkpoint", "exits", "learning_rates", "max_length", "batch_size", "pooling")
    changes = {k: tiny_run[k] for k in reused} | {"epochs": 1, "head_init": "random"}
    changes |= {"head_refit": False, "baselines": "none", "evaluation_batch_size": 16}
    changes["clip_norm"] = "inf"  # not a JSON number in config.json
    values = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changes.items()}
    return [f"--config.{k}={v}" for k, v in values.items()]


@pytest.fixture(scope="module")
def trained_run(rows, quick_arguments, tmp_path_factory):
    """Returns (directory of a run on a file, output of its command)."""
    folder = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *a, **_: lines.append(" ".join(map(str, a))))
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
        status = cli.main(
            ["train", str(rows), f"--output={folder}", "--budget=0.7", *quick_arguments]
        )
    assert status == 0
    return folder, "\n".join(lines)


def test_train_command_needs_only_a_file(trained_run, rows):
    folder, stdout = trained_run
    config = json.loads((folder / "config.json").read_text())
    assert config["data_files"] == str(rows)
    assert config["text_columns"] == ""  # the default: the only other column
    assert config["method"] == OWN_DATA["method"]
    assert (folder / "report.html").exists()
    assert "recommended operating point: accuracy " in stdout
    assert "through all layers: accuracy " in stdout


def test_recipe_values_that_a_preset_leaves_are_warned_of(caplog):
    parse(["train", "a.csv"])
    protocol = ["--config.preset=paper", "--config.head_init=random", "--config.head_refit=False"]
    protocol += ["--config.epochs=2", "--config.warmup_fraction=0", "--config.max_length=256"]
    protocol += ["--config.group_by_length=False", "--config.learning_rates=5e-5"]
    parse(["train", "a.csv", *protocol, "--config.rate_search=full"])
    assert not caplog.messages
    parse(["train", "a.csv", *protocol[:4]])
    (line,) = caplog.messages
    assert line.startswith(
        "preset=paper leaves the recipe's warmup_fraction=0.1, group_by_length=True, "
        "learning_rates=0.0001,5e-05,0.0003, rate_search=short, max_length=128 unchanged"
    )


def test_printed_next_command_runs(trained_run, tmp_path):
    folder, stdout = trained_run
    serve_line, predict_line = [
        text for text in stdout.splitlines() if text.startswith("next: sweet-jax ")
    ]
    assert serve_line.startswith(
        f"next: sweet-jax serve --model={folder / 'model'} --cost=0.7 --port=8000"
    )
    (tmp_path / "in.txt").write_text("word1 word2\n")
    predict_line = predict_line.replace("--input=FILE", f"--input={tmp_path / 'in.txt'}")
    predict_line = predict_line.replace("--output=FILE", f"--output={tmp_path / 'out.jsonl'}")
    assert predict_line.endswith("--cost=0.7")
    assert cli.main(shlex.split(predict_line.removeprefix("next: sweet-jax "))) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"]


def test_report_has_exit_times_and_is_rewritten_for_target(trained_run, capsys, monkeypatch):
    folder, _ = trained_run
    page = (folder / "report.html").read_text()
    assert "milliseconds until each exit, a text of " in page  # measured at the end of the run
    assert "the best accuracy within 0.7 of the layers" in page
    monkeypatch.setenv("PATH", "")  # without a browser, the PNG is drawn
    assert cli.main(["report", str(folder), "--milliseconds=1e-6", "--png"]) == 0
    page = (folder / "report.html").read_text()
    assert (
        "The target (the best accuracy within 1e-06 ms for a text of median length) cannot be met: "
        in page
    )
    assert "<h1>rows.csv " in page
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"first screen: {folder / 'report.png'}\n")
    assert cli.main(["report", str(folder), "--cost=0.7"]) == 0
    assert not (folder / "report.png").exists()  # it would show the previous target


def test_report_has_times_of_recommended_engine(trained_run, tmp_path):
    """The recommended engine is the fastest over both lengths among those that were measured."""
    workdir = shutil.copytree(trained_run[0], tmp_path / "run")
    model = open_model(workdir / "model")
    lengths = (model.median_tokens, model.long_tokens)
    assert lengths[0] < lengths[1]

    def table(engine: str, host: str, *milliseconds: float) -> LatencyTable:
        stages = np.repeat([milliseconds], len(model.layers), axis=0).T[None]
        return LatencyTable(engine, "float32", 1, f"{host}, {engine}", (1,), lengths, stages)

    host_name = platform.node()
    tables = [table("jax", host_name, 2, 20), table("onnxruntime", host_name, 3, 5)]
    (workdir / "model" / "clock.json").unlink()
    write_tables(model.folder, [*tables, table("onnxruntime", f"other-{host_name}", 0.1, 0.2)])
    assert cli.main(["report", str(workdir)]) == 0
    page = html.unescape((workdir / "report.html").read_text())
    assert f"measured on {host_name}, onnxruntime; tokenization" in page
    (workdir / "model" / "clock.json").unlink()
    write_tables(model.folder, [table("jax", f"other-{host_name}", 0.1, 0.2)])
    assert cli.main(["report", str(workdir), "--milliseconds=1"]) == 2


def test_report_warns_when_data_file_is_not_found(trained_run, tmp_path, monkeypatch, capsys):
    """For example if its name is relative to the folder where the run was trained."""
    workdir = shutil.copytree(trained_run[0], tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"data_files": "absent.csv"}))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["report", str(workdir)]) == 0
    stderr = capsys.readouterr().err
    assert stderr.startswith("warning: the report lists no mistakes, which quote texts: ")
    assert "'absent.csv' does not exist; run this in the folder where the run was" in stderr


def test_report_names_a_damaged_file_of_results(trained_run, tmp_path, capsys):
    workdir = shutil.copytree(trained_run[0], tmp_path / "run")
    os.truncate(workdir / "results.json", 100)
    assert cli.main(["report", str(workdir)]) == 2
    assert f"'{workdir / 'results.json'}' is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is not a finished run"),
        ([".", "--cost=-1"], "--cost must be 0 or more; got -1"),
        ([".", "--error=-1"], "--error must be 0 or more; got -1"),
    ],
)
def test_invalid_report_arguments_are_refused(arguments, message, capsys):
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_recommended_operating_point_keeps_the_budget(trained_run):
    folder, _ = trained_run
    for budget in (0.4, 0.7, 1.0):
        first_line, *_ = recommend(folder, {"cost": budget}).splitlines()
        share = int(first_line.split("% of the layers")[0].rsplit(" ", 1)[1]) / 100
        # The share of validation rows; the point was chosen on calibration rows.
        assert share <= budget + 0.1
    assert (folder / "model" / "clock.json").exists()


def test_recommendation_states_selection_rule_and_time_of_slow_texts(trained_run):
    folder, stdout = trained_run
    assert (
        " calibration rows: the best accuracy within 0.7 of the layers, or the cheapest " in stdout
    )
    assert "estimated from each text's length and exit, the " in stdout
    text = recommend(folder, {"milliseconds": 1e6})
    assert "95% intervals; times are means over these texts, each at its own length\n" in text
    assert "the best accuracy within 1e+06 ms for a text of median length, or the cheap" in text
    assert re.search(r"ms on average in the model, and 95% of them at most .* ms: the budget", text)
    assert "the budget of 1e+06 ms on average is kept (0% of the texts take longer)" in text
    page = (folder / "report.html").read_text()
    assert "Milliseconds are means. Estimated from each text&#39;s length and exit, the " in page


def test_infeasible_budget_is_answered_with_smallest_feasible_one(trained_run):
    text = recommend(trained_run[0], {"milliseconds": 1e-6})
    refused = "no operating point meets the budget of 1e-06 ms at the median length; the smallest "
    assert text.startswith(refused)
    assert "recommended operating point" in text
    assert "--milliseconds" not in text


def test_train_arguments_set_config_workdir_and_target(tmp_path):
    arguments = ["train", "a.csv", "--text=title,body", "--label=y", "--test=b.csv", "--budget=5ms"]
    command = parse([*arguments, "--config.exits=1,3"])
    assert command.config.data_files == "a.csv,b.csv"
    assert command.config.text_columns == "title,body"
    assert (command.config.label_column, command.config.exits) == ("y", (1, 3))
    assert str(command.workdir) == "runs/a"
    assert command.target == {"milliseconds": 5.0}
    assert parse(["train", "a.csv.gz", f"--workdir={tmp_path}"]).workdir == tmp_path
    assert str(parse(["train", "data/x+data/y"]).workdir) == "runs/x"


def test_columns_of_config_file_are_kept(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text('def get_config(): return {"text_columns": "body", "label_column": "y"}')
    config = parse(["train", "a.csv", f"--config={recipe}"]).config
    assert (config.text_columns, config.label_column) == ("body", "y")
    assert parse(["train", "a.csv", f"--config={recipe}", "--label=z"]).config.label_column == "z"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (None, {}),
        ("5ms", {"milliseconds": 5}),
        (" 2.5 ms", {"milliseconds": 2.5}),
        (".5", {"cost": 0.5}),
    ],
)
def test_budget_is_parsed_as_milliseconds_or_cost(text, target):
    assert parse_budget(text) == target


def test_cost_budget_is_at_most_the_cost_of_all_exits():
    """All exits of Multi-Model, which run one after the other, cost more than the full model."""
    arguments = ["train", "a.csv", "--config.exits=1,4,6,12", "--config.method=multi_model"]
    assert parse([*arguments, "--budget=1.5"]).target == {"cost": 1.5}
    with pytest.raises(UserError, match=r"at most 1\.92: for milliseconds write --budget=5ms"):
        parse([*arguments, "--budget=5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.csv", "--budget=5s"], "--budget must be a time, such as 5ms, or a fract"),
        (["a.csv", "--output="], "--output is empty: set a value, or remove it"),
        (["--config=", "--workdir=a"], "--config is empty: set a value"),
        ([""], "the file name is empty"),
        (["a.csv", "--budget=0"], "got '0'"),
        (["a.csv", "--budget=5"], "at most 1: for milliseconds write --budget=5ms"),
        (["a.csv", "--workdir=a", "--output=b"], "--output and --workdir set the same directory"),
        (["a.csv", "b.csv"], "unknown argument 'b.csv': write --config.KEY=VALUE"),
        (["a.csv", "--buget=5ms"], "argument '--buget=5ms': did you mean '--budget'?"),
        (["--text=a"], "--text applies only to a run on a file: sweet-jax train FILE --text="),
        (["nowhere.csv"], "'nowhere.csv' does not exist"),
        (["https://a.org/b.csv"], "'https://a.org/b.csv' is a URL, which is not read: download it"),
        (["a.csv", "--test=s3://b/c.csv"], "'s3://b/c.csv' is a URL, which is not read"),
        (
            ["my,data.csv", "--test=v.csv"],
            "'my,data.csv' contains a comma, which separates the files",
        ),
        (["a.csv", "--test=v,1.csv"], "'v,1.csv' contains a comma, which separates the files"),
    ],
)
def test_invalid_train_command_is_refused_in_one_line(arguments, message, capsys):
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
