"""Predictions, and checks of the texts to predict.

Shape letters: N texts, C classes.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from sweet_jax.data.tables import find_model_column
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.scheduler import Request

Label = str | list[str] | float  # a class, the labels of a multi-label model, or a number
Text = str | tuple[str, str] | Sequence[str]


class Prediction(NamedTuple):
    """Holds the prediction of one text.

    Attributes:
      label: the class with the largest probability; for multi-label, the list of predicted labels;
        for regression, the predicted number.
      probabilities: float64 [C], after temperature scaling, in the order of the model's classes;
        [0] for regression.
      exit: layer of the exit that the text took.
      cost: share of the full model's layers that were computed.
      probability: probability of the class; for multi-label, the probability of the least certain
        decision on a label, positive or negative; None for regression.

    """

    label: Label
    probabilities: np.ndarray
    exit: int
    cost: float
    probability: float | None

    @property
    def is_finite(self) -> bool:
        """Returns whether the prediction is finite; that of an exit that diverged is not."""
        return is_finite(self.label, self.probability)


class ExitPrediction(NamedTuple):
    """Holds the prediction of one text at one exit; see `Prediction`."""

    layer: int
    label: Label
    probability: float | None


def is_finite(label: Label, probability: float | None) -> bool:
    """Returns whether a label and its probability come from finite logits."""
    number = label if probability is None else probability
    return isinstance(number, float) and math.isfinite(number)


class InvalidRow(NamedTuple):
    """Marks a row that has no valid text, with the reason."""

    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Holds the predictions of texts as arrays; it is also a sequence of `Prediction`, one a text.

    Attributes:
      labels: names of the predicted classes, str [N], also for a model that was trained on integers
        or booleans: compare them with `y.astype(str)`. For multi-label, lists of str, object [N];
        for regression, float64 [N].
      probabilities: float64 [N, C], in the order of the model's classes; [N, 0] for regression.
      exits: layers of the exits taken, int64 [N].
      cost: shares of the full model's layers, float64 [N].
      probability: see `Prediction`, float64 [N]; NaN for regression.

    """

    labels: np.ndarray
    probabilities: np.ndarray
    exits: np.ndarray
    cost: np.ndarray
    probability: np.ndarray

    def __len__(self) -> int:
        return len(self.exits)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> "Predictions": ...

    def __getitem__(self, index: int | slice) -> "Prediction | Predictions":
        """Returns the prediction of one text, or for a slice the `Predictions` of some."""
        if isinstance(index, slice):
            columns = (self.labels, self.probabilities, self.exits, self.cost, self.probability)
            return Predictions(*(column[index] for column in columns))
        probability = float(self.probability[index])
        return Prediction(
            self.labels[index] if self.labels.dtype == object else self.labels[index].item(),
            self.probabilities[index],
            int(self.exits[index]),
            float(self.cost[index]),
            probability if self.probabilities.shape[1] else None,
        )

    def __iter__(self) -> Iterator[Prediction]:
        return (self[index] for index in range(len(self)))


def make_prediction(model: ModelArtifact, request: Request) -> Prediction:
    """Returns the prediction of a request that has exited."""
    logits = request.logits[-1]
    (probabilities,) = request.rule.probabilities(logits[None], [request.exit])  # [C]
    label, probability = model.objective.answer(logits, probabilities, model.classes)
    # If only the full model ran, the cost of Multi-Model's shallower models does not count.
    alone = len(request.logits) == 1 and request.exit > 0
    cost = 1.0 if alone else float(model.cost[request.exit])
    return Prediction(label, probabilities, model.layers[request.exit], cost, probability)


def make_exit_predictions(model: ModelArtifact, request: Request) -> list[ExitPrediction]:
    """Returns the predictions at every exit that a request reached; the last is the one it took."""
    first = request.exit + 1 - len(request.logits)  # the last exit if only the full model ran
    exits = range(first, request.exit + 1)
    probabilities = request.rule.probabilities(np.stack(request.logits), exits)  # [exits, C]
    return [
        ExitPrediction(model.layers[e], *model.objective.answer(logits, p, model.classes))
        for e, logits, p in zip(exits, request.logits, probabilities, strict=True)
    ]


def collect_predictions(predictions: Sequence[Prediction], model: ModelArtifact) -> Predictions:
    """Collects predictions of a model into arrays."""
    columns = zip(*predictions, strict=True) if predictions else ((),) * 5
    labels, probabilities, exits, cost, probability = columns
    several, outputs = model.objective.target_per_output, len(model.classes)
    if model.objective.categorical is None:
        outputs = 0
    label_array = np.empty(len(labels), object) if several else np.asarray(labels)
    if several:
        label_array[:] = labels
    elif model.objective.agrees is not None:
        # The width of the longest name, so that the type does not depend on the texts.
        label_array = label_array.astype(f"<U{max(map(len, model.classes))}")
    return Predictions(
        label_array,
        np.asarray(probabilities, np.float64).reshape(len(predictions), outputs),
        np.asarray(exits, np.int64),
        np.asarray(cost, np.float64),
        np.asarray(probability, np.float64),  # None becomes NaN
    )


def rows_of(texts: Any, columns: Sequence[str]) -> Iterable[Any]:
    """Returns the texts in a table's text columns; returns any other iterable of texts unchanged.

    Args:
      texts: a pandas DataFrame, a `datasets.Dataset`, a PyArrow table, or any iterable of texts.
      columns: names of the model's text columns.

    Raises UserError for a single text, a dict, something else that is not iterable, or a table
    without these columns.

    """
    if isinstance(texts, str | bytes):
        raise UserError("texts must be a list of texts or a table; got a single text: pass [text]")
    if isinstance(texts, Mapping):
        raise UserError("texts must be a list of texts or a table; got a dict")
    names = getattr(texts, "column_names", None)
    if names is None and hasattr(texts, "iterrows"):
        names = list(texts.columns)
    if not isinstance(names, list):
        if not hasattr(_values(texts), "__iter__"):
            raise UserError(f"texts must be a list of texts or a table; got {texts!r:.80}")
        return _values(texts)
    column_texts = []
    for name in columns:
        column = texts[names[find_model_column(name, [str(other) for other in names])]]
        column_texts.append(list(_values(column)))
    return column_texts[0] if len(column_texts) == 1 else zip(*column_texts, strict=True)


def _values(column: Any) -> Iterable[Any]:
    """Returns an Arrow array as a list, since its items are Arrow scalars; others unchanged."""
    return column.to_pylist() if hasattr(column, "to_pylist") else column


def validate_text(text: Text, pairs: bool, number: int) -> tuple[str, ...]:
    """Returns a text or a pair of texts as a tuple.

    Args:
      text: the text or pair.
      pairs: whether it must be a pair.
      number: index of the row, from 0, for the error message.

    Raises UserError for anything else.

    """
    items = tuple(text) if isinstance(text, tuple | list | np.ndarray) else ()
    texts = (text,) if isinstance(text, str) else items
    if len(texts) != 1 + pairs or not all(isinstance(item, str) for item in texts):
        expected = "a pair of texts (a tuple of two)" if pairs else "a text"
        raise UserError(f"row {number + 1} must be {expected}; got {text!r:.80}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"row {number + 1} has an unpaired surrogate, which is not valid Unicode: {text!a:.80}"
        ) from error
    return texts
