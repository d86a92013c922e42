"""Tests of training from Python: sweet_jax.train, and the Run that it returns."""

import csv
import dataclasses
import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import sweet_jax
from sweet_jax import Run
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.exits.simulation import simulate
from sweet_jax.inference.latency_table import read_tables, write_tables
from sweet_jax.pipeline import run
from sweet_jax.recipe import OWN_DATA
from sweet_jax.runs import run_config
from sweet_jax.training.loop import termination_event

pytestmark = pytest.mark.usefixtures("one_device_in_module")


@pytest.fixture(scope="module")
def table(rows) -> pd.DataFrame:
    frame = pd.read_csv(rows)
    return frame.assign(noise=range(len(frame)))


@pytest.fixture(scope="module")
def quick_config(tiny_run) -> dict:
    """Config values of a run that takes seconds, without those of the data."""
    values = {k: v for k, v in tiny_run.items() if k not in ("data_files", "text_columns", "task")}
    recipe = {"method": "sweet", "head_init": "random", "head_refit": False, "epochs": 1}
    return values | recipe | {"group_by_length": False, "rate_search": "full"}


@pytest.fixture(scope="module")
def trained_run(table, quick_config, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    return sweet_jax.train(
        table, text="text", label="label", workdir=folder / "run", **quick_config
    )


def test_training_on_dataframe_gives_bitwise_same_model_as_command(
    trained_run, quick_config, rows, tmp_path
):
    values = {**OWN_DATA, **quick_config, "data_files": str(rows)}
    run(from_mapping(values | {"text_columns": "text"}), tmp_path / "command")
    for name in ("model/model.safetensors", "exit_outputs/validation.npz"):
        expected = (tmp_path / "command" / name).read_bytes()
        assert (trained_run.directory / name).read_bytes() == expected


def test_loaded_run_has_results_and_report(trained_run):
    loaded = Run.load(trained_run.directory)
    results = loaded.results
    assert results["exit"].dropna().tolist() == [1, 2, 3]
    accuracy = (loaded.outputs.predictions[0] == loaded.outputs.labels[0]).mean(axis=1)
    np.testing.assert_allclose(results["accuracy"][:3], accuracy)
    assert (results["low"] < results["accuracy"]).all()
    assert "accuracy" in repr(loaded)
    assert "<table" in loaded._repr_html_()
    assert loaded.report().read_text().startswith("<!doctype html>")


def test_curve_and_operating_point_match_saved_outputs(trained_run):
    curve = trained_run.curve()
    expected = simulate(trained_run.outputs, "confidence", calibration=trained_run.calibration)
    np.testing.assert_array_equal(curve.score, expected.score)
    assert not np.array_equal(trained_run.curve("entropy").threshold, curve.threshold)
    point = trained_run.operating_point(cost=0.5)
    assert point.calibration[0] <= 0.5
    index = np.searchsorted(curve.threshold[0], point.threshold)
    assert point.validation == (curve.cost[0, index], curve.score[0, index])
    with pytest.raises(UserError, match="set one target, not 2"):
        trained_run.operating_point(cost=0.5, accuracy=0.9)


def test_run_classifier_uses_last_exit_at_infinite_threshold(trained_run, rows):
    with open(rows, newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    predictions = trained_run.classifier(threshold=float("inf")).predict(texts)
    assert set(predictions.exits.tolist()) == {3}
    assert len(predictions.labels) == len(texts)


def test_recommend_rewrites_report_and_reuses_measured_times(trained_run, tmp_path, monkeypatch):
    shutil.copytree(trained_run.directory, tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    with pytest.raises(UserError, match="set one target, not 2: milliseconds, cost"):
        loaded.recommend(milliseconds=5, cost=0.5)
    assert not (loaded.directory / "model" / "clock.json").exists()
    old_report = loaded.report().read_bytes()
    recommendation = loaded.recommend(cost=0.5)
    assert recommendation.startswith("recommended operating point: accuracy ")
    assert "the best accuracy within 0.5 of the layers" in recommendation
    assert loaded.report().read_bytes() != old_report
    assert loaded.classifier(milliseconds=1000).threshold < 1  # from the saved times

    def measure(*arguments):
        raise AssertionError("predict --measure has measured these lengths")

    def widen(table):  # as predict --measure does
        times = np.concatenate([table.milliseconds, 9 + table.milliseconds[:, -1:]], axis=1)
        lengths = (*table.lengths, 512)
        return dataclasses.replace(table, lengths=lengths, milliseconds=times)

    model = loaded.directory / "model"
    write_tables(model, [widen(table) for table in read_tables(model)])
    saved_times = (model / "clock.json").read_bytes()
    monkeypatch.setattr("sweet_jax.recommendation.measure_latency", measure)
    assert loaded.recommend(cost=0.5) == recommendation
    assert (model / "clock.json").read_bytes() == saved_times


TABLE_TYPES = {
    "dict": lambda frame: frame.to_dict("list"),
    "arrow": lambda frame: pa.Table.from_pandas(frame),
    "dataset": lambda frame: datasets.Dataset.from_pandas(frame),
    "index": lambda frame: frame.set_index(frame.index + 7),
}


@pytest.mark.parametrize("table_type", TABLE_TYPES)
def test_every_table_type_resumes_the_same_run(trained_run, table, quick_config, table_type):
    extra_file = trained_run.directory / "model" / "added.json"
    extra_file.write_text("{}")
    resumed = sweet_jax.train(
        TABLE_TYPES[table_type](table[["text", "label"]]),
        text="text",
        label="label",
        workdir=trained_run.directory,
        **quick_config,
    )
    assert json.dumps(resumed.record["replicas"]) == json.dumps(trained_run.record["replicas"])
    assert len(list((trained_run.directory / "rows").iterdir())) == 1
    extra_file.unlink()  # the resumed run has not removed it


def test_workdir_of_run_on_other_rows_is_refused(trained_run, table, quick_config):
    with pytest.raises(UserError, match="belongs to a run on other rows"):
        sweet_jax.train(
            table.iloc[:-1],
            text="text",
            label="label",
            workdir=trained_run.directory,
            **quick_config,
        )


@pytest.mark.parametrize("make_table", [dict, pd.DataFrame, pa.table])
def test_rows_with_missing_values_are_recognized_as_the_same_rows(make_table, tmp_path):
    missing = float("nan")
    rows = make_table({"text": ["a", None], "label": [1.0, missing], "more": [[missing], []]})
    arguments = {"text": "", "label": "label", "validation": None, "values": {}}
    config = run_config(rows, tmp_path, **arguments)
    (tmp_path / "config.json").touch()  # as if a run had started
    assert run_config(rows, tmp_path, **arguments) == config
    other_rows = make_table({"text": ["a", None], "label": [1.0, 2.0], "more": [[missing], []]})
    with pytest.raises(UserError, match="belongs to a run on other rows"):
        run_config(other_rows, tmp_path, **arguments)


def test_corrected_call_succeeds_after_refused_calls(table, quick_config, tmp_path):
    arguments = {"text": "text", "label": "label", "workdir": tmp_path / "run", **quick_config}
    with pytest.raises(UserError, match="unknown config key 'epoch'"):
        sweet_jax.train(table, epoch=1, **arguments)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="label"):
        sweet_jax.train(table.assign(label=None), **arguments)
    run_arguments = {"text": "text", "label": "label", "validation": None, "values": {}}
    config = run_config(table, tmp_path / "run", **run_arguments)
    with pa.memory_map(config.data_files) as source:
        assert pa.ipc.open_file(source).read_all().column("label").null_count == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "data must be the name of a file, a DataFrame"),
        (
            datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]}).to_iterable_dataset(),
            "data must be .*; got IterableDataset",
        ),
        ({"text": ["a"], "label": ["x", "y"]}, "data cannot be read as a table"),
        ({"texts": ["a"], "label": ["x"]}, "unknown column 'text': did you mean 'texts'"),
    ],
)
def test_invalid_table_is_refused_before_workdir_exists(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        sweet_jax.train(data, text="text", workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_comma_in_path_is_refused_when_two_files_are_given(table, tmp_path):
    with pytest.raises(
        UserError, match=r"runs,1/rows/train\.arrow' contains a comma, which separates"
    ):
        sweet_jax.train(table, validation=table, workdir=tmp_path / "runs,1")
    with pytest.raises(UserError, match=r"'v,1\.csv' contains a comma, which separates the files"):
        sweet_jax.train(table, validation="v,1.csv", workdir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_loading_directory_without_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a finished run"):
        Run.load(tmp_path)


def test_termination_event_handles_sigterm_only_in_main_thread():
    """A server or a notebook may train in another thread, where Python handles no signals."""
    previous_handler = signal.getsignal(signal.SIGTERM)
    with termination_event() as event:
        signal.raise_signal(signal.SIGTERM)
        assert event.is_set()
    assert signal.getsignal(signal.SIGTERM) == previous_handler

    def receives_signal() -> bool:
        with termination_event() as event:
            return event.is_set()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(receives_signal).result()
