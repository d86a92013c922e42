"""ExitOutputs: what every exit said of every example, the hub between training and analysis.

Shape letters: R replica, E exit, N examples, C classes.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.files import atomic_write
from sweet_jax.methods import METHODS


@dataclasses.dataclass(frozen=True, eq=False)
class ExitOutputs:
    """The logits of every exit of one split, and what reaching each exit costs.

    Attributes:
      logits: float32 [R, E, N, C]; [E, N, C] is taken as one replica.
      labels: int64 [R, N]; [N] is broadcast. Calibration rows differ by seed.
      layers: int64 [E], the layer number of each exit, ascending.
      cost: float64 [E], share of the full model's layers spent when exit e answers, ascending.
        Default layers / layers[-1]: Early-Exit and SWEET.
      exit_scores: float32 [R, E, N] or None, learning-to-exit scores.
      identity: what run this is: task, method, classes, metric, replicas and so on.

    Raises:
      ValueError: shapes that do not fit, labels outside the classes, layers or cost not ascending.

    """

    logits: np.ndarray
    labels: np.ndarray
    layers: np.ndarray
    cost: np.ndarray = None  # type: ignore[assignment]  # filled in by __post_init__
    exit_scores: np.ndarray | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: np.ndarray) -> None:
            object.__setattr__(self, name, value)

        logits = np.asarray(self.logits, np.float32)
        put("logits", logits[None] if logits.ndim == 3 else logits)
        if self.logits.ndim != 4 or 0 in self.logits.shape:
            raise ValueError(f"logits must be [R, E, N, C] and not empty; got {logits.shape}")
        r, e, n, c = self.logits.shape
        labels = np.asarray(self.labels, np.int64)
        if labels.shape not in ((n,), (1, n), (r, n)):
            raise ValueError(f"labels must be [N] or [R, N] with N = {n}; got {labels.shape}")
        put("labels", np.broadcast_to(labels, (r, n)))
        if self.labels.min() < 0 or self.labels.max() >= c:
            raise ValueError(f"labels must be from 0 to {c - 1}")
        put("layers", np.asarray(self.layers, np.int64))
        cost = self.layers / self.layers[-1] if self.cost is None else self.cost
        put("cost", np.asarray(cost, np.float64))
        for name, value in (("layers", self.layers), ("cost", self.cost)):
            if value.shape != (e,) or bool((np.diff(value) <= 0).any()):
                raise ValueError(f"{name} must be [E] with E = {e}, ascending; got {value}")
        if self.exit_scores is not None:
            put("exit_scores", np.asarray(self.exit_scores, np.float32))
            if self.exit_scores.shape != (r, e, n):
                raise ValueError(f"exit_scores must be [R, E, N]; got {self.exit_scores.shape}")

    @property
    def predictions(self) -> np.ndarray:
        """The class each exit gives, int64 [R, E, N]."""
        return self.logits.argmax(axis=-1)

    def replica(self, index: int) -> "ExitOutputs":
        """One replica alone, R = 1."""
        scores = self.exit_scores
        return dataclasses.replace(
            self,
            logits=self.logits[index : index + 1],
            labels=self.labels[index : index + 1],
            exit_scores=None if scores is None else scores[index : index + 1],
        )

    def rows(self, index: np.ndarray) -> "ExitOutputs":
        """Some of the examples: index int [N'], of all replicas alike."""
        scores = self.exit_scores
        return dataclasses.replace(
            self,
            logits=self.logits[:, :, index],
            labels=self.labels[:, index],
            exit_scores=None if scores is None else scores[:, :, index],
        )

    def save(self, path: str | Path) -> None:
        """Writes one .npz, whole or not at all."""
        arrays: dict[str, Any] = {
            "logits": self.logits,
            "labels": self.labels,
            "layers": self.layers,
            "cost": self.cost,
            "identity": np.asarray(json.dumps(dict(self.identity))),
        }
        if self.exit_scores is not None:
            arrays["exit_scores"] = self.exit_scores
        with atomic_write(Path(path)) as aside:
            np.savez(aside, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "ExitOutputs":
        """Reads what `save` wrote; nothing is unpickled. Raises UserError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            identity = json.loads(str(found.pop("identity", "{}")))
            return cls(**found, identity=identity)
        except FileNotFoundError as error:
            raise UserError(f"there are no exit outputs at {str(path)!r}") from error
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{str(path)!r} does not hold exit outputs: {error}") from error


def layer_cost(layers: Sequence[int], method: str) -> np.ndarray:
    """Returns the share of the full model's layers spent when each exit answers, float64 [E].

    By the method's rule (SWEET paper, section 3): Multi-Model runs its models one after the other,
    and spends the running sum of their depths.
    """
    depth = np.asarray(layers, np.float64)
    return METHODS[method].cost(depth) / depth[-1]
