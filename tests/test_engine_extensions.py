"""Engines, trackers and file formats that other packages add, through the commands."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_extension
import pytest

from sweet_jax import cli, predict
from sweet_jax.config import Config, from_mapping
from sweet_jax.data.readers import READERS
from sweet_jax.data.records import last_position, read_records
from sweet_jax.data.tables import Columns
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine_choice import available_engines, default_engine, describe_default
from sweet_jax.inference.engine_table import ENGINES
from sweet_jax.pipeline import run
from sweet_jax.trackers import TRACKERS

REFERENCE = "own_extension:ENGINE"
ENTRY_POINTS = """[sweet_jax.engines]
own = own_extension:ENGINE
[sweet_jax.readers]
.own = own_extension:READER
"""
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("restored_logging", "restored_tables")


@pytest.fixture
def restored_tables():
    """Restores the tables after a test has added to them."""
    saved = [(table, dict(table)) for table in (ENGINES, TRACKERS, READERS)]
    yield
    for table, entries in saved:
        table.clear()
        table.update(entries)


@pytest.fixture
def model(sweet, tmp_path, monkeypatch) -> Path:
    """Returns a copy of the model, into which measured times can be written."""
    monkeypatch.setattr("sweet_jax.inference.latency._SECONDS", 0.0)
    monkeypatch.setattr("sweet_jax.predict.measured_lengths", lambda model: (model.max_length,))
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    return folder


def set_times(folder: Path, **milliseconds: float) -> None:
    """Replaces the measured times by the given ones, and those of other engines by 9 ms."""
    values = json.loads((folder / "clock.json").read_text())
    for row in values["rows"]:
        value = milliseconds.get(row["engine"].partition(":")[0], 9.0)
        row["milliseconds"] = np.full_like(row["milliseconds"], value).tolist()
    (folder / "clock.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_referenced_engine_is_measured_but_never_default(model, sweet, tmp_path, capsys):
    """The file of measured times belongs to a model and must not make a process import code."""
    assert predict.main([f"--model={model}", "--measure", "--batch_size=1"]) == 0
    options = ["--measure", "--batch_size=1", f"--engine={REFERENCE}"]
    assert predict.main([f"--model={model}", *options]) == 0
    assert f"one text of {sweet.classifier.model.median_tokens} tokens" in capsys.readouterr().out
    set_times(model, own_extension=1.0)
    assert default_engine(open_model(model)) in ("jax", "onnxruntime")
    (tmp_path / "in.txt").write_text("word1 word2\n")
    files = [f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.jsonl'}"]
    options = [f"--engine={REFERENCE}", "--policy=raw_confidence", "--milliseconds=2"]
    assert predict.main([f"--model={model}", *options, *files]) == 0


@pytest.mark.parametrize(
    ("times", "default", "others"),
    [
        ({}, "jax", "onnxruntime, own is installed too"),
        ({"onnxruntime": 1.0}, "jax", "onnxruntime, own is installed too"),
        ({"jax": 2.0, "onnxruntime": 1.0}, "onnxruntime", "; own is installed too"),
        ({"onnxruntime": 2.0, "own": 1.0}, "own", "; jax is installed too"),
    ],
)
def test_default_engine_description_names_unmeasured_engines(
    model, monkeypatch, times, default, others
):
    monkeypatch.setattr("sweet_jax.inference.engine_choice._measured_times", lambda *_: times)
    monkeypatch.setitem(ENGINES, "own", own_extension.ENGINE)
    description = describe_default(open_model(model))
    assert description.startswith(f"engine: {default}, float32 (")
    assert others in description


@pytest.mark.slow
def test_registered_engine_is_measured_and_can_be_default(model, monkeypatch):
    ENGINES["own"] = own_extension.ENGINE
    assert predict.main([f"--model={model}", "--measure", "--precision=float32"]) == 0
    rows = json.loads((model / "clock.json").read_text())["rows"]
    assert {"jax", "own"} <= {row["engine"] for row in rows}
    set_times(model, own=1.0)
    assert default_engine(open_model(model)) == "own"
    monkeypatch.setenv("OWN_ENGINE_OBSTACLE", "has no device")
    assert default_engine(open_model(model)) != "own"
    assert "own" not in [choice.engine for choice in available_engines(open_model(model))]


@pytest.mark.parametrize("measure", [True, False])
def test_unsupported_precision_is_refused_with_alternatives(model, tmp_path, measure, capsys):
    (tmp_path / "in.txt").write_text("word1 word2\n")
    files = [f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.jsonl'}"]
    options = [f"--engine={REFERENCE}", "--precision=bfloat16"]
    mode = ["--measure"] if measure else files
    assert predict.main([f"--model={model}", *options, *mode]) == 2
    expected = (
        f"error: the {REFERENCE} engine does not support precision 'bfloat16': choose engine jax "
        "with float32 or bfloat16, or onnxruntime with float32 or int8"
    )
    assert capsys.readouterr().err.startswith(expected)


def test_measure_reports_why_no_engine_runs_the_model(model, monkeypatch, capsys):
    for name in ("jax", "onnxruntime"):
        del ENGINES[name]
    ENGINES["own"] = own_extension.ENGINE
    monkeypatch.setenv("OWN_ENGINE_OBSTACLE", "has no device")
    assert predict.main([f"--model={model}", "--measure"]) == 2
    assert capsys.readouterr().err.endswith("here: own has no device\n")
    assert predict.main([f"--model={model}", "--measure", "--precision=bfloat16"]) == 2
    assert "unknown precision 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere:ENGINE", "own_extension:Lines"])
def test_invalid_engine_reference_is_refused_in_one_line(model, name, capsys):
    assert predict.main([f"--model={model}", "--measure", f"--engine={name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: engine {name!r}")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_measured_times_of_unknown_engines_are_ignored(model):
    """Another version may have written times of an engine that this process does not know."""
    assert predict.main([f"--model={model}", "--measure", "--engine=jax"]) == 0
    values = json.loads((model / "clock.json").read_text())
    values["rows"] += [row | {"engine": "former"} for row in values["rows"]]
    (model / "clock.json").write_text(json.dumps(values))
    assert default_engine(open_model(model)) == "jax"


def test_installed_extension_is_found_by_entry_point(model, sweet, tmp_path):
    """`predict` uses its engine and reads its format in a new process."""
    metadata = tmp_path / "site" / "own-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "in.own").write_text("".join(f"1|{text}\n" for text in sweet.texts[:9]))
    paths = os.pathsep.join(map(str, (metadata.parent, ROOT / "tests", ROOT)))
    options = [f"--input={tmp_path / 'in.own'}", f"--output={tmp_path / 'out.jsonl'}"]
    options += ["--engine=own", "--policy=raw_confidence", "--threshold=0.6"]
    process = subprocess.run(
        [sys.executable, "-m", "sweet_jax.predict", f"--model={model}", *options],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9


@pytest.mark.slow
def test_train_uses_registered_reader_trackers_and_engine(
    rows, tiny_run, tmp_path, one_device, monkeypatch, capsys
):
    monkeypatch.setattr("sweet_jax.inference.latency._SECONDS", 0.0)
    READERS[".own"], TRACKERS["lines"] = own_extension.READER, own_extension.Lines
    ENGINES["own"] = own_extension.ENGINE
    with rows.open() as file:
        labeled_texts = [(row["label"], row["text"]) for row in csv.DictReader(file)]
    first_label = labeled_texts[0][0]
    lines = (
        f"{'true' if label == first_label else 'false'}|{text}\n" for label, text in labeled_texts
    )
    (tmp_path / "rows.own").write_text("".join(lines))
    shared = ("checkpoint", "exits", "learning_rates", "max_length", "batch_size", "pooling")
    changes = {k: tiny_run[k] for k in shared} | {"epochs": 1, "head_init": "random"}
    changes |= {"head_refit": False, "baselines": "none", "evaluation_batch_size": 16}
    changes |= {"clip_norm": "inf", "log_to": "tensorboard,lines,own_extension:Lines"}
    values = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changes.items()}
    keys = [f"--config.{k}={v}" for k, v in values.items()]
    folder = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "rows.own"), f"--output={folder}", *keys]) == 0
    exits = json.loads((folder / "model" / "exits.json").read_text())
    assert exits["classes"] == ["False", "True"]  # like booleans in JSON
    logged = (folder / "own_tracker.txt").read_text().splitlines()
    (loss,) = {line.split()[1] for line in logged if f"loss/exit_{exits['layers'][0]}/" in line}
    assert loss.endswith("/replica_0")
    assert logged.count("attached True") == 2  # for "lines" and for the reference
    assert list((folder / "tensorboard").iterdir())
    measured = json.loads((folder / "model" / "clock.json").read_text())["rows"]
    assert {"jax", "own"} <= {row["engine"] for row in measured}
    assert "  engines, all layers, mean over the lengths that were timed: jax" in (
        capsys.readouterr().out
    )


def test_log_to_accepts_known_trackers_and_refuses_unknown_ones():
    for names in ("wandb", "tensorboard,wandb", "mlflow, own_extension:Lines", "a:B"):
        assert Config(log_to=names).log_to == names
    assert from_mapping({"log_to": ["tensorboard", "wandb"]}).log_to == "tensorboard,wandb"
    with pytest.raises(UserError, match="unknown log_to 'lines': choose one of 'tensorboard', "):
        Config(log_to="lines")
    for names in ("wandbb", "tensorboard,wandbb"):
        with pytest.raises(UserError, match="unknown log_to 'wandbb': did you mean 'wandb'"):
            Config(log_to=names)
    for names in ("", ","):
        with pytest.raises(UserError, match=r"unknown log_to '.?': choose one of"):
            Config(log_to=names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_extension:Nothing", "log_to 'own_extension:Nothing': AttributeError: "),
        ("own_extension:obstacle", "is not a tracker, since it has no method add"),
        ("own_extension:DamagedError", "is not a tracker, since it has no method add"),
        ("own_extension:NeedsPackage", "requires the package no_such_package: pip install no-such"),
    ],
)
def test_invalid_tracker_reference_is_refused_before_run_starts(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(from_mapping({"log_to": f"tensorboard,{name}"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_registered_reader_yields_values_positions_and_type_errors(tmp_path):
    READERS[".own"] = own_extension.READER
    path = tmp_path / "rows.own"
    path.write_text("1|a\n2.5|b\n")
    records = list(read_records(path, Columns(("text",), "label")))
    assert [record.values for record in records] == [("a", "1.0"), ("b", "2.5")]
    assert records[-1].position == last_position(path) == 2
    path.write_text("1|a\ntrue|b\n")  # of another type than the first
    *_, last = read_records(path, Columns(("text",), "label"))
    assert last.error == "column 'label' is True, not of the type of the first, 1.0"
    assert [r.values for r in read_records(path, Columns(("text",)))] == [("a",), ("b",)]


def test_registered_reader_refuses_bad_rows_output_and_compression(tmp_path, model, capsys):
    READERS[".own"] = own_extension.READER
    path = tmp_path / "rows.own"
    path.write_text("1|a\nb\n")
    files = [f"--input={path}", f"--output={tmp_path / 'out.jsonl'}"]
    assert predict.main([f"--model={model}", *files]) == 2
    expected = f"error: could not read {str(path)!r}: line 2 has no bar\n"
    assert capsys.readouterr().err.endswith(expected)
    assert predict.main([f"--model={model}", files[0], f"--output={tmp_path / 'out.own'}"]) == 2
    assert "a format that predictions are not written in" in capsys.readouterr().err
    path.rename(tmp_path / "rows.own.gz")  # `open_text` would not decompress it
    with pytest.raises(UserError, match=r"must end in one of .csv, .*, .xlsx, .own"):
        list(read_records(tmp_path / "rows.own.gz", Columns(("text",), "label")))
