"""Linear models on the features of every exit, used to initialize the heads and to refit them.

The models are logistic regressions, or the `LinearModel` of another objective.

For linear probing followed by fine-tuning, see Kumar et al. 2022 (arXiv 2202.10054). For refitting
the last layer on a trained encoder, see Kirichenko et al. 2022 (arXiv 2204.02937).

Shape letters: R replica, E exit, U rows with features, N training rows, M tuning rows, H width of
a classifier's input, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.files import write_arrays
from sweet_jax.objectives import SINGLE_LABEL, Objective
from sweet_jax.objectives.linear_model import LinearModel
from sweet_jax.training.step import Params

# λ in mean cross-entropy + λ/2 |W|^2, where W applies to standardized features; `LinearModel`
# defines |W|^2 for two classes, and the objectives of several labels and of regression. The
# strongest penalty comes first, and each fit starts from the one before.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4)
ROWS = 50_000  # maximum number of rows to fit on, and of rows that choose the penalty
_CHUNK = 8192  # number of rows that are standardized at a time


def refit_path(workdir: Path, training: str) -> Path:
    """Returns the path where a run keeps the classifiers that were refitted after a training."""
    return workdir / "refit" / f"{training}.npz"


def read_classifiers(path: Path) -> "LinearClassifiers | None":
    """Reads the file that `LinearClassifiers.save` wrote, or returns None if there is none."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return LinearClassifiers(*(arrays[name] for name in LinearClassifiers._fields))


class LinearClassifiers(NamedTuple):
    """Holds the dense layers of linear models, which apply to features without standardization."""

    kernel: np.ndarray  # float32 [R, E, H, C]
    bias: np.ndarray  # float32 [R, E, C]
    penalty: np.ndarray  # float64 [R, E], the λ of PENALTIES chosen on tuning rows

    def select_replicas(self, replicas: Sequence[int]) -> "LinearClassifiers":
        """Returns the classifiers of some replicas."""
        return LinearClassifiers(*(array[list(replicas)] for array in self))

    def select_exits(self, exits: Sequence[int], chosen: Sequence[int]) -> "LinearClassifiers":
        """Returns the classifiers of the exits `chosen` out of `exits`, both given as layers."""
        columns = [list(exits).index(layer) for layer in chosen]
        return LinearClassifiers(*(array[:, columns] for array in self))

    def save(self, path: Path, **more: np.ndarray) -> None:
        """Writes the classifiers and further arrays atomically to one .npz file."""
        write_arrays(path, self._asdict() | more)

    def predictions(self, features: np.ndarray, objective: Objective = SINGLE_LABEL) -> np.ndarray:
        """Returns the predictions of all rows, [R, E, N, ...], given features [R or 1, E, N, H]."""
        features = np.broadcast_to(features, (len(self.kernel), *features.shape[1:]))
        replicas, exits = features.shape[:2]

        def predict(r: int, e: int) -> np.ndarray:
            return objective.predict(features[r, e] @ self.kernel[r, e] + self.bias[r, e])

        return np.stack([[predict(r, e) for e in range(exits)] for r in range(replicas)])


class Probe(NamedTuple):
    """Holds linear models on the frozen encoder."""

    classifiers: LinearClassifiers  # one for every replica and exit
    predictions: np.ndarray  # predictions for the validation rows; classes are int64 [R, E, N]

    def select_replicas(self, replicas: Sequence[int]) -> "Probe":
        """Returns the probe of some replicas."""
        return Probe(self.classifiers.select_replicas(replicas), self.predictions[list(replicas)])


def fit_classifiers(
    features: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    tuning_rows: np.ndarray,
    classes: int,
    linear: LinearModel = SINGLE_LABEL.linear,
) -> LinearClassifiers:
    """Fits one linear model for every replica and exit; see `fit_classifier`.

    Only one exit's features of one replica are copied at a time.

    Args:
      features: features, float32 [R or 1, E, U, H]; 1 if all replicas have the same ones.
      labels: targets of the same rows [R or 1, U, ...]; classes are int [R or 1, U].
      rows: positions of the training rows on the axis U, int [R, N].
      tuning_rows: positions of the rows that choose the penalty, int [R, M].
      classes: number of classes, C.
      linear: kind of linear model, from the objective.

    """
    fitted: list[list[tuple[np.ndarray, np.ndarray, float]]] = []
    for r, (training, held) in enumerate(zip(rows, tuning_rows, strict=True)):
        source = r if len(features) > 1 else 0
        y = labels[source]
        before = range(r) if len(features) == 1 else ()
        twin = next((s for s in before if np.array_equal(rows[s], training)), None)
        fitted.append(
            fitted[twin]  # a replica with another learning rate but the same rows
            if twin is not None
            else [
                fit_classifier(x[training], y[training], x[held], y[held], classes, linear)
                for x in features[source]
            ]
        )
    kernel, bias, penalty = (np.asarray([[e[i] for e in r] for r in fitted]) for i in range(3))
    return LinearClassifiers(kernel.astype(np.float32), bias.astype(np.float32), penalty)


def fit_classifier(
    x: np.ndarray,
    y: np.ndarray,
    held_x: np.ndarray,
    held_y: np.ndarray,
    classes: int,
    linear: LinearModel = SINGLE_LABEL.linear,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits a linear model with an L2 penalty chosen on held-out rows.

    Features are standardized for the fit, in place and in chunks, so that they may be a memory map.
    The returned model includes the standardization: it applies to the original features. Penalties
    are tried from the strongest to the weakest, until two in a row do not reduce the held-out loss.

    Args:
      x: features, float32 [N, H].
      y: targets [N, ...]; labels, int [N], must have at least two classes.
      held_x: features of the held-out rows, float32 [M, H].
      held_y: targets of the held-out rows [M, ...].
      classes: number of classes, C; a class that does not occur in y gets the smallest logit.
      linear: kind of linear model; by default multinomial logistic regression.

    Returns:
      (kernel [H, C], bias [C], penalty).

    Raises:
      ValueError: there are no held-out rows, so that no penalty can be chosen.

    """
    if not len(held_x):
        raise ValueError("no held-out rows to choose the penalty of the linear model on")
    mean, scale = _standardise(x, held_x)
    solve = linear.solver(x.shape[1], classes)
    best: tuple[float, np.ndarray, np.ndarray, float] | None = None
    rises = 0
    for penalty in PENALTIES:
        kernel, bias = solve(x, y, penalty)
        loss = linear.loss(held_x @ kernel + bias, held_y)
        if best is None or loss < best[0]:
            best, rises = (loss, kernel, bias, penalty), 0
        elif (rises := rises + 1) == 2:
            break
    assert best is not None
    _, kernel, bias, penalty = best
    kernel = kernel / scale[:, None]
    return kernel, bias - mean @ kernel, penalty


def with_classifiers(
    params: Params, exits: Sequence[int], classifiers: LinearClassifiers, columns: Sequence[int]
) -> Params:
    """Returns parameters [R, ...] whose heads have the dense layers in `classifiers`.

    Args:
      params: parameters [R, ...].
      exits: layer numbers of the heads.
      classifiers: dense layers of the heads.
      columns: positions of `exits` on the axis E of `classifiers`.

    """
    heads: dict[str, Any] = dict(params["heads"])
    for layer, e in zip(exits, columns, strict=True):
        dense = {"kernel": classifiers.kernel[:, e], "bias": classifiers.bias[:, e]}
        heads[str(layer)] = heads[str(layer)] | {"classifier": dense}
    return params | {"heads": heads}


def _standardise(x: np.ndarray, held_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardizes both arrays in place with the mean and standard deviation of the first.

    The moments are computed in two passes because E[x^2] - E[x]^2 loses precision.

    Returns:
      The mean and the standard deviation, float32 [H] each. The standard deviation of a constant
      feature is replaced by 1.

    """
    chunks = range(0, len(x), _CHUNK)
    mean = sum(x[i : i + _CHUNK].sum(axis=0, dtype=np.float64) for i in chunks) / len(x)
    squares = sum((((x[i : i + _CHUNK] - mean) ** 2).sum(axis=0)) for i in chunks)
    scale = np.sqrt(squares / len(x))
    scale = np.where(scale > 1e-6, scale, 1).astype(np.float32)
    mean = mean.astype(np.float32)
    for rows in (x, held_x):
        for start in range(0, len(rows), _CHUNK):
            rows[start : start + _CHUNK] -= mean
            rows[start : start + _CHUNK] /= scale
    return mean, scale
