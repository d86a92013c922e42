"""The trackers of a run: those that the config key `log_to` names, checked and opened as one."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweet_jax.config import split_names
from sweet_jax.errors import UserError
from sweet_jax.trackers import TRACKERS, Tracker

_METHODS = ("add", "attach", "flush", "close")


class _Trackers:
    """Passes everything to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = trackers

    def add(self, name: str, value: float, step: int) -> None:
        for tracker in self._trackers:
            tracker.add(name, value, step)

    def attach(self, workdir: Path) -> None:
        for tracker in self._trackers:
            tracker.attach(workdir)

    def flush(self) -> None:
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def check_trackers(names: str) -> None:
    """Raises UserError if a tracker is unknown or incomplete, or its package is not installed."""
    for name in split_names(names):
        tracker = TRACKERS[name]
        missing = [method for method in _METHODS if not hasattr(tracker, method)]
        if missing:
            raise UserError(
                f"log_to={name} is not a tracker, since it has no method {missing[0]}: a tracker "
                f"has {', '.join(_METHODS)}"
            )
        package = getattr(tracker, "package", "")
        if package and importlib.util.find_spec(package.partition(".")[0]) is None:
            install = getattr(tracker, "install", "") or "install it"
            raise UserError(f"log_to={name} requires the package {package}: {install}")


def open_tracker(names: str, workdir: Path, training: str, step: int) -> Tracker:
    """Opens one or several trackers as one.

    Args:
      names: names of trackers in TRACKERS, or "module:OBJECT", separated by commas.
      workdir: directory of the run.
      training: name of the training, under which its values are logged.
      step: first step to log.

    """
    kinds = [TRACKERS[name] for name in dict.fromkeys(split_names(names))]
    return _Trackers([kind(workdir, training, step) for kind in kinds])


def track_results(names: str, workdir: Path, results: Mapping[str, Any]) -> None:
    """Logs a finished run to trackers: metrics on validation rows, the report and the model."""
    tracker = open_tracker(names, workdir, "validation", 0)
    for number, replica in enumerate(results["replicas"]):
        for exit in replica["individual"]:
            metric_name = f"{results['metric']}/exit_{exit['layer']}/replica_{number}"
            if exit["score"] is not None:  # None if the exit diverged
                tracker.add(metric_name, exit["score"], 0)
    tracker.flush()
    tracker.attach(workdir)
    tracker.close()
