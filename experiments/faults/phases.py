"""Determines the phase of a run from the files in its directory and from its progress bar.

So the command that is killed is the one that users run, unchanged.
"""

import dataclasses
import re
from pathlib import Path

PHASES = (
    "start-up",
    "probe",
    "rate search",
    "compile",
    "training",
    "checkpoint",
    "refit",
    "evaluation",
    "report",
)
# A run goes through these sets of phases in this order; the phases of one set alternate.
_ORDER = (
    {"start-up"},
    {"probe"},
    {"rate search", "compile", "training", "checkpoint"},
    {"refit"},
    {"evaluation"},
    {"report"},
    {"ended"},
)
_BAR = re.compile(r"training, exits 1, 2, 3:[^\r\n]*?(\d+)/(\d+) ")
_LAG = 0.02  # seconds by which the clock of a file system may lag behind


def phase_order(phase: str) -> int:
    """Returns the position of a phase in a run, which is the same for phases that alternate."""
    return next(n for n, phases in enumerate(_ORDER) if phase in phases)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Watches one attempt at a run.

    Attributes:
      workdir: run directory.
      start: time.time() of the start of the attempt; older files are of earlier attempts.
      errors: file with the stderr of the process that shows the progress bar.
      last_step: step of the last checkpoint of a whole run.
      total: total of the training's progress bar in a whole run.

    """

    workdir: Path
    start: float
    errors: Path
    last_step: int = 0
    total: int = 0

    def is_new(self, path: Path) -> bool:
        """Returns whether this attempt wrote a file, or wrote into a directory."""
        try:
            return path.stat().st_mtime >= self.start - _LAG
        except OSError:
            return False

    def phase(self) -> str:
        """Returns the phase of the run, "ended" if its results are written."""
        run = self.workdir
        if self.is_new(run / "results.json"):
            return "ended"
        if not self.is_new(run / "config.json"):
            return "start-up"  # imports, reading, tokenization; connecting to other processes
        if self.is_new(run / "exit_outputs"):
            return "report"
        if not (run / "probe.npz").exists():
            return "probe"
        if self._is_saving():
            return "checkpoint"
        if not (run / "rate_search.json").exists():
            return "rate search"
        if self.is_new(run / "refit" / "exits_1_2_3.npz"):
            return "evaluation"
        if (run / "checkpoints" / "exits_1_2_3" / f"{self.last_step}.digest.json").exists():
            return "refit"
        return "training" if self._has_stepped() else "compile"

    def _is_saving(self) -> bool:
        """Returns whether a checkpoint of any training is being written."""
        try:
            return any(map(self._is_unfinished, self.workdir.glob("**/checkpoints/*")))
        except FileNotFoundError:  # the search of the learning rate removes its folders at its end
            return False

    def _is_unfinished(self, folder: Path) -> bool:
        """Returns whether a training's checkpoint is being written, or has no digest yet."""
        for path in folder.glob("*"):
            unfinished = "checkpoint-tmp" in path.name or (
                path.name.isdigit() and not (folder / f"{path.name}.digest.json").exists()
            )
            if unfinished and self.is_new(path):
                return True
        return False

    def _has_stepped(self) -> bool:
        """Returns whether the progress bar has moved, so that the step is compiled."""
        try:
            counts = _BAR.findall(self.errors.read_text(errors="replace"))
        except OSError:
            return False
        return len({done for done, total in counts if int(total) == self.total}) > 1


def largest_total(errors: Path) -> int:
    """Returns the largest total of the progress bars of trainings in a file, 0 if there is none."""
    return max((int(total) for _, total in _BAR.findall(errors.read_text())), default=0)
