"""The linear models of an objective, used for its heads and for the baselines of a report.

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
    """Defines the linear models that predict an objective's targets.

    Attributes:
      solver: function of (H, C) that returns a function minimizing the mean loss
        + penalty / 2 |kernel|^2 on standardized features, where the loss of regression is half the
        squared error. With two classes, |kernel|^2 is that of the difference between the two
        columns, which is twice that of both; with several labels, the loss is the sum over labels
        of the mean over rows. The returned function may start from its last result, since it is
        called with the strongest penalty first.
      loss: function of (logits float64 [N, C], targets) that returns the mean loss.
      constant: function of (targets, C) that returns the best prediction without features, [] or
        [C].
      text_model: function of (inverse_penalty, max_iter), scikit-learn's C and its maximum number
        of iterations, that returns an estimator for sparse features [N, H] and targets. If the
        objective has `decision_shifts`, the estimator has a `decision_function`.
      baselines: names of the baselines that use `constant` and `text_model`.

    """

    solver: Callable[[int, int], Solve]
    loss: Callable[[np.ndarray, np.ndarray], float]
    constant: Callable[[np.ndarray, int], np.ndarray]
    text_model: Callable[[float, int], Any]
    baselines: tuple[str, str] = ("majority", "tfidf")
