"""Objectives: what the outputs of an exit mean, and how they are compared with targets.

To add an objective, define an `Objective` in a file of its own and list it in this table.
"""

from sweet_jax.objectives.multi_label import MULTI_LABEL
from sweet_jax.objectives.objective import Metric, Objective
from sweet_jax.objectives.regression import REGRESSION
from sweet_jax.objectives.single_label import SINGLE_LABEL
from sweet_jax.registry import Registry

OBJECTIVES = Registry(
    "objective",
    Objective,
    {objective.name: objective for objective in (SINGLE_LABEL, MULTI_LABEL, REGRESSION)},
    "sweet_jax.objectives",
)

__all__ = ["OBJECTIVES", "SINGLE_LABEL", "Metric", "Objective"]
