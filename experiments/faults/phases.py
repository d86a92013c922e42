"""Tells from outside in which phase a run is: by the files of its directory and its progress bar.

Nothing is added to the program that is killed: it is the command that users run.
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
# Phases that a run goes through in this order; those of one set alternate.
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
_SLACK = 0.02  # seconds by which the clock of a file system may lag


def place_of(phase: str) -> int:
    """Returns how late in a run a phase comes: the same number for those that alternate."""
    return next(n for n, phases in enumerate(_ORDER) if phase in phases)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Says which attempt at a run is watched.

    Attributes:
      workdir: of the run.
      began: time.time() at which the attempt was started: files from before are older attempts'.
      errors: file of the standard error of the process that draws the progress bar.
      last_step: the step of the last checkpoint of a whole run.
      total: of the progress bar of its training.

    """

    workdir: Path
    began: float
    errors: Path
    last_step: int = 0
    total: int = 0

    def is_new(self, path: Path) -> bool:
        """Returns whether this attempt wrote a file, or something in a directory."""
        try:
            return path.stat().st_mtime >= self.began - _SLACK
        except OSError:
            return False

    def phase(self) -> str:
        """Returns the phase of the run; "ended" when its results are written."""
        run = self.workdir
        if self.is_new(run / "results.json"):
            return "ended"
        if not self.is_new(run / "config.json"):
            return "start-up"  # imports, rows, tokenising; of several processes also joining
        if self.is_new(run / "exit_outputs"):
            return "report"
        if not (run / "probe.npz").exists():
            return "probe"
        if self._saves_checkpoint():
            return "checkpoint"
        if not (run / "rate_search.json").exists():
            return "rate search"
        if self.is_new(run / "refit" / "exits_1_2_3.npz"):
            return "evaluation"
        if (run / "checkpoints" / "exits_1_2_3" / f"{self.last_step}.digest.json").exists():
            return "refit"
        return "training" if self._stepped() else "compile"

    def _saves_checkpoint(self) -> bool:
        """Returns whether a checkpoint of any training is being written."""
        try:
            return any(map(self._writing, self.workdir.glob("**/checkpoints/*")))
        except FileNotFoundError:  # the rate search removes its folders as it ends
            return False

    def _writing(self, folder: Path) -> bool:
        """Returns whether a checkpoint of a training is being written, or has no digest yet."""
        for path in folder.glob("*"):
            unfinished = "checkpoint-tmp" in path.name or (
                path.name.isdigit() and not (folder / f"{path.name}.digest.json").exists()
            )
            if unfinished and self.is_new(path):
                return True
        return False

    def _stepped(self) -> bool:
        """Returns whether the progress bar has moved: the step is compiled."""
        try:
            counts = _BAR.findall(self.errors.read_text(errors="replace"))
        except OSError:
            return False
        return len({done for done, total in counts if int(total) == self.total}) > 1


def bar_total(errors: Path) -> int:
    """Returns the total of the longest training that a whole run drew a progress bar of."""
    return max((int(total) for _, total in _BAR.findall(errors.read_text())), default=0)
