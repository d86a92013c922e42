"""ExitOutputs: the logits of every exit on every example, the link between training and analysis.

Shape letters: R replica, E exit, N examples, C outputs of an exit (classes).
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sweet_jax.errors import UserError
from sweet_jax.files import write_arrays
from sweet_jax.methods import METHODS
from sweet_jax.objectives import OBJECTIVES, Metric, Objective

# Exceptions that NumPy raises for truncated files and for files that it did not write.
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """Identifies the run and the rows that outputs belong to.

    Attributes:
      split: "calibration", "tuning" or "validation".
      task, method, checkpoint, preset, learning_to_exit: values from the run's config.
      fitted_on: rows that calibration uses: "held_out" for rows held out from training,
        "validation" or "validation_dropout" for the reported rows.
      policy: exit policy of the run.
      metric: name of one of the objective's metrics; default its first.
      classes: names of the classes [C]; empty if unknown.
      replicas: (seed, learning rate) of each replica [R]; empty if unknown.
      objective: name, in OBJECTIVES, of the objective that the model was trained for.

    Raises UserError for an unknown objective, or for a metric that the objective does not have.

    """

    split: str = ""
    task: str = ""
    method: str = ""
    checkpoint: str = ""
    preset: str = ""
    fitted_on: str = "held_out"
    policy: str = "confidence"
    learning_to_exit: str = ""
    metric: str = ""
    classes: tuple[str, ...] = ()
    replicas: tuple[tuple[int, float], ...] = ()
    objective: str = "single_label"

    def __post_init__(self) -> None:
        objective = OBJECTIVES[self.objective]
        metric = objective.metric(self.metric or objective.metrics[0])
        object.__setattr__(self, "metric", metric.name)
        object.__setattr__(self, "classes", tuple(self.classes))
        replicas = tuple((int(seed), float(rate)) for seed, rate in self.replicas)
        object.__setattr__(self, "replicas", replicas)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunIdentity":
        """Restores the result of `dataclasses.asdict`, ignoring unknown keys of other versions."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclasses.dataclass(frozen=True, eq=False)
class ExitOutputs:
    """Holds the logits of every exit on one split, and the cost of reaching each exit.

    Attributes:
      logits: logits, float32 [R, E, N, C]; [E, N, C] is interpreted as one replica.
      labels: targets of the objective. For single-label classification int64 [R, N], since
        calibration rows differ by seed; [N] is broadcast. [R, N, C] if every output has its own
        target.
      layers: layer number of each exit, ascending, int64 [E].
      cost: share of the full model's layers spent when each exit answers, ascending, float64 [E].
        Default layers / layers[-1], which holds for Early-Exit and SWEET.
      exit_scores: learning-to-exit scores, float32 [R, E, N], or None.
      identity: identity of the run; its metric is the one that curves and tables report.

    Raises:
      ValueError: shapes do not match, labels are invalid for the objective, layers or cost are not
        ascending, or identity is not a RunIdentity.

    """

    logits: np.ndarray
    labels: np.ndarray
    layers: np.ndarray
    cost: np.ndarray = None  # type: ignore[assignment]  # filled in by __post_init__
    exit_scores: np.ndarray | None = None
    identity: RunIdentity = RunIdentity()

    if TYPE_CHECKING:  # arguments may be what the attributes are made from, such as lists

        def __init__(
            self,
            logits: npt.ArrayLike,
            labels: npt.ArrayLike,
            layers: npt.ArrayLike,
            cost: npt.ArrayLike | None = None,
            exit_scores: npt.ArrayLike | None = None,
            identity: RunIdentity = RunIdentity(),
        ) -> None: ...

    def __post_init__(self) -> None:
        def put(name: str, value: np.ndarray) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.identity, RunIdentity):
            raise ValueError(f"identity must be a RunIdentity; got {self.identity!r}")
        logits = np.asarray(self.logits, np.float32)
        put("logits", logits[None] if logits.ndim == 3 else logits)
        if self.logits.ndim != 4 or 0 in self.logits.shape:
            raise ValueError(f"logits must be [R, E, N, C] and not empty; got {logits.shape}")
        r, e, n, c = self.logits.shape
        row, letters = ((n, c), "N, C") if self.objective.target_per_output else ((n,), "N")
        shape = np.shape(self.labels)
        if shape not in (row, (1, *row), (r, *row)):
            raise ValueError(f"labels must be [{letters}] = {row} or [R, {letters}]; got {shape}")
        put("labels", np.broadcast_to(self.objective.read_targets(self.labels, c), (r, *row)))
        layers = np.asarray(self.layers)
        # A conversion would drop fractions.
        if layers.dtype.kind not in "iuf" or not np.array_equal(layers, np.trunc(layers)):
            raise ValueError(f"layers must be whole numbers; got {layers}")
        put("layers", np.asarray(layers, np.int64))
        cost = self.layers / self.layers[-1] if self.cost is None else self.cost
        put("cost", np.asarray(cost, np.float64))
        for name, value in (("layers", self.layers), ("cost", self.cost)):
            sound = value.shape == (e,) and np.isfinite(value).all()
            if not (sound and (np.diff(value, prepend=0) > 0).all()):
                raise ValueError(
                    f"{name} must be [E] with E = {e}, positive and ascending; got {value}"
                )
        if self.exit_scores is not None:
            put("exit_scores", np.asarray(self.exit_scores, np.float32))
            if self.exit_scores.shape != (r, e, n):
                raise ValueError(f"exit_scores must be [R, E, N]; got {self.exit_scores.shape}")

    def __repr__(self) -> str:
        r, e, n, c = self.logits.shape
        return (
            f"{type(self).__name__}(split={self.identity.split!r}, R={r}, E={e}, N={n}, C={c}, "
            f"layers={self.layers})"
        )

    @property
    def objective(self) -> Objective:
        """Returns the objective that defines what the logits mean."""
        return OBJECTIVES[self.identity.objective]

    @property
    def metric(self) -> Metric:
        """Returns the metric that curves and tables report."""
        return self.objective.metric(self.identity.metric)

    @property
    def predictions(self) -> np.ndarray:
        """Returns the predictions of each exit; for single-label classification int64 [R, E, N]."""
        return self.objective.predict(self.logits)

    def credit(self, predictions: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Returns how right predictions are compared with other predictions or targets, [..., N].

        Returns whether they are the same, bool, or the credit of each row, float from 0 to 1, for
        metrics that define it. Raises UserError for regression.
        """
        measure = self.metric.credit or self.objective.same
        return measure(predictions, others)

    def check_same_run(self, others: "ExitOutputs") -> None:
        """Raises UserError if calibration or tuning rows come from another model than these rows.

        Replicas and names of classes are compared only if both are known.
        """
        ours, theirs = (
            {
                "layers": outputs.layers.tolist(),
                "costs": outputs.cost.tolist(),
                "outputs of an exit": outputs.logits.shape[-1],
                "number of replicas": outputs.logits.shape[0],
                "objective": outputs.identity.objective,
                "classes": list(outputs.identity.classes) or None,
                "replicas": list(outputs.identity.replicas) or None,
            }
            for outputs in (self, others)
        )
        for name, value in ours.items():
            if None not in (value, theirs[name]) and value != theirs[name]:
                raise UserError(
                    f"the {others.identity.split or 'calibration'} rows are not from the same run: "
                    f"{name} {theirs[name]}, but {value} for the rows to simulate"
                )

    def replica(self, index: int) -> "ExitOutputs":
        """Returns the outputs of one replica, R = 1."""
        return self._part(slice(index, index + 1), slice(None))

    def rows(self, index: np.ndarray) -> "ExitOutputs":
        """Returns the outputs of some examples, the same for every replica: index int [N']."""
        return self._part(slice(None), index)

    def _part(self, replicas: slice, rows: slice | np.ndarray) -> "ExitOutputs":
        scores = self.exit_scores
        return dataclasses.replace(
            self,
            logits=self.logits[replicas, :, rows],
            labels=self.labels[replicas, rows],
            exit_scores=None if scores is None else scores[replicas, :, rows],
        )

    def save(self, path: str | Path) -> None:
        """Writes one .npz file, atomically."""
        arrays = {name: getattr(self, name) for name in ("logits", "labels", "layers", "cost")}
        arrays["identity"] = np.asarray(json.dumps(dataclasses.asdict(self.identity)))
        if self.exit_scores is not None:
            arrays["exit_scores"] = self.exit_scores
        write_arrays(Path(path), arrays)

    @classmethod
    def load(cls, path: str | Path) -> "ExitOutputs":
        """Reads a file written by `save`, without unpickling. Raises UserError for other files."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in arrays.files}
            identity = RunIdentity.from_dict(json.loads(str(fields.pop("identity", "{}"))))
            return cls(**fields, identity=identity)
        except FileNotFoundError as error:
            raise UserError(f"there are no exit outputs at {str(path)!r}") from error
        except _UNREADABLE as error:
            known = isinstance(error, OSError) or zipfile.is_zipfile(path)
            reason = error if known else "it is not an .npz file"
            raise UserError(f"{str(path)!r} does not hold exit outputs: {reason}") from error


def layer_cost(layers: Sequence[int], method: str) -> np.ndarray:
    """Returns the share of the full model's layers spent when each exit answers, float64 [E].

    The rule depends on the method (SWEET paper, section 3): Multi-Model runs its models one after
    the other, so that its cost is the cumulative sum of their depths.
    """
    depth = np.asarray(layers, np.float64)
    return METHODS[method].cost(depth) / depth[-1]
