"""Baselines that a user would try first, evaluated on the validation rows of the report.

Their names are "majority", "tfidf", "probe_<layer>" (the frozen encoder with a logistic-regression
probe at that layer) and "fine_tuned" (the plain fine-tuned full model). For multi-label and
regression objectives, "constant" replaces "majority", and "tfidf_one_vs_rest" or "tfidf_ridge"
replaces "tfidf".

Shape letters: R replica, N examples, C classes, K baselines.
"""

import dataclasses
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.files import write_arrays

_TITLES = {
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "constant": "same prediction for all rows",
    "tfidf_one_vs_rest": "TF-IDF + logistic regression for each label",
    "tfidf_ridge": "TF-IDF + ridge regression",
    "fine_tuned": "plain fine-tuned full model",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """Holds a baseline's predictions on the validation rows, and its cost.

    Attributes:
      name: one of the names above; any other name is shown unchanged.
      predictions: predictions of the objective: class indices int64 [R, N], labels bool [R, N, C],
        or numbers float32 [R, N]. R may be 1 if they are the same for all replicas; class indices
        may also be [N].
      cost: share of the full model's layers; 0 without an encoder.

    Raises:
      ValueError: predictions have another shape or type, or cost is negative.

    """

    name: str
    predictions: np.ndarray
    cost: float

    def __post_init__(self) -> None:
        predictions = np.asarray(self.predictions)
        kind = predictions.dtype.kind
        predictions = predictions[None] if predictions.ndim == 1 and kind in "iu" else predictions
        sound = predictions.ndim == (3 if kind == "b" else 2) and 0 not in predictions.shape
        if not sound or kind not in "iubf" or (kind in "iu" and predictions.min() < 0):
            raise ValueError(
                f"predictions of {self.name!r} must be class indices [R, N] or [N], labels bool "
                "[R, N, C] or numbers [R, N]"
            )
        if not (np.isfinite(self.cost) and self.cost >= 0):
            raise ValueError(f"the cost of {self.name!r} must be at least 0; got {self.cost}")
        dtype = np.int64 if kind in "iu" else np.float32 if kind == "f" else bool
        object.__setattr__(self, "predictions", predictions.astype(dtype))

    def for_replica(self, replica: int) -> np.ndarray:
        """Returns the predictions of one replica; class indices are int64 [N]."""
        return self.predictions[replica if len(self.predictions) > 1 else 0]


def baseline_title(name: str) -> str:
    """Returns the baseline's title in tables and figures."""
    probe = re.fullmatch(r"probe_(\d+)", name)
    return f"frozen encoder + probe at layer {probe[1]}" if probe else _TITLES.get(name, name)


def save_baselines(path: str | Path, baselines: Sequence[Baseline]) -> None:
    """Writes baselines for the same rows to one .npz file, atomically.

    The file holds names [K], cost float64 [K] and predictions [K, R, N, ...], int32 for classes.
    Raises ValueError for an empty list, or if the shapes are not compatible.
    """
    given = np.stack(np.broadcast_arrays(*(b.predictions for b in baselines)))  # [K, R, N]
    arrays = {
        "names": np.asarray([b.name for b in baselines]),
        "cost": np.asarray([b.cost for b in baselines], np.float64),
        "predictions": given.astype(np.int32) if given.dtype.kind == "i" else given,
    }
    write_arrays(Path(path), arrays, compressed=True)


def load_baselines(path: str | Path) -> list[Baseline]:
    """Reads a file written by `save_baselines`, without unpickling. Raises UserError otherwise."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = [arrays[name] for name in ("names", "predictions", "cost")]
        return [Baseline(str(n), p, float(c)) for n, p, c in zip(*columns, strict=True)]
    except FileNotFoundError as error:
        raise UserError(f"there are no baselines at {str(path)!r}") from error
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} does not hold baselines: {error}") from error
