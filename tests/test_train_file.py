"""sweet-jax train FILE: a run on labelled texts, and the operating point that it recommends."""

import html
import json
import logging
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
    """Measured times are not asserted: few runs of each stage will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweet_jax.inference.latency._SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def keys(tiny_run) -> list[str]:
    """Keys that make the recipe one of seconds, as the command line has them."""
    taken = ("checkpoint", "exits", "learning_rates", "max_length", "batch_size", "pooling")
    changes = {k: tiny_run[k] for k in taken} | {"epochs": 1, "head_init": "random"}
    changes |= {"head_refit": False, "baselines": "none", "evaluation_batch_size": 16}
    changes["clip_norm"] = "inf"  # which config.json cannot hold as a number
    values = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changes.items()}
    return [f"--config.{k}={v}" for k, v in values.items()]


@pytest.fixture(scope="module")
def trained(rows, keys, tmp_path_factory):
    """(directory of a run on a file, what the command printed)."""
    folder = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *a, **_: printed.append(" ".join(map(str, a))))
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
        status = cli.main(["train", str(rows), f"--output={folder}", "--budget=0.7", *keys])
    assert status == 0
    return folder, "\n".join(printed)


def test_a_file_is_all_that_has_to_be_named(trained, rows):
    folder, printed = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["data_files"] == str(rows)
    assert config["text_columns"] == ""  # the only one beside the label
    assert config["method"] == OWN_DATA["method"]
    assert (folder / "report.html").exists()
    assert "recommended operating point: accuracy " in printed
    assert "through all layers: accuracy " in printed


def test_the_next_command_runs(trained, tmp_path):
    folder, printed = trained
    serve, line = [text for text in printed.splitlines() if text.startswith("next: sweet-jax ")]
    assert serve.startswith(
        f"next: sweet-jax serve --model={folder / 'model'} --cost=0.7 --port=8000"
    )
    (tmp_path / "in.txt").write_text("word1 word2\n")
    line = line.replace("--input=FILE", f"--input={tmp_path / 'in.txt'}")
    line = line.replace("--output=FILE", f"--output={tmp_path / 'out.jsonl'}")
    assert line.endswith("--cost=0.7")
    assert cli.main(shlex.split(line.removeprefix("next: sweet-jax "))) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"]


def test_the_report_has_the_times_and_is_written_anew_for_a_target(trained, capsys, monkeypatch):
    folder, _ = trained
    page = (folder / "report.html").read_text()
    assert "milliseconds until each exit, a text of " in page  # measured after the run
    assert "the best accuracy within 0.7 of the layers" in page
    monkeypatch.setenv("PATH", "")  # where there is no browser, the picture is drawn
    assert cli.main(["report", str(folder), "--milliseconds=1e-6", "--png"]) == 0
    page = (folder / "report.html").read_text()
    assert (
        "No threshold reaches the best accuracy within 1e-06 ms for a text of median length: the"
        in page
    )
    assert "<h1>rows.csv " in page
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"first screen: {folder / 'report.png'}\n")
    assert cli.main(["report", str(folder), "--cost=0.7"]) == 0
    assert not (folder / "report.png").exists()  # it showed the other operating point


def test_the_report_has_the_times_of_the_engine_that_is_recommended(trained, tmp_path):
    """The faster one on both lengths together, of those that were measured on this machine."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    model = open_model(run / "model")
    lengths = (model.median_tokens, model.long_tokens)
    assert lengths[0] < lengths[1]

    def table(engine: str, host: str, *milliseconds: float) -> LatencyTable:
        stages = np.repeat([milliseconds], len(model.layers), axis=0).T[None]
        return LatencyTable(engine, "float32", 1, f"{host}, {engine}", (1,), lengths, stages)

    here = platform.node()
    tables = [table("jax", here, 2, 20), table("onnxruntime", here, 3, 5)]
    (run / "model" / "clock.json").unlink()
    write_tables(model.folder, [*tables, table("onnxruntime", f"other-{here}", 0.1, 0.2)])
    assert cli.main(["report", str(run)]) == 0
    page = html.unescape((run / "report.html").read_text())
    assert f"measured on {here}, onnxruntime; tokenization" in page
    (run / "model" / "clock.json").unlink()
    write_tables(model.folder, [table("jax", f"other-{here}", 0.1, 0.2)])
    assert cli.main(["report", str(run), "--milliseconds=1"]) == 2


def test_a_report_without_texts_says_where_they_are_found(trained, tmp_path, monkeypatch, capsys):
    """Such as of a file whose name is relative to the folder where the run was trained."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data_files": "absent.csv"}))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["report", str(run)]) == 0
    printed = capsys.readouterr().err
    assert printed.startswith("warning: the report lists no mistakes, which quote texts: ")
    assert "'absent.csv' does not exist; run this in the folder where the run was" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is not a finished run"),
        ([".", "--cost=-1"], "--cost must be 0 or more; got -1"),
        ([".", "--error=-1"], "--error must be 0 or more; got -1"),
    ],
)
def test_a_report_that_cannot_be_written_gets_one_line(arguments, words, capsys):
    assert cli.main(["report", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_is_recommended_keeps_within_the_budget(trained):
    folder, _ = trained
    for budget in (0.4, 0.7, 1.0):
        first, *_ = recommend(folder, {"cost": budget}).splitlines()
        share = int(first.split("% of the layers")[0].rsplit(" ", 1)[1]) / 100
        assert share <= budget + 0.1  # on validation rows; it was chosen on calibration rows
    assert (folder / "model" / "clock.json").exists()


def test_the_recommendation_says_how_it_was_chosen_and_what_slow_texts_take(trained):
    folder, printed = trained
    assert (
        " calibration rows: the best accuracy within 0.7 of the layers, or the cheapest " in printed
    )
    assert "estimated from each text's length and exit, the " in printed
    text = recommend(folder, {"milliseconds": 1e6})
    assert re.search(r"ms on average in the model, and 95% of them at most .* ms: the budget", text)
    assert "the budget of 1e+06 ms on average is kept (0% of the texts take longer)" in text
    page = (folder / "report.html").read_text()
    assert "Milliseconds are means. Estimated from each text&#39;s length and exit, the " in page


def test_a_budget_that_cannot_be_met_says_what_can(trained):
    text = recommend(trained[0], {"milliseconds": 1e-6})
    assert text.startswith("no operating point meets the budget of 1e-06 ms; the smallest possible")
    assert "recommended operating point" in text
    assert "--milliseconds" not in text


def test_all_of_the_command_reaches_the_run(tmp_path):
    line = ["train", "a.csv", "--text=title,body", "--label=y", "--test=b.csv", "--budget=5ms"]
    command = parse([*line, "--config.exits=1,3"])
    assert command.config.data_files == "a.csv,b.csv"
    assert command.config.text_columns == "title,body"
    assert (command.config.label_column, command.config.exits) == ("y", (1, 3))
    assert str(command.workdir) == "runs/a"
    assert command.target == {"milliseconds": 5.0}
    assert parse(["train", "a.csv.gz", f"--workdir={tmp_path}"]).workdir == tmp_path
    assert str(parse(["train", "data/x+data/y"]).workdir) == "runs/x"


def test_columns_that_a_config_names_stay(tmp_path):
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
def test_a_budget_is_a_time_or_a_share(text, target):
    assert parse_budget(text) == target


def test_a_share_is_at_most_what_all_layers_cost():
    """Multi-Model runs its models one after the other: they cost more than the full model."""
    line = ["train", "a.csv", "--config.exits=1,4,6,12", "--config.method=multi_model"]
    assert parse([*line, "--budget=1.5"]).target == {"cost": 1.5}
    with pytest.raises(UserError, match=r"at most 1\.92: for milliseconds write --budget=5ms"):
        parse([*line, "--budget=5"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.csv", "--budget=5s"], "--budget must be a time, such as 5ms, or a fract"),
        (["a.csv", "--output="], "--output is empty: set a value, or remove it"),
        (["--config=", "--workdir=a"], "--config is empty: set a value"),
        ([""], "the file name is empty"),
        (["a.csv", "--budget=0"], "got '0'"),
        (["a.csv", "--budget=5"], "at most 1: for milliseconds write --budget=5ms"),
        (["a.csv", "--workdir=a", "--output=b"], "--output and --workdir set the same directory"),
        (["a.csv", "b.csv"], "unknown argument 'b.csv'"),
        (["--text=a"], "--text applies only to a run on a file: sweet-jax train FILE --text="),
        (["nowhere.csv"], "'nowhere.csv' does not exist"),
        (
            ["my,data.csv", "--test=v.csv"],
            "'my,data.csv' contains a comma, which separates the files",
        ),
        (["a.csv", "--test=v,1.csv"], "'v,1.csv' contains a comma, which separates the files"),
    ],
)
def test_a_wrong_command_gets_one_line(arguments, words, capsys):
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
