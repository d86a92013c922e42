"""Runs that nobody disturbs: the reference for the results of killed runs, and for their times."""

import dataclasses
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from experiments.faults.compare import differing_bits
from experiments.faults.inputs import write_inputs
from experiments.faults.launch import Setup, run_to_end, started
from experiments.faults.phases import Watch, largest_total
from sweet_jax.files import read_json, write_json


class Mode(NamedTuple):
    """Describes how a run is started and killed."""

    processes: int
    signal: signal.Signals


MODES = {
    "single": Mode(1, signal.SIGKILL),
    "two": Mode(2, signal.SIGKILL),
    "four": Mode(4, signal.SIGKILL),
    "two-sigterm": Mode(2, signal.SIGTERM),
    "four-sigterm": Mode(4, signal.SIGTERM),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Describes an undisturbed run.

    Attributes:
      seconds: its duration.
      phases: for each phase, the seconds of its longest stay, and the time when it was last seen.
      last_step: step of its last checkpoint.
      total: total of its training's progress bar.

    """

    seconds: float
    phases: dict[str, tuple[float, float]]
    last_step: int
    total: int

    def watch(self, run: Path, start: float, errors: Path) -> Watch:
        """Returns a watch of an attempt at a run of the same length; arguments as for `Watch`."""
        return Watch(run, start, errors, self.last_step, self.total)


def make_setup(mode: str, folder: Path) -> Setup:
    """Returns the setup of a mode; writes its inputs."""
    config = write_inputs(folder / "inputs")
    return Setup(config, folder / mode / "cache", MODES[mode].processes)


def run_undisturbed(mode: str, setup: Setup, folder: Path) -> Reference:
    """Returns the reference; runs FOLDER/MODE/whole unless it exists.

    The phases are timed in a second run of the mode "single", which must equal the first. All modes
    share this reference, because they take the same steps.
    """
    run, path = folder / mode / "whole", folder / "reference.json"
    if mode == "single":
        if not path.exists():
            write_json(path, dataclasses.asdict(_time_phases(setup, run)))
        return read_reference(path)
    if not path.exists():
        alone = dataclasses.replace(setup, cache=folder / "single" / "cache", processes=1)
        run_undisturbed("single", alone, folder)
    if not (run / "results.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        run_to_end(setup, run)
    return read_reference(path)


def read_reference(path: Path) -> Reference:
    """Reads the file that `run_undisturbed` wrote."""
    return Reference(**read_json(path))


def _time_phases(setup: Setup, run: Path) -> Reference:
    """Runs the command twice, and returns the phases of the second run.

    Raises RuntimeError if the runs differ, or have no progress bar of a training.
    """
    again = run.with_name("again")
    for old in (run, again):
        shutil.rmtree(old, ignore_errors=True)
    errors = run_to_end(setup, run).errors[0]  # this run compiles
    steps = [int(p.name.split(".")[0]) for p in run.glob("checkpoints/*/*.digest.json")]
    last_step, total = max(steps), largest_total(errors)
    if not total:
        raise RuntimeError(f"no progress bar of a training in {errors}: see phases.py")
    with started(setup, again) as attempt:
        watch = Watch(again, attempt.start, attempt.errors[0], last_step, total)
        seen: list[tuple[float, str]] = []
        while attempt.running():
            seen.append((time.time() - attempt.start, watch.phase()))
            time.sleep(0.01)
    if differences := differing_bits(run, again)[1]:
        raise RuntimeError(f"two undisturbed runs differ: {differences}")
    shutil.rmtree(again)
    return Reference(seen[-1][0], longest_stays(seen), last_step, total)


def longest_stays(seen: Iterable[tuple[float, str]]) -> dict[str, tuple[float, float]]:
    """Returns, for each phase, the seconds of its longest stay, and the time it was last seen.

    seen: times in seconds and phases, in order.
    """
    stays: dict[str, tuple[float, float]] = {}
    last, since = "", 0.0
    for now, phase in seen:
        if phase != last:
            last, since = phase, now
        stays[phase] = max(stays.get(phase, (0.0, 0.0))[0], now - since), now
    return stays
