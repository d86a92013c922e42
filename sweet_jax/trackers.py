"""Trackers that log a training in addition to metrics.jsonl: TensorBoard, W&B or MLflow.

A tracker is a class, and one entry of TRACKERS; its package is imported only when it is opened.
Each run directory corresponds to one run of the tracker, whose id is kept in trackers.json so that
a resumed run continues it. `training/trackers.py` opens the trackers of a run.
"""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sweet_jax.files import read_json, write_json
from sweet_jax.registry import Registry

_PROJECT = "sweet_jax"
# What is attached to a tracker that stores files.
_REPORT = ("report.html", "results.json", "figures")
_MODEL = "model"


class Tracker(Protocol):
    """Receives values by name and step, and the files of a run at its end.

    The class is called with (workdir, training, step): the run directory, the name of a training,
    under which its values are logged, and the first step to log. This happens for each training of
    a run, in the primary process, and again when the run is resumed: the steps from `step` on are
    then repeated. A class may have two attributes: `package`, the name of the Python package that
    it imports, and `install`, the command that installs it, for messages.
    """

    def add(self, name: str, value: float, step: int) -> None:
        """Logs one finite value."""

    def attach(self, workdir: Path) -> None:
        """Attaches the report and the model of a finished run."""

    def flush(self) -> None:
        """Sends the values that are still pending."""

    def close(self) -> None:
        """Flushes and closes the tracker."""


class TensorBoard:
    """Writes event files to the workdir; purges later events, which a killed run left behind."""

    package, install = "tensorboardX", "pip install -e ."

    def __init__(self, workdir: Path, training: str, step: int):
        from tensorboardX import SummaryWriter

        folder = str(workdir / "tensorboard" / training)
        self._events = SummaryWriter(folder, purge_step=step, write_to_disk=True)

    def add(self, name: str, value: float, step: int) -> None:
        self._events.add_scalar(name, value, step)

    def attach(self, workdir: Path) -> None:
        """Does nothing: event files cannot hold other files."""

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Wandb:
    """Logs to a W&B run; each training has its own step axis."""

    package, install = "wandb", 'pip install -e ".[wandb]"'

    def __init__(self, workdir: Path, training: str, step: int):
        import wandb

        self._training, self._pending, self._step = training, {}, step  # type: ignore[var-annotated]
        number = run_id(workdir, "wandb", lambda: uuid.uuid4().hex[:12])
        run = wandb.run
        if run is None or run.id != number:
            config = read_json(path) if (path := workdir / "config.json").exists() else {}
            metadata = {"name": workdir.resolve().name, "config": config}
            where = {"project": os.environ.get("WANDB_PROJECT", _PROJECT), "dir": str(workdir)}
            run = wandb.init(id=number, resume="allow", **where, **metadata)
        self._run = run
        run.define_metric(f"{training}/step", hidden=True)
        run.define_metric(f"{training}/*", step_metric=f"{training}/step")

    def add(self, name: str, value: float, step: int) -> None:
        if step != self._step:
            self.flush()
        self._step = step
        self._pending[f"{self._training}/{name}"] = value

    def attach(self, workdir: Path) -> None:
        import wandb

        for name, files in (("report", _REPORT), ("model", (_MODEL,))):
            artifact = wandb.Artifact(f"{workdir.resolve().name}-{name}", name)
            for path in (workdir / file for file in files):
                if path.is_dir():
                    artifact.add_dir(str(path), path.name)
                elif path.exists():
                    artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        self._run.finish()

    def flush(self) -> None:
        if self._pending:
            self._run.log(self._pending | {f"{self._training}/step": self._step})
        self._pending = {}

    def close(self) -> None:
        self.flush()


class MLflow:
    """Logs to an MLflow run at MLFLOW_TRACKING_URI, by default in the workdir's mlruns folder."""

    package, install = "mlflow", 'pip install -e ".[mlflow]"'

    def __init__(self, workdir: Path, training: str, step: int):
        import mlflow.entities
        from mlflow import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (workdir.resolve() / "mlruns").as_uri()
        self._client, self._training = MlflowClient(tracking_uri=address), training
        self._metric, self._pending = mlflow.entities.Metric, []  # type: ignore[var-annotated]
        self._number = run_id(workdir, "mlflow", lambda: self._new_run(workdir))

    def _new_run(self, workdir: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(number, run_name=workdir.resolve().name)
        config = read_json(path) if (path := workdir / "config.json").exists() else {}
        for key, value in config.items():
            self._client.log_param(run.info.run_id, key, value)
        return run.info.run_id

    def add(self, name: str, value: float, step: int) -> None:
        now = int(1000 * time.time())
        self._pending.append(self._metric(f"{self._training}/{name}", value, now, step))
        if len(self._pending) >= 500:  # a request may have at most 1,000
            self.flush()

    def attach(self, workdir: Path) -> None:
        for name in (*_REPORT, _MODEL):
            if (path := workdir / name).is_dir():
                self._client.log_artifacts(self._number, str(path), name)
            elif path.exists():
                self._client.log_artifact(self._number, str(path))
        self._client.set_terminated(self._number)

    def flush(self) -> None:
        if self._pending:
            self._client.log_batch(self._number, metrics=self._pending)
        self._pending = []

    def close(self) -> None:
        self.flush()


def run_id(workdir: Path, tracker: str, new: Callable[[], str]) -> str:
    """Returns the id of a run directory in a tracker, kept in trackers.json.

    Args:
      workdir: the run directory.
      tracker: key of the tracker in the file.
      new: function that creates the tracker's run and returns its id, called if there is none.

    """
    path = workdir / "trackers.json"
    run_ids = read_json(path) if path.exists() else {}
    if tracker not in run_ids:
        run_ids |= {tracker: new()}
        write_json(path, run_ids)
    return run_ids[tracker]


# The values of the config key `log_to`.
TRACKERS: Registry[Callable[[Path, str, int], Tracker]] = Registry(
    "log_to",
    Callable,
    {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow},
    "sweet_jax.trackers",
)
