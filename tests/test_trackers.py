"""Where the numbers of a training go: TensorBoard's event files, MLflow, W&B."""

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
NAMES = {
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


def finish(workdir, tracker: str) -> None:
    """Hands on the files of a finished run."""
    (workdir / "model").mkdir()
    for name in ("report.html", "results.json", "model/exits.json"):
        (workdir / name).write_text("a file")
    track_results(tracker, workdir, RESULTS)


def read_events(folder) -> list[tuple[str, float, int]]:
    """The scalars (name, value, step) of TensorBoard's event files."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, checksum, record, checksum
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
    return found


def test_tensorboard_has_metrics_of_every_exit_area_and_learning_rate(tmp_path):
    log_two_steps(tmp_path, "tensorboard")
    found = read_events(tmp_path / "tensorboard" / "short")
    assert {name: value for name, value, _ in found} == NAMES
    assert [s for name, _, s in found if name == "learning_rate/replica_0"] == [4, 5]
    assert [s for name, _, s in found if name == "tuning_area/replica_0"] == [6]
    assert [row["loss"] for row in read_metrics(tmp_path)] == [LOSSES.tolist()] * 2
    wanted = {"training": "short", "step": 6, "area": [0.625], "metric": [[0.5, 0.75]]}
    assert read_tuning(tmp_path) == [wanted]
    finish(tmp_path, "tensorboard")
    validation = read_events(tmp_path / "tensorboard" / "validation")
    assert validation[0] == ("accuracy/exit_1/replica_0", 0.75, 0)


def test_mlflow_has_them_in_its_local_files_with_report_and_model(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason='pip install -e ".[mlflow]"')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 2}))
    log_two_steps(tmp_path, "mlflow")
    log_two_steps(tmp_path, "mlflow")  # a run that is resumed is the same run
    finish(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "sweet_jax"]
    (found,) = client.search_runs([experiment.experiment_id])
    values = {f"short/{name}": value for name, value in NAMES.items()}
    values |= {"validation/accuracy/exit_1/replica_0": 0.75}
    values |= {"validation/accuracy/exit_3/replica_0": 0.875}
    assert found.data.metrics == values
    assert found.data.params == {"epochs": "2"}
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "short/learning_rate/replica_0")
    assert {point.step for point in history} == {4, 5}
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert names == {"report.html", "results.json", "model"}


def test_wandb_takes_them_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason='pip install -e ".[wandb]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_two_steps(tmp_path, "wandb")
    log_two_steps(tmp_path, "wandb")
    finish(tmp_path, "wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    for name in (*(f"short/{n}" for n in NAMES), "validation/accuracy/exit_3/replica_0"):
        assert name.encode() in data
    assert b"report.html" in data
    assert path.name == f"run-{json.loads((tmp_path / 'trackers.json').read_text())['wandb']}.wandb"


def test_every_row_is_in_the_file_at_once_and_dropped_if_it_is_repeated(tmp_path):
    """A program that follows metrics.jsonl sees it; a run that is killed then leaves more rows."""
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
def test_a_tracker_that_is_not_installed_is_refused_at_once(tracker, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"log_to={tracker} requires the package {tracker}: pip "):
        run(from_mapping({"log_to": tracker}), tmp_path / "run")
    assert not os.path.exists(tmp_path / "run")
