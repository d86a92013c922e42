"""Details that a report shows in addition to saved outputs: texts, times, baselines, the target.

Shape letters: N validation rows, E exit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np

from sweet_jax.config import Config
from sweet_jax.exits.analysis import Analysis
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.recipe import OWN_DATA
from sweet_jax.report.baselines import Baseline
from sweet_jax.run_directory import RUN_ROWS


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTimes:
    """Holds the measured time until each exit for a single text.

    Attributes:
      milliseconds: time until each exit has answered, float64 [E].
      tokens: number of tokens of the text, including padding.
      machine: machine on which the time was measured, and the engine.
      slow: milliseconds of a long text through all layers; None if that length was not measured.
      slow_tokens: number of tokens of that text, which 95% of the texts do not exceed.
      by_text: predicted milliseconds until each exit for each validation text at its own length,
        float64 [N, E]; None if the texts are not available.

    """

    milliseconds: np.ndarray
    tokens: int
    machine: str
    slow: float | None = None
    slow_tokens: int = 0
    by_text: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReportDetails:
    """Holds the contents of a report that cannot be computed from saved outputs.

    Attributes:
      title: title of the page; empty for the task's name.
      texts: texts of the validation rows [N]; None to omit single texts.
      times: measured times; None if there are none.
      baselines: baselines with their predictions on the validation rows.
      cut: whether each validation text is truncated, bool [N]; None if unknown.
      max_length: maximum number of tokens that the model reads.
      target: target of the recommended operating point: cost, accuracy, error, milliseconds
        (requires times) or threshold. If empty, the cheapest threshold that keeps the last exit's
        metric on calibration rows is recommended.
      split: description of how the validation rows were drawn; "" if they have their own file.

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
    """Describes how validation rows were drawn from the user's file; "" if they were not."""
    if not config.data_files or "," in config.data_files:
        return ""
    strata = OBJECTIVES[config.objective].column.strata_name
    return (
        f"{config.validation_fraction:.0%} of the file, drawn at random, {strata} in proportion "
        f"(validation_fraction; split_seed {config.split_seed})"
    )


def report_title(config: Config) -> str:
    """Returns the file name of a run on the user's own data; "" for other runs.

    Common names, such as train.csv, are prefixed with their folder.
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

    If the target cannot be met, returns the threshold that would be chosen without a target. If
    there is none either, returns infinity, which runs all layers. Raises UserError for a target out
    of range, or for milliseconds without times.
    """
    clock = None if details.times is None else details.times.milliseconds
    resolver = analysis.resolver(replica)
    threshold = resolver.resolve(analysis.policy, details.target, clock).threshold
    if threshold is not None:
        return threshold, True
    threshold = resolver.resolve(analysis.policy).threshold
    return np.inf if threshold is None else threshold, not details.target
