"""The linear models of an objective: of its heads, and of the baselines of a report.

Shape letters: N rows, H features, C outputs of an exit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# (features float32 [N, H], targets, penalty) → kernel float64 [H, C], bias float64 [C]
Solve = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Defines the linear models that an objective's targets are predicted by.

    Attributes:
      solver: (H, C) → the function that minimises the mean loss + penalty / 2 |kernel|^2 on
        standardised features. It may start from its last result: penalties come strongest first.
      loss: (logits float64 [N, C], targets) → their mean loss.
      constant: (targets, C) → the best prediction without features: [] or [C].
      text_model: (inverse of the penalty's strength, most iterations) → an estimator of
        scikit-learn's, of sparse features [N, H] and targets.
      baselines: names of the baselines by `constant` and by `text_model`.

    """

    solver: Callable[[int, int], Solve]
    loss: Callable[[np.ndarray, np.ndarray], float]
    constant: Callable[[np.ndarray, int], np.ndarray]
    text_model: Callable[[float, int], Any]
    baselines: tuple[str, str] = ("majority", "tfidf")
