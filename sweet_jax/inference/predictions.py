"""Predictions, and checks of the texts they are made for.

Shape letters: N texts, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.config import UserError
from sweet_jax.data.tables import find_column
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.scheduler import Request

Label = str | list[str] | float  # of one text
Text = str | tuple[str, str] | Sequence[str]


class Prediction(NamedTuple):
    """Holds the prediction of one text.

    Attributes:
      label: in the terms of the label column: the class with the largest probability; a list of
        the labels of a multi-label model; the number of a regression.
      probabilities: float64 [C], after temperature, in the order of the model's classes; [0] of a
        regression.
      exit: the layer it exited at.
      cost: share of the full model's layers.
      probability: of the class; of several labels the certainty of the least certain, given or not;
        None of a regression.

    """

    label: Label
    probabilities: np.ndarray
    exit: int
    cost: float
    probability: float | None

    @property
    def is_finite(self) -> bool:
        """Returns whether it is a prediction at all: an exit that diverged has none."""
        return is_finite(self.label, self.probability)


class ExitPrediction(NamedTuple):
    """Holds the prediction of one text at one exit, by its layer; see `Prediction`."""

    layer: int
    label: Label
    probability: float | None


def is_finite(label: Label, probability: float | None) -> bool:
    """Returns whether a prediction and its probability are of finite logits."""
    number = label if probability is None else probability
    return isinstance(number, float) and math.isfinite(number)


class InvalidRow(NamedTuple):
    """Marks a row without a text, and the reason."""

    reason: str


class Predictions(NamedTuple):
    """Holds the predictions of some texts, in their order."""

    labels: np.ndarray  # str [N]; lists of str, object [N], of several labels; float64 [N]
    probabilities: np.ndarray  # float64 [N, C]; [N, 0] of a regression
    exits: np.ndarray  # int64 [N], layer numbers
    cost: np.ndarray  # float64 [N]


def make_prediction(model: ModelArtifact, request: Request) -> Prediction:
    """Returns the prediction of a request that has exited."""
    logits = request.logits[-1]
    (probabilities,) = request.rule.probabilities(logits[None], [request.exit])  # [C]
    label, probability = model.objective.answer(logits, probabilities, model.classes)
    # The full model alone does not pay for Multi-Model's shallower ones.
    alone = len(request.logits) == 1 and request.exit > 0
    cost = 1.0 if alone else float(model.cost[request.exit])
    return Prediction(label, probabilities, model.layers[request.exit], cost, probability)


def make_exit_predictions(model: ModelArtifact, request: Request) -> list[ExitPrediction]:
    """Returns the predictions at every exit that a request reached, the one it took last."""
    first = request.exit + 1 - len(request.logits)  # of the full model alone, the last
    exits = range(first, request.exit + 1)
    probabilities = request.rule.probabilities(np.stack(request.logits), exits)  # [exits, C]
    return [
        ExitPrediction(model.layers[e], *model.objective.answer(logits, p, model.classes))
        for e, logits, p in zip(exits, request.logits, probabilities, strict=True)
    ]


def collect_predictions(predictions: Sequence[Prediction], model: ModelArtifact) -> Predictions:
    """Collects predictions of a model into arrays."""
    columns = zip(*predictions, strict=True) if predictions else ((),) * 5
    labels, probabilities, exits, cost, _ = columns
    several, outputs = model.objective.target_per_output, len(model.classes)
    if model.objective.categorical is None:
        outputs = 0
    found = np.empty(len(labels), object) if several else np.asarray(labels)
    if several:
        found[:] = labels
    elif model.objective.agrees is not None:
        found = found.astype(np.str_)
    return Predictions(
        found,
        np.asarray(probabilities, np.float64).reshape(len(predictions), outputs),
        np.asarray(exits, np.int64),
        np.asarray(cost, np.float64),
    )


def rows_of(texts: Any, columns: Sequence[str]) -> Iterable[Any]:
    """Returns the texts of a table by the names of its columns, and other texts as they are.

    Args:
      texts: a pandas DataFrame, a `datasets.Dataset`, a PyArrow table, or any iterable of texts.
      columns: the text columns of the model.

    Raises UserError for one text, a dict, or a table without these columns.

    """
    if isinstance(texts, str | bytes | Mapping):
        what = "one text" if isinstance(texts, str | bytes) else "a dict"
        raise UserError(f"texts must be a list of texts, or a table, not {what}")
    names = getattr(texts, "column_names", None)
    if names is None and hasattr(texts, "iterrows"):
        names = list(texts.columns)
    if not isinstance(names, list):
        return _values(texts)
    found = []
    for name in columns:
        column = texts[names[find_column(name, [str(other) for other in names])]]
        found.append(list(_values(column)))
    return found[0] if len(found) == 1 else zip(*found, strict=True)


def _values(column: Any) -> Iterable[Any]:
    """Returns an array of Arrow as a list, since its own items are scalars; others as they are."""
    return column.to_pylist() if hasattr(column, "to_pylist") else column


def validate_text(text: Text, pairs: bool, number: int) -> tuple[str, ...]:
    """Returns a text, or a pair of them, as a tuple of one or two.

    Raises UserError for anything else; `number` is the row's, from 0, for the message.
    """
    several = tuple(text) if isinstance(text, tuple | list | np.ndarray) else ()
    parts = (text,) if isinstance(text, str) else several
    if len(parts) != 1 + pairs or not all(isinstance(part, str) for part in parts):
        wanted = "a pair of texts (a tuple of two)" if pairs else "a text"
        raise UserError(f"row {number + 1} must be {wanted}; got {text!r:.80}")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"row {number + 1} holds half a surrogate pair: {text!a:.80}") from error
    return parts
