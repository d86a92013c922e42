"""Details that a report shows beside saved outputs: texts, times, baselines, the point asked for.

Shape letters: N validation rows, E exit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np

from sweet_jax.config import Config
from sweet_jax.exits.analysis import Analysis
from sweet_jax.files import RUN_ROWS
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.recipe import OWN_DATA
from sweet_jax.report.baselines import Baseline


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTimes:
    """Holds the measured time until each exit of one text by itself.

    Attributes:
      milliseconds: float64 [E], until each exit has answered.
      tokens: of the text, padded.
      machine: that it was measured on, with the engine.
      slow: milliseconds of a long text through all layers; None where its length was not measured.
      slow_tokens: of that text: 95% of the texts have no more.
      by_text: float64 [N, E], predicted for each validation text at its own length; None where
        the texts are not there.

    """

    milliseconds: np.ndarray
    tokens: int
    machine: str
    slow: float | None = None
    slow_tokens: int = 0
    by_text: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReportDetails:
    """Holds what a report shows that does not follow from its outputs.

    Attributes:
      title: of the page; empty for the task's name.
      texts: of the validation rows [N]; None leaves single texts out.
      times: None where none were measured.
      baselines: with their predictions on the validation rows.
      cut: whether a validation text is longer than the model reads, bool [N]; None: not known.
      max_length: tokens that it reads.
      target: of the operating point that is recommended: cost, accuracy, error, milliseconds (with
        times) or threshold; empty for the cheapest that keeps the last exit's metric on
        calibration rows.
      split: where the validation rows are from; "" where they were given.

    """

    title: str = ""
    texts: Sequence[tuple[str, ...]] | None = None
    times: ExitTimes | None = None
    baselines: Sequence[Baseline] = ()
    cut: np.ndarray | None = None
    max_length: int = 0
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    split: str = ""


def describe_split(config: Config) -> str:
    """Says how the validation rows were drawn from a file of one's own; "" where it was another."""
    if not config.data_files or "," in config.data_files:
        return ""
    strata = OBJECTIVES[config.objective].column.strata_name
    return (
        f"{config.validation_fraction:.0%} of the file, drawn at random, {strata} in proportion "
        f"(validation_fraction; split_seed {config.split_seed})"
    )


def report_title(config: Config) -> str:
    """Returns the name of the file of a run on one's own data, which says more than its task.

    With its folder where it is called like any other.
    """
    path = PurePath(config.data_files.partition(",")[0].partition("+")[0])
    if config.task != OWN_DATA["task"] or path.parent.name == RUN_ROWS:
        return ""
    common = path.name.partition(".")[0] in ("data", "train", "training")
    return "/".join(path.parts[-2:]) if common else path.name


def recommended_threshold(
    analysis: Analysis, replica: int, details: ReportDetails
) -> tuple[float, bool]:
    """Returns the threshold that a report recommends, and whether it meets the target.

    Where the target cannot be met, the one that there would be without; where there is none either,
    infinity: all layers. Raises UserError for a target out of its range, or milliseconds without
    times.
    """
    clock = None if details.times is None else details.times.milliseconds
    resolver = analysis.resolver(replica)
    found = resolver.resolve(analysis.policy, details.target, clock).threshold
    if found is not None:
        return found, True
    found = resolver.resolve(analysis.policy).threshold
    return np.inf if found is None else found, not details.target
