"""Baselines that a user would try first, evaluated on the validation rows of the report.

Their names are "majority", "tfidf", "probe_<layer>" (the frozen encoder with a logistic-regression
probe at that layer) and "fine_tuned" (the plain fine-tuned full model). For multi-label and
regression objectives, "constant" replaces "majority", and "tfidf_one_vs_rest" or "tfidf_ridge"
replaces "tfidf".

Shape letters: R replica, N examples, M training examples, K baselines.
"""

import dataclasses
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.files import write_arrays
from sweet_jax.objectives import SINGLE_LABEL, Objective

_TITLES = {
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "constant": "same prediction for all rows",
    "tfidf_one_vs_rest": "TF-IDF + logistic regression for each label",
    "tfidf_ridge": "TF-IDF + ridge regression",
    "fine_tuned": "plain fine-tuned full model",
}
_INVERSE_PENALTIES = (1.0, 10.0, 100.0)  # C of the logistic regression, the inverse of its penalty
_USUAL_INVERSE_PENALTY = 10.0  # used without tuning rows
# Bounds on time and memory for large data sets; a few thousand rows stay below all of them.
_ROWS = 50_000  # maximum number of rows to fit or tune on
_CHARACTERS = 20_000_000  # maximum number of characters of these rows
_LONGEST = 5_000  # characters read per text; an encoder's 512 tokens are about 2,500
_FEATURES = 200_000  # maximum number of features of all columns
_WEIGHTS = 2_000_000  # maximum number of weights; L-BFGS keeps about 25 copies
_WORK = 20_000_000_000  # products of features and classes, which bounds L-BFGS's iterations
_AT_ONCE = 10_000  # number of rows to predict at once
_FOLDS = 5  # folds of the cross-validation on which decision thresholds are fitted


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


def constant_predictions(
    targets: np.ndarray, n: int, classes: int, objective: Objective = SINGLE_LABEL
) -> np.ndarray:
    """Returns the best prediction without features for targets [M, ...], repeated n times.

    For classes it is the most frequent class, the first among ties, int64 [n].
    """
    prediction = np.asarray(objective.linear.constant(targets, classes))
    return np.broadcast_to(prediction, (n, *prediction.shape)).copy()


def tfidf_predictions(
    train_texts: Sequence[tuple[str, ...]],
    train_labels: np.ndarray,
    texts: Sequence[tuple[str, ...]],
    *,
    tuning: tuple[Sequence[tuple[str, ...]], np.ndarray] | None = None,
    seed: int = 0,
    objective: Objective = SINGLE_LABEL,
    fit_decisions: bool = False,
) -> np.ndarray:
    """Predicts the classes of texts by logistic regression on TF-IDF features, int64 [N].

    For other objectives, predicts their targets [N, ...] with their linear model, see
    `LinearModel.text_model`.

    Features are words and pairs of adjacent words, with sublinear frequencies. The two texts of a
    pair have separate features, since a word of the hypothesis means something else than in the
    premise, and no pair of words spans both texts. C is the value of 1, 10 and 100 with the best
    accuracy (for other objectives, their first metric) on the tuning rows, the smallest among ties;
    10 without tuning rows.

    Time and memory are bounded for data of any size: the model is fitted on at most 50,000 rows,
    drawn with a fixed seed, and 20 million characters. It reads 5,000 characters per text and has
    at most 200,000 features, fewer with more than ten classes. This takes at most about 1 GB and
    two minutes on one core, and prediction takes time proportional to N.

    If the training rows have a single class or contain no words, predicts their majority class.
    Words are those of scikit-learn, two or more letters between boundaries, so this is a weak
    baseline for languages written without spaces.

    Args:
      train_texts: M tuples of one text each, or of two texts for pairs.
      train_labels: targets of the training rows; for single-label classification int [M].
      texts: N tuples with as many texts each as in the training rows.
      tuning: (texts, targets) of rows on which C is chosen, neither trained on nor reported.
      seed: random seed of the draw of training rows.
      objective: objective that defines the targets.
      fit_decisions: whether to fit the decision threshold of each label, as for the exits
        (`Objective.decision_shifts`), to the chosen model on the tuning rows. Without tuning rows,
        they are fitted by cross-validation on the training rows, if there are at least five, which
        takes about four times as long as one fit.

    """
    use = _drawn(train_texts, seed)
    labels = np.asarray(train_labels)[use]  # [M, ...], at most 50,000
    labels = labels.astype(np.int64) if labels.dtype.kind in "biu" else labels
    outputs = labels.shape[1] if objective.target_per_output else len(np.unique(labels))
    classes = 1 if objective.agrees is None else outputs  # weights of a feature
    fitted = _fit_features([train_texts[i] for i in use], classes)
    if outputs == 1 or all(vectorizer is None for vectorizer in fitted):
        return constant_predictions(train_labels, len(texts), 1, objective)
    features = _features(fitted, [train_texts[i] for i in use])
    iterations = int(np.clip(_WORK // (features.nnz * classes + 1), 20, 1000))

    def fit(inverse_penalty: float, rows: np.ndarray | None = None) -> Any:
        model = objective.linear.text_model(inverse_penalty, iterations)
        if rows is None:
            return _fit_model(model, features, labels)
        return _fit_model(model, features[rows], labels[rows])

    def predict(model: Any, rows: Any, shifts: np.ndarray | None = None) -> np.ndarray:
        if shifts is not None:
            return model.decision_function(rows) > shifts
        predicted = model.predict(rows)
        return predicted.astype(bool) if labels.ndim > 1 else predicted

    fit_shifts, shifts = objective.decision_shifts if fit_decisions else None, None
    if tuning is not None and len(tuning[0]):
        held = _drawn(tuning[0], seed)
        rows, truth = _features(fitted, [tuning[0][i] for i in held]), np.asarray(tuning[1])[held]
        metric = objective.metrics[0]
        models = [fit(c) for c in _INVERSE_PENALTIES]
        # max() returns the first among ties.
        model = max(models, key=lambda m: compute_metric(metric, predict(m, rows), truth, outputs))
        shifts = fit_shifts and fit_shifts(model.decision_function(rows), truth)
    else:
        model = fit(_USUAL_INVERSE_PENALTY)
        if fit_shifts and len(labels) >= _FOLDS:
            held = _cross_validated(lambda own: fit(_USUAL_INVERSE_PENALTY, own), features, labels)
            shifts = fit_shifts(held, labels.astype(bool))
    parts = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
    return np.concatenate([predict(model, _features(fitted, part), shifts) for part in parts])


def _cross_validated(
    fit: Callable[[np.ndarray], Any], features: Any, labels: np.ndarray
) -> np.ndarray:
    """Returns the logits of each row by a model that was fitted on the other folds, float [M, C].

    Args:
      fit: function of the rows to fit on that returns a model.
      features: features of all rows, a sparse matrix [M, F].
      labels: targets of all rows, [M, C].

    """
    folds = np.random.default_rng(0).permutation(len(labels)) % _FOLDS
    logits = np.empty(labels.shape)
    for fold in range(_FOLDS):
        own, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        known = labels[others].any(axis=0)  # a model cannot find a label that it has not seen
        logits[own] = np.where(known, fit(others).decision_function(features[own]), -np.inf)
    return logits


def _fit_model(model: Any, features: Any, labels: np.ndarray) -> Any:
    """Fits a linear model without warnings that users cannot act on.

    They concern convergence, although predictions near the optimum are the same, and labels that no
    row has.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.fit(features, labels)


def _drawn(texts: Sequence[tuple[str, ...]], seed: int) -> np.ndarray:
    """Returns the ascending indices of the rows to fit on: all, or a sample within the bounds."""
    order = np.random.default_rng(seed).permutation(len(texts))[:_ROWS]
    size = np.cumsum([sum(min(len(text), _LONGEST) for text in texts[i]) for i in order])
    return np.sort(order[: max(1, int((size <= _CHARACTERS).sum()))])


def _columns(texts: Iterable[tuple[str, ...]]) -> list[list[str]]:
    return [[text[:_LONGEST] for text in column] for column in zip(*texts, strict=True)]


def _fit_features(texts: Sequence[tuple[str, ...]], classes: int) -> list[Any]:
    """Fits a vectorizer for each text column; None for a column without words."""
    # Imported here because it takes a second, and reading a finished run does not need it.
    from sklearn.feature_extraction.text import TfidfVectorizer

    columns = _columns(texts)
    most = min(_FEATURES, _WEIGHTS // classes) // len(columns)
    fitted = []
    for column in columns:
        usable = None
        # With many rows, drop terms that occur in a single row, unless that drops all terms.
        for least in (2, 1) if len(texts) >= 1000 else (1,):
            vectorizer = TfidfVectorizer(
                ngram_range=(1, 2), sublinear_tf=True, min_df=least, max_features=most
            )
            try:
                usable = vectorizer.fit(column)
                break
            except ValueError:  # there are no words
                continue
        fitted.append(usable)
    return fitted


def _features(fitted: Sequence[Any], texts: Sequence[tuple[str, ...]]) -> Any:
    """Returns the TF-IDF features of texts, a sparse matrix [N, F]."""
    import scipy.sparse

    pairs = zip(fitted, _columns(texts), strict=True)
    return scipy.sparse.hstack([v.transform(c) for v, c in pairs if v is not None], format="csr")


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
