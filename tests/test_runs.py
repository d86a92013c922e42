"""Training from Python: the same run as the command's, and what it holds afterwards."""

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
def quick(tiny_run) -> dict:
    """Keys of a run that takes seconds, without those of the data."""
    ours = {k: v for k, v in tiny_run.items() if k not in ("data_files", "text_columns", "task")}
    recipe = {"method": "sweet", "head_init": "random", "head_refit": False, "epochs": 1}
    return ours | recipe | {"group_by_length": False, "rate_search": "full"}


@pytest.fixture(scope="module")
def trained(table, quick, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    return sweet_jax.train(table, text="text", label="label", workdir=folder / "run", **quick)


def test_a_table_gives_bitwise_the_model_of_the_command(trained, quick, rows, tmp_path):
    command = {**OWN_DATA, **quick, "data_files": str(rows)}
    run(from_mapping(command | {"text_columns": "text"}), tmp_path / "command")
    for name in ("model/model.safetensors", "exit_outputs/validation.npz"):
        ours, theirs = (d / name for d in (trained.directory, tmp_path / "command"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_is_loaded_and_holds_its_results(trained):
    again = Run.load(trained.directory)
    found = again.results
    assert found["exit"].dropna().tolist() == [1, 2, 3]
    wanted = (again.outputs.predictions[0] == again.outputs.labels[0]).mean(axis=1)
    np.testing.assert_allclose(found["accuracy"][:3], wanted)
    assert (found["low"] < found["accuracy"]).all()
    assert "accuracy" in repr(again)
    assert "<table" in again._repr_html_()
    assert again.report().read_text().startswith("<!doctype html>")


def test_curves_and_operating_points_are_those_of_the_saved_outputs(trained):
    curve = trained.curve()
    wanted = simulate(trained.outputs, "confidence", calibration=trained.calibration)
    np.testing.assert_array_equal(curve.score, wanted.score)
    assert not np.array_equal(trained.curve("entropy").threshold, curve.threshold)
    point = trained.operating_point(cost=0.5)
    assert point.calibration[0] <= 0.5
    at = np.searchsorted(curve.threshold[0], point.threshold)
    assert point.validation == (curve.cost[0, at], curve.score[0, at])
    with pytest.raises(UserError, match="set one target, not 2"):
        trained.operating_point(cost=0.5, accuracy=0.9)


def test_the_classifier_answers_as_the_run_was_evaluated(trained, rows):
    with open(rows, newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    found = trained.classifier(threshold=float("inf")).predict(texts)
    assert set(found.exits.tolist()) == {3}
    assert len(found.labels) == len(texts)


def test_a_budget_is_answered_as_at_the_end_of_the_command(trained, tmp_path, monkeypatch):
    shutil.copytree(trained.directory, tmp_path / "run")
    run = Run.load(tmp_path / "run")
    with pytest.raises(UserError, match="set one target, not 2: milliseconds, cost"):
        run.recommend(milliseconds=5, cost=0.5)
    assert not (run.directory / "model" / "clock.json").exists()
    before = run.report().read_bytes()
    found = run.recommend(cost=0.5)
    assert found.startswith("recommended operating point: accuracy ")
    assert "the best accuracy within 0.5 of the layers" in found
    assert run.report().read_bytes() != before
    assert run.classifier(milliseconds=1000).threshold < 1  # by the times that were kept

    def measure(*arguments):
        raise AssertionError("predict --measure has measured these lengths")

    def widen(table):  # as predict --measure does
        times = np.concatenate([table.milliseconds, 9 + table.milliseconds[:, -1:]], axis=1)
        lengths = (*table.lengths, 512)
        return dataclasses.replace(table, lengths=lengths, milliseconds=times)

    model = run.directory / "model"
    write_tables(model, [widen(table) for table in read_tables(model)])
    saved = (model / "clock.json").read_bytes()
    monkeypatch.setattr("sweet_jax.recommendation.measure_latency", measure)
    assert run.recommend(cost=0.5) == found
    assert (model / "clock.json").read_bytes() == saved


KINDS = {
    "dict": lambda frame: frame.to_dict("list"),
    "arrow": lambda frame: pa.Table.from_pandas(frame),
    "dataset": lambda frame: datasets.Dataset.from_pandas(frame),
    "index": lambda frame: frame.set_index(frame.index + 7),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_is_the_same_run(trained, table, quick, kind):
    before = (trained.directory / "results.json").stat().st_mtime_ns
    added = trained.directory / "model" / "added.json"
    added.write_text("{}")
    again = sweet_jax.train(
        KINDS[kind](table[["text", "label"]]),
        text="text",
        label="label",
        workdir=trained.directory,
        **quick,
    )
    assert json.dumps(again.record["replicas"]) == json.dumps(trained.record["replicas"])
    assert before  # resumed in the same directory: another kind of table is no other data
    assert len(list((trained.directory / "rows").iterdir())) == 1
    added.unlink()  # what the run had not written stays beside the same weights


def test_other_rows_are_refused_in_the_same_workdir(trained, table, quick):
    with pytest.raises(UserError, match="belongs to a run on other rows"):
        sweet_jax.train(
            table.iloc[:-1], text="text", label="label", workdir=trained.directory, **quick
        )


@pytest.mark.parametrize("kind", [dict, pd.DataFrame, pa.table])
def test_rows_without_some_values_are_the_same_rows_again(kind, tmp_path):
    missing = float("nan")
    rows = kind({"text": ["a", None], "label": [1.0, missing], "more": [[missing], []]})
    asked = {"text": "", "label": "label", "validation": None, "values": {}}
    config = run_config(rows, tmp_path, **asked)
    (tmp_path / "config.json").touch()  # a run was begun
    assert run_config(rows, tmp_path, **asked) == config
    others = kind({"text": ["a", None], "label": [1.0, 2.0], "more": [[missing], []]})
    with pytest.raises(UserError, match="belongs to a run on other rows"):
        run_config(others, tmp_path, **asked)


def test_a_call_that_fails_before_the_run_can_be_corrected(table, quick, tmp_path):
    asked = {"text": "text", "label": "label", "workdir": tmp_path / "run", **quick}
    with pytest.raises(UserError, match="unknown config key 'epoch'"):
        sweet_jax.train(table, epoch=1, **asked)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="label"):
        sweet_jax.train(table.assign(label=None), **asked)
    kept = {"text": "text", "label": "label", "validation": None, "values": {}}
    config = run_config(table, tmp_path / "run", **kept)
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
def test_data_that_is_no_table_is_refused(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        sweet_jax.train(data, text="text", workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_comma_in_the_name_of_one_of_two_files_is_refused(table, tmp_path):
    with pytest.raises(
        UserError, match=r"runs,1/rows/train\.arrow' contains a comma, which separates"
    ):
        sweet_jax.train(table, validation=table, workdir=tmp_path / "runs,1")
    with pytest.raises(UserError, match=r"'v,1\.csv' contains a comma, which separates the files"):
        sweet_jax.train(table, validation="v,1.csv", workdir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a finished run"):
        Run.load(tmp_path)


def test_only_the_main_thread_waits_for_sigterm():
    """A server or a notebook may train in a thread of its own, which handles no signals."""
    before = signal.getsignal(signal.SIGTERM)
    with termination_event() as event:
        signal.raise_signal(signal.SIGTERM)
        assert event.is_set()
    assert signal.getsignal(signal.SIGTERM) == before

    def wait() -> bool:
        with termination_event() as event:
            return event.is_set()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(wait).result()
