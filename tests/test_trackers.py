"""Tests of the trackers of training metrics: TensorBoard, MLflow and W&B."""

import json
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny import read_tuning

from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.pipeline import run
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.metrics import MetricsLog, read_metrics
from sweet_jax.training.trackers import open_tracker, track_results

RESULTS = {
    "metric": "accuracy",
    "replicas": [{"individual": [{"layer": 1, "score": 0.75}, {"layer": 3, "score": 0.875}]}],
}
LOSSES = np.asarray([[0.5, 0.25]], np.float32)
LOGGED = {
    "loss/exit_1/replica_0": 0.5,
    "loss/exit_3/replica_0": 0.25,
    "learning_rate/replica_0": 0.125,
    "tuning_area/replica_0": 0.625,
    "tuning_metric/exit_1/replica_0": 0.5,
    "tuning_metric/exit_3/replica_0": 0.75,
}


def log_two_steps(workdir, tracker: str) -> None:
    """Logs steps 4 and 5 of the training "short", and the evaluation after them."""
    opened = open_tracker(tracker, workdir, "short", 4)
    log = MetricsLog(workdir, "short", 4, (1, 3), opened)
    fields = dict.fromkeys(StepMetrics._fields)
    for step in (4, 5):
        log.add(step, 0, 16, StepMetrics(**(fields | {"loss": LOSSES})))
        log.add_rates(step, [0.125])
    log.add_tuning(6, np.asarray([0.625]), np.asarray([[0.5, 0.75]]))
    log.close()


def finish_run(workdir, tracker: str) -> None:
    """Writes files as of a finished run, and gives them to the tracker."""
    (workdir / "model").mkdir()
    for name in ("report.html", "results.json", "model/exits.json"):
        (workdir / name).write_text("a file")
    track_results(tracker, workdir, RESULTS)


def read_events(folder) -> list[tuple[str, float, int]]:
    """Returns the scalars (name, value, step) of TensorBoard's event files."""
    scalars = []
    for path in sorted(folder.iterdir()):
        data, offset = path.read_bytes(), 0
        while offset < len(data):  # length, checksum, record, checksum
            (length,) = struct.unpack("<Q", data[offset : offset + 8])
            event = Event.FromString(data[offset + 12 : offset + 12 + length])
            offset += 16 + length
            scalars += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
    return scalars


def test_tensorboard_gets_exit_metrics_tuning_area_and_learning_rate(tmp_path):
    log_two_steps(tmp_path, "tensorboard")
    scalars = read_events(tmp_path / "tensorboard" / "short")
    assert {name: value for name, value, _ in scalars} == LOGGED
    assert [s for name, _, s in scalars if name == "learning_rate/replica_0"] == [4, 5]
    assert [s for name, _, s in scalars if name == "tuning_area/replica_0"] == [6]
    assert [row["loss"] for row in read_metrics(tmp_path)] == [LOSSES.tolist()] * 2
    expected = {"training": "short", "step": 6, "area": [0.625], "metric": [[0.5, 0.75]]}
    assert read_tuning(tmp_path) == [expected]
    finish_run(tmp_path, "tensorboard")
    validation = read_events(tmp_path / "tensorboard" / "validation")
    assert validation[0] == ("accuracy/exit_1/replica_0", 0.75, 0)


def test_mlflow_stores_metrics_report_and_model_in_local_files(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason='pip install -e ".[mlflow]"')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 2}))
    log_two_steps(tmp_path, "mlflow")
    log_two_steps(tmp_path, "mlflow")  # as a resumed run does
    finish_run(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "sweet_jax"]
    (tracked,) = client.search_runs([experiment.experiment_id])
    values = {f"short/{name}": value for name, value in LOGGED.items()}
    values |= {"validation/accuracy/exit_1/replica_0": 0.75}
    values |= {"validation/accuracy/exit_3/replica_0": 0.875}
    assert tracked.data.metrics == values
    assert tracked.data.params == {"epochs": "2"}
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "short/learning_rate/replica_0")
    assert {point.step for point in history} == {4, 5}
    names = {file.path for file in client.list_artifacts(tracked.info.run_id)}
    assert names == {"report.html", "results.json", "model"}


def test_wandb_stores_metrics_and_report_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason='pip install -e ".[wandb]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_two_steps(tmp_path, "wandb")
    log_two_steps(tmp_path, "wandb")
    finish_run(tmp_path, "wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    for name in (*(f"short/{n}" for n in LOGGED), "validation/accuracy/exit_3/replica_0"):
        assert name.encode() in data
    assert b"report.html" in data
    assert path.name == f"run-{json.loads((tmp_path / 'trackers.json').read_text())['wandb']}.wandb"


def test_metric_rows_are_flushed_and_repeated_steps_dropped(tmp_path):
    """Programs may follow metrics.jsonl; a killed run leaves rows that the resumed run repeats."""
    path, fields = tmp_path / "metrics.jsonl", dict.fromkeys(StepMetrics._fields)
    values = StepMetrics(**(fields | {"loss": LOSSES}))

    def log_steps(start: int, stop: int) -> MetricsLog:
        tracker = open_tracker("tensorboard", tmp_path, "short", start)
        log = MetricsLog(tmp_path, "short", start, (1, 3), tracker)
        for step in range(start, stop):
            log.add(step, 0, 16, values)
        return log

    logs = [log_steps(0, 5)]  # not flushed, not closed
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    logs.append(log_steps(3, 4))  # from the checkpoint after step 2
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    resumed = path.read_bytes()
    logs.append(log_steps(0, 4))
    assert path.read_bytes() == resumed
    for log in logs:
        log.close()


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_missing_tracker_package_is_refused_before_run_starts(tracker, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"log_to={tracker} requires the package {tracker}: pip "):
        run(from_mapping({"log_to": tracker}), tmp_path / "run")
    assert not os.path.exists(tmp_path / "run")
