"""What a report shows beside the saved outputs: texts, times, baselines, and the point asked for.

Shape letters: N validation rows, E exit.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sweet_jax.exits.analysis import Analysis
from sweet_jax.report.baselines import Baseline


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTimes:
    """Holds the measured time until each exit of one text by itself.

    Attributes:
      milliseconds: float64 [E], until each exit has answered.
      tokens: of the text, padded.
      machine: that it was measured on, with the engine.

    """

    milliseconds: np.ndarray
    tokens: int
    machine: str


@dataclasses.dataclass(frozen=True, eq=False)
class ReportDetails:
    """Holds what a report shows that does not follow from its outputs.

    Attributes:
      texts: of the validation rows [N]; None leaves single texts out.
      times: None where none were measured.
      baselines: with their predictions on the validation rows.
      cut: whether a validation text is longer than the model reads, bool [N]; None: not known.
      max_length: tokens that it reads.
      target: of the operating point that is recommended: cost, accuracy, milliseconds (with times)
        or threshold; empty for the cheapest that keeps the last exit's metric on calibration rows.

    """

    texts: Sequence[tuple[str, ...]] | None = None
    times: ExitTimes | None = None
    baselines: Sequence[Baseline] = ()
    cut: np.ndarray | None = None
    max_length: int = 0
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)


def recommended_threshold(
    analysis: Analysis, replica: int, target: Mapping[str, float], times: ExitTimes | None
) -> float:
    """Returns the threshold that a report recommends: infinity, all layers, where none will do.

    Raises UserError for a target out of its range, or milliseconds without times.
    """
    clock = times.milliseconds if times else None
    found = analysis.resolver(replica).resolve(analysis.policy, target, clock).threshold
    return np.inf if found is None else found
